"""What a head does to its logits after the product, and its derivative, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_head(v: Tensor, bias: Tensor | None, scale: float, softcap: float, in_place: bool = False) -> Tensor:
    """softcap tanh(scale (v + bias) / softcap), without the tanh where softcap is 0; v itself where a head does nothing."""
    out = v if in_place else None
    if bias is not None:
        v = torch.add(v, bias, out=out)
    if scale != 1.0:
        v = torch.mul(v, scale, out=out)
    if softcap != 0.0:
        v = torch.mul(torch.tanh(torch.div(v, softcap, out=out), out=out), softcap, out=out)
    return v


def cap_slope(v: Tensor, softcap: float) -> Tensor:
    """Derivative of the softcap, which is not 0, where it gave v."""
    return (v / softcap).square_().neg_().add_(1.0)
