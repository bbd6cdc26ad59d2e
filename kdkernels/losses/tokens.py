"""Which tokens count, how much, and what their losses are divided by, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from kdkernels.backends.dtypes import DTYPES
from kdkernels.losses.checks import INTEGERS, constant, float_tensor, integer_tensor, of_tokens, scalar
from kdkernels.losses.signatures import Reduction
from kdkernels.scalars import flag, one_of, positive, whole

REDUCTIONS = get_args(Reduction)


@dataclass(frozen=True)
class Tokens:
    """labels, weight: [N] or None. shape: of the tokens as they came."""

    labels: Tensor | None
    weight: Tensor | None
    ignore_index: int
    check_labels: bool
    reduction: str
    normalizer: float | Tensor | None
    shape: torch.Size

    def arguments(self) -> dict[str, Any]:
        """An operator's."""
        of_tokens = {"labels": self.labels, "token_weight": self.weight}
        return {**of_tokens, "ignore_index": self.ignore_index, "check_labels": self.check_labels}

    def factor(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What the sum of the losses is multiplied by. rows: the student's, one for each token."""
        device = rows.device
        if self.reduction != "mean":
            return torch.ones((), dtype=dtype, device=device)
        if self.normalizer is None:
            normalizer = self._kept_weight(rows, dtype)
        elif isinstance(self.normalizer, Tensor):
            normalizer = self.normalizer.detach().to(device=device, dtype=dtype)
        else:
            normalizer = torch.full((), self.normalizer, dtype=dtype, device=device)
        return torch.where(normalizer == 0, 0.0, 1.0 / normalizer)

    def _kept_weight(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum of the token weights over kept tokens."""
        if self.labels is None:
            kept = torch.full((), rows.shape[0], dtype=dtype, device=rows.device)
            return kept if self.weight is None else self.weight.sum(dtype=dtype)
        counted = self.labels != self.ignore_index
        if self.weight is None:
            return counted.sum().to(dtype)
        return self.weight.to(dtype).where(counted, 0.0).sum()


def tokens_of(
    name: str,
    leading: Tensor,
    labels: Any,
    token_weight: Any,
    ignore_index: Any,
    reduction: Any,
    normalizer: Any,
    check_labels: Any,
    ce_weight: float,
) -> Tokens:
    """leading: the student's tensor, whose dimensions before the last are those of the tokens; name: its name."""
    device = leading.device
    ignore_index = whole("ignore_index", ignore_index, "an integer")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is an integer that int64 holds, got {ignore_index}")
    if labels is not None:
        of_tokens("labels", integer_tensor("labels", labels, device), leading, name)
    elif ce_weight != 0.0:
        raise ValueError(f"labels is None, but ce_weight={ce_weight} asks for the cross-entropy on them")
    if token_weight is not None:
        of_tokens("token_weight", float_tensor("token_weight", token_weight, device), leading, name)
        if token_weight.requires_grad:
            raise ValueError("token_weight is held constant, but requires grad; pass token_weight.detach()")
    one_of("reduction", reduction, REDUCTIONS)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer divides the sum of reduction='mean'; reduction is {reduction!r}")
        if isinstance(normalizer, Tensor):
            constant("normalizer", normalizer)
            scalar("normalizer", normalizer, "a positive number or a 0-dim tensor of one", device, (*DTYPES, *INTEGERS))
        else:
            normalizer = positive("normalizer", normalizer, " or a 0-dim tensor of one")
    return Tokens(
        labels=None if labels is None else labels.reshape(-1).to(torch.int64),
        weight=None if token_weight is None else token_weight.reshape(-1),
        ignore_index=ignore_index,
        check_labels=flag("check_labels", check_labels),
        reduction=reduction,
        normalizer=normalizer,
        shape=leading.shape[:-1],
    )
