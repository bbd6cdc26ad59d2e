"""What the kernels have in common when they are started: the divergence as a device function, and the groups of arguments."""

from __future__ import annotations

import functools
import os
import types
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kdkernels.divergences import Divergence, bind, flat, resolve

if TYPE_CHECKING:
    from kdkernels.backends.triton.blocks import Matrix

# Entries of a row that a thread loads and stores together: 16 bytes of a 16-bit type, twice 16 of float32.
ENTRIES = 8


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def pair_function(divergence: str, temperature: float) -> Any:
    """The pair function of divergences.py over functions.py, for a kernel's constexpr argument."""
    return _pair_function(divergence, flat(temperature))


@functools.cache
def _pair_function(divergence: str, is_flat: bool) -> Any:
    from kdkernels.backends.triton import functions

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


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as "sm_90" (compute capability 9.0) or "gfx942"; the interpreter stands for "sm_90"."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major * 10 + minor}"


def warp(device: torch.device) -> int:
    """Threads of a warp; AMD's data centre GPUs call it a wavefront."""
    return 64 if architecture(device).startswith("gfx9") else 32


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, kernels start on that GPU: Triton takes the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def described(device: torch.device) -> bool:
    """Whether operands are loaded through tensor descriptors: compute capability 9.0 and later."""
    name = architecture(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


def operands(hidden: Tensor, weight: Tensor, matrix: Matrix, device: torch.device) -> tuple[Any, ...]:
    """Both operands of logits = hidden weightᵀ and their layout, as vocabulary._product takes them.

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
