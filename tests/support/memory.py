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


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose above its start while ``run`` ran (Linux).

    What the C library holds of memory freed before is given back first: ``run`` would use it without a rise.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before
