"""Metrics come from the same pass: those of the oracle, without changing loss or gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import oracle
from tests.support.cases import VARIANTS, Case, draw, dressed, keywords, parameters, running
from tests.support.oracle import Options

NAMES = {"kd", "ce", "target_entropy", "student_entropy", "agreement", "overlap", "tokens"}
every_variant = pytest.mark.parametrize("variant", parameters(VARIANTS))


def dressed_case(name: str, t: float, temperature: float) -> Case:
    # Weights, factors and T² are in the loss and not in the metrics.
    options = Options(name, t=t, temperature=temperature, kd_weight=3.0, ce_weight=0.5)
    return replace(dressed(draw(tokens=(2, 6), vocab=1100, spread=4.0)), options=options)


def expected(case: Case) -> dict[str, Tensor]:
    return oracle.metrics(*case.logits(), case.labels, case.token_weight, case.options)


def assert_metrics(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(found) == set(right)
    for name, value in right.items():
        assert found[name].shape == ()
        assert not found[name].requires_grad
        torch.testing.assert_close(found[name].double(), value, rtol=2e-5, atol=1e-6, msg=lambda text, of=name: f"{of}: {text}")


@every_variant
@pytest.mark.parametrize("name", kd.divergences())
@pytest.mark.parametrize(("t", "temperature"), [(1.0, 1.0), (0.4, 2.0), (0.0, 1.0)])
def test_they_are_those_of_the_oracle(variant: str, name: str, t: float, temperature: float) -> None:
    case = dressed_case(name, t, temperature)
    with running(variant):
        _, found = case.loss(return_metrics=True)
        x, z = (logits.float() for logits in case.logits())
        options = {**keywords(case.options), "token_weight": case.token_weight}
        _, of_logits = kd.kd_loss(x, z, case.labels, **options, return_metrics=True)
    assert set(found) == NAMES
    assert_metrics(found, expected(case))
    assert_metrics(of_logits, expected(case))


@every_variant
def test_cross_entropy_is_there_only_with_labels(variant: str) -> None:
    case = draw()
    with running(variant):
        _, without = case.loss(return_metrics=True)
        assert set(without) == NAMES - {"ce"}
        assert_metrics(without, expected(case))
        # Labels whose loss nobody asks for still give the metric.
        case = replace(case, labels=torch.arange(6))
        _, found = case.loss(return_metrics=True)
        assert_metrics(found, expected(case))


@every_variant
def test_the_cut_vocabulary_is_the_only_one(variant: str) -> None:
    case = draw(vocab=37)
    cut = replace(case, student_weight=case.student_weight[:30], teacher_weight=case.teacher_weight[:30])
    with running(variant):
        _, found = case.loss(return_metrics=True, vocab_size=30)
    assert_metrics(found, expected(cut))


@every_variant
@pytest.mark.parametrize("memory_budget", [1000, 20_000])
def test_chunks_do_not_show(variant: str, memory_budget: int) -> None:
    case = dressed_case("jsd", 0.5, 2.0)
    with running(variant):
        _, found = case.loss(return_metrics=True, memory_budget=memory_budget)
    assert_metrics(found, expected(case))


@every_variant
def test_banned_tokens_have_no_entropy(variant: str) -> None:
    x, z = (logits.float() for logits in draw().logits())
    x[:, 3], z[:, 5] = -torch.inf, -torch.inf
    with running(variant):
        _, found = kd.kd_loss(x, z, return_metrics=True, t=0.5)
    assert_metrics(found, oracle.metrics(x.double(), z.double(), None, None, Options(t=0.5)))


@every_variant
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_bad_token_shows_in_the_means(variant: str, model: str) -> None:
    x, z = (logits.float() for logits in draw().logits())
    (x if model == "student" else z)[2, 3] = torch.nan
    with running(variant):
        _, found = kd.kd_loss(x, z, return_metrics=True)
    for name in ("kd", "student_entropy" if model == "student" else "target_entropy", "overlap"):
        assert found[name].isnan(), name
    assert found["tokens"] == 6


def result(case: Case, **more: Any) -> list[Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    loss = case.loss(leaves, **more)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return [loss.detach(), *torch.autograd.grad(loss.sum(), list(leaves.values()))]


@every_variant
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_asking_for_them_changes_neither_loss_nor_gradient(variant: str, reduction: str) -> None:
    case = dressed_case("skew_reverse_kl", 0.6, 2.0)
    with running(variant):
        without, asked = result(case, reduction=reduction), result(case, reduction=reduction, return_metrics=True)
    for one, other in zip(asked, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@every_variant
@pytest.mark.parametrize("return_metrics", [False, True])
def test_a_term_of_weight_zero_is_not_looked_at(variant: str, return_metrics: bool) -> None:
    """Training on labels alone goes on when the teacher breaks; the metrics say that it did."""
    case = replace(draw(), labels=torch.arange(6), options=Options(kd_weight=0.0, ce_weight=1.0))
    exact = case.plain()
    case.teacher_hidden[1] = torch.nan
    with running(variant):
        for found, right in zip(
            result(case, return_metrics=return_metrics), [exact["loss"], *list(exact.values())[2:]], strict=True
        ):
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-6)
        x, z = (logits.float() for logits in case.logits())
        loss = kd.kd_loss(x.requires_grad_(), z, case.labels, kd_weight=0.0, ce_weight=1.0)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, [x])[0].isfinite().all()
