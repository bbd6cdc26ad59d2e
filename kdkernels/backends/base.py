"""A loss step as a backend sees it: what is multiplied, which rows count, and the terms of the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkernels.divergences import Divergence, resolve
from kdkernels.parallel.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Terms:
    """The loss of a row, apart from the logits: kd_scale * D(T) + ce_scale * CE, and what its heads do to their logits."""

    divergence: str
    a: float
    temperature: float
    kd_scale: float
    ce_scale: float
    head: list[float]

    @property
    def loss(self) -> tuple[str, float, float, float, float]:
        """What the row operation and the gradient take of it, in their order."""
        return self.divergence, self.a, self.temperature, self.kd_scale, self.ce_scale

    def resolved(self) -> Divergence:
        default = resolve(self.divergence)
        return Divergence(self.divergence, default.pair, self.a, default.one_sweep)


@dataclass(frozen=True)
class Model:
    """One model's side: hidden [N, D], weight [V, D] and bias [V] or None as they came, cut to the vocabulary; where ranks share
    one, V is how much of it this rank holds.

    dtype: what its products run in. logits: what their results are kept in.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    logits: torch.dtype

    def rows(self, index: slice | Tensor) -> Tensor:
        return self.hidden[index].to(self.dtype)


@dataclass(frozen=True)
class Step:
    """A step after its checks. Rows of ``hidden`` that do not count are never touched.

    labels: [N] or None, counted from this rank's first column; -1 where another rank holds it. rows: indices of those that count,
    None for all; count: how many. weights: [N], token weights; scale: 0-dim, on top of them for gradients. needs: which of hidden,
    weight and bias take one. alone: the loss does not look at the teacher, so its logits are not computed, and ``teacher`` is the
    student. ranks: over which the vocabulary is split. teacher_needs: as needs, of a teacher that learns in a step of its own; else
    None.
    """

    student: Model
    teacher: Model
    labels: Tensor | None
    weights: Tensor
    scale: Tensor
    t: Tensor
    terms: Terms
    rows: Tensor | None
    count: int
    needs: tuple[bool, bool, bool]
    metrics: bool
    alone: bool
    lift: Tensor | None
    backend: str
    budget: int
    ranks: Ranks = ALONE
    teacher_needs: tuple[bool, bool, bool] | None = None

    @property
    def vocab(self) -> int:
        """Columns of the logits here."""
        return self.student.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.student.hidden.device

    @property
    def sum_dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the logits of student and teacher."""
        return self.student.logits, self.teacher.logits

    def index(self, begin: int, end: int) -> slice | Tensor:
        """The counted rows ``begin`` to ``end``, as an index into all."""
        return slice(begin, end) if self.rows is None else self.rows[begin:end]

    def chunk(self, begin: int, end: int) -> Step:
        """The same of the counted rows ``begin`` to ``end`` alone."""
        rows = torch.arange(begin, end, device=self.device) if self.rows is None else self.rows[begin:end]
        return replace(self, rows=rows, count=end - begin)

    def labels_at(self, index: slice | Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[index].contiguous()
