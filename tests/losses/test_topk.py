"""Distillation from the k tokens that an offline teacher kept: the loss and gradients that the formulas give, at three products."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import kdkernels as kd
from tests.support.cases import (
    DTYPES,
    MAIN,
    SPREADS,
    Case,
    assert_as_good_as_eager,
    assert_close,
    assert_same,
    both_strategies,
    draw,
    dressed,
    every_divergence,
    keywords,
    ratios,
    strided,
    yardsticks,
)
from tests.support.oracle import Options
from tests.support.topk import BUDGET, INF, TAILS, Kept, both_tails, full, keep, log_of_rest

# All divergences in float32, those that are most used in every dtype.
ACCURACY = [(dtype, name) for dtype in DTYPES for name in kd.divergences() if dtype == torch.float32 or name in MAIN]


@functools.cache
def compared(name: str, tail: str, dtype: torch.dtype, spread: float) -> Any:
    """For each setting its cases, the exact results and eager's; bare and dressed, the target the teacher's or mixed."""
    found = {}
    for bare, (t, temperature) in ((True, (1.0, 1.0)), (False, (0.4, 2.0)), (False, (1.0, 1.0))):
        options = Options(name, t=t, temperature=temperature, ce_weight=0.0 if bare else 0.5, kd_weight=0.75)
        # Near enough to each other for the k tokens to hold mass of both.
        cases = [draw(seed, (10,), 211, (16, 16), spread, dtype, near=spread / 8) for seed in range(2)]
        cases = [replace(case if bare else dressed(case, seed), options=options) for seed, case in enumerate(cases)]
        # What is left of 1 below float64's own roundings is no result that float64 could be held to.
        floor = 0.01 if dtype == torch.float64 else 0.0
        rest = tail == "bucket" and t < 1.0
        kept = [keep(case, 7, tail, ragged=not bare, floor=floor, rest=rest) for case in cases]
        working = torch.float32 if dtype == torch.float64 else dtype
        exact, eager = ([one.plain(to) for one in kept] for to in (torch.float64, working))
        found[bare, t, temperature] = (kept, *yardsticks(exact, eager, 1.0, dtype))
    return found


@both_tails
@pytest.mark.parametrize(("dtype", "name"), ACCURACY)
def test_as_close_to_the_formulas_as_eager(name: str, dtype: torch.dtype, tail: str) -> None:
    over = {}
    for spread, strategy in itertools.product(SPREADS, ("tokens", "vocab")):
        for setting, (kept, exact, eager) in compared(name, tail, dtype, spread).items():
            found = [one.run(strategy=strategy, memory_budget=3000) for one in kept]
            over[(spread, strategy, *setting)] = ratios(found, eager, exact)
    assert_as_good_as_eager(over)


@both_tails
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_on_every_kind_of_machine(kind: str, name: str, dtype: torch.dtype, tail: str) -> None:
    """16-bit products that are widened, that are native, and whose results stay in float32."""
    test_as_close_to_the_formulas_as_eager(name, dtype, tail)


class TestFormulas:
    """In float64, where nothing but the formula matters."""

    @both_tails
    @both_strategies
    @every_divergence
    @pytest.mark.parametrize(("t", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.7, 3.0), (1.0, 0.5)])
    def test_targets(self, t: float, temperature: float, name: str, strategy: str, tail: str) -> None:
        if name == "total_variation":
            t = max(t, 0.05)  # with both at one point its slope is a sign, which the oracle's roundings decide
        kept = full(tail, torch.float64, divergence=name, t=t, temperature=temperature)
        assert_close(kept.run(strategy=strategy, memory_budget=2 * BUDGET), kept.plain(), 1e-12)
        tensor = torch.tensor(t, dtype=torch.float64)
        assert_same([kept.loss(t=tensor, strategy=strategy)], [kept.loss(strategy=strategy)])

    @both_tails
    @both_strategies
    @pytest.mark.parametrize(
        "options",
        [
            {"square_temperature": False},
            {"kd_weight": 0.0},
            {"ce_weight": 0.0},
            {"kd_weight": 3.0, "ce_weight": 2.0, "temperature": 1.0},
            {"normalizer": 7.0},
            {"divergence": "jsd", "parameter": 0.2},
        ],
    )
    def test_factors(self, options: dict[str, Any], strategy: str, tail: str) -> None:
        kept = full(tail, torch.float64, **options)
        assert_close(kept.run(strategy=strategy, memory_budget=2 * BUDGET), kept.plain(), 1e-12)

    @both_tails
    def test_a_sum_divides_by_nothing(self, tail: str) -> None:
        kept = full(tail, torch.float64)
        undivided = replace(kept, case=replace(kept.case, options=replace(kept.case.options, normalizer=1.0)))
        assert_close(kept.run(reduction="sum", normalizer=None), undivided.plain(), 1e-12)

    @both_tails
    @pytest.mark.parametrize("lead", [(), (1,), (2, 3), (1, 2, 1, 3)])
    def test_leading_dimensions_are_only_a_shape(self, lead: tuple[int, ...], tail: str) -> None:
        case = replace(dressed(draw(tokens=lead, dtype=torch.float64)), options=Options(ce_weight=0.5))
        kept = keep(case, 3, tail, torch.float64)
        assert kept.loss(reduction="none").shape == lead
        flat = replace(
            kept,
            case=replace(
                case,
                student_hidden=case.student_hidden.reshape(-1, 8),
                labels=case.labels.reshape(-1),  # type: ignore[union-attr]
                token_weight=case.token_weight.reshape(-1),  # type: ignore[union-attr]
            ),
            ids=kept.ids.reshape(-1, 3),
            log_probs=kept.log_probs.reshape(-1, 3),
        )
        right = flat.plain()
        found = kept.run()
        assert_close({**found, **{name: found[name].view(right[name].shape) for name in found}}, right, 1e-12)

    @every_divergence
    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_renormalized_is_a_teacher_who_bans_the_others(self, t: float, name: str) -> None:
        """The loss from logits with z = -inf outside of the k tokens: another implementation, down to the row loops."""
        kept = full("renormalize", torch.float64, divergence=name, t=t)
        case = kept.case
        x, _ = case.logits()
        z = torch.full_like(x, -INF)
        for row, ids, log_probs in zip(z, kept.ids, kept.log_probs, strict=True):
            used = log_probs != -INF
            row[ids[used]] = log_probs[used] * case.options.temperature
        right = kd.kd_loss(*(x, z, case.labels), **keywords(case.options), token_weight=case.token_weight, return_metrics=True)
        found = kept.loss(return_metrics=True)
        torch.testing.assert_close(found[0], right[0], rtol=1e-12, atol=0)
        for metric in ("kd", "ce", "target_entropy", "student_entropy", "agreement", "tokens"):
            torch.testing.assert_close(found[1][metric], right[1][metric], rtol=1e-12, atol=1e-15)

    @both_tails
    @both_strategies
    @every_divergence
    @pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
    def test_a_teacher_that_is_known_whole_is_a_teacher(self, t: float, name: str, strategy: str, tail: str) -> None:
        case = replace(dressed(draw(dtype=torch.float64)), options=Options(name, t=t, temperature=2.0, ce_weight=0.5))
        kept = keep(case, 37, tail, torch.float64)
        found = kept.run(strategy=strategy, memory_budget=2 * BUDGET)
        assert_close(found, case.run(), 1e-12)

    def test_half_of_the_student_may_be_banned(self) -> None:
        for tail, name, t in itertools.product(TAILS, kd.divergences(), (1.0, 0.5)):
            kept = full(tail, torch.float64, divergence=name, t=t)
            case = replace(kept.case, student_softcap=None)
            bias = case.student_bias
            assert bias is not None
            assert case.labels is not None
            bias[::2] = -INF
            case.labels[case.labels >= 0] |= 1  # cross-entropy with a banned label is infinite
            kept = replace(kept, case=case)
            found = kept.run()
            assert all(value.isfinite().all() for value in found.values())
            assert_close(found, kept.plain(), 1e-12)
            assert (found["student_weight"][::2] == 0).all()


class TestSureStudents:
    """Where the student gives nearly all of its mass to the k tokens, 1 - their sum has no digits; the rest still has gradients."""

    @pytest.mark.parametrize("gap", [20.0, 60.0, 200.0, 2000.0])
    @pytest.mark.parametrize("offset", [0.0, 2.0**15])
    @both_strategies
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_rest_is_a_softmax_of_its_own(self, dtype: torch.dtype, strategy: str, offset: float, gap: float) -> None:
        """Logits that float32 holds exactly, the k tokens ``gap`` above the others, all of them ``offset`` from 0."""
        x = torch.tensor([[gap, 0.0, 1.0, -1.0, gap - 1.0, 0.5]], dtype=dtype)
        case = Case(x + offset, torch.eye(6, dtype=dtype), x, torch.eye(6, dtype=dtype))
        kept = Kept(case, torch.tensor([[0, 4]]), torch.tensor([[0.5, 0.25]], dtype=dtype).log(), "bucket")
        exact = replace(kept, case=replace(case, student_hidden=x)).plain()
        found = kept.run(strategy=strategy, memory_budget=50)
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps * (1 + offset))  # statistics are kept in float64
        torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=8 * eps, atol=0)
        # A multiple of the softmax over the rest: what the student gives that outcome, less what the target does.
        rest = [1, 2, 3, 5]
        share = torch.softmax(x[0].double(), 0)[rest].sum() - math.exp(log_of_rest(kept.log_probs[0].tolist()))
        expected = torch.softmax(x[0, rest].double(), 0) * share
        torch.testing.assert_close(found["student_hidden"][0, rest].double(), expected, rtol=8 * eps, atol=0)
        torch.testing.assert_close(exact["student_hidden"][0, rest], expected, rtol=1e-12, atol=0)

    @both_strategies
    def test_or_to_the_rest(self, strategy: str) -> None:
        x = torch.tensor([[-300.0, 2.0, 1.0, -1.0, -301.0, 0.5]])
        kept = Kept(Case(x, torch.eye(6), x, torch.eye(6)), torch.tensor([[0, 4]]), torch.tensor([[0.5, 0.25]]).log(), "bucket")
        assert_close(kept.run(strategy=strategy, memory_budget=50), kept.plain(), 1e-6)

    def test_a_softcap_bans_nothing(self) -> None:
        """-inf before a softcap is its lowest value: tokens have to leave the rest after it."""
        for gap in (1.0, 6.0, 12.0):
            x = torch.tensor([[gap, 0.0, 1.0, -1.0, gap - 1.0, 0.5]], dtype=torch.float64)
            case = Case(x * 50, torch.eye(6).double(), x, torch.eye(6).double(), student_softcap=gap)
            kept = Kept(case, torch.tensor([[0, 4]]), torch.tensor([[0.5, 0.25]]).double().log(), "bucket")
            assert_close(kept.run(), kept.plain(), 1e-12)


class TestSlots:
    @both_tails
    @both_strategies
    @every_divergence
    def test_unused_slots_change_nothing(self, name: str, strategy: str, tail: str) -> None:
        kept = keep(replace(draw(), options=Options(name, t=0.5)), 4, tail)
        lead = kept.ids.shape[:-1]
        # Ids out of range, of the same row's tokens, and of others.
        for wrong in (-1, 10**12, int(kept.ids[0, 0]), 0):
            more = replace(
                kept,
                ids=torch.cat([torch.full((*lead, 2), wrong), kept.ids], -1),
                log_probs=torch.cat([torch.full((*lead, 2), -INF), kept.log_probs], -1),
            )
            options: dict[str, Any] = {"strategy": strategy, "memory_budget": BUDGET}
            assert_close(more.run(**options), kept.run(**options), 1e-6)
            for (_, found), (_, right) in [(more.loss(return_metrics=True), kept.loss(return_metrics=True))]:
                assert_close(found, right, 1e-6)

    @both_tails
    @every_divergence
    def test_a_position_without_any_has_no_target(self, name: str, tail: str) -> None:
        for t in (0.0, 0.5, 1.0):
            case = replace(draw(), options=Options(name, t=t))
            kept = keep(case, 4, tail)
            kept.log_probs[2] = -INF
            found = kept.run(reduction="sum")
            torch.testing.assert_close(found["losses"][2], torch.tensor(0.0), rtol=0, atol=0)
            assert found["student_hidden"][2].abs().max() <= 1e-6
            assert (found["losses"][[0, 1, 3, 4, 5]] != 0).all() or t == 0.0
            _, metrics = kept.loss(return_metrics=True)
            assert all(value.isfinite() for value in metrics.values())
            assert metrics["agreement"] <= 5 / 6

    def test_the_order_of_the_slots_is_nothing(self) -> None:
        kept = full("bucket", torch.float64)
        order = torch.tensor([4, 0, 3, 1, 2])
        assert_close(replace(kept, ids=kept.ids[:, order], log_probs=kept.log_probs[:, order]).run(), kept.run(), 1e-13)

    @both_tails
    def test_mass_above_one_is_normalised(self, tail: str) -> None:
        kept = keep(replace(draw(dtype=torch.float64), options=Options("jsd")), 4, tail, torch.float64)
        kept = replace(kept, log_probs=kept.log_probs + 1.0)
        assert_close(kept.run(), kept.plain(), 1e-12)
        if tail == "renormalize":
            assert_close(kept.run(), replace(kept, log_probs=kept.log_probs - 1.0).run(), 1e-12)

    @both_tails
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
    def test_ids_of_any_integer_dtype_and_log_probs_of_any_float(self, dtype: torch.dtype, tail: str) -> None:
        kept = keep(replace(draw(), options=Options()), 4, tail)
        assert_same([replace(kept, ids=strided(kept.ids.to(dtype))).loss()], [kept.loss()])
        for of in DTYPES:
            rounded = kept.log_probs.to(of)
            assert_same([replace(kept, log_probs=rounded).loss()], [replace(kept, log_probs=rounded.double()).loss()])
