"""Online distillation gives each model the loss and gradients that the formulas give."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support.cases import (
    CHOICES,
    DTYPES,
    MAIN,
    NATIVE_DTYPES,
    REDUCTIONS,
    SPREADS,
    Case,
    assert_as_good_as_eager,
    assert_close,
    assert_same,
    both_strategies,
    draw,
    dressed,
    keywords,
    parameters,
    ratios,
    running,
    strided,
    yardsticks,
)
from tests.support.okd import (
    BUDGET,
    EVERYTHING,
    OF_STUDENT,
    OF_TEACHER,
    assert_as_plain,
    call,
    full,
    heads,
    leaves_of,
    one_of_each,
    plain,
    results,
    run,
    upstream,
)
from tests.support.oracle import Options

# Every dtype of every variant with the divergences that are most used; the others in float32, and not in the slow interpreter.
ACCURACY = [(*choice, name) for choice in CHOICES for name in MAIN]
ACCURACY += [
    (variant, dtype, name)
    for variant, dtype in CHOICES
    for name in kd.divergences()
    if name not in MAIN and dtype == torch.float32 and not variant.startswith("triton")
]


@functools.cache
def compared(name: str, dtype: torch.dtype, spread: float, small: bool, bare: bool) -> Any:
    """Cases, teacher_alpha, and for each learner the exact results and eager's."""
    alpha = 1.0 if bare else 0.3
    count, width, draws = (8, 101, 1) if small else (12, 403, 2)
    options = Options(name) if bare else Options(name, temperature=2.0, ce_weight=0.5, kd_weight=0.75)
    cases = [draw(seed, (count,), width, (16, 24), spread, dtype) for seed in range(draws)]
    cases = [replace(case if bare else dressed(case, seed), options=options) for seed, case in enumerate(cases)]
    working = torch.float32 if dtype == torch.float64 else dtype
    exact, eager = ([plain(case, alpha, to) for case in cases] for to in (torch.float64, working))
    found = {
        learner: yardsticks([one[learner] for one in exact], [one[learner] for one in eager], 1.0, dtype)
        for learner in ("student", "teacher")
    }
    return cases, alpha, found


@pytest.mark.parametrize(("variant", "dtype", "name"), parameters(ACCURACY))
def test_as_close_to_the_formulas_as_eager(variant: str, dtype: torch.dtype, name: str) -> None:
    over: dict[str, dict[Any, dict[str, float]]] = {"student": {}, "teacher": {}}
    interpreted = variant.startswith("triton")
    for spread, bare in itertools.product(SPREADS, (False,) if interpreted else (True, False)):
        cases, alpha, right = compared(name, dtype, spread, interpreted, bare)
        with running(variant):
            found = [results(case, alpha, per_token=not interpreted) for case in cases]
        for learner, (exact, eager) in right.items():
            over[learner][spread, bare] = ratios([one[learner] for one in found], eager, exact)
    for one in over.values():
        assert_as_good_as_eager(one)


