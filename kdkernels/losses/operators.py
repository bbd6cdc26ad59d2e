"""The library operators behind the public functions, one opaque node each in a compiled graph.

They take what the strategies take, flat, and return losses and gradients; autograd.py has their backward. ``group`` is the
name of a torch.distributed group whose ranks share the vocabulary, "" for none; the collectives stay inside the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.base import Step, Terms
from kdkernels.backends.operators import accumulate_dtype, library
from kdkernels.backends.products import product_dtype
from kdkernels.engine import logits
from kdkernels.engine.cut import CUTS, Size
from kdkernels.engine.run import run
from kdkernels.engine.step import METRICS, Inputs, Outcome, Split, prepare, prepare_both, size_of, summary
from kdkernels.engine.target import Target, of_known, of_teacher
from kdkernels.losses.autograd import OWNERS, of_operator
from kdkernels.planning.plan import choose, default_budget

_HEADS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, ",
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, ",
)
_TERMS = "str divergence, float a, float temperature, float kd_scale, float ce_scale, float[] head"

library.define(
    f"linear_kd({_HEADS[0]}Tensor? token_weight, Tensor grad_scale, Tensor? lift, {_HEADS[1]}Tensor? labels, "
    f"Tensor t, {_TERMS}, int ignore_index, int? vocab, ScalarType student_dtype, ScalarType teacher_dtype, "
    "str strategy, int memory_budget, str group, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"linear_okd({_HEADS[0]}{_HEADS[1]}Tensor? token_weight, Tensor? teacher_token_weight, Tensor grad_scale, Tensor? lift, "
    f"Tensor? labels, {_TERMS}, float teacher_kd_scale, float teacher_ce_scale, int ignore_index, int? vocab, "
    "ScalarType student_dtype, ScalarType teacher_dtype, str strategy, int memory_budget, str group, bool[] needs, bool metrics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    f"linear_topk_kd({_HEADS[0]}Tensor? token_weight, Tensor grad_scale, Tensor? lift, Tensor topk_ids, Tensor topk_logprobs, "
    f"Tensor? topk_rest, Tensor? labels, Tensor t, {_TERMS}, int ignore_index, int vocab, ScalarType student_dtype, str tail, "
    "str strategy, int memory_budget, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "logits_kd(Tensor student_logits, Tensor? token_weight, Tensor grad_scale, Tensor? lift, "
    "Tensor teacher_logits, Tensor? labels, "
    f"Tensor t, {_TERMS}, int ignore_index, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor)"
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
    means = summary(done[0].metric_sums, step.count, step.sum_dtype) if step.metrics else done[0].losses.new_empty(0)
    return done, means


def linear_kd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, (token_weight, grad_scale, lift), teacher, (labels, t) = (
        arguments[begin:end] for begin, end in ((0, 3), (3, 6), (6, 9), (9, 11))
    )
    ignore_index, vocab_size, student_dtype, teacher_dtype, strategy, budget, group, needs, metrics = arguments[17:]
    budget = budget or default_budget(student[0].device)
    # The products' dtypes are decided already; an ambient autocast must not change them.
    with torch.autocast(student[0].device.type, enabled=False):
        step = prepare(
            *(student, teacher, token_weight, grad_scale, lift, labels, t, Terms(*arguments[11:17])),
            *(ignore_index, vocab_size, (student_dtype, teacher_dtype), tuple(needs), metrics, budget),
            split=Split(group, "linear_kd_loss", strategy) if group else None,
        )
        (done,), means = _run(strategy, size_of(step), (step,), (student,))
    return done.losses, *done.grads, means


def linear_okd(*arguments: Any) -> tuple[Tensor, ...]:
    student, teacher, weights, (grad_scale, lift, labels) = (
        arguments[begin:end] for begin, end in ((0, 3), (3, 6), (6, 8), (8, 11))
    )
    terms = Terms(*arguments[11:17])
    teacher_kd, teacher_ce, ignore_index, vocab_size, student_dtype, teacher_dtype = arguments[17:23]
    strategy, budget, group, needs, metrics = arguments[23:]
    budget = budget or default_budget(student[0].device)
    # KL(q || p) for the teacher is forward KL with the student as its constant target.
    swapped = Terms("forward_kl", 0.0, terms.temperature, teacher_kd, teacher_ce, [*terms.head[2:], *terms.head[:2]])
    with torch.autocast(student[0].device.type, enabled=False):
        steps = prepare_both(
            *(student, teacher, weights, grad_scale, lift, labels, (terms, swapped)),
            *(ignore_index, vocab_size, (student_dtype, teacher_dtype), tuple(needs), metrics, budget),
            split=Split(group, "linear_okd_loss", strategy) if group else None,
        )
        (one, other), means = _run(strategy, size_of(steps[0]), steps, (student, teacher))
    return one.losses, other.losses, *one.grads, *other.grads, means


def linear_topk_kd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    student, (token_weight, grad_scale, lift), known, (labels, t) = (
        arguments[begin:end] for begin, end in ((0, 3), (3, 6), (6, 9), (9, 11))
    )
    ignore_index, vocab_size, dtype, tail, strategy, budget, needs, metrics = arguments[17:]
    budget = budget or default_budget(student[0].device)
    with torch.autocast(student[0].device.type, enabled=False):
        step = prepare(
            *(student, None, token_weight, grad_scale, lift, labels, t, Terms(*arguments[11:17])),
            *(ignore_index, vocab_size, (dtype, dtype), tuple(needs), metrics, budget, known),
        )
        # One sweep over the vocabulary gives the statistics, whatever the divergence; to the plan that is forward KL.
        size = replace(size_of(step), known=True, divergence="forward_kl")
        (done,), means = _run(strategy, size, (step,), (student,), of_known(known, tail))
    return done.losses, *done.grads, means


def _absent_or_like(losses: Tensor, sources: tuple[Tensor | None, ...], needs: list[bool]) -> list[Tensor]:
    return [
        losses.new_empty(0) if not need or source is None else source.new_empty(source.shape)
        for source, need in zip(sources, needs, strict=True)
    ]


def _fake_of_a_student(*arguments: Any) -> tuple[Tensor, ...]:
    """Of linear_kd and linear_topk_kd, which take the student's dtype at one place."""
    hidden, compute, needs, metrics = arguments[0], arguments[19], *arguments[-2:]
    losses = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(product_dtype(compute, hidden.device)))
    return losses, *_absent_or_like(losses, arguments[:3], needs), losses.new_empty(len(METRICS) if metrics else 0)


