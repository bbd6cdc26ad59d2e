"""A gradient times the upstream one, which is 1 where nothing stands between the loss and ``backward()``. Only the GPU knows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kdkernels.backends.triton import arch

WARPS = 8
BLOCK = WARPS * 32 * arch.ENTRIES
# What hides the latency of memory: so many programs on a multiprocessor, of 2,048 threads there.
PROGRAMS = 8


@triton.jit
def scale_kernel(grad_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            entries = begin + tl.arange(0, BLOCK)
            inside = entries < count
            grad = tl.load(grad_ptr + entries, mask=inside).to(tl.float32) * factor
            tl.store(grad_ptr + entries, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad (contiguous) *= factor (0-dim), in float32; a factor of 1 moves no entry."""
    count = grad.numel()
    programs = min(-(-count // BLOCK), arch.multiprocessors(grad.device) * PROGRAMS)
    if programs:
        with arch.on(grad.device):
            scale_kernel[(programs,)](grad, factor, count, BLOCK=BLOCK, num_warps=WARPS)