class TestFormulas:
    """Options that change the formula, in float64, where nothing but the formula matters."""

    @both_strategies
    @pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
    @pytest.mark.parametrize(
        "options",
        [
            {"square_temperature": False},
            {"temperature": 0.5},
            {"kd_weight": 0.0},
            {"ce_weight": 0.0},
            {"kd_weight": 3.0, "ce_weight": 2.0},
            {"normalizer": 7.0},
            {"divergence": "jsd", "parameter": 0.2},
        ],
    )
    def test_factors(self, options: dict[str, Any], alpha: float, strategy: str) -> None:
        assert_as_plain(full(torch.float64, **options), alpha, strategy=strategy, memory_budget=BUDGET)

    @both_strategies
    def test_a_sum_divides_by_nothing_and_a_normalizer_may_be_a_tensor(self, strategy: str) -> None:
        case = full(torch.float64)
        right = plain(replace(case, options=replace(case.options, normalizer=1.0)), 0.5)
        for learner, found in results(case, 0.5, reduction="sum", strategy=strategy).items():
            assert_close(found, right[learner], 1e-12)
        divided = call(case, normalizer=torch.tensor(4.0), strategy=strategy)
        for loss, learner in zip(divided, ("student", "teacher"), strict=True):
            torch.testing.assert_close(loss, right[learner]["loss"] / 4)

    @both_strategies
    @pytest.mark.parametrize("drop", [(), ("labels",), ("token_weight",), ("labels", "token_weight")])
    def test_labels_and_weights_with_holes_and_without(self, drop: tuple[str, ...], strategy: str) -> None:
        case = replace(full(torch.float64, ce_weight=0.0), **dict.fromkeys(drop))
        assert_as_plain(case, 1.0 if "labels" in drop else 0.5, strategy=strategy, memory_budget=BUDGET)

    @pytest.mark.parametrize("lead", [(), (1,), (2, 3), (1, 2, 1, 3)])
    def test_leading_dimensions_are_only_a_shape(self, lead: tuple[int, ...]) -> None:
        case = replace(dressed(draw(tokens=lead, dtype=torch.float64)), options=Options(ce_weight=0.5))
        assert_as_plain(case, 0.5)
        losses = call(case, reduction="none")
        assert losses.student.shape == losses.teacher.shape == lead

    def test_the_default_alpha_is_a_half(self) -> None:
        assert_same(call(full()), call(full(), teacher_alpha=0.5))

    def test_models_may_be_of_any_hidden_sizes(self) -> None:
        for dims in ((3, 20), (20, 3), (1, 1)):
            case = replace(dressed(draw(dims=dims, dtype=torch.float64)), options=Options("jsd"))
            for strategy in ("tokens", "vocab"):
                assert_as_plain(case, 0.5, strategy=strategy, memory_budget=BUDGET)


class TestAsLinearKdLoss:
    """Each of the two losses is linear_kd_loss's, for the teacher with the roles swapped, bit for bit."""

    def assert_as(self, case: Case, made: kd.OKDLoss, leaves: dict[str, Tensor], which: int, right: Any, own: Any) -> None:
        inputs = [leaves[name] for name in own]
        found, expected = (torch.autograd.grad(loss, inputs, upstream(loss, 2.0)) for loss in (made[which], right))
        assert_same((made[which], *found), (right, *expected))

    @one_of_each
    @pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_the_students(self, reduction: str, name: str, variant: str) -> None:
        case = full(divergence=name)
        leaves = leaves_of(case)
        student, _ = heads(case, leaves)
        _, teacher = heads(case, leaves_of(case, ()))
        options = {**keywords(case.options), "token_weight": case.token_weight, "reduction": reduction}
        with running(variant):
            made = call(case, leaves, reduction=reduction)
            right = kd.linear_kd_loss(leaves["student_hidden"], student, case.teacher_hidden, teacher, case.labels, **options)
            self.assert_as(case, made, leaves, 0, right, OF_STUDENT)

    @one_of_each
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_the_teachers(self, reduction: str, alpha: float, variant: str) -> None:
        case = full()
        leaves = leaves_of(case)
        student, _ = heads(case, leaves_of(case, ()))
        _, teacher = heads(case, leaves)
        with running(variant):
            made = call(case, leaves, reduction=reduction, teacher_alpha=alpha)
            right = kd.linear_kd_loss(
                *(leaves["teacher_hidden"], teacher, case.student_hidden, student, case.labels),
                temperature=2.0,
                kd_weight=alpha,
                ce_weight=1 - alpha,
                token_weight=case.token_weight,
                reduction=reduction,
            )
            self.assert_as(case, made, leaves, 1, right, OF_TEACHER)

    @one_of_each
    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_metrics_and_asking_for_them_changes_nothing_else(self, reduction: str, name: str, variant: str) -> None:
        case = full(divergence=name)
        with running(variant):
            found, without = run(case, reduction=reduction, return_metrics=True), run(case, reduction=reduction)
            _, right = case.loss(reduction=reduction, return_metrics=True)
        assert list(found)[2:-6] == list(right)
        for metric, value in right.items():
            torch.testing.assert_close(found[metric], value, rtol=0, atol=0)
        assert_close(found, without, 37 * torch.finfo(torch.float32).eps)

    def test_without_labels_there_is_no_cross_entropy_among_the_metrics(self) -> None:
        metrics = call(draw(), teacher_alpha=1.0, return_metrics=True).metrics
        assert metrics is not None
        assert "ce" not in metrics
        assert "kd" in metrics


