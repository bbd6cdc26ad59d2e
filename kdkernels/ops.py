"""The library operators behind the public functions, one opaque node each in a compiled graph.

They take what the strategies take, flat, and return losses and gradients; autograd.py gives them their backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels import logits, tokens, vocab
from kdkernels.backends.operators import accumulate_dtype, library
from kdkernels.plan import choose
from kdkernels.products import product_dtype
from kdkernels.step import METRICS, Step, Terms, prepare, summary

_TERMS = "str divergence, float a, float temperature, float kd_scale, float ce_scale, float[] head"

library.define(
    "linear_kd(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? token_weight, Tensor grad_scale, Tensor? lift, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels, "
    f"Tensor t, {_TERMS}, int ignore_index, int vocab, ScalarType student_dtype, ScalarType teacher_dtype, "
    "str strategy, int memory_budget, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "logits_kd(Tensor student_logits, Tensor? token_weight, Tensor grad_scale, Tensor? lift, "
    "Tensor teacher_logits, Tensor? labels, "
    f"Tensor t, {_TERMS}, int ignore_index, bool[] needs, bool metrics) -> (Tensor, Tensor, Tensor)"
)


_STRATEGIES = {"tokens": tokens.run, "vocab": vocab.run}


def linear_kd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors, terms = arguments[:11], Terms(*arguments[11:17])
    ignore_index, vocab_size, student_dtype, teacher_dtype, strategy, budget, needs, metrics = arguments[17:]
    # The products' dtypes are decided already; an ambient autocast must not change them.
    with torch.autocast(tensors[0].device.type, enabled=False):
        make: Callable[..., Step] = prepare
        step = make(*tensors, terms, ignore_index, vocab_size, (student_dtype, teacher_dtype), tuple(needs), metrics, budget)
        done = _STRATEGIES[choose(strategy, step.size)](step, *tensors[:3])
        means = summary(done.metric_sums, step.count, step.sum_dtype) if metrics else done.losses.new_empty(0)
    return done.losses, *done.grads, means


def _fake_linear_kd(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    compute, needs, metrics = rest[-6], rest[-2], rest[-1]
    losses = student_hidden.new_empty(
        student_hidden.shape[0], dtype=accumulate_dtype(product_dtype(compute, student_hidden.device))
    )
    grads = [
        losses.new_empty(0) if not need or source is None else source.new_empty(source.shape)
        for source, need in zip((student_hidden, student_weight, student_bias), needs, strict=True)
    ]
    return losses, grads[0], grads[1], grads[2], losses.new_empty(len(METRICS) if metrics else 0)


def logits_kd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = logits.run
    ignore_index, needs, metrics = arguments[13:]
    return run(*arguments[:7], Terms(*arguments[7:13]), ignore_index, needs[0], metrics)


def _fake_logits_kd(student_logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (need,), metrics = rest[-2:]
    losses = student_logits.new_empty(student_logits.shape[0], dtype=accumulate_dtype(student_logits.dtype))
    grad = student_logits.new_empty(student_logits.shape) if need else losses.new_empty(0)
    return losses, grad, losses.new_empty(len(METRICS) if metrics else 0)


for _operator, _fake in ((linear_kd, _fake_linear_kd), (logits_kd, _fake_logits_kd)):
    library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kdkernels::{_operator.__name__}", _fake, lib=library)
