"""A gradient times the upstream one, which is 1 where nothing stands between the loss and ``backward()``. Only the GPU knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.backends.triton import arch

WARPS = 8
THREADS = 2048  # of a multiprocessor: as many hide the latency of memory


@triton.jit
def _scale(ptrs, factor, mask):
    scaled = tl.load(ptrs, mask=mask).to(tl.float32) * factor
    tl.store(ptrs, scaled.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["factor_ptr"])
def scale_kernel(grad_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        entries = tl.arange(0, BLOCK)
        whole = count // BLOCK * BLOCK  # without a mask, accesses are wide whatever the count is
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, tl.num_programs(0) * BLOCK):
            _scale(grad_ptr + begin + entries, factor, None)
        if tl.program_id(0) == tl.num_programs(0) - 1:
            _scale(grad_ptr + whole + entries, factor, whole + entries < count)


def cut(device: torch.device) -> tuple[int, int]:
    """Entries that a program takes at a time, and the most programs."""
    threads = WARPS * arch.warp(device)
    return threads * arch.ENTRIES, arch.multiprocessors(device) * (THREADS // threads)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad (contiguous) *= factor (0-dim), in float32; a factor of 1 moves no entry."""
    count = grad.numel()
    block, most = cut(grad.device)
    if count:
        with arch.on(grad.device):
            scale_kernel[(min(triton.cdiv(count, block), most),)](grad, factor, count, BLOCK=block, num_warps=WARPS)
