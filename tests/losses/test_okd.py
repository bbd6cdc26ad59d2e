"""Online distillation gives each model the loss and gradients that the formulas give, and costs what the products cost."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.engine import gradients
from kdkernels.engine import run as loop
from tests.backends.test_backends import SPREADS, yardsticks
from tests.engine.test_cost import STUDENT, TEACHER, US, UT, N, Products, V
from tests.losses.test_inputs import CASE, LABELS, LINEAR, OPTIONS, forbid_work, refused
from tests.losses.test_operators import Recorder
from tests.support import oracle
from tests.support.cases import (
    CHOICES,
    NATIVE_DTYPES,
    Case,
    InsideOperators,
    Result,
    assert_as_good_as_eager,
    draw,
    dressed,
    keywords,
    parameters,
    ratios,
    running,
    strided,
)
from tests.support.oracle import Options

OF_STUDENT = ("student_hidden", "student_weight", "student_bias")
OF_TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")
EVERYTHING = (*OF_STUDENT, *OF_TEACHER)
FROZEN_HEAD = ("student_hidden", "student_weight", "teacher_hidden")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (*NATIVE_DTYPES, torch.float64)
# In small cases the budget is two tokens of six, or a dozen columns of 37.
BUDGET = 1000
both_strategies = pytest.mark.parametrize("strategy", ["tokens", "vocab"])
one_of_each = pytest.mark.parametrize("variant", parameters(("native", "native-vocab", "reference", "reference-vocab")))


def leaves_of(case: Case, learn: tuple[str, ...] = EVERYTHING) -> dict[str, Tensor]:
    parts = {name: getattr(case, name) for name in EVERYTHING}
    return {name: part.detach().requires_grad_(name in learn) for name, part in parts.items() if part is not None}


def heads(case: Case, leaves: dict[str, Tensor]) -> tuple[kd.LMHead, kd.LMHead]:
    return (
        kd.LMHead(leaves["student_weight"], leaves.get("student_bias"), case.student_scale, case.student_softcap),
        kd.LMHead(leaves["teacher_weight"], leaves.get("teacher_bias"), case.teacher_scale, case.teacher_softcap),
    )


def call(case: Case, leaves: dict[str, Tensor] | None = None, **more: Any) -> kd.OKDLoss:
    leaves = leaves_of(case, ()) if leaves is None else leaves
    student, teacher = heads(case, leaves)
    options = {**keywords(case.options), "token_weight": case.token_weight, **more}
    del options["t"]
    return kd.linear_okd_loss(leaves["student_hidden"], student, leaves["teacher_hidden"], teacher, case.labels, **options)


def upstream(loss: Tensor, end: float) -> Tensor:
    """An own factor for each token, 1 to ``end``; 1 for a loss of all."""
    return torch.linspace(1.0, end, loss.numel(), dtype=loss.dtype).view(loss.shape)


def run(case: Case, learn: tuple[str, ...] = EVERYTHING, **more: Any) -> Result:
    """Both losses, metrics if asked for, and the gradients of what learns."""
    leaves = leaves_of(case, learn)
    made = call(case, leaves, **more)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(made[:2], list(asked.values()), [upstream(made.student, 2.0), upstream(made.teacher, 3.0)])
    losses = {"student": made.student.detach(), "teacher": made.teacher.detach()}
    return {**losses, **(made.metrics or {}), **dict(zip(asked, grads, strict=True))}


def plain(case: Case, alpha: float, dtype: torch.dtype = torch.float64) -> dict[str, Result]:
    """The formulas with autograd, in ``dtype``."""

    def logits(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        return (
            oracle.after_head(*(leaves.get(name) for name in OF_STUDENT), case.student_scale, case.student_softcap),  # type: ignore[arg-type]
            oracle.after_head(*(leaves.get(name) for name in OF_TEACHER), case.teacher_scale, case.teacher_softcap),  # type: ignore[arg-type]
        )

    return oracle.online(logits, leaves_of(case), dtype, case.labels, case.token_weight, case.options, alpha)


def results(case: Case, alpha: float, per_token: bool = True, **more: Any) -> dict[str, Result]:
    """The library's, as ``plain`` gives them; the losses of the tokens, which take a call of their own, only if ``per_token``."""
    leaves = leaves_of(case)
    made = call(case, leaves, teacher_alpha=alpha, **more)
    losses = None
    if per_token:
        with torch.no_grad():
            losses = call(case, leaves, teacher_alpha=alpha, **{**more, "reduction": "none", "normalizer": None})
    grads = dict(zip(leaves, torch.autograd.grad(made.student + made.teacher, list(leaves.values())), strict=True))
    return {
        learner: {
            **({} if losses is None else {"losses": getattr(losses, learner)}),
            "loss": getattr(made, learner).detach(),
            **{name: grad for name, grad in grads.items() if name.startswith(learner)},
        }
        for learner in ("student", "teacher")
    }


