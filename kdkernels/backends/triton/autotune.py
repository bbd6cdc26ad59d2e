"""KDKERNELS_AUTOTUNE=1: before a kernel first runs on a GPU, time it with blocks around the table's and keep the fastest.

The winner is printed in the table's own form, ready for blocks.py. Without the variable the table is taken as it is.

The search walks: from the best so far it tries one change at a time and moves on to what is faster, until nothing is or its time is
up. Compiling a candidate takes seconds, so that a whole grid of them would take longer than a training run waits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from kdkernels.backends.triton.arch import architecture
from kdkernels.backends.triton.blocks import Matrix

REPEATS = 5
# Seconds after which the search of a kernel tries no more candidates: the three kernels of a dtype end within two minutes.
PATIENCE = 35.0
_winners: dict[tuple[str, str, torch.dtype, Matrix], Matrix] = {}


def wanted() -> bool:
    return os.environ.get("KDKERNELS_AUTOTUNE") == "1"


def neighbours(matrix: Matrix) -> Iterator[Matrix]:
    """The blocks with one change: half or twice the tokens, warps or depth, a stage more or less.

    The vocabulary block is never smaller or larger than what a split of the vocabulary was rounded to, so it stays.
    """
    for name in ("block_n", "num_warps", "block_d"):
        size = getattr(matrix, name)
        yield from (replace(matrix, **{name: changed}) for changed in (size // 2, size * 2) if _takes(name, changed))
    yield from (replace(matrix, num_stages=stages) for stages in (matrix.num_stages - 1, matrix.num_stages + 1) if stages >= 1)


def _takes(name: str, size: int) -> bool:
    return 1 <= size <= 16 if name == "num_warps" else 16 <= size <= 256


def fastest(matrix: Matrix, timed: Callable[[Matrix], float]) -> dict[Matrix, float]:
    """Seconds of all blocks that were tried, from ``matrix`` on towards what is faster."""
    end, tried = time.monotonic() + PATIENCE, {matrix: timed(matrix)}
    best, moved = matrix, True
    while moved:
        start, moved = best, False
        for candidate in neighbours(start):
            if candidate in tried:
                continue
            if time.monotonic() >= end:
                return tried
            tried[candidate] = timed(candidate)
            if tried[candidate] < tried[best]:
                best, moved = candidate, True
    return tried


def seconds(start: Callable[[Matrix], None], matrix: Matrix) -> float:
    """The fastest of REPEATS runs; infinite where the device cannot run it (shared memory, registers)."""
    times: list[float] = []
    try:
        start(matrix)
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start(matrix)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    except Exception as error:  # Triton's own error types differ from release to release
        print(f"kdkernels: {matrix} does not run: {error}", file=sys.stderr)
        return float("inf")
    return min(times)


def chosen(kernel: Any, matrix: Matrix, device: torch.device, dtype: torch.dtype, start: Callable[[Matrix], None]) -> Matrix:
    """The table's blocks, or the winner of a search that runs once for each of them, kernel, architecture and dtype."""
    if not wanted() or device.type != "cuda":
        return matrix
    key = kernel.fn.__name__, architecture(device), dtype, matrix
    if key not in _winners:
        timed = fastest(matrix, lambda candidate: seconds(start, candidate))
        _winners[key] = min(timed, key=lambda candidate: timed[candidate])
        best = _winners[key]
        print(
            f'kdkernels: ("{key[1]}", {dtype.itemsize}): {key[0].removesuffix("_kernel")}={best}  '
            f"# {timed[best] * 1e3:.3f} ms, the table's {matrix} {timed[matrix] * 1e3:.3f} ms",
            file=sys.stderr,
        )
    return _winners[key]
