"""KDKERNELS_AUTOTUNE=1: before a kernel first runs on a GPU, time it with blocks around the table's and keep the fastest.

The winner is printed in the table's own form, ready for blocks.py. Without the variable the table is taken as it is.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from kdkernels.backends.triton.blocks import Matrix
from kdkernels.backends.triton.launch import architecture

REPEATS = 5
_winners: dict[tuple[str, str, torch.dtype], Matrix] = {}


def wanted() -> bool:
    return os.environ.get("KDKERNELS_AUTOTUNE") == "1"


def neighbours(matrix: Matrix) -> Iterator[Matrix]:
    """The table's entry, and those with each block halved or doubled and a stage or a factor of two in warps more or less.

    The vocabulary block is never smaller or larger than what a split of the vocabulary was rounded to, so it stays.
    """
    sizes = itertools.product((1.0, 0.5, 2.0), (1.0, 0.5, 2.0), (1.0, 0.5, 2.0), (0, -1, 1))
    for block_n, block_d, warps, stages in sizes:
        found = replace(
            matrix,
            block_n=int(matrix.block_n * block_n),
            block_d=int(matrix.block_d * block_d),
            num_warps=int(matrix.num_warps * warps),
            num_stages=matrix.num_stages + stages,
        )
        if found.block_n >= 16 and found.block_d >= 16 and 1 <= found.num_warps <= 16 and found.num_stages >= 1:
            yield found


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
    """The table's blocks, or the winner of a search that runs once for each kernel, architecture and dtype."""
    if not wanted() or device.type != "cuda":
        return matrix
    key = kernel.fn.__name__, architecture(device), dtype
    if key not in _winners:
        timed = {candidate: seconds(start, candidate) for candidate in neighbours(matrix)}
        _winners[key] = min(timed, key=lambda candidate: timed[candidate])
        best = _winners[key]
        print(
            f'kdkernels: ("{key[1]}", {dtype.itemsize}): {key[0].removesuffix("_kernel")}={best}  '
            f"# {timed[best] * 1e3:.3f} ms, the table's {matrix} {timed[matrix] * 1e3:.3f} ms",
            file=sys.stderr,
        )
    return _winners[key]
