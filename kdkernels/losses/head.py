"""An output head, and whether it fits the hidden states that it multiplies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kdkernels.losses.checks import float_tensor
from kdkernels.scalars import positive


@dataclass(frozen=True, eq=False)
class LMHead:
    """An output head: logits = softcap * tanh(logit_scale * (H Wᵀ + bias) / softcap), without the tanh where softcap is None.

    weight: (V, D). bias: (V,) or None. logit_scale: a positive factor (Cohere, Granite). softcap: a positive bound (Gemma 2); both
    from 1e-18 to 1e18.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def detach(self) -> LMHead:
        """The same head, held constant."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def __repr__(self) -> str:
        """Of the tensors what they are, not their values."""
        parts = ", ".join(f"{name}={_described(value)}" for name, value in vars(self).items())
        return f"LMHead({parts})"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    learned = ", requires_grad" if value.requires_grad else ""
    return f"<{tuple(value.shape)}, {value.dtype}, {value.device}{learned}>"


def _as_head(name: str, value: Any) -> LMHead:
    if isinstance(value, LMHead):
        return value
    if isinstance(value, Tensor):
        return LMHead(value)
    raise TypeError(f"{name} is an LMHead or a (V, D) tensor, got {type(value).__name__}{_instead_of(value)}")


def _instead_of(value: Any) -> str:
    """What to pass for something that holds a head."""
    weight = getattr(value, "weight", value)
    if callable(weight) and not isinstance(weight, nn.Module):
        return "; of a quantised layer pass head.weight().dequantize()"
    if isinstance(value, (nn.Linear, nn.Embedding)):
        bias = getattr(value, "bias", None) is not None
        return "; pass kd.LMHead(head.weight, head.bias)" if bias else "; pass head.weight"
    if isinstance(value, nn.Module):
        return "; of a model of transformers pass kdkernels.transformers.lm_head(model)"
    return ""


def fitting(hidden: Tensor, weight: Any, bias: Any, hidden_name: str, weight_name: str, bias_name: str) -> None:
    """Raises TypeError or ValueError unless weight (V, D) and bias (V,) or None are those of a head for hidden states (..., D)."""
    float_tensor(weight_name, weight, hidden.device)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{weight_name} is (V, D) with at least one row and column, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} has shape {tuple(hidden.shape)}, but {weight_name} is {tuple(weight.shape)}: "
            f"the last dimension of {hidden_name} must be D = {weight.shape[1]}"
        )
    if bias is not None:
        float_tensor(bias_name, bias, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name} is ({weight.shape[0]},) like the rows of its weight, got {tuple(bias.shape)}")


def head_of(name: str, value: Any, hidden: Tensor, hidden_name: str) -> LMHead:
    """The head, checked against the hidden states that it multiplies."""
    head = _as_head(name, value)
    fitting(hidden, head.weight, head.bias, hidden_name, f"{name}.weight", f"{name}.bias")
    scale = positive(f"{name}.logit_scale", head.logit_scale)
    softcap = None if head.softcap is None else positive(f"{name}.softcap", head.softcap, " or None")
    return LMHead(head.weight, head.bias, scale, softcap)
