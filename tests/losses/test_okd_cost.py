"""What a step of two learners costs: the products of both and no more, within the budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.engine import gradients, tokens, vocab
from tests.support.cases import (
    NATIVE_DTYPES,
    Case,
    InsideOperators,
    both_strategies,
    draw,
    parameters,
    running,
)
from tests.support.counting import STUDENT, TEACHER, US, UT, N, Products, V
from tests.support.okd import (
    EVERYTHING,
    FROZEN_HEAD,
    call,
    full,
    leaves_of,
)
from tests.support.oracle import Options


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
    module = {"tokens": tokens, "vocab": vocab}[strategy]
    borrowed = module.borrowed

    def recording(block: int, tiles: Any, *rest: Any) -> Any:
        taken.append(sum(rows * columns * of.itemsize for (rows, columns), of in tiles))
        return borrowed(block, tiles, *rest)

    monkeypatch.setattr(module, "borrowed", recording)
    least = 37 if strategy == "tokens" else 6  # one token or one column: less there cannot be
    with running(backend):
        call(case, leaves_of(case), strategy=strategy, memory_budget=memory_budget)
    smallest = 12 * least  # at most three float32 tiles, or two and two of 16 bits
    assert taken
    assert all(0 < size <= max(memory_budget, smallest) for size in taken)
