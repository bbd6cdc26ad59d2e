"""One loss step, as every strategy sees it: which rows count, what they are multiplied with, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Model, Needs, Step, Terms
from kdkernels.backends.columns import ROW_COLUMNS, Row
from kdkernels.backends.dtypes import DTYPES, accumulate_dtype, logits_dtype, product_dtype
from kdkernels.divergences import divergences
from kdkernels.engine.cut import STRATEGIES, Size
from kdkernels.engine.keep import Kept, Known, check_labels, checksum, keep_of, kept_rows, places
from kdkernels.parallel.ranks import ALONE, LOSSES, Fact, Ranks, agree, one_of, whether

METRICS = (*ROW_COLUMNS, "tokens")


class Inputs(NamedTuple):
    """Of a model, as they came."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


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
        train_head=step.needs.weight,
        device=step.device,
        budget=step.budget,
        learners=1 if step.teacher_needs is None else 2,
        train_teacher_head=step.teacher_needs is not None and step.teacher_needs.weight,
        alone=step.alone,
        shared=not step.ranks.alone,
        widest=step.ranks.widest,
        temperature=step.terms.temperature,
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
    kept: Kept
    labels: Tensor | None
    vocab: int
    budget: int


def _alone(weight: Tensor | None, options: Options, known: Known | None = None) -> _Shares:
    assert options.vocab is not None
    kept = kept_rows(options.labels, weight, options.ignore_index, options.vocab, known, options.check_labels)
    return _Shares(ALONE, kept, options.labels, options.vocab, options.budget)


def _shares(
    split: Split | None, models: tuple[Inputs, Inputs], weight: Tensor | None, options: Options, same: list[Fact]
) -> _Shares:
    """weight: token weights, by which tokens are dropped. same: facts that ranks must agree on besides; tensors last."""
    if split is None:
        return _alone(weight, options)
    labels = options.labels
    (hidden, student, _), (teacher_hidden, teacher, _) = models
    keep, labelled = keep_of(labels, weight, options.ignore_index)
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
        Fact("ignore_index", options.ignore_index),
        Fact("vocab_size", options.vocab),
        *read,
        *same,
    ]
    facts = sorted(unsorted, key=lambda fact: isinstance(fact.value, Tensor))
    agreed = agree(split.group, hidden.device, (student.shape[0], teacher.shape[0]), options.vocab, options.budget, facts)
    of = {fact.name: code for fact, code in zip(facts, agreed.codes, strict=True)}
    if labels is not None:
        if tokens:
            check_labels(of["labels (the largest)"], of["labels (the least)"], agreed.vocab, options.ignore_index)
        here = labels - agreed.ranks.begin
        labels = here.where((here >= 0) & (here < agreed.held), -1)
    rows = None if keep is None else places(keep, of[read[0].name])
    return _Shares(agreed.ranks, Kept(rows), labels, agreed.held, agreed.budget)


def _facts_of(terms: Terms, models: tuple[Inputs, Inputs], dtypes: tuple[torch.dtype, torch.dtype], metrics: bool) -> list[Fact]:
    """What ranks must agree on about a loss, apart from its tokens."""
    device = models[0].hidden.device
    logits = [logits_dtype(dtype, device) for dtype in dtypes]
    floats = [str(dtype) for dtype in DTYPES]
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
        one_of("the backend (kdkernels.backend)", backends.select(device, *logits).name, backends.NAMES),
    ]


@dataclass(frozen=True)
class Options:
    """What a step was asked for besides its models and its loss.

    vocab: None for all rows, with a ``Split`` only. dtypes: of both models' products. needs: of each learner.
    budget: bytes of logits scratch. grad_scale: 0-dim, on top of the
    token weights for gradients; lift: a factor on top of that which only the gradient of the hidden states keeps. check_labels:
    whether the host may read how many rows count.
    """

    labels: Tensor | None
    ignore_index: int
    vocab: int | None
    dtypes: tuple[torch.dtype, torch.dtype]
    needs: tuple[Needs, ...]
    metrics: bool
    budget: int
    grad_scale: Tensor
    lift: Tensor | None
    check_labels: bool = True

    @property
    def scale(self) -> Tensor:
        return self.grad_scale if self.lift is None else self.grad_scale * self.lift


