"""What a backend is, and a loss step as it sees one: what is multiplied, which rows count, and the terms of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kdkernels.backends.products import HeadProducts
from kdkernels.divergences import Divergence, resolve
from kdkernels.parallel.ranks import ALONE, Ranks


class Sweeps(Protocol):
    """The sweeps over the vocabulary of one step's counted rows, for each learner; statistics and sums in float64."""

    def statistics(self, wanted: Sequence[tuple[str, bool]]) -> list[Tensor]:
        """wanted: by whose exponentials moments are weighed, and whether there is a cross-entropy."""

    def sums(self, stats: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of those learners whose statistics are given."""

    def gradients(self, stats: Sequence[Tensor], sums: Sequence[Tensor]) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        """Learner, block of columns, its head there, and the gradient tile [count, Vb], valid until the next one."""


class OffsetRows(Protocol):
    """Both models' logits of a chunk's rows, as 16-bit offsets, and the row operation on them."""

    def row_loss(self, at: int, weights: Tensor, dx: Tensor | None) -> Tensor:
        """ROW_COLUMNS of a learner's rows. weights: [rows], factors of the gradient, which goes to dx [rows, V] (None for none):
        that may lie over the learner's own logits."""


def scale_(grad: Tensor, factor: Tensor) -> None:
    """By torch, as ``Backend.scale_``."""
    # Of another device's factor the host could know only by waiting for it.
    if factor.device.type != "cpu" or factor.item() != 1.0:
        grad.mul_(factor)


@dataclass(frozen=True)
class Backend:
    """An implementation of the low-level operators, and what it can do.

    name: as ``kd.backend`` says it. operators: makes their namespace: row_loss, and block_stats, block_reduce and block_grad unless
    ``sweeps`` takes their place. device, dtypes: the type of the devices (None for all) and the logits that it is made for.
    usable: whether it can run here. missing, get_it: what is not there where it cannot, and how to get it.

    sweeps: of a backend that multiplies itself and keeps no logits: makes them from the learners' steps, both models' counted rows
    in their products' dtype, scratch [count, Vb] for the widest learner's gradient, and HeadProducts' buffer.
    offsets: makes the logits of whole rows as 16-bit offsets in its own products: from the learners' steps, both models' rows in
    their products' dtype, float16 scratch [rows, V] for each model, and labels [rows] or None. keeps_offsets: whether it does on a
    device (or on one of an architecture that need not be here, such as "sm_90"; else ""), for the models' dtypes.
    scale_: multiplies a gradient in place by a 0-dim factor, which mostly is 1.
    temporaries: [rows, V] tensors of accumulate_dtype that it holds beside the logits; most_rows: in one call of row_loss, where
    nothing else bounds them. row_copies: float32 rows that each thread keeps.
    """

    name: str
    operators: Callable[[], Any]
    device: str | None
    dtypes: tuple[torch.dtype, ...]
    usable: Callable[[], bool] = lambda: True
    missing: str = ""
    get_it: str = ""
    sweeps: Callable[[Sequence[Step], tuple[Tensor, Tensor], Tensor, Tensor], Sweeps] | None = None
    offsets: Callable[[Sequence[Step], Sequence[Tensor], Sequence[Tensor], Tensor | None], OffsetRows] | None = None
    keeps_offsets: Callable[[torch.device, str, torch.dtype, torch.dtype], bool] = lambda *_: False
    scale_: Callable[[Tensor, Tensor], None] = scale_
    temporaries: int = 0
    most_rows: int | None = None
    row_copies: int = 0

    def serves(self, device: torch.device, *dtypes: torch.dtype) -> bool:
        """Whether it is made for logits of these dtypes on this device, whether it can run here or not."""
        return self.device in (None, device.type) and all(dtype in self.dtypes for dtype in dtypes)


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


class Needs(NamedTuple):
    """Which of a learner's tensors take a gradient."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Step:
    """A step after its checks. Of rows that do not count the values in ``hidden`` are never looked at.

    labels: [N] or None, counted from this rank's first column; -1 where another rank holds it. rows: indices of those that are
    worked on, None for all; count: how many. counts: [N], which of them count; None where all do. weights: [N], token weights;
    scale: 0-dim, on top of them for gradients. needs: which tensors take one. alone: the loss does not look at
    the teacher, so its logits are not computed, and ``teacher`` is the student. ranks: over which the vocabulary is split.
    teacher_needs: as needs, of a teacher that learns in a step of its own; else None.
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
    needs: Needs
    metrics: bool
    alone: bool
    lift: Tensor | None
    backend: Backend
    budget: int
    ranks: Ranks = ALONE
    teacher_needs: Needs | None = None
    counts: Tensor | None = None

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

    @property
    def counted(self) -> int | Tensor:
        """How many rows count."""
        return self.count if self.counts is None else self.counts.sum()

    def uncounted_at(self, index: slice | Tensor) -> Tensor | None:
        """[C, 1], which of the rows ``index`` do not count; None for none of them."""
        return None if self.counts is None else ~self.counts[index][:, None]

    def labels_at(self, index: slice | Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[index].contiguous()
