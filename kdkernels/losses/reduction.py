"""From a checked loss to the operator that works it out, and from its losses of tokens to what the reduction asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.engine.step import METRICS
from kdkernels.losses import operators as ops  # noqa: F401  (registers the operators)
from kdkernels.losses.autograd import OWNERS, SummedLoss, anchors_of, losses_of, refuse_transforms, total
from kdkernels.losses.checks import Loss, kept_weight


def reduced(
    loss: Loss, name: str, differentiable: tuple[Tensor | None, ...], dtype: torch.dtype, others: tuple[Any, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and metrics of the operator of that name, with the backward that fits the reduction. dtype: of the losses."""
    refuse_transforms(differentiable)
    rows = differentiable[0]
    assert rows is not None
    operator, owners, metrics = getattr(torch.ops.kdkernels, name), OWNERS[name], loss.return_metrics
    factor = _factor(loss, rows, dtype)
    if not torch.is_grad_enabled():
        # Inside SummedLoss this can no longer be seen: it would make gradients that nobody can ask for.
        differentiable = tuple(None if argument is None else argument.detach() for argument in differentiable)
    # An exported program holds no SummedLoss: there the operator's own backward makes the gradients.
    if loss.reduction == "none" or torch.compiler.is_exporting():
        weights, one, needs = [loss.token_weight] * losses_of(owners), torch.ones_like(factor), [False] * len(owners)
        *values, summary = operator(*differentiable, *weights, one, None, *others, needs, metrics)
        values = values[: len(weights)]
    else:
        # Divided by the token count, float16 gradients of single tokens would underflow before a gradient scaler sees them. Until
        # the backward they are kept larger, by that count at most.
        small = any(argument is not None and argument.dtype == torch.float16 for argument in differentiable)
        lift = (1.0 / factor).clamp(1.0, 1024.0) if small and loss.reduction == "mean" else None
        *values, summary = SummedLoss.apply(  # type: ignore[no-untyped-call]
            operator, owners, metrics, factor, lift, anchors_of(differentiable), *differentiable, loss.token_weight, *others
        )
    if loss.reduction == "none":
        values = [value.reshape(loss.shape) for value in values]
    elif torch.compiler.is_exporting():
        values = [total(value, factor) for value in values]
    of = dict(zip(METRICS, summary.unbind(), strict=True)) if metrics else {}
    if loss.labels is None:
        of.pop("ce", None)
    return values, of


def _factor(loss: Loss, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What the sum of the losses is multiplied by."""
    if loss.reduction != "mean":
        return torch.ones((), dtype=dtype, device=rows.device)
    if loss.normalizer is None:
        normalizer = kept_weight(loss, rows.shape[0], dtype, rows.device)
    elif isinstance(loss.normalizer, Tensor):
        normalizer = loss.normalizer.detach().to(device=rows.device, dtype=dtype)
    else:
        normalizer = torch.full((), loss.normalizer, dtype=dtype, device=rows.device)
    return torch.where(normalizer == 0, 0.0, 1.0 / normalizer)


def terms_of(loss: Loss, head: list[float]) -> tuple[Any, ...]:
    return (loss.divergence.name, float(loss.divergence.a), loss.temperature, loss.kd_scale, loss.ce_weight, head)