def prepare(
    student: Inputs,
    teacher: Inputs | None,
    token_weight: Tensor | None,
    t: Tensor,
    terms: Terms,
    options: Options,
    known: Known | None = None,
    split: Split | None = None,
) -> Step:
    """teacher: None where it is not a model; ``known`` is then what it left."""
    dtypes, needs = options.dtypes, options.needs[0]
    tokens, device = student.hidden.shape[0], student.hidden.device
    sum_dtype = accumulate_dtype(dtypes[0])
    if known is None:
        models = student, student if teacher is None else teacher
        same = [] if split is None else [
            *_facts_of(terms, models, dtypes, options.metrics),
            whether("student_hidden requires grad", needs.hidden),
            whether("student_head requires grad", needs.weight),
            Fact("t", t),
            Fact(_DIVISOR, options.grad_scale),
        ]  # fmt: skip
        shares = _shares(split, models, token_weight, options, same)
    else:
        shares = _alone(token_weight, options, known)
    kept = shares.kept
    # Where the loss does not look at the teacher, the student stands in for it.
    alone = teacher is None or (terms.kd_scale == 0.0 and not options.metrics)
    learner = _model(student, dtypes[0], shares.vocab, sum_dtype)
    constant = learner if alone or teacher is None else _model(teacher, dtypes[1], shares.vocab, sum_dtype)
    if alone:
        terms = Terms(*terms.loss, terms.head[:2] * 2)
    return Step(
        student=learner,
        teacher=constant,
        labels=shares.labels,
        weights=kept.weights(token_weight, tokens, sum_dtype, device),
        scale=options.scale,
        t=t,
        terms=terms,
        rows=kept.rows,
        count=tokens if kept.rows is None else kept.rows.shape[0],
        counts=kept.counts,
        needs=needs,
        metrics=options.metrics,
        alone=alone,
        lift=options.lift,
        backend=backends.select(device, learner.logits, constant.logits),
        budget=shares.budget,
        ranks=shares.ranks,
    )


def prepare_both(
    models: tuple[Inputs, Inputs],
    token_weights: tuple[Tensor | None, Tensor | None],
    terms: tuple[Terms, Terms],
    options: Options,
    split: Split | None = None,
) -> tuple[Step, Step]:
    """The student's step and the teacher's, which is the same with the roles swapped: each holds the other's logits constant.

    models, token_weights, terms: the student's, then the teacher's.
    """
    (student, teacher), dtypes, (needs, teacher_needs) = models, options.dtypes, options.needs
    device = student.hidden.device
    sum_dtype = accumulate_dtype(*dtypes)
    given = [weight for weight in token_weights if weight is not None]
    # A token counts if it does for either.
    either = given[0].abs() + given[1].abs() if len(given) == 2 else None
    same = [] if split is None else [
        *_facts_of(terms[0], (student, teacher), dtypes, options.metrics),
        Fact("teacher_alpha (times temperature² unless square_temperature=False)", terms[1].kd_scale),
        Fact("teacher_alpha", terms[1].ce_scale),
        whether("student_hidden requires grad", needs.hidden),
        whether("teacher_hidden requires grad", teacher_needs.hidden),
        whether("student_head requires grad", needs.weight),
        whether("teacher_head requires grad", teacher_needs.weight),
        Fact(_DIVISOR, options.grad_scale),
    ]  # fmt: skip
    shares = _shares(split, models, either, options, same)
    kept, tokens = shares.kept, student.hidden.shape[0]
    weights = [kept.weights(weight, tokens, sum_dtype, device) for weight in token_weights]
    learners = [_model(inputs, dtype, shares.vocab, sum_dtype) for inputs, dtype in zip((student, teacher), dtypes, strict=True)]
    one = Step(
        student=learners[0],
        teacher=learners[1],
        labels=shares.labels,
        weights=weights[0],
        scale=options.scale,
        t=torch.ones((), dtype=sum_dtype, device=device),
        terms=terms[0],
        rows=kept.rows,
        count=tokens if kept.rows is None else kept.rows.shape[0],
        counts=kept.counts,
        needs=needs,
        metrics=options.metrics,
        alone=False,
        lift=options.lift,
        backend=backends.select(device, *(model.logits for model in learners)),
        budget=shares.budget,
        ranks=shares.ranks,
        teacher_needs=teacher_needs,
    )
    other = replace(
        one,
        student=learners[1],
        teacher=learners[0],
        weights=weights[1],
        terms=terms[1],
        needs=teacher_needs,
        teacher_needs=needs,
        metrics=False,
    )
    return one, other


def weighted(columns: Tensor, terms: Terms) -> Tensor:
    """Both terms of the loss of each row; a term of factor 0 is left out, whatever it came to."""
    row, loss = Row(*columns.unbind(1)), columns.new_zeros(columns.shape[0])
    if terms.kd_scale != 0.0:
        loss += terms.kd_scale * row.kd
    if terms.ce_scale != 0.0:
        loss += terms.ce_scale * row.ce
    return loss


def summary(sums: Tensor, counted: int | Tensor, dtype: torch.dtype) -> Tensor:
    """The metrics of METRICS from ROW_COLUMNS summed: means over the kept tokens, and their number."""
    number = counted.to(sums.dtype)[None] if isinstance(counted, Tensor) else sums.new_full((1,), counted)
    return torch.cat([sums / number.clamp(min=1.0), number]).to(dtype)


def empty_sums(device: torch.device) -> Any:
    """ROW_COLUMNS of no rows, for adding up."""
    return torch.zeros(len(ROW_COLUMNS), dtype=torch.float64, device=device)
