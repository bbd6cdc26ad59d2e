"""What stands for the GPU in a run of the suite, and how what is not the default is asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

BACKEND = "triton"


def device_of(size: str) -> str:
    return "cpu" if size == "toy" else "cuda"


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, CPU tensors take the path of a GPU: there the device chooses the backend, its dtypes and its blocks."""
    from tests.support.interpreter import as_on_a_gpu  # Triton may not be installed

    # inf - inf in NumPy
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    with as_on_a_gpu(BACKEND):
        yield


@contextmanager
def cluster_rows(shape: tuple[int, int, int] | None = None, at_a_time: int | None = None) -> Iterator[list[int]]:
    """Inside, the cluster kernel does the rows that it can, slower or not; yields the rows of each of its starts. shape: blocks
    that share a row, warps of a block, blocks of a multiprocessor, instead of what the library chooses. at_a_time: clusters,
    at most, instead of all that the device runs."""
    from kdkernels.backends import cuda

    started: list[int] = []
    row_loss, chosen, compiled = cuda.row_loss, cuda.rows._shapes, cuda.rows._kernel

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor | None:
        found = row_loss(x, *rest)
        if found is not None:
            started.append(len(found))
        return found

    def cut(vocab: int, device: torch.device) -> Any:
        if shape is None:
            return chosen(vocab, device)
        asked = cuda.rows.cut(vocab, *shape)
        return (asked,) if asked.fits(*cuda.rows.shared_memory(device)) else ()

    def kernel(*setting: Any) -> tuple[Any, int]:
        made, clusters = compiled(*setting)
        return made, clusters if at_a_time is None else min(clusters, at_a_time)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, KDKERNELS_ROWS="cluster", KDKERNELS_LOGITS="float32"))
        stack.enter_context(mock.patch.object(cuda.rows, "_kernel", kernel))
        stack.enter_context(mock.patch.object(cuda, "row_loss", counted))
        stack.enter_context(mock.patch.object(cuda.rows, "_shapes", cut))
        stack.enter_context(mock.patch.object(cuda.rows, "is_worth_it", return_value=True))
        yield started


@contextmanager
def offset_logits(how: str = "offsets", kept: list[tuple[torch.Tensor, ...]] | None = None) -> Iterator[list[int]]:
    """Inside, logits are kept as 16-bit offsets where they can be; yields the rows of each chunk of them, or of each product that
    CUDA C++ made. how: as KDKERNELS_LOGITS. kept: gets codes, largest and sums of both models of each chunk."""
    from kdkernels.backends.cuda import product
    from kdkernels.backends.triton import offsets

    started: list[int] = []
    row_loss, stored = offsets.OffsetRows.row_loss, product.stored

    def counted(rows: Any, *rest: Any) -> torch.Tensor:
        if kept is not None:
            kept.extend((side.codes.clone(), side.largest, side.sums) for side in rows.sides)
        found = row_loss(rows, *rest)
        if how == "offsets":
            started.append(len(found))
        return found

    def counted_products(hidden: torch.Tensor, *rest: Any) -> bool:
        made: bool = stored(hidden, *rest)
        if made:
            started.append(len(hidden))
        return made

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, KDKERNELS_LOGITS=how))
        stack.enter_context(mock.patch.object(offsets.OffsetRows, "row_loss", counted))
        stack.enter_context(mock.patch.object(product, "stored", counted_products))
        yield started
