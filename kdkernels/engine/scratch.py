"""The logits scratch, kept between calls on a CPU.

There a fresh page costs a fault, and faulting some hundred MiB in at every step costs as much as all row operations. So the scratch
of the last call stays, never larger than that call's budget, until ``free_scratch``. Other devices' allocators do this themselves.

Where the memory is not there, the error says what would take less. It is a torch.OutOfMemoryError on every device: a RuntimeError
like the one that torch's CPU allocator raises, and one handler then serves both kinds of device. The allocator's own words are in
its text, because by them programs that try again with a smaller batch know it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 128
# Elements of which a row of a tile takes a multiple on a GPU: each row then starts at a multiple of 128 bytes or more, whatever the
# vocabulary. Matrix libraries read rows of 16 bits that start elsewhere (every other row of an odd vocabulary) by slower kernels.
ROW_ELEMENTS = 64
_lock = threading.Lock()
_held: Tensor | None = None


# By these words of a RuntimeError one knows that it is about memory (torch.OutOfMemoryError is known by its type).
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def _allocate(size: int, memory_budget: int, device: torch.device) -> Tensor:
    try:
        # A tensor made in inference mode could not be written to outside of it later.
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise torch.OutOfMemoryError(
            f"the scratch for logits wants {size} bytes on {device}, and they are not there; memory_budget is {memory_budget} "
            "bytes, and a smaller memory_budget takes less (down to the logits of one token with strategy='tokens', of one column "
            f"with strategy='vocab'). The allocator says: {error}"
        ) from error


def row_stride(columns: int, device: torch.device) -> int:
    """Elements from one row of a tile to the next. Rows shorter than ROW_ELEMENTS lie close, lest little budgets be overdrawn."""
    if device.type == "cpu" or columns < ROW_ELEMENTS:
        return columns
    return -(-columns // ROW_ELEMENTS) * ROW_ELEMENTS


@contextmanager
def borrowed(
    block: int, tiles: list[tuple[tuple[int, int], torch.dtype]], memory_budget: int, device: torch.device
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Uninitialised memory, all in one allocation: a float32 buffer of ``block`` elements for a head's block, and tiles of these
    shapes and dtypes for logits, whose rows are ``row_stride`` apart with zeros between them.

    memory_budget: bytes of tiles that may stay allocated afterwards, and the buffer with them. Raises torch.OutOfMemoryError;
    nothing is held then.
    """
    global _held
    shapes = [(1, block, block, torch.float32)]
    shapes += [(rows, columns, row_stride(columns, device), dtype) for (rows, columns), dtype in tiles]
    offsets, size = [], 0
    for rows, _, stride, dtype in shapes:
        offsets.append(size)
        size += -(-rows * stride * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def views(memory: Tensor) -> tuple[Tensor, list[Tensor]]:
        buffer, *found = [
            memory[offset : offset + rows * stride * dtype.itemsize].view(dtype).view(rows, stride)
            for offset, (rows, _, stride, dtype) in zip(offsets, shapes, strict=True)
        ]
        for whole, ((_, columns), _) in zip(found, tiles, strict=True):
            # A matrix library may read an entry past a row of odd length, and multiply it by 0: it must not be a NaN.
            if whole.shape[1] > columns:
                whole[:, columns:].zero_()
        return buffer[0], [whole[:, :columns] for whole, ((_, columns), _) in zip(found, tiles, strict=True)]

    # A second thread that calls at the same time gets a scratch of its own.
    if device.type != "cpu" or not _lock.acquire(blocking=False):
        yield views(_allocate(size, memory_budget, device))
        return
    try:
        if _held is None or not size <= _held.numel() <= max(size, memory_budget + 4 * block):
            _held = None
            _held = _allocate(size, memory_budget, device)
        yield views(_held)
    finally:
        _lock.release()


def free_scratch() -> None:
    """Give back the scratch that the last loss on a CPU left allocated (its memory_budget and 8 MiB at most)."""
    global _held
    with _lock:
        _held = None
