"""Which dtype each thing is in: what a user's tensors ask for, what products run in, what logits are kept in, what is added up.

A bfloat16 model, say: its products run in bfloat16, or in float32 on a CPU without matrix units for 16 bits; its logits are
float32 where the device can write them so; losses, statistics and the sums of its gradients are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FAST_DTYPES, torch.float64)


def compute_dtype(hidden: Tensor, weight: Tensor, names: str) -> torch.dtype:
    """What a model asks for: autocast's dtype where that is on (float64 it leaves alone), else the tensors' own. names: of both,
    for the TypeError where they have two."""
    device_type, found = hidden.device.type, (hidden.dtype, weight.dtype)
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if autocast and torch.float64 not in found:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        rule = "torch.autocast leaves float64 alone: both must be it, or neither" if autocast else (
            "outside torch.autocast they must have one dtype"
        )  # fmt: skip
        raise TypeError(f"{names} are {hidden.dtype} and {weight.dtype}; {rule}")
    return hidden.dtype


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU's matrix library has a fast path for this 16-bit type."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-any-return]
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()  # type: ignore[no-any-return]


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products of ``dtype`` operands run in.

    That is ``dtype`` itself, except for 16-bit types on a CPU whose matrix library has no fast path for them: there float32 is both
    several times faster and more accurate, and heads are widened block by block.
    """
    if device.type != "cpu" or dtype.itemsize != 2 or cpu_multiplies(dtype):
        return dtype
    return torch.float32


def keeps_sums(device: torch.device) -> bool:
    """Whether 16-bit products can come out in float32, as the matrix units add them up (torch.mm's out_dtype: CUDA, not ROCm)."""
    return device.type == "cuda" and torch.version.hip is None


def logits_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the logits of ``dtype`` operands are kept in: float32 where the device can, so that the difference of two
    log-probabilities is not taken between rounded logits; elsewhere what the products run in."""
    made = product_dtype(dtype, device)
    return torch.float32 if made.itemsize == 2 and keeps_sums(device) else made


def accumulate_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What statistics, losses and head gradients of ``dtypes`` are kept in: float64 where one is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