class TestReturned:
    def test_two_losses_have_names_and_unpack(self) -> None:
        made = call(full())
        student, teacher = made
        assert isinstance(made, kd.OKDLoss)
        assert made.student is student
        assert made.teacher is teacher
        assert made.metrics is None
        assert len(made) == 2

    def test_metrics_come_third(self) -> None:
        made = call(full(), return_metrics=True)
        student, teacher, metrics = made
        assert made.student is student
        assert made.teacher is teacher
        assert made.metrics is metrics
        assert metrics["tokens"] == 4
        assert not any(value.requires_grad or value.dim() for value in metrics.values())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_losses_and_gradients_have_the_promised_dtypes(self, reduction: str, dtype: torch.dtype) -> None:
        found = run(full(dtype), reduction=reduction)
        of_loss = torch.float64 if dtype == torch.float64 else torch.float32
        assert {found.pop(learner).dtype for learner in ("student", "teacher")} == {of_loss}
        assert {grad.dtype for grad in found.values()} == {dtype}


class TestContracts:
    @one_of_each
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_two_runs_agree_bit_for_bit(self, reduction: str, variant: str) -> None:
        with running(variant):
            first, second = (run(full(divergence="jsd"), reduction=reduction, memory_budget=BUDGET) for _ in range(2))
        assert_same(list(first.values()), list(second.values()))

    @one_of_each
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_inputs_are_never_written_to(self, reduction: str, variant: str) -> None:
        for dtype in NATIVE_DTYPES:
            case = full(dtype)
            parts = [part for part in vars(case).values() if isinstance(part, Tensor)]
            before, versions = [part.clone() for part in parts], [part._version for part in parts]
            with running(variant):
                run(case, reduction=reduction, memory_budget=BUDGET, return_metrics=True)
            assert_same(parts, before)
            assert [part._version for part in parts] == versions

    @both_strategies
    @pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(DTYPES, 2)))
    def test_student_and_teacher_differ_in_dtype(self, student: torch.dtype, teacher: torch.dtype, strategy: str) -> None:
        case = full(student)
        to = {name: getattr(case, name).to(teacher) for name in OF_TEACHER}
        case = replace(case, **to)
        assert_as_plain(case, 0.5, strategy=strategy)
        found = run(case, strategy=strategy)
        assert {found[name].dtype for name in OF_STUDENT} == {student}
        assert {found[name].dtype for name in OF_TEACHER} == {teacher}
        of_loss = torch.float64 if torch.float64 in (student, teacher) else torch.float32
        assert found["student"].dtype == found["teacher"].dtype == of_loss

    @pytest.mark.parametrize("variant", parameters(("triton", "triton-vocab")))
    @pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(NATIVE_DTYPES, 2)))
    def test_they_differ_on_a_gpu_too(self, student: torch.dtype, teacher: torch.dtype, variant: str) -> None:
        """There products run in each model's own dtype, and one scratch serves both gradients."""
        case = full(student)
        case = replace(case, **{name: getattr(case, name).to(teacher) for name in OF_TEACHER})
        with running(variant):
            assert_as_plain(case, 0.5, per_token=False)

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_autocast(self, reduction: str, strategy: str) -> None:
        """bfloat16 hidden states over float32 master weights."""
        case = full(temperature=1.0)
        case = replace(case, student_hidden=case.student_hidden.bfloat16(), teacher_hidden=case.teacher_hidden.bfloat16())
        right = run(replace(case, **{name: getattr(case, name).float() for name in EVERYTHING}), reduction=reduction)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = run(case, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert found["student"].dtype == found["teacher"].dtype == torch.float32
        assert {name: found[name].dtype for name in EVERYTHING} == {name: getattr(case, name).dtype for name in EVERYTHING}
        assert_close(found, right, 4 * torch.finfo(torch.bfloat16).eps)

    @both_strategies
    def test_float16_gradients_of_single_tokens_survive_until_a_gradient_scaler_multiplies_them(self, strategy: str) -> None:
        case, scale = draw(tokens=(4096,), vocab=101, spread=1.0, dtype=torch.float16), 2.0**14
        exact = plain(case, 1.0)
        leaves = leaves_of(case)
        made = call(case, leaves, teacher_alpha=1.0, strategy=strategy)
        grads = torch.autograd.grad((made.student + made.teacher) * scale, list(leaves.values()))
        for name, grad in zip(leaves, grads, strict=True):
            right = exact[name.split("_")[0]][name] * scale
            off = (grad.double() - right).square().mean().sqrt() / right.square().mean().sqrt()
            assert off <= 2 * torch.finfo(torch.float16).eps, name

    @one_of_each
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_a_padded_vocabulary_is_cut_and_the_padding_gets_no_gradient(self, reduction: str, variant: str) -> None:
        case = full(divergence="jsd")
        rows = {name: part for name, part in leaves_of(case, ()).items() if not name.endswith("hidden")}
        padding = {"student": 3, "teacher": 11}
        padded = {
            name: torch.cat([part, part.new_full((padding[name.split("_")[0]], *part.shape[1:]), torch.nan)])
            for name, part in rows.items()
        }
        with running(variant):
            right = run(case, reduction=reduction)
            found = run(replace(case, **padded), reduction=reduction, vocab_size=37)
        for name in rows:
            assert (found[name][37:] == 0).all()
            found[name] = found[name][:37]
        assert_same(list(found.values()), list(right.values()))

    @one_of_each
    def test_views_of_any_strides(self, variant: str) -> None:
        case = replace(dressed(draw(tokens=(2, 3))), options=Options(ce_weight=0.5))
        views = {name: strided(part) for name, part in vars(case).items() if isinstance(part, Tensor)}
        assert not views["teacher_weight"].is_contiguous()
        with running(variant):
            assert_close(run(replace(case, **views)), run(case), 4 * torch.finfo(torch.float32).eps)

    @one_of_each
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_a_batch_without_a_token_to_learn_from_is_zero(self, reduction: str, variant: str) -> None:
        case = full()
        assert case.labels is not None
        assert case.token_weight is not None
        masked = replace(case, labels=torch.full_like(case.labels, -100))
        weightless = replace(case, token_weight=torch.zeros_like(case.token_weight))
        per_token = {name: getattr(case, name)[:0] for name in ("student_hidden", "teacher_hidden", "labels", "token_weight")}
        with running(variant):
            for nothing in (masked, weightless, replace(case, **per_token)):
                found = run(nothing, reduction=reduction, return_metrics=True)
                for name, value in found.items():
                    assert (value == 0).all(), name

    @one_of_each
    def test_what_dropped_tokens_hold_does_not_matter(self, variant: str) -> None:
        case = full()
        assert case.labels is not None
        assert case.token_weight is not None
        with running(variant):
            right = run(case, return_metrics=True)
            dropped = (case.labels == -100) | (case.token_weight == 0)
            assert dropped.sum() == 2
            case.student_hidden[dropped], case.teacher_hidden[dropped] = torch.nan, torch.inf
            assert_same(list(run(case, return_metrics=True).values()), list(right.values()))
