"""What the kernels have in common when they are started: the divergence as a device function, and the groups of arguments."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kdkernels.backends.triton import functions
from kdkernels.backends.triton.arch import described
from kdkernels.backends.triton.blocks import Matrix
from kdkernels.divergences import Divergence, bind, flat, resolve


def pair_function(divergence: str, temperature: float) -> Any:
    """The pair function of divergences.py over functions.py, for a kernel's constexpr argument."""
    return _pair_function(divergence, flat(temperature))


@functools.cache
def _pair_function(divergence: str, is_flat: bool) -> Any:
    namespace = functions
    if not is_flat:
        namespace = types.ModuleType("far")  # Triton looks into modules alone
        vars(namespace).update(vars(functions), near=functions.never, __name__="far")

    def compiled(function: Any) -> Any:
        function.__globals__["tl"] = triton.language  # the interpreter wants to see it, used or not
        return triton.jit(function)

    return bind(resolve(divergence).pair, namespace, compiled)


def head_arguments(bias: Tensor | None, scale: float, softcap: float) -> tuple[Any, ...]:
    """A head as device.py takes it."""
    return bias, scale, softcap or None


def term_arguments(divergence: Divergence, temperature: float, kd_scale: float, ce_scale: float) -> tuple[Any, ...]:
    """The terms as device.py takes them: what is absent is None, and compiled away."""
    return (
        divergence.shares(temperature),
        None if temperature == 1.0 else temperature,
        kd_scale / temperature or None,
        ce_scale or None,
    )


def operands(hidden: Tensor, weight: Tensor, matrix: Matrix, device: torch.device) -> tuple[Any, ...]:
    """Both operands of logits = hidden weightᵀ and their layout, as vocabulary.product takes them.

    A descriptor wants 16-byte rows that lie apart; others go by pointers.
    """
    width = hidden.shape[1]
    aligned = all(
        side.data_ptr() % 16 == 0 and side.stride(0) >= width and side.stride(0) * side.element_size() % 16 == 0
        for side in (hidden, weight)
    )
    if not (described(device) and aligned and hidden.stride(1) == weight.stride(1) == 1):
        hidden, weight = (side if side.stride(1) == 1 else side.contiguous() for side in (hidden, weight))
        return hidden, weight, (hidden.stride(0), weight.stride(0), width)
    descriptors = [
        TensorDescriptor.from_tensor(side, [rows, matrix.block_d])
        for side, rows in ((hidden, matrix.block_n), (weight, matrix.block_v))
    ]
    return *descriptors, (None, None, width)
