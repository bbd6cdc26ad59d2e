"""One loss step, as every strategy sees it: which rows count, what they are multiplied with, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.backends.products import logits_dtype, product_dtype
from kdkernels.divergences import Divergence, divergences, resolve
from kdkernels.losses.checks import FLOATS
from kdkernels.parallel.ranks import ALONE, LOSSES, Fact, Ranks, agree, one_of, whether
from kdkernels.planning.plan import STRATEGIES, Size

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

    @property
    def size(self) -> Size:
        """What its plan depends on; the same on every rank."""
        student, teacher = self.student, self.teacher
        return Size(
            tokens=self.count,
            vocab=max(self.vocab, self.ranks.widest),
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

    def chunk(self, begin: int, end: int) -> Step:
        """The same of the counted rows ``begin`` to ``end`` alone."""
        rows = torch.arange(begin, end, device=self.device) if self.rows is None else self.rows[begin:end]
        return replace(self, rows=rows, count=end - begin)

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
# The k tokens that an offline teacher kept of each row and their log-probabilities, [N, K] each, -inf where a slot is not used, and
# the log-probability of all others, [N], where it is known.
Known = tuple[Tensor, Tensor, Tensor | None]
_DIVISOR = "what the mean divides by (the normalizer, or the token weights that are kept)"


@dataclass(frozen=True)
class Split:
    """A vocabulary over the ranks of ``group``, by its name, and what they call: the loss, and its strategy as it was asked for."""

    group: str
    loss: str
    strategy: str


@dataclass(frozen=True)
class _Shares:
    """Which rows count, and what of the vocabulary is worked on here."""

    ranks: Ranks
    rows: Tensor | None
    labels: Tensor | None
    vocab: int
    budget: int


def _shares(
    split: Split | None,
    models: tuple[Inputs, Inputs],
    weight: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    vocab: int | None,
    budget: int,
    same: list[Fact],
) -> _Shares:
    """weight: token weights, by which tokens are dropped. same: facts that ranks must agree on besides; tensors last."""
    if split is None:
        assert vocab is not None
        return _Shares(ALONE, kept_rows(labels, weight, ignore_index, vocab), labels, vocab, budget)
    (hidden, student, _), (teacher_hidden, teacher, _) = models
    keep, labelled = _keep(labels, weight, ignore_index)
    tokens = hidden.shape[0]
    read = [Fact("the number of tokens that labels and token_weight keep", tokens if keep is None else keep.sum())]
    if labels is not None and labelled is not None and tokens:
        counted = labels.where(labelled, 0)
        read += [
            Fact("labels (the largest)", counted.max()),
            Fact("labels (the least)", counted.min()),
            Fact("labels (a checksum)", _checksum(counted, labelled)),
        ]
    if weight is not None and keep is not None and tokens:
        read.append(Fact("which tokens token_weight keeps (a checksum)", _checksum(keep.long(), keep)))
    # Whatever decides about the facts that follow comes first: where it differs, these are not looked at.
    unsorted = [
        one_of("the loss", split.loss, LOSSES),
        whether("labels are given", labels is not None),
        whether("token_weight is given", weight is not None),
        Fact("the number of tokens in student_hidden", tokens),
        Fact("the last dimension of student_hidden", hidden.shape[1]),
        Fact("the last dimension of teacher_hidden", teacher_hidden.shape[1]),
        one_of("strategy", split.strategy, STRATEGIES),
        Fact("ignore_index", ignore_index),
        Fact("vocab_size", vocab),
        *read,
        *same,
    ]
    facts = sorted(unsorted, key=lambda fact: isinstance(fact.value, Tensor))
    agreed = agree(split.group, hidden.device, (student.shape[0], teacher.shape[0]), vocab, budget, facts)
    of = {fact.name: code for fact, code in zip(facts, agreed.codes, strict=True)}
    if labels is not None:
        if tokens:
            _check_labels(of["labels (the largest)"], of["labels (the least)"], agreed.vocab, ignore_index)
        here = labels - agreed.ranks.begin
        labels = here.where((here >= 0) & (here < agreed.held), -1)
    rows = None if keep is None else _places(keep, of[read[0].name])
    return _Shares(agreed.ranks, rows, labels, agreed.held, agreed.budget)


def _checksum(counted: Tensor, labelled: Tensor) -> Tensor:
    """Of labels and which of them are ignored; it tells orders apart."""
    # An odd factor loses no bits; the shift brings the upper ones down, so that sums of labels do not add up to the same.
    mixed = (counted + labelled) * 0x2545F4914F6CDD1D
    return ((mixed ^ (mixed >> 29)) * (2 * torch.arange(len(mixed), device=mixed.device) + 1)).sum()


def _facts_of(terms: Terms, models: tuple[Inputs, Inputs], dtypes: tuple[torch.dtype, torch.dtype], metrics: bool) -> list[Fact]:
    """What ranks must agree on about a loss, apart from its tokens."""
    device = models[0][0].device
    logits = [logits_dtype(dtype, device) for dtype in dtypes]
    floats = [str(dtype) for dtype in FLOATS]
    sides = dict(zip(("student", "teacher"), models, strict=True))
    names = [f"{side}_head.{part}" for side in sides for part in ("logit_scale", "softcap (0 for None)")]
    return [
        one_of("divergence", terms.divergence, divergences()),
        Fact("divergence's parameter", terms.a),
        Fact("temperature", terms.temperature),
        Fact("kd_weight (times temperature² unless square_temperature=False)", terms.kd_scale),
        Fact("ce_weight", terms.ce_scale),
        *(Fact(name, value) for name, value in zip(names, terms.head, strict=True)),
        whether("metrics are asked for", metrics),
        *(whether(f"{name}_head has a bias", bias is not None) for name, (_, _, bias) in sides.items()),
        *(
            one_of(f"the dtype of the {name}'s products", str(product_dtype(dtype, device)), floats)
            for name, dtype in zip(sides, dtypes, strict=True)
        ),
        one_of("the backend (kdkernels.backend)", backends.select(device, *logits), backends.NAMES),
    ]


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
    vocab: int | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
    metrics: bool,
    budget: int,
    known: Known | None = None,
    split: Split | None = None,
) -> Step:
    """teacher: None where it is not a model; ``known`` is then what it left. lift: a factor on top of grad_scale that only the
    gradient of the hidden states keeps. vocab: None for all rows, with a ``split`` only."""
    tokens, device = student[0].shape[0], student[0].device
    sum_dtype = accumulate_dtype(product_dtype(dtypes[0], device))
    if known is None:
        models = student, student if teacher is None else teacher
        same = [] if split is None else [
            *_facts_of(terms, models, dtypes, metrics),
            whether("student_hidden requires grad", needs[0]),
            whether("student_head requires grad", needs[1]),
            Fact("t", t),
            Fact(_DIVISOR, grad_scale),
        ]  # fmt: skip
        shares = _shares(split, models, token_weight, labels, ignore_index, vocab, budget, same)
    else:
        assert vocab is not None
        shares = _Shares(ALONE, kept_rows(labels, token_weight, ignore_index, vocab, known), labels, vocab, budget)
    # Where the loss does not look at the teacher, the student stands in for it.
    alone = teacher is None or (terms.kd_scale == 0.0 and not metrics)
    learner = _model(student, dtypes[0], shares.vocab, sum_dtype)
    constant = learner if alone or teacher is None else _model(teacher, dtypes[1], shares.vocab, sum_dtype)
    if alone:
        terms = Terms(*terms.loss, terms.head[:2] * 2)
    return Step(
        student=learner,
        teacher=constant,
        labels=shares.labels,
        weights=_weights(token_weight, tokens, sum_dtype, device),
        scale=grad_scale if lift is None else grad_scale * lift,
        t=t,
        terms=terms,
        rows=shares.rows,
        count=tokens if shares.rows is None else shares.rows.shape[0],
        needs=needs,
        metrics=metrics,
        alone=alone,
        lift=lift,
        backend=backends.select(device, learner.logits, constant.logits),
        budget=shares.budget,
        ranks=shares.ranks,
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
    vocab: int | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, ...],
    metrics: bool,
    budget: int,
    split: Split | None = None,
) -> tuple[Step, Step]:
    """The student's step and the teacher's, which is the same with the roles swapped: each holds the other's logits constant.

    token_weights, terms, needs: the student's, then the teacher's.
    """
    device = student[0].device
    sum_dtype = accumulate_dtype(torch.promote_types(*dtypes))
    weights = [_weights(weight, student[0].shape[0], sum_dtype, device) for weight in token_weights]
    given = [weight for weight in token_weights if weight is not None]
    # A token counts if it does for either.
    either = given[0].abs() + given[1].abs() if len(given) == 2 else None
    same = [] if split is None else [
        *_facts_of(terms[0], (student, teacher), dtypes, metrics),
        Fact("teacher_alpha (times temperature² unless square_temperature=False)", terms[1].kd_scale),
        Fact("teacher_alpha", terms[1].ce_scale),
        whether("student_hidden requires grad", needs[0]),
        whether("teacher_hidden requires grad", needs[3]),
        whether("student_head requires grad", needs[1]),
        whether("teacher_head requires grad", needs[4]),
        Fact(_DIVISOR, grad_scale),
    ]  # fmt: skip
    shares = _shares(split, (student, teacher), either, labels, ignore_index, vocab, budget, same)
    learners = [_model(inputs, dtype, shares.vocab, sum_dtype) for inputs, dtype in zip((student, teacher), dtypes, strict=True)]
    one = Step(
        student=learners[0],
        teacher=learners[1],
        labels=shares.labels,
        weights=weights[0],
        scale=grad_scale if lift is None else grad_scale * lift,
        t=torch.ones((), dtype=sum_dtype, device=device),
        terms=terms[0],
        rows=shares.rows,
        count=student[0].shape[0] if shares.rows is None else shares.rows.shape[0],
        needs=(needs[0], needs[1], needs[2]),
        metrics=metrics,
        alone=False,
        lift=lift,
        backend=backends.select(device, *(model.logits for model in learners)),
        budget=shares.budget,
        ranks=shares.ranks,
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
    keep, labelled = _keep(labels, weight, ignore_index)
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
        facts += _facts_of_slots(keep, *known[:2])
    count, *found = torch.stack(facts).tolist()
    if labels is not None:
        largest, least, *found = found
        _check_labels(largest, least, vocab, ignore_index)
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
    return _places(keep, count)


def _keep(labels: Tensor | None, weight: Tensor | None, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """[N] bool, None for all: rows that count, and rows whose label is not ignored."""
    keep = None if weight is None else weight != 0
    if labels is None:
        return keep, None
    labelled = labels != ignore_index
    return labelled if keep is None else keep & labelled, labelled


def _check_labels(largest: int, least: int, vocab: int, ignore_index: int) -> None:
    if largest >= vocab or least < 0:
        wrong = largest if largest >= vocab else least
        raise ValueError(f"labels holds {wrong}; accepted: 0 to {vocab - 1}, or ignore_index={ignore_index}")


def _places(keep: Tensor, count: int) -> Tensor | None:
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
    return torch.cat([sums / max(count, 1), sums.new_full((1,), count)]).to(dtype)


def empty_sums(device: torch.device) -> Any:
    """ROW_COLUMNS of no rows, for adding up."""
    return torch.zeros(len(METRICS) - 1, dtype=torch.float64, device=device)
