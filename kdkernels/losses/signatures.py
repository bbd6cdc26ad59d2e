"""What type checkers see of the losses' options: the names that are accepted, and each loss's keywords for its overloads.

The losses state them in their own signatures, with defaults; tests hold the two to each other.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, TypedDict

from torch import Tensor

from kdkernels.divergences import Divergence, DivergenceName
from kdkernels.engine.cut import Strategy

Reduction: TypeAlias = Literal["mean", "sum", "none"]
Tail: TypeAlias = Literal["renormalize", "bucket"]
Metrics: TypeAlias = dict[str, Tensor]


class Options(TypedDict, total=False):
    """Of every loss."""

    divergence: Divergence | DivergenceName
    temperature: float
    square_temperature: bool
    kd_weight: float
    ce_weight: float
    token_weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    normalizer: float | Tensor | None
    check_labels: bool


class _Cut(TypedDict, total=False):
    vocab_size: int | None
    strategy: Strategy
    memory_budget: int | None


class LogitsOptions(Options, total=False):
    """Of ``kd_loss``."""

    t: float | Tensor


class LinearOptions(LogitsOptions, _Cut, total=False):
    """Of ``linear_kd_loss``."""

    process_group: Any


class TopKOptions(LogitsOptions, _Cut, total=False):
    """Of ``linear_topk_kd_loss``."""

    tail: Tail | None
    topk_rest: Tensor | None


class OKDOptions(Options, _Cut, total=False):
    """Of ``linear_okd_loss``."""

    teacher_alpha: float
    process_group: Any
