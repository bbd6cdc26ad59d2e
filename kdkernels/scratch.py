"""The logits scratch, kept between calls on a CPU.

There a fresh page costs a fault, and faulting some hundred MiB in at every step costs as much as all row operations. So the scratch
of the last call stays, never larger than that call's budget, until ``free_scratch``. Other devices' allocators do this themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 64
_lock = threading.Lock()
_held: Tensor | None = None


def _allocate(size: int, device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be written to outside of it later.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


@contextmanager
def borrowed(shapes: list[tuple[tuple[int, int], torch.dtype]], budget: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Uninitialised tensors of these shapes and dtypes, side by side in one allocation, for the time of the block.

    budget: bytes that may stay allocated afterwards.
    """
    global _held
    offsets, size = [], 0
    for (rows, columns), dtype in shapes:
        offsets.append(size)
        size += -(-rows * columns * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(memory: Tensor) -> list[Tensor]:
        return [
            memory[offset : offset + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
            for offset, ((rows, columns), dtype) in zip(offsets, shapes, strict=True)
        ]

    # A second thread that calls at the same time gets a scratch of its own.
    if device.type != "cpu" or not _lock.acquire(blocking=False):
        yield views(_allocate(size, device))
        return
    try:
        if _held is None or not size <= _held.numel() <= max(size, budget):
            _held = None
            _held = _allocate(size, device)
        yield views(_held)
    finally:
        _lock.release()


def free_scratch() -> None:
    """Give back the scratch that the last loss on a CPU left allocated (its memory_budget and 8 MiB at most)."""
    global _held
    with _lock:
        _held = None
