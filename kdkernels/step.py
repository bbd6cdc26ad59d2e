"""One loss step, as every strategy sees it: which rows count, what they are multiplied with, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.divergences import Divergence, resolve
from kdkernels.plan import Size
from kdkernels.products import logits_dtype, product_dtype

METRICS = ("kd", "ce", "target_entropy", "student_entropy", "agreement", "overlap", "tokens")


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


# Hidden states, weight and bias of a model as they came.
Inputs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Model:
    """One model's side: hidden [N, D], weight [V, D] and bias [V] or None as they came, cut to the vocabulary.

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

    rows: indices of those that count, None for all; count: how many. weights: [N], token weights; scale: 0-dim, on top of them for
    gradients. needs: which of hidden, weight and bias take one. alone: the loss does not look at the teacher, so its logits are
    not computed, and ``teacher`` is the student. teacher_needs: as needs, of a teacher that learns in a step of its own; else None.
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
    teacher_needs: tuple[bool, bool, bool] | None = None

    @property
    def vocab(self) -> int:
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

    @property
    def size(self) -> Size:
        """What its plan depends on."""
        student, teacher = self.student, self.teacher
        return Size(
            tokens=self.count,
            vocab=self.vocab,
            student_dim=student.weight.shape[1],
            teacher_dim=0 if self.alone else teacher.weight.shape[1],
            dtype=student.dtype,
            teacher_dtype=teacher.dtype,
            divergence=self.terms.divergence,
            train_head=self.needs[1],
            device=self.device,
            budget=self.budget,
            learners=1 if self.teacher_needs is None else 2,
            train_teacher_head=self.teacher_needs is not None and self.teacher_needs[1],
        )

    def index(self, begin: int, end: int) -> slice | Tensor:
        """The counted rows ``begin`` to ``end``, as an index into all."""
        return slice(begin, end) if self.rows is None else self.rows[begin:end]

    def labels_at(self, index: slice | Tensor) -> Tensor | None:
        return None if self.labels is None else self.labels[index].contiguous()


@dataclass(frozen=True)
class Outcome:
    """What a strategy makes of a learner: the loss of each row, ROW_COLUMNS summed, and three gradients (empty if not needed)."""

    losses: Tensor
    metric_sums: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


def _model(inputs: Inputs, dtype: torch.dtype, vocab: int, sum_dtype: torch.dtype) -> Model:
    hidden, weight, bias = inputs
    device = hidden.device
    cut = None if bias is None else bias[:vocab].to(sum_dtype).contiguous()
    return Model(hidden, weight[:vocab], cut, product_dtype(dtype, device), logits_dtype(dtype, device))


# So many slots are looked at together.
SLOTS = 2**22
# The k tokens that an offline teacher kept of each row, and their log-probabilities: [N, K] each, -inf where a slot is not used.
Known = tuple[Tensor, Tensor]


def prepare(
    student: Inputs,
    teacher: Inputs | None,
    token_weight: Tensor | None,
    grad_scale: Tensor,
    lift: Tensor | None,
    labels: Tensor | None,
    t: Tensor,
    terms: Terms,
    ignore_index: int,
    vocab: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
    metrics: bool,
    budget: int,
    known: Known | None = None,
) -> Step:
    """teacher: None where it is not a model; ``known`` is then what it left. lift: a factor on top of grad_scale that only the
    gradient of the hidden states keeps."""
    tokens, device = student[0].shape[0], student[0].device
    sum_dtype = accumulate_dtype(product_dtype(dtypes[0], device))
    # Where the loss does not look at the teacher, the student stands in for it.
    alone = teacher is None or (terms.kd_scale == 0.0 and not metrics)
    learner = _model(student, dtypes[0], vocab, sum_dtype)
    constant = learner if alone or teacher is None else _model(teacher, dtypes[1], vocab, sum_dtype)
    if alone:
        terms = Terms(*terms.loss, terms.head[:2] * 2)
    rows = kept_rows(labels, token_weight, ignore_index, vocab, known)
    return Step(
        student=learner,
        teacher=constant,
        labels=labels,
        weights=_weights(token_weight, tokens, sum_dtype, device),
        scale=grad_scale if lift is None else grad_scale * lift,
        t=t,
        terms=terms,
        rows=rows,
        count=tokens if rows is None else rows.shape[0],
        needs=needs,
        metrics=metrics,
        alone=alone,
        lift=lift,
        backend=backends.select(device, learner.logits, constant.logits),
        budget=budget,
    )