def full(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Six tokens, one of them ignored and one of weight 0, with everything that heads can have."""
    return replace(dressed(draw(dtype=dtype)), options=Options(**{"temperature": 2.0, "ce_weight": 0.5, **options}))


def assert_same(found: Any, right: Any) -> None:
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_close(found: Result, right: Result, share: float) -> None:
    """Within a share of each result's largest entry."""
    for name, value in right.items():
        atol = share * value.double().abs().max().item() if value.numel() else 0.0
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=0, atol=atol, msg=lambda text, of=name: f"{of}: {text}"
        )


def assert_as_plain(case: Case, alpha: float, **more: Any) -> None:
    exact = plain(case, alpha)
    share = 37 * max(torch.finfo(part.dtype).eps for part in (case.student_weight, case.teacher_weight))
    for learner, found in results(case, alpha, **more).items():
        assert_close(found, {name: exact[learner][name] for name in found}, share)


MAIN = ("forward_kl", "reverse_kl", "jsd")
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


class TestProducts:
    """Counted, and what a gradient that nobody asks for would take."""

    CASE = draw(tokens=(N,), vocab=V, dims=(STUDENT, TEACHER))
    # With two learners a column of all tokens takes three float32 tiles: this is four blocks of the vocabulary.
    BLOCKS = 16 * N * 12

    def count(self, learn: tuple[str, ...], case: Case = CASE, **more: Any) -> int:
        with Products() as products:
            made = call(case, leaves_of(case, learn), **{"teacher_alpha": 1.0, **more})
            if learn:
                sum(loss.sum() for loss in made[:2] if loss.requires_grad).backward()  # type: ignore[union-attr]
        return products.flops

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("memory_budget", [None, 500, 1])
    def test_the_teacher_adds_its_own_gradients_and_chunks_add_none(self, memory_budget: int | None, name: str) -> None:
        case = replace(self.CASE, options=Options(name))
        options: dict[str, Any] = {"strategy": "tokens", "memory_budget": memory_budget}
        assert self.count(FROZEN_HEAD, case, **options) == 3 * US + 2 * UT
        assert self.count(EVERYTHING, case, **options) == 3 * US + 3 * UT

    @pytest.mark.parametrize("variant", parameters(("native", "reference")))
    @pytest.mark.parametrize("name", kd.divergences())
    def test_streaming_multiplies_again_for_each_sweep(self, name: str, variant: str) -> None:
        case = replace(self.CASE, options=Options(name))
        memory = self.BLOCKS if variant == "native" else 10 * self.BLOCKS
        options: dict[str, Any] = {"strategy": "vocab", "memory_budget": memory}
        more = 0 if name in ("forward_kl", "reverse_kl") else US + UT
        with running(variant):
            assert self.count(FROZEN_HEAD, case, **options) == 4 * US + 3 * UT + more
            assert self.count(EVERYTHING, case, **options) == 4 * US + 4 * UT + more
            assert self.count(FROZEN_HEAD, case, **options, return_metrics=True) == 5 * US + 4 * UT
            assert self.count((), case, **options) == US + UT + more

    @both_strategies
    def test_a_vocabulary_that_fits_is_multiplied_once(self, strategy: str) -> None:
        assert self.count(FROZEN_HEAD, strategy=strategy) == 3 * US + 2 * UT

    @both_strategies
    def test_without_gradients_there_are_two(self, strategy: str) -> None:
        assert self.count((), strategy=strategy) == US + UT
        with torch.no_grad(), Products() as products:
            call(self.CASE, leaves_of(self.CASE), teacher_alpha=1.0, strategy=strategy)
        assert products.flops == US + UT

    @both_strategies
    def test_only_the_gradients_that_are_asked_for_cost(self, strategy: str) -> None:
        for learn, products in {
            ("student_hidden",): US,
            ("student_hidden", "student_weight"): 2 * US,
            ("teacher_hidden",): UT,
            ("teacher_weight",): UT,
            ("student_weight", "teacher_weight"): US + UT,
        }.items():
            assert self.count(learn, strategy=strategy) == US + UT + products

    def test_losses_per_token_are_computed_again_in_the_backward_for_who_asks(self) -> None:
        assert self.count(FROZEN_HEAD, reduction="none") == 4 * US + 3 * UT
        for which, products in ((0, 3 * US + UT), (1, US + 2 * UT)):
            made = call(self.CASE, leaves_of(self.CASE, FROZEN_HEAD), teacher_alpha=1.0, reduction="none")
            with Products() as counted:
                made[which].sum().backward()
            assert counted.flops == products

    @pytest.mark.parametrize("kept", [0, 1, N // 2, N])
    def test_dropped_tokens_cost_nothing(self, kept: int) -> None:
        labels = torch.full((N,), -100)
        labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:kept]] = 3
        for case in (replace(self.CASE, labels=labels), replace(self.CASE, token_weight=(labels == 3).float())):
            assert self.count(FROZEN_HEAD, case) == (3 * US + 2 * UT) * kept // N

    @both_strategies
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_a_frozen_heads_gradient_is_neither_allocated_nor_added_to(
        self, dtype: torch.dtype, reduction: str, strategy: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = draw(tokens=(N,), vocab=V, dims=(STUDENT, TEACHER), dtype=dtype)
        added: list[int] = []
        add = gradients.add_head_grad
        monkeypatch.setattr(
            gradients, "add_head_grad", lambda dx, hidden, *rest: added.append(hidden.shape[1]) or add(dx, hidden, *rest)
        )
        allocated: list[tuple[int, ...]] = []

        class Allocations(InsideOperators):
            def after(self, name: str, made: Any) -> None:
                if name.startswith(("aten::empty", "aten::zeros", "aten::new_")):
                    allocated.append(tuple(made.shape))

        for learn, widths in ((FROZEN_HEAD, {STUDENT}), (("teacher_weight", *FROZEN_HEAD), {STUDENT, TEACHER})):
            added.clear(), allocated.clear()
            with Allocations():
                made = call(case, leaves_of(case, learn), teacher_alpha=1.0, reduction=reduction, strategy=strategy)
                (made.student + made.teacher).sum().backward()
            assert set(added) == widths
            assert {shape[1] for shape in allocated if shape[:1] == (V,) and len(shape) == 2} == widths


@pytest.mark.parametrize("backend", parameters(("native", "reference", "triton")))
@both_strategies
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("memory_budget", [600, 2000, 5000])
def test_the_scratch_of_both_gradients_is_within_the_budget(
    memory_budget: int, dtype: torch.dtype, strategy: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, taken = full(dtype), []
    borrowed = loop.borrowed

    def recording(block: int, tiles: Any, *rest: Any) -> Any:
        taken.append(sum(rows * columns * of.itemsize for (rows, columns), of in tiles))
        return borrowed(block, tiles, *rest)

    monkeypatch.setattr(loop, "borrowed", recording)
    least = 37 if strategy == "tokens" else 6  # one token or one column: less there cannot be
    with running(backend):
        call(case, leaves_of(case), strategy=strategy, memory_budget=memory_budget)
    smallest = 12 * least  # at most three float32 tiles, or two and two of 16 bits
    assert taken
    assert all(0 < size <= max(memory_budget, smallest) for size in taken)


class TestAutograd:
    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_each_loss_has_gradients_for_its_own_model_only(self, reduction: str, strategy: str) -> None:
        case = full()
        together = run(case, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        for which, own in enumerate((OF_STUDENT, OF_TEACHER)):
            leaves = leaves_of(case)
            loss = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)[which]
            loss.backward(upstream(loss, 2.0 + which))
            for name, leaf in leaves.items():
                if name in own:
                    torch.testing.assert_close(leaf.grad, together[name], rtol=0, atol=0)
                else:
                    assert leaf.grad is None, name

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_added_or_one_after_the_other_in_either_order(self, dtype: torch.dtype, reduction: str, strategy: str) -> None:
        case = full(dtype)
        grads = []
        for order in ("added", (0, 1), (1, 0)):
            leaves = leaves_of(case)
            made = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
            if order == "added":
                (made.student + made.teacher).sum().backward()
            else:
                made[order[0]].sum().backward(retain_graph=True)
                made[order[1]].sum().backward()
            grads.append([leaf.grad for leaf in leaves.values()])
        assert_same(grads[1], grads[0])
        assert_same(grads[2], grads[0])

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_backward_twice_gives_the_same_gradient_twice(self, dtype: torch.dtype, reduction: str, strategy: str) -> None:
        case = full(dtype)
        leaves = leaves_of(case)
        made = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        total, inputs = (0.25 * made.student + 3 * made.teacher).sum(), list(leaves.values())
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        kept = [grad.clone() for grad in first]
        second = torch.autograd.grad(total, inputs, retain_graph=True)
        assert_same(second, kept)
        for grad in (*first, *second):
            grad.fill_(torch.nan)  # what a caller does with a gradient is their own business
        assert_same(torch.autograd.grad(total, inputs), kept)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_each_loss_has_its_own_upstream_gradient(self, reduction: str) -> None:
        case = full(torch.float64)
        leaves = leaves_of(case)
        inputs = list(leaves.values())
        made = call(case, leaves, reduction=reduction)
        once = torch.autograd.grad((made.student + made.teacher).sum(), inputs, retain_graph=True)
        scaled = torch.autograd.grad((3 * made.student - 0.5 * made.teacher).sum(), inputs)
        for name, one, other in zip(leaves, scaled, once, strict=True):
            torch.testing.assert_close(one, other * (3.0 if name in OF_STUDENT else -0.5), rtol=1e-12, atol=1e-15)

    @both_strategies
    def test_each_token_has_its_own_upstream_gradient_in_each_loss(self, strategy: str) -> None:
        """Zeros in one, in the other and in both: a token counts where either of its two is not 0."""
        case = replace(full(torch.float64), labels=torch.arange(6), token_weight=None)
        leaves = leaves_of(case)
        inputs = list(leaves.values())
        factors = torch.tensor([[1.0, -2.0, 0.5, 0.0, 0.0, 3.0], [2.0, 0.0, 1.0, 0.0, -1.0, 1e-3]]).double()
        made = call(case, leaves, reduction="none", strategy=strategy, memory_budget=BUDGET)
        together = torch.autograd.grad(made[:2], inputs, list(factors), retain_graph=True)
        for name, inp, found in zip(leaves, inputs, together, strict=True):
            which = 0 if name in OF_STUDENT else 1
            by_hand = sum(
                factor * torch.autograd.grad(made[which][token], inp, retain_graph=True)[0]
                for token, factor in enumerate(factors[which].tolist())
            )
            torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-14)

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize(
        "learn",
        [("student_hidden",), ("teacher_hidden",), ("teacher_bias",), FROZEN_HEAD, OF_TEACHER, ("student_bias", "teacher_weight")],
    )
    def test_gradients_go_only_where_they_are_asked_for(self, learn: tuple[str, ...], reduction: str, strategy: str) -> None:
        case = full()
        everything = run(case, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        leaves = leaves_of(case, learn)
        made = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        for loss, end in zip(made, (2.0, 3.0), strict=True):
            assert loss.requires_grad  # one function makes both
            loss.backward(upstream(loss, end), retain_graph=True)
        for name, leaf in leaves.items():
            if name in learn:
                torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-6, atol=1e-9)
            else:
                assert leaf.grad is None

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_there_are_only_losses(self, context: Callable[[], Any]) -> None:
        case = full()
        right = [loss.detach() for loss in call(case, leaves_of(case))]
        with context():
            made = call(case, leaves_of(case))
        assert not any(loss.requires_grad for loss in made)
        assert_same(made, right)

    def test_the_teachers_modules_learn_through_its_hidden_states(self) -> None:
        """A LoRA module below a frozen head, as in the paper: gradients arrive, and those of the student's loss do not."""
        case = full(torch.float64)
        module = torch.nn.Linear(12, 12, dtype=torch.float64)
        leaves = leaves_of(case, FROZEN_HEAD)
        leaves["teacher_hidden"] = module(case.teacher_hidden)
        made = call(case, leaves)
        made.student.backward(retain_graph=True)
        assert module.weight.grad is None
        made.teacher.backward()
        through = plain(replace(case, teacher_hidden=leaves["teacher_hidden"].detach()), 0.5)["teacher"]["teacher_hidden"]
        torch.testing.assert_close(module.weight.grad, through.mT @ case.teacher_hidden, rtol=1e-10, atol=1e-13)

    def test_second_derivatives_are_refused(self) -> None:
        leaves = leaves_of(full(torch.float64))
        made = call(full(torch.float64), leaves)
        (first,) = torch.autograd.grad((made.student + made.teacher).square(), [leaves["teacher_hidden"]], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


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


class TestSpecialValues:
    def banning(self, name: str = "forward_kl", dtype: torch.dtype = torch.float64) -> Case:
        """Tokens banned in the student, in the teacher and in both."""
        case = full(dtype, divergence=name)
        case = replace(case, student_softcap=None, teacher_softcap=None, labels=torch.tensor([7, -100, 20, 36, 7, 8]))
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case.student_bias[:5], case.teacher_bias[3:7] = -torch.inf, -torch.inf
        return case

    @pytest.mark.parametrize("variant", parameters(("native", "native-vocab", "reference-vocab", "triton", "triton-vocab")))
    @pytest.mark.parametrize("name", kd.divergences())
    def test_banned_tokens_add_nothing(self, name: str, variant: str) -> None:
        case = self.banning(name, torch.float32)
        with running(variant):
            assert_as_plain(case, 0.5)

    @one_of_each
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_token_is_nan_in_both_losses_and_no_other_is(self, model: str, variant: str) -> None:
        case = draw(options=Options("jsd"))
        with running(variant):
            right = run(case, reduction="none", teacher_alpha=1.0)
            getattr(case, f"{model}_hidden")[2, 3] = torch.nan
            found = run(case, reduction="none", teacher_alpha=1.0)
        others = [0, 1, 3, 4, 5]
        for name in ("student", "teacher", "student_hidden", "teacher_hidden"):
            assert found[name][2].isnan().all(), name
            torch.testing.assert_close(found[name][others], right[name][others], rtol=1e-6, atol=1e-8)
        for name in ("student_weight", "teacher_weight"):
            assert found[name].isnan().all(), name

    @one_of_each
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_entry_makes_nan(self, model: str, bad: float, variant: str) -> None:
        case = replace(full(), student_softcap=None, teacher_softcap=None)
        getattr(case, f"{model}_bias")[5] = bad
        with running(variant):
            for name, value in run(case).items():
                assert value.isnan().any(), name

    @one_of_each
    def test_a_loss_that_does_not_look_at_the_other_model_goes_on_when_that_breaks(self, variant: str) -> None:
        with running(variant):
            case = full(kd_weight=0.0)
            right = run(case)
            case.teacher_hidden[0] = torch.nan
            broken = run(case)
            for name in ("student", *OF_STUDENT):
                torch.testing.assert_close(broken[name], right[name], rtol=0, atol=0)
            assert broken["teacher"].isnan()
            case = full()
            right = run(case, teacher_alpha=0.0)
            case.student_hidden[0] = torch.nan
            broken = run(case, teacher_alpha=0.0)
            for name in ("teacher", *OF_TEACHER):
                torch.testing.assert_close(broken[name], right[name], rtol=0, atol=0)
            assert broken["student"].isnan()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_keeps_the_contracts_of_torch_library(dtype: torch.dtype, bare: bool) -> None:
    case = draw(dtype=dtype, options=Options("jsd")) if bare else full(dtype)
    with Recorder() as recorder:
        call(case, leaves_of(case, FROZEN_HEAD if bare else EVERYTHING), teacher_alpha=1.0, return_metrics=not bare)
    torch.library.opcheck(torch.ops.kdkernels.linear_okd.default, recorder.calls["linear_okd"])


def test_the_operators_fake_says_what_two_dtypes_make() -> None:
    case = full(torch.bfloat16)
    case = replace(case, **{name: getattr(case, name).double() for name in OF_TEACHER})
    with Recorder() as recorder:
        call(case, leaves_of(case))
    torch.library.opcheck(torch.ops.kdkernels.linear_okd.default, recorder.calls["linear_okd"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("reduction", "dtype"), [("mean", torch.float32), ("mean", torch.float16), ("none", torch.float32)])
def test_it_compiles_to_one_graph(reduction: str, dtype: torch.dtype) -> None:
    case = full(dtype, divergence="jsd")

    def step(leaves: dict[str, Tensor]) -> Any:
        made = call(case, leaves, reduction=reduction, return_metrics=True)
        student, teacher, metrics = made
        return (made.student * 1.5).sum() + teacher.sum(), student.detach(), metrics

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {name: leaf.clone().detach().requires_grad_() for name, leaf in leaves_of(case).items()}
        total, student, metrics = function(leaves)
        total.backward()
        found.append([total.detach(), student, *metrics.values(), *(leaf.grad for leaf in leaves.values())])
    for compiled, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, expected, rtol=2 * torch.finfo(compiled.dtype).eps, atol=1e-7)


class TestBadInput:
    """Refused before any work, in words that name the argument."""

    @pytest.fixture(autouse=True)
    def nothing_is_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forbid_work(monkeypatch)

    def online(self, **changed: Any) -> Any:
        arguments: dict[str, Any] = {
            "student_hidden": CASE.student_hidden,
            "student_head": CASE.student_weight,
            "teacher_hidden": CASE.teacher_hidden,
            "teacher_head": CASE.teacher_weight,
            "labels": None,
            "teacher_alpha": 1.0,
        }
        return kd.linear_okd_loss(**{**arguments, **changed})

    def test_the_good_input_would_work_and_its_teacher_may_require_grad(self, monkeypatch: pytest.MonkeyPatch) -> None:
        learns = {"teacher_hidden": CASE.teacher_hidden.clone().requires_grad_(), "labels": LABELS, "teacher_alpha": 0.5}
        with pytest.raises(AssertionError, match="work was done"):
            self.online(**learns)
        monkeypatch.undo()
        made = self.online(**learns)
        assert made.teacher.requires_grad
        assert torch.stack(list(made)).isfinite().all()

    @pytest.mark.parametrize(
        ("wrong", "error", "words"),
        [
            ({"teacher_alpha": 1.5}, ValueError, ("teacher_alpha", "[0, 1]", "1.5")),
            ({"teacher_alpha": -0.1}, ValueError, ("teacher_alpha", "[0, 1]", "-0.1")),
            ({"teacher_alpha": torch.nan}, ValueError, ("teacher_alpha", "[0, 1]", "nan")),
            ({"teacher_alpha": torch.inf}, ValueError, ("teacher_alpha", "[0, 1]", "inf")),
            ({"teacher_alpha": "half"}, TypeError, ("teacher_alpha", "[0, 1]", "str")),
            ({"teacher_alpha": True}, TypeError, ("teacher_alpha", "[0, 1]", "bool")),
            ({"teacher_alpha": None}, TypeError, ("teacher_alpha", "[0, 1]", "NoneType")),
            ({"teacher_alpha": torch.tensor(0.5)}, TypeError, ("teacher_alpha", "[0, 1]", "Tensor")),
            ({"teacher_alpha": 0.5}, ValueError, ("labels is None", "teacher_alpha=0.5", "cross-entropy")),
            ({"teacher_alpha": 0}, ValueError, ("labels is None", "teacher_alpha=0", "cross-entropy")),
            ({"t": 0.5}, TypeError, ("'t'",)),
        ],
    )
    def test_teacher_alpha_and_the_labels_it_needs(
        self, wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]
    ) -> None:
        with refused(error, *words):
            self.online(**wrong)

    @pytest.mark.parametrize(
        ("wrong", "error", "words"),
        [one for one in [*OPTIONS, *LINEAR] if "t" not in one[0] and "linear_okd_loss" not in one[2]],
    )
    def test_what_linear_kd_loss_refuses(self, wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
        with refused(error, *words):
            self.online(**wrong)
