"""How the benchmarks measure: time against a yardstick beside it, peak memory above a start, each case in a process of its own."""

from __future__ import annotations

import datetime
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdkernels import info
from kdkernels.backends import native

MIB = 2**20


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(step: Callable[[], object], yardstick: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Ratios of each step to the mean of the yardsticks before and after it, their median, and median seconds of both."""
    ratios, steps, yardsticks = [], [], []
    before = seconds(yardstick)
    for _ in range(repeats):
        steps.append(seconds(step))
        yardsticks.append(seconds(yardstick))
        ratios.append(2 * steps[-1] / (before + yardsticks[-1]))
        before = yardsticks[-1]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(steps),
        "yardstick_seconds": statistics.median(yardsticks),
    }


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose above its start while ``run`` ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def in_own_process(module: str, case: dict[str, Any]) -> dict[str, Any]:
    """What ``python -m module --case JSON`` prints as JSON in its last line; {"failed": why} if it did not end well."""
    child = [sys.executable, "-m", module, "--case", json.dumps(case)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """Where and when something was measured, as the result files record it."""
    return {
        "processor": info.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instruction_sets": list(native.instruction_sets()),
        "date": datetime.date.today().isoformat(),
    }
