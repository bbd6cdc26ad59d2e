"""How the benchmarks measure: time against a yardstick beside it, peak memory above a start, each case in a process of its own."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from kdkernels.backends import native
from kdkernels.console import info

MIB = 2**20
LIBRARIES = ("triton", "transformers", "liger-kernel", "trl")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    step: Callable[[], object], yardstick: Callable[[], object], repeats: int, patience: float = float("inf")
) -> dict[str, Any]:
    """Ratios of each step to the mean of the yardsticks before and after it, their median, and median seconds of both.

    patience: seconds after which no further repeat is begun.
    """
    ratios, steps, yardsticks = [], [], []
    begin = time.perf_counter()
    before = seconds(yardstick)
    for _ in range(repeats):
        steps.append(seconds(step))
        yardsticks.append(seconds(yardstick))
        ratios.append(2 * steps[-1] / (before + yardsticks[-1]))
        before = yardsticks[-1]
        if time.perf_counter() - begin > patience:
            break
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": statistics.median(steps),
        "yardstick_seconds": statistics.median(yardsticks),
    }


def limit_memory(limit: int) -> None:
    """Let allocations fail once this process holds ``limit`` bytes of data, so that it cannot take the machine down (Linux)."""
    import resource  # Unix only

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def why(error: BaseException) -> str:
    """One line of an error for a result file."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def in_own_process(module: str, case: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """What ``python -m module --case JSON`` prints as JSON in its last line; {"failed": why} if it did not end well.

    timeout: seconds after which it is ended.
    """
    child = [sys.executable, "-m", module, "--case", json.dumps(case)]
    try:
        done = subprocess.run(child, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:.0f} s"}
    if done.returncode < 0:
        return {"failed": f"ended by signal {signal.Signals(-done.returncode).name}"}
    if done.returncode != 0:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def version(library: str) -> str | None:
    """Of an installed distribution, None if it is not there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Where and when something was measured, as the result files record it."""
    return {
        "processor": info.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{library: version(library) for library in LIBRARIES},
        "instruction_sets": list(native.instruction_sets()),
        "date": datetime.date.today().isoformat(),
    }
