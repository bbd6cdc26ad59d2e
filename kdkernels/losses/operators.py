"""The library operators behind the public functions, one opaque node each in a compiled graph.

They take what the strategies take, flat, and return losses and gradients; autograd.py has their backward. ``group`` is the
name of a torch.distributed group whose ranks share the vocabulary, "" for none; the collectives stay inside the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.base import Needs, Step, Terms
from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.backends.operators import library
from kdkernels.engine import logits
from kdkernels.engine.cut import CUTS, Size
from kdkernels.engine.run import run
from kdkernels.engine.step import METRICS, Inputs, Options, Outcome, Split, prepare, prepare_both, size_of, summary
from kdkernels.engine.target import Target, of_known, of_teacher
from kdkernels.losses.autograd import SCHEMAS, Schema, of_operator
from kdkernels.planning.plan import choose, default_budget

_HEADS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, ",
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, ",
)
_TERMS = "str divergence, float a, float temperature, float kd_scale, float ce_scale, float[] head"

library.define(
    f"linear_kd({_HEADS[0]}Tensor? token_weight, Tensor grad_scale, Tensor? lift, {_HEADS[1]}Tensor? labels, "
    f"Tensor t, {_TERMS}, int ignore_index, bool check_labels, int? vocab, ScalarType student_dtype, ScalarType teacher_dtype, "
    "str strategy, int memory_budget, str group, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"linear_okd({_HEADS[0]}{_HEADS[1]}Tensor? token_weight, Tensor? teacher_token_weight, Tensor grad_scale, Tensor? lift, "
    f"Tensor? labels, {_TERMS}, float teacher_kd_scale, float teacher_ce_scale, int ignore_index, bool check_labels, int? vocab, "
    "ScalarType student_dtype, ScalarType teacher_dtype, str strategy, int memory_budget, str group, bool[] needs, bool metrics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"linear_topk_kd({_HEADS[0]}Tensor? token_weight, Tensor grad_scale, Tensor? lift, Tensor topk_ids, Tensor topk_logprobs, "
    f"Tensor? topk_rest, Tensor? labels, Tensor t, {_TERMS}, int ignore_index, bool check_labels, int vocab, "
    "ScalarType student_dtype, str tail, str strategy, int memory_budget, bool[] needs, bool metrics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "logits_kd(Tensor student_logits, Tensor? token_weight, Tensor grad_scale, Tensor? lift, "
    "Tensor teacher_logits, Tensor? labels, "
    f"Tensor t, {_TERMS}, int ignore_index, bool check_labels, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor)"
)


def _run(
    strategy: str, size: Size, steps: tuple[Step, ...], inputs: tuple[Inputs, ...], target: Target = of_teacher
) -> tuple[list[Outcome], Tensor]:
    """Outcomes of the learners, and the first one's metrics (empty if not wanted)."""
    step = steps[0]
    if strategy == "auto" and size.fused and size.shared:
        # There is no row operation over ranks, and kernels that multiply themselves have nothing to gain from chunks of tokens.
        strategy = "vocab"
    done = run(CUTS[choose(strategy, size)](size), steps, inputs, target)
    means = summary(done[0].metric_sums, step.counted, step.sum_dtype) if step.metrics else done[0].losses.new_empty(0)
    return done, means


class Given(SimpleNamespace):
    """An operator's arguments by the names that its schema has."""

    @property
    def student(self) -> Inputs:
        return Inputs(self.student_hidden, self.student_weight, self.student_bias)

    @property
    def teacher(self) -> Inputs:
        return Inputs(self.teacher_hidden, self.teacher_weight, self.teacher_bias)

    @property
    def terms(self) -> Terms:
        return Terms(self.divergence, self.a, self.temperature, self.kd_scale, self.ce_scale, self.head)

    def options(self, dtypes: tuple[torch.dtype, torch.dtype], *learners: str) -> Options:
        """dtypes: of both models' products. learners: the models that learn."""
        return Options(
            labels=self.labels,
            ignore_index=self.ignore_index,
            check_labels=self.check_labels,
            vocab=self.vocab,
            dtypes=dtypes,
            needs=tuple(Needs(*(self.needs[f"{model}_{part}"] for part in Needs._fields)) for model in learners),
            metrics=self.metrics,
            budget=self.memory_budget or default_budget(self.student_hidden.device),
            grad_scale=self.grad_scale,
            lift=self.lift,
        )


