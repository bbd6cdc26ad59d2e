"""From a checked loss to the operator that works it out, and from its losses of tokens to what the reduction asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.engine.step import METRICS
from kdkernels.losses import operators as ops  # noqa: F401  (registers the operators)
from kdkernels.losses.autograd import SCHEMAS, SummedLoss, anchors_of, refuse_transforms, total
from kdkernels.losses.tokens import Tokens


def reduced(
    name: str, given: dict[str, Any], tokens: Tokens, dtype: torch.dtype, metrics: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and metrics of the operator of that name, with the backward that fits the reduction.

    given: its arguments by their names in the schema, but for what autograd puts in. dtype: of the losses.
    """
    schema = SCHEMAS[name]
    learned = {one: given[one] for one in schema.learned}
    refuse_transforms(list(learned.values()))
    factor = tokens.factor(given[schema.learned[0]], dtype)
    if not torch.is_grad_enabled():
        # Inside SummedLoss this can no longer be seen: it would make gradients that nobody can ask for.
        learned = {one: None if argument is None else argument.detach() for one, argument in learned.items()}
    given = {**given, **tokens.arguments(), **learned}
    # An exported program holds no SummedLoss: there the operator's own backward makes the gradients.
    if tokens.reduction == "none" or torch.compiler.is_exporting():
        weights = dict.fromkeys(schema.weights, tokens.weight)
        values, _, summary = schema.call(
            {**given, **weights, "grad_scale": torch.ones_like(factor), "lift": None, "metrics": metrics},
            dict.fromkeys(schema.learned, False),
        )
    else:
        # Divided by the token count, float16 gradients of single tokens would underflow before a gradient scaler sees them. Until
        # the backward they are kept larger, by that count at most.
        small = any(argument is not None and argument.dtype == torch.float16 for argument in learned.values())
        lift = (1.0 / factor).clamp(1.0, 1024.0) if small and tokens.reduction == "mean" else None
        *values, summary = SummedLoss.apply(  # type: ignore[no-untyped-call]
            name, metrics, factor, lift, anchors_of(list(learned.values())), *(given[one] for one in schema.given)
        )
    if tokens.reduction == "none":
        values = [value.reshape(tokens.shape) for value in values]
    elif torch.compiler.is_exporting():
        values = [total(value, factor) for value in values]
    of = dict(zip(METRICS, summary.unbind(), strict=True)) if metrics else {}
    if tokens.labels is None:
        of.pop("ce", None)
    return values, of
