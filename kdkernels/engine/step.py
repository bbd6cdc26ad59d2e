"""One loss step, as every strategy sees it: which rows count, what they are multiplied with, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Model, Step, Terms
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.backends.products import logits_dtype, product_dtype
from kdkernels.divergences import divergences
from kdkernels.engine.cut import STRATEGIES, Size
from kdkernels.engine.keep import Known, check_labels, checksum, keep_of, kept_rows, places
from kdkernels.parallel.ranks import ALONE, LOSSES, Fact, Ranks, agree, one_of, whether

METRICS = ("kd", "ce", "target_entropy", "student_entropy", "agreement", "overlap", "tokens")


# Hidden states, weight and bias of a model as they came.
Inputs = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Outcome:
    """What a strategy makes of a learner: the loss of each row, ROW_COLUMNS summed, and three gradients (empty if not needed)."""

    losses: Tensor
    metric_sums: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


def size_of(step: Step) -> Size:
    """What its cut depends on."""
    student, teacher = step.student, step.teacher
    return Size(
        tokens=step.count,
        vocab=step.vocab,
        student_dim=student.weight.shape[1],
        teacher_dim=0 if step.alone else teacher.weight.shape[1],
        dtype=student.dtype,
        teacher_dtype=teacher.dtype,
        divergence=step.terms.divergence,
        train_head=step.needs[1],
        device=step.device,
        budget=step.budget,
        learners=1 if step.teacher_needs is None else 2,
        train_teacher_head=step.teacher_needs is not None and step.teacher_needs[1],
        alone=step.alone,
        shared=not step.ranks.alone,
        widest=step.ranks.widest,
    )


def _model(inputs: Inputs, dtype: torch.dtype, vocab: int, sum_dtype: torch.dtype) -> Model:
    hidden, weight, bias = inputs
    device = hidden.device
    cut = None if bias is None else bias[:vocab].to(sum_dtype).contiguous()
    return Model(hidden, weight[:vocab], cut, product_dtype(dtype, device), logits_dtype(dtype, device))


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
    keep, labelled = keep_of(labels, weight, ignore_index)
    tokens = hidden.shape[0]
    read = [Fact("the number of tokens that labels and token_weight keep", tokens if keep is None else keep.sum())]
    if labels is not None and labelled is not None and tokens:
        counted = labels.where(labelled, 0)
        read += [
            Fact("labels (the largest)", counted.max()),
            Fact("labels (the least)", counted.min()),
            Fact("labels (a checksum)", checksum(counted, labelled)),
        ]
    if weight is not None and keep is not None and tokens:
        read.append(Fact("which tokens token_weight keeps (a checksum)", checksum(keep.long(), keep)))
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
            check_labels(of["labels (the largest)"], of["labels (the least)"], agreed.vocab, ignore_index)
        here = labels - agreed.ranks.begin
        labels = here.where((here >= 0) & (here < agreed.held), -1)
    rows = None if keep is None else places(keep, of[read[0].name])
    return _Shares(agreed.ranks, rows, labels, agreed.held, agreed.budget)


def _facts_of(terms: Terms, models: tuple[Inputs, Inputs], dtypes: tuple[torch.dtype, torch.dtype], metrics: bool) -> list[Fact]:
    """What ranks must agree on about a loss, apart from its tokens."""
    device = models[0][0].device
    logits = [logits_dtype(dtype, device) for dtype in dtypes]
    floats = [str(dtype) for dtype in backends.DTYPES]
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