def _fake_linear_okd(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, dtypes, needs, metrics = arguments[0], arguments[21:23], *arguments[-2:]
    losses = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(torch.promote_types(*dtypes)))
    grads = _absent_or_like(losses, arguments[:6], needs)
    return losses, torch.empty_like(losses), *grads, losses.new_empty(len(METRICS) if metrics else 0)


def logits_kd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = logits.run
    ignore_index, needs, metrics = arguments[13:]
    return run(*arguments[:7], Terms(*arguments[7:13]), ignore_index, needs[0], metrics)


def _fake_logits_kd(student_logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (need,), metrics = rest[-2:]
    losses = student_logits.new_empty(student_logits.shape[0], dtype=accumulate_dtype(student_logits.dtype))
    grad = student_logits.new_empty(student_logits.shape) if need else losses.new_empty(0)
    return losses, grad, losses.new_empty(len(METRICS) if metrics else 0)


_FAKES = {
    linear_kd: _fake_of_a_student,
    linear_okd: _fake_linear_okd,
    linear_topk_kd: _fake_of_a_student,
    logits_kd: _fake_logits_kd,
}
for _operator, _fake in _FAKES.items():
    library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
    _name = _operator.__name__
    torch.library.register_fake(f"kdkernels::{_name}", _fake, lib=library)
    _setup, _backward = of_operator(getattr(torch.ops.kdkernels, _name), OWNERS[_name])
    torch.library.register_autograd(f"kdkernels::{_name}", _backward, setup_context=_setup, lib=library)