def linear_kd(given: Given) -> tuple[Tensor, ...]:
    step = prepare(
        given.student,
        given.teacher,
        given.token_weight,
        given.t,
        given.terms,
        given.options((given.student_dtype, given.teacher_dtype), "student"),
        split=Split(given.group, "linear_kd_loss", given.strategy) if given.group else None,
    )
    (done,), means = _run(given.strategy, size_of(step), (step,), (given.student,))
    return done.losses, *done.grads, means


def linear_okd(given: Given) -> tuple[Tensor, ...]:
    terms = given.terms
    # KL(q || p) for the teacher is forward KL with the student as its constant target.
    swapped = Terms(
        "forward_kl", 0.0, terms.temperature, given.teacher_kd_scale, given.teacher_ce_scale, [*terms.head[2:], *terms.head[:2]]
    )
    steps = prepare_both(
        (given.student, given.teacher),
        (given.token_weight, given.teacher_token_weight),
        (terms, swapped),
        given.options((given.student_dtype, given.teacher_dtype), "student", "teacher"),
        split=Split(given.group, "linear_okd_loss", given.strategy) if given.group else None,
    )
    (one, other), means = _run(given.strategy, size_of(steps[0]), steps, (given.student, given.teacher))
    return one.losses, other.losses, *one.grads, *other.grads, means


def linear_topk_kd(given: Given) -> tuple[Tensor, ...]:
    known = given.topk_ids, given.topk_logprobs, given.topk_rest
    options = given.options((given.student_dtype, given.student_dtype), "student")
    step = prepare(given.student, None, given.token_weight, given.t, given.terms, options, known)
    # One sweep over the vocabulary gives the statistics, whatever the divergence; to the plan that is forward KL.
    size = replace(size_of(step), known=True, divergence="forward_kl")
    (done,), means = _run(given.strategy, size, (step,), (given.student,), of_known(known, given.tail))
    return done.losses, *done.grads, means


def logits_kd(given: Given) -> tuple[Tensor, ...]:
    return logits.run(
        given.student_logits,
        given.token_weight,
        given.grad_scale,
        given.lift,
        given.teacher_logits,
        given.labels,
        given.t,
        given.terms,
        given.ignore_index,
        given.check_labels,
        given.needs["student_logits"],
        given.metrics,
    )


def _made(given: Given, dtype: torch.dtype, sources: tuple[Tensor | None, ...], learners: int = 1) -> tuple[Tensor, ...]:
    """What an operator returns, empty: losses, a gradient for each source that needs one, metrics. dtype: of the losses."""
    first = sources[0]
    assert first is not None
    losses = [first.new_empty(first.shape[0], dtype=dtype) for _ in range(learners)]
    grads = [
        losses[0].new_empty(0) if not need or source is None else source.new_empty(source.shape)
        for source, need in zip(sources, given.needs.values(), strict=True)
    ]
    return *losses, *grads, losses[0].new_empty(len(METRICS) if given.metrics else 0)


def _fake_linear_kd(given: Given) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(given.student_dtype)
    return _made(given, dtype, given.student)


def _fake_linear_okd(given: Given) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(given.student_dtype, given.teacher_dtype)
    return _made(given, dtype, (*given.student, *given.teacher), learners=2)


def _fake_linear_topk_kd(given: Given) -> tuple[Tensor, ...]:
    return _fake_linear_kd(given)


def _fake_logits_kd(given: Given) -> tuple[Tensor, ...]:
    return _made(given, accumulate_dtype(given.student_logits.dtype), (given.student_logits,))


def _by_name(schema: Schema, function: Callable[[Given], tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def called(*arguments: Any) -> tuple[Tensor, ...]:
        given = Given(**dict(zip(schema.names, arguments, strict=True)))
        given.needs = dict(zip(schema.learned, given.needs, strict=True))
        return function(given)

    return called


def _with_own_dtypes(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The products' dtypes are decided already; an ambient autocast must not change them."""

    def called(*arguments: Any) -> tuple[Tensor, ...]:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return called


# What runs for each operator, by its name.
IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
for _operator, _fake in {
    linear_kd: _fake_linear_kd,
    linear_okd: _fake_linear_okd,
    linear_topk_kd: _fake_linear_topk_kd,
    logits_kd: _fake_logits_kd,
}.items():
    _name = _operator.__name__
    _schema = SCHEMAS[_name] = Schema(getattr(torch.ops.kdkernels, _name))
    IMPLEMENTATIONS[_name] = _with_own_dtypes(_by_name(_schema, _operator))
    library.impl(_name, IMPLEMENTATIONS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{_name}", _by_name(_schema, _fake), lib=library)
    _setup, _backward = of_operator(_schema)
    torch.library.register_autograd(f"kdkernels::{_name}", _backward, setup_context=_setup, lib=library)
