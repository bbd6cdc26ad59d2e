"""What a step costs: the fewest products, no more scratch than the budget, and both as the plan says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.engine import gradients
from tests.support.counting import US, UT, N, Products, V, case, count
from tests.support.oracle import Options


class TestProducts:
    @pytest.mark.parametrize("name", kd.divergences())
    def test_three_of_the_students_and_one_of_the_teachers(self, name: str) -> None:
        assert count(case(options=Options(name, t=0.5))) == 3 * US + UT

    def test_a_frozen_head_costs_none(self) -> None:
        assert count(case(), ("student_hidden",)) == 2 * US + UT

    def test_frozen_hidden_states_cost_none(self) -> None:
        assert count(case(), ("student_weight",)) == 2 * US + UT

    def test_a_bias_costs_none(self) -> None:
        biased = case(student_bias=torch.zeros(V))
        assert count(biased, ("student_bias",)) == US + UT

    def test_without_gradients_there_are_two(self) -> None:
        assert count(case(), ()) == US + UT
        with torch.no_grad(), Products() as products:
            case().loss({name: leaf.detach().requires_grad_() for name, leaf in case().learned().items()})
        assert products.flops == US + UT

    def test_a_teacher_that_nobody_looks_at_costs_none(self) -> None:
        on_labels = case(labels=torch.zeros(N, dtype=torch.int64), options=Options(kd_weight=0.0, ce_weight=1.0))
        assert count(on_labels) == 3 * US

    def test_losses_per_token_are_computed_again_in_the_backward(self) -> None:
        assert count(case(), reduction="none") == 4 * US + 2 * UT

    @pytest.mark.parametrize("kept", [0, 1, N // 2, N])
    def test_dropped_tokens_cost_nothing(self, kept: int) -> None:
        labels = torch.full((N,), -100)
        labels[torch.randperm(N, generator=torch.Generator().manual_seed(0))[:kept]] = 3
        assert count(case(labels=labels)) == (3 * US + UT) * kept // N
        assert count(case(token_weight=(labels == 3).float())) == (3 * US + UT) * kept // N

    def test_a_cut_vocabulary_costs_what_is_left(self) -> None:
        assert count(case(), vocab_size=V // 2) == (3 * US + UT) // 2

    @pytest.mark.parametrize("memory_budget", [None, 500, 1])
    def test_chunks_add_none(self, memory_budget: int | None) -> None:
        assert count(case(), memory_budget=memory_budget, strategy="tokens") == 3 * US + UT

    def test_a_frozen_heads_gradient_is_never_touched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def touched(*_: Any) -> None:
            raise AssertionError("a gradient of a frozen head was added to")

        monkeypatch.setattr(gradients, "add_head_grad", touched)
        for reduction in ("mean", "none"):
            count(case(), ("student_hidden",), reduction=reduction)
