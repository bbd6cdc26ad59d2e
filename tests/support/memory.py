"""Resident memory of this process, and how far it rises (Linux)."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path


def status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def mark() -> int:
    """Starts the high-water mark of the resident memory (VmHWM) anew, and returns what is resident now, in bytes (Linux).

    What the C library holds of memory freed before is given back first: it would be used without a rise.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose above its start while ``run`` ran (Linux)."""
    before = mark()
    run()
    return status("VmHWM") - before
