"""Distillation from the k tokens that an offline teacher kept: its metrics, and bad, masked, missing and tied values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support import oracle
from tests.support.cases import (
    assert_close,
    assert_same,
    both_strategies,
    draw,
    every_divergence,
    every_reduction,
)
from tests.support.oracle import Options
from tests.support.topk import BUDGET, INF, NAN, TAILS, Kept, both_tails, divergence, full, keep, of_one_row


class TestMetrics:
    @both_tails
    @both_strategies
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize("t", [0.4, 1.0])
    def test_they_are_means_over_the_kept_tokens(self, t: float, temperature: float, strategy: str, tail: str) -> None:
        kept = full(tail, torch.float64, divergence="jsd", t=t, temperature=temperature)
        case = kept.case
        x, _ = case.logits()
        counts = oracle.kept(x.shape[:-1], case.labels, case.token_weight, -100)
        q = (x[counts] / temperature).softmax(-1)
        rows = [
            of_one_row(x_row, ids, log_probs, tail, case.options)
            for x_row, ids, log_probs in zip(x[counts], kept.ids[counts], kept.log_probs[counts], strict=True)
        ]
        used = kept.log_probs[counts] != -INF
        mass = q.gather(-1, kept.ids[counts].where(used, 0))
        right = {
            "kd": torch.stack(
                [
                    divergence(*row, tail, case.options)
                    for row in zip(x[counts], kept.ids[counts], kept.log_probs[counts], strict=True)
                ]
            ).mean(),
            "target_entropy": torch.stack([torch.special.entr(lp.exp()).sum() for lp, _ in rows]).mean(),
            "student_entropy": torch.special.entr(q).sum(-1).mean(),
            "ce": oracle.cross_entropy(x[counts], case.labels[counts]).mean(),  # type: ignore[index]
            "agreement": (q.argmax(-1) == kept.ids[counts].gather(-1, kept.log_probs[counts].argmax(-1)[:, None])[:, 0])
            .double()
            .mean(),
            "overlap": torch.minimum(mass, kept.log_probs[counts].exp()).where(used, 0.0).sum(-1).mean(),
            "tokens": counts.sum().double(),
        }
        loss, found = kept.loss(return_metrics=True, strategy=strategy, memory_budget=2 * BUDGET)
        assert set(found) == set(right)
        assert not any(value.requires_grad or value.dim() for value in found.values())
        assert_close(found, right, 1e-12)
        assert_same([loss], [kept.loss(strategy=strategy, memory_budget=2 * BUDGET)])

    def test_overlap_is_at_most_that_over_the_vocabulary(self) -> None:
        case = draw(near=0.3)
        whole = case.loss(return_metrics=True)[1]["overlap"]
        found = [keep(case, count, tail).loss(return_metrics=True)[1]["overlap"] for tail in TAILS for count in (1, 5, 37)]
        assert all(value <= whole + 1e-6 for value in found)
        torch.testing.assert_close(found[2], whole)
        assert found[0] < found[1] < found[2]

    def test_agreement_sees_the_students_best_token_wherever_it_is(self) -> None:
        case = draw(tokens=(40,), near=0.3)
        x, z = case.logits()
        right = (x.argmax(-1) == z.argmax(-1)).float().mean()
        assert 0.1 < right < 0.9
        for strategy in ("tokens", "vocab"):
            found = keep(case, 3).loss(return_metrics=True, strategy=strategy, memory_budget=2000)[1]["agreement"]
            torch.testing.assert_close(found, right)

    def test_without_labels_there_is_no_cross_entropy(self) -> None:
        assert "ce" not in keep(draw(), 3).loss(return_metrics=True)[1]


class TestSpecialValues:
    @both_tails
    @both_strategies
    @every_divergence
    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_a_bad_value_makes_its_row_nan_and_no_other(self, bad: float, name: str, strategy: str, tail: str) -> None:
        options: dict[str, Any] = {"strategy": strategy, "memory_budget": BUDGET, "reduction": "sum"}
        good = keep(replace(draw(), options=Options(name, t=0.5)), 4, tail)
        others = [0, 2, 3, 4, 5]

        def assert_row_is_nan(kept: Kept, **more: Any) -> None:
            found, right = kept.run(**options, **more), good.run(**options, **more)
            assert found["losses"].isnan().tolist() == [False, True, False, False, False, False]
            assert found["loss"].isnan()
            assert found["student_hidden"][1].isnan().all()
            assert found["student_weight"].isnan().any()
            torch.testing.assert_close(found["losses"][others], right["losses"][others], rtol=0, atol=0)
            torch.testing.assert_close(found["student_hidden"][others], right["student_hidden"][others], rtol=0, atol=0)

        hidden = good.case.student_hidden.clone()
        hidden[1, 0] = bad
        log_probs = good.log_probs.clone()
        log_probs[1, 2] = bad
        assert_row_is_nan(replace(good, log_probs=log_probs))
        assert_row_is_nan(replace(good, log_probs=log_probs), t=0.0)
        if bad is NAN:  # an infinite hidden state makes -inf logits, too
            assert_row_is_nan(replace(good, case=replace(good.case, student_hidden=hidden)))
        for column in (int(good.ids[1, 1]), next(v for v in range(37) if v not in good.ids[1])):
            bias = torch.zeros(37)
            bias[column] = bad
            case = replace(good.case, student_bias=bias)
            assert replace(good, case=case).run(**options)["losses"].isnan().all()

    @both_tails
    @both_strategies
    def test_a_divergence_of_weight_zero_is_left_out_whatever_it_came_to(self, strategy: str, tail: str) -> None:
        kept = full(tail, kd_weight=0.0)
        right = kept.run(strategy=strategy)
        wrong = kept.log_probs.masked_fill(kept.log_probs != -INF, NAN)
        found = replace(kept, log_probs=wrong).run(strategy=strategy)
        assert_same(list(found.values()), list(right.values()))

    @both_tails
    @both_strategies
    @every_reduction
    def test_all_tokens_masked(self, reduction: str, strategy: str, tail: str) -> None:
        kept = full(tail)
        case = replace(kept.case, labels=torch.full((6,), -100))
        case.student_hidden[0, 0] = NAN
        for result, value in replace(kept, case=case).run(reduction=reduction, strategy=strategy).items():
            assert (value == 0).all(), result

    @both_tails
    @both_strategies
    @pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
    def test_no_tokens(self, lead: tuple[int, ...], strategy: str, tail: str) -> None:
        case = replace(draw(tokens=lead), labels=torch.zeros(lead, dtype=torch.int64), options=Options(ce_weight=0.5))
        kept = keep(case, 3, tail)
        found = kept.run(strategy=strategy)
        total, metrics = kept.loss(return_metrics=True, strategy=strategy)
        assert total == found["loss"] == 0
        assert found["losses"].shape == lead
        assert (found["student_weight"] == 0).all()
        assert metrics["tokens"] == 0

    @both_tails
    def test_dropped_rows_may_hold_anything(self, tail: str) -> None:
        kept = full(tail)
        good = kept.run()
        assert kept.case.labels is not None
        for row in (int((kept.case.labels == -100).nonzero()), 2):  # the latter has weight 0
            kept.case.student_hidden[row] = NAN
            kept.ids[row], kept.log_probs[row] = 99, 3.0
        assert_same(list(kept.run().values()), list(good.values()))

    @every_divergence
    def test_students_at_their_target_stay_there(self, name: str) -> None:
        """Where the rest is an outcome; renormalized, a student at its teacher still has mass outside of the k tokens to lose."""
        case = replace(draw(spread=5.0, near=0.0), options=Options(name, temperature=2.0))
        for t in (0.0, 0.4, 1.0):
            found = keep(case, 5, "bucket").run(t=t)
            assert found["losses"].abs().max() <= 1e-6
            if name != "total_variation" or t == 0.0:  # its slope is a sign, which roundings decide unless both are the same bits
                assert found["student_hidden"].abs().max() <= 1e-5

    @both_strategies
    @both_tails
    def test_total_variation_at_ties_has_gradient_exactly_zero(self, tail: str, strategy: str) -> None:
        case = replace(draw(), options=Options("total_variation", t=0.0, temperature=2.0))
        kept = keep(case, 5 if tail == "bucket" else 37, tail)
        found = kept.run(strategy=strategy, memory_budget=BUDGET)
        assert all((value == 0).all() for value in found.values())
