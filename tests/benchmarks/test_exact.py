"""The float64 results that errors are measured against: by hand, by the oracle, and for tokens that come more than once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import cases, compare, exact, limits
from benchmarks.cases import IGNORED, Case, Head, Problem, problem
from benchmarks.exact import Exact, errors, sampled
from tests.support import oracle

SMALL = Case("largest", Head("small", "student", "teacher", 600, 600, 12, 20), 256, "fp64")


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.DTYPES, "fp64", torch.float64)


def by_hand(masked: bool) -> Problem:
    """Two tokens of a vocabulary of two: q = (3/4, 1/4) for both, p = (1/2, 1/2) and (1/4, 3/4)."""
    log_3 = math.log(3.0)
    rows = [[1], [1]], [[log_3], [0]], [[0], [1]], [[0], [log_3]]
    hidden, head, teacher_hidden, teacher_head = (torch.tensor(values, dtype=torch.float64) for values in rows)
    labels = torch.tensor([IGNORED, 0]) if masked else None
    return Problem(hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels)


def mean(given: Problem, loss: str = "forward_kl", most: int = 4096) -> Exact:
    rows = sampled(given.vocab, most)
    return exact.tokens(given, loss, rows).mean(given, rows)


def head_grad(found: Exact) -> Tensor:
    return found.dx.T @ found.hidden


class TestMean:
    def test_value_and_gradients_are_those_by_hand(self) -> None:
        found = mean(by_hand(masked=False))
        first, second = 0.5 * math.log(4 / 3), 0.5 * math.log(3)  # KL of each token
        entropies = math.log(2), 2 * math.log(2) - 0.75 * math.log(3)
        assert float(found.value) == pytest.approx((first + second) / 2, rel=1e-14)
        assert float(found.target_entropy) == pytest.approx(sum(entropies) / 2, rel=1e-14)
        # dx = q - p is (1/4, -1/4) and (1/2, -1/2), each times a half
        torch.testing.assert_close(found.hidden_grad, torch.tensor([[1 / 8], [1 / 4]]).double() * math.log(3))
        torch.testing.assert_close(head_grad(found), torch.tensor([[3 / 8], [-3 / 8]]).double())

    def test_masked_tokens_change_nothing(self) -> None:
        found = mean(by_hand(masked=True))
        assert float(found.value) == pytest.approx(0.5 * math.log(3), rel=1e-14)
        assert found.hidden_grad[0] == 0
        torch.testing.assert_close(head_grad(found), torch.tensor([[0.5], [-0.5]]).double())

    def test_the_mean_of_three_is_taken_in_float64(self) -> None:
        one, double = torch.ones(3, 1), torch.ones(3, 1).double()
        found = exact.Tokens(double[:, 0], double[:, 0], double, double).mean(Problem(one, one, one, one), torch.zeros(1))
        assert float(found.value) == pytest.approx(1.0, rel=1e-15)
        assert float(found.hidden_grad[0]) == pytest.approx(1 / 3, rel=1e-15)

    def test_masked_and_unmasked_cases_share_the_losses_of_their_tokens(self) -> None:
        some = [Case("heads", SMALL.head, 24, "fp32", loss=loss, masked=masked) for loss, masked in compare.EVERY]
        together = compare.truth([replace(case, contender=name) for name in ("eager", "trl") for case in some])
        assert len(together) == len(some)
        for case, found in zip(some, together.values(), strict=True):
            alone = mean(problem(case), case.loss, compare.SAMPLE)
            for name, value in vars(alone).items():
                torch.testing.assert_close(getattr(found, name), value, rtol=1e-12, atol=1e-14)


class TestErrors:
    def test_they_are_relative_norms(self) -> None:
        given = by_hand(masked=False)
        found = mean(given)
        given.hidden.grad, given.head.grad = found.hidden_grad * 1.25, head_grad(found) * 0.5
        expected = {"value_error": 0.125, "hidden_grad_error": 0.25, "head_grad_error": 0.5}
        assert errors(found.value * 1.125, given, found) == pytest.approx(expected)
        cross_entropy = found.value + found.target_entropy
        assert errors(cross_entropy, given, found, of_cross_entropy=True)["value_error"] == 0
        given.head.grad = None
        with pytest.raises(ArithmeticError, match="missing or not finite"):
            errors(found.value, given, found)

    def test_the_sampled_rows_are_spread_over_the_vocabulary(self) -> None:
        assert sampled(97, compare.SAMPLE).tolist() == list(range(97))
        large = sampled(262_144, compare.SAMPLE)
        assert (len(large), large[0], large[-1]) == (compare.SAMPLE, 0, 262_143)
        assert large.diff().unique().tolist() == [513]


class TestRepeatedTokens:
    """The largest step of limits: few different tokens, many times."""

    def stepped(self) -> tuple[Problem, Exact, Tensor]:
        """In float64, with the oracle's gradients over all tokens in the leaves, and its loss."""
        given, known = limits.repeating(SMALL)
        x, z = given.hidden @ given.head.mT, given.teacher_hidden @ given.teacher_head.mT
        loss = oracle.mean(oracle.losses(x, z, None, None, oracle.Options()), None, None, oracle.Options())
        loss.backward()
        return given, known(), loss.detach()

    def test_the_different_ones_give_the_float64_result_of_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In float64 both computations differ by roundings alone, whatever the blocks of the vocabulary."""
        for block in (100, 600, 4096):
            monkeypatch.setattr(exact, "BLOCK", block)
            given, known, loss = self.stepped()
            assert max(errors(loss, given, known).values()) < 1e-12

    def test_one_wrong_entry_anywhere_is_an_error_of_its_size(self) -> None:
        given, known, loss = self.stepped()
        assert errors(loss * (1 + 1e-6), given, known)["value_error"] == pytest.approx(1e-6)
        for name in ("hidden", "head"):
            grad = getattr(given, name).grad
            whole, kept = grad.norm(), grad[-1, -1].clone()
            grad[-1, -1] += 1e-3 * whole
            assert errors(loss, given, known)[f"{name}_grad_error"] == pytest.approx(1e-3)
            grad[-1, -1] = kept
        assert max(errors(loss, given, known).values()) < 1e-12

    def test_each_is_there_as_often_and_in_no_order(self) -> None:
        given, known = limits.repeating(replace(SMALL, tokens=1024))
        different, places, counts = given.hidden.detach().unique(dim=0, return_inverse=True, return_counts=True)
        assert counts.tolist() == [1024 // limits.DISTINCT] * limits.DISTINCT
        found = known()
        order = (found.hidden[:, None] == different).all(-1).int().argmax(-1)[:, None] == places
        assert order.sum(1).tolist() == counts.tolist()
        assert not torch.equal(places[: limits.DISTINCT].sort().values, torch.arange(limits.DISTINCT)), "in no order"
        pairs = torch.cat([given.hidden.detach(), given.teacher_hidden], 1).unique(dim=0)
        assert len(pairs) == limits.DISTINCT, "a token has one teacher's hidden state"
        logits = given.hidden.detach() @ given.head.detach().mT
        assert float(logits.std()) == pytest.approx(cases.SPREAD, rel=0.1)
        odd, _ = limits.repeating(replace(SMALL, tokens=97))
        assert len(odd.hidden.detach().unique(dim=0)) == 1, "97 tokens cannot be several ones as often"