def prepare_both(
    student: Inputs,
    teacher: Inputs,
    token_weights: tuple[Tensor | None, Tensor | None],
    grad_scale: Tensor,
    lift: Tensor | None,
    labels: Tensor | None,
    terms: tuple[Terms, Terms],
    ignore_index: int,
    vocab: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, ...],
    metrics: bool,
    budget: int,
) -> tuple[Step, Step]:
    """The student's step and the teacher's, which is the same with the roles swapped: each holds the other's logits constant.

    token_weights, terms, needs: the student's, then the teacher's.
    """
    device = student[0].device
    sum_dtype = accumulate_dtype(torch.promote_types(*dtypes))
    learners = [_model(inputs, dtype, vocab, sum_dtype) for inputs, dtype in zip((student, teacher), dtypes, strict=True)]
    weights = [_weights(weight, student[0].shape[0], sum_dtype, device) for weight in token_weights]
    given = [weight for weight in token_weights if weight is not None]
    # A token counts if it does for either.
    either = given[0].abs() + given[1].abs() if len(given) == 2 else None
    rows = kept_rows(labels, either, ignore_index, vocab)
    one = Step(
        student=learners[0],
        teacher=learners[1],
        labels=labels,
        weights=weights[0],
        scale=grad_scale if lift is None else grad_scale * lift,
        t=torch.ones((), dtype=sum_dtype, device=device),
        terms=terms[0],
        rows=rows,
        count=student[0].shape[0] if rows is None else rows.shape[0],
        needs=(needs[0], needs[1], needs[2]),
        metrics=metrics,
        alone=False,
        lift=lift,
        backend=backends.select(device, *(model.logits for model in learners)),
        budget=budget,
        teacher_needs=(needs[3], needs[4], needs[5]),
    )
    other = replace(
        one,
        student=learners[1],
        teacher=learners[0],
        weights=weights[1],
        terms=terms[1],
        needs=(needs[3], needs[4], needs[5]),
        teacher_needs=one.needs,
        metrics=False,
    )
    return one, other


def _weights(token_weight: Tensor | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(tokens, dtype=dtype, device=device) if token_weight is None else token_weight.to(dtype)


def kept_rows(
    labels: Tensor | None, weight: Tensor | None, ignore_index: int, vocab: int, known: Known | None = None
) -> Tensor | None:
    """Indices of the rows that count, None for all of them; raises ValueError if a label of theirs, or a token that the teacher
    kept for them, is out of range, or if it kept one twice.

    On a GPU this is the call's one host sync.
    """
    if labels is None and weight is None and known is None:
        return None
    keep = labelled = None
    if weight is not None:
        keep = weight != 0
    if labels is not None:
        labelled = labels != ignore_index
        keep = labelled if keep is None else keep & labelled
    if keep is None:
        assert known is not None
        keep = torch.ones_like(known[0][:, 0], dtype=torch.bool)
    if keep.numel() == 0:
        return None
    facts = [keep.sum()]
    if labels is not None and labelled is not None:
        counted = labels.where(labelled, 0)
        facts += [counted.max(), counted.min()]
    if known is not None:
        facts += _facts_of_slots(keep, *known)
    count, *found = torch.stack(facts).tolist()
    if labels is not None:
        largest, least, *found = found
        if largest >= vocab or least < 0:
            wrong = largest if largest >= vocab else least
            raise ValueError(f"labels holds {wrong}; accepted: 0 to {vocab - 1}, or ignore_index={ignore_index}")
    if known is not None:
        largest, least, twice = found
        if largest >= vocab or least < 0:
            wrong = largest if largest >= vocab else least
            raise ValueError(
                f"topk_ids holds {wrong}; accepted: 0 to {vocab - 1}, or anything where topk_logprobs is -inf (an unused slot)"
            )
        if twice >= 0:
            raise ValueError(
                f"topk_ids holds {twice} twice in one row; accepted: distinct tokens in each row, and topk_logprobs of -inf for "
                "slots that are not used"
            )
    return None if count == keep.numel() else torch.nonzero_static(keep, size=count)[:, 0]


def _facts_of_slots(keep: Tensor, ids: Tensor, log_probs: Tensor) -> list[Tensor]:
    """The largest and the least token of the used slots of kept rows, and one that a row holds twice (-1 if none)."""
    # Slots that are not used get numbers of their own, which no token has.
    alone = -2 - torch.arange(ids.shape[1], device=ids.device)
    found = []
    for rows in zip(*(part.split(max(1, SLOTS // ids.shape[1])) for part in (keep, ids, log_probs)), strict=True):
        used = rows[0][:, None] & (rows[2] != -torch.inf)
        counted, ordered = rows[1].where(used, 0), rows[1].where(used, alone).sort(1).values
        twice = ordered[:, :-1].where(ordered[:, 1:] == ordered[:, :-1], -1).amax() if len(alone) > 1 else counted.new_full((), -1)
        found.append(torch.stack([counted.amax(), -counted.amin(), twice]))
    largest, least, twice = torch.stack(found).amax(0).unbind()
    return [largest, -least, twice]


def weighted(columns: Tensor, terms: Terms) -> Tensor:
    """Both terms of the loss of each row; a term of factor 0 is left out, whatever it came to."""
    loss = columns.new_zeros(columns.shape[0])
    if terms.kd_scale != 0.0:
        loss += terms.kd_scale * columns[:, 0]
    if terms.ce_scale != 0.0:
        loss += terms.ce_scale * columns[:, 1]
    return loss


def summary(sums: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The metrics of METRICS from ROW_COLUMNS summed: means over the kept tokens, and their number."""
    return torch.cat([sums / max(count, 1), sums.new_tensor([count])]).to(dtype)


def empty_sums(device: torch.device) -> Any:
    """ROW_COLUMNS of no rows, for adding up."""
    return torch.zeros(len(METRICS) - 1, dtype=torch.float64, device=device)
