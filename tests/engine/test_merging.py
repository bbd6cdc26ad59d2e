"""Statistics of blocks of the vocabulary merge to those of the whole, in one sweep where that is enough."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import reference
from kdkernels.backends.columns import STATS_COLUMNS
from kdkernels.backends.merge import merged, sums_of_one_sweep
from kdkernels.divergences import resolve
from tests.engine.test_vocab import AT, ONE_SWEEP


def random_log_probabilities(points: int = 1000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(2, points, generator=generator, dtype=torch.float64) * -20)  # type: ignore[return-value]


def as_linear(divergence: kd.Divergence, lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope, as ``linear`` states them."""
    own, other = (lp, lq) if divergence.one_sweep == "target" else (lq, lp)
    return tuple(own.exp() * (c0 + c1 * (own - other)) for c0, c1 in divergence.linear())  # type: ignore[return-value]


class TestOneSweep:
    @pytest.mark.parametrize("name", ONE_SWEEP)
    def test_value_and_slope_are_linear_where_the_divergence_says_so(self, name: str) -> None:
        divergence = resolve(name)
        lp, lq = random_log_probabilities()
        for found, right in zip(as_linear(divergence, lp, lq), divergence.textbook(lp, lq), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-15)

    @pytest.mark.parametrize("side", ["target", "student"])
    @pytest.mark.parametrize("name", kd.divergences())
    def test_no_divergence_is_linear_that_does_not_say_so(self, name: str, side: str) -> None:
        divergence = resolve(name)
        if divergence.one_sweep == side:
            return
        lp, lq = random_log_probabilities()
        value, _ = divergence.textbook(lp, lq)
        found, _ = as_linear(replace(divergence, one_sweep=side), lp, lq)
        assert not torch.allclose(found, value, rtol=1e-3)

    @pytest.mark.parametrize("name", ONE_SWEEP)
    def test_a_value_that_is_nan_makes_the_slope_nan(self, name: str) -> None:
        stats = torch.zeros(2, len(STATS_COLUMNS), dtype=torch.float64)
        stats[:, AT["mass"]], stats[0, AT["moment"]] = 1.0, torch.nan
        assert sums_of_one_sweep(stats, resolve(name))[:, :2].isnan().tolist() == [[True, True], [False, False]]

    def test_both_kinds_exist(self) -> None:
        assert {resolve(name).one_sweep for name in kd.divergences()} == {"target", "student", ""}


def statistics(x: Tensor, z: Tensor, labels: Tensor, weigh: str, edges: list[int]) -> Tensor:
    """By the reference over the blocks between the edges, merged."""
    parts = []
    for begin, end in itertools.pairwise(edges):
        block = (x[:, begin:end], z[:, begin:end], None, None, labels - begin)
        part = reference.block_stats(*block, torch.tensor(0.7).double(), 2.0, [1.0, 0.0, 1.0, 0.0], weigh, True, True)
        part[:, [AT["argmax_x"], AT["argmax_z"]]] += begin
        parts.append(part)
    return merged(torch.stack(parts), weigh)


@pytest.mark.parametrize("weigh", ["", "target", "student"])
class TestMerged:
    """Statistics of blocks become those of whole rows."""

    VOCAB = 60

    def rows(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, z = (torch.randn(2, 7, self.VOCAB, generator=generator, dtype=torch.float64) * 10).round()  # with ties
        x[1, 20:40], z[1, 20:40] = -torch.inf, -torch.inf
        x[2, :30] = -torch.inf
        z[3, 30:] = -torch.inf
        x[4, 45:] += 2000.0  # by more than any exponential holds
        z[4, :15] += 2000.0
        return x, z, torch.randint(40, 45, (7,), generator=generator)

    @hypothesis.given(strategies.integers(0, 2**31), strategies.sets(strategies.integers(1, 59), min_size=1))
    def test_random_splits(self, weigh: str, seed: int, cuts: set[int]) -> None:
        x, z, labels = self.rows(seed)
        found = statistics(x, z, labels, weigh, [0, *sorted(cuts), self.VOCAB])
        right = statistics(x, z, labels, weigh, [0, self.VOCAB])
        finite = right.isfinite()
        assert (found.isfinite() == finite).all()
        eps = torch.finfo(torch.float64).eps
        torch.testing.assert_close(found[finite], right[finite], rtol=10 * self.VOCAB * eps, atol=10 * self.VOCAB * eps)
        for name in ("argmax_x", "argmax_z", "label_logit", "max_x_T", "max_y_T", "max_x", "max_z_T"):
            assert (found[:, AT[name]] == right[:, AT[name]]).all(), name

    def test_whole_rows_are_what_they_were(self, weigh: str) -> None:
        x, z, labels = self.rows(0)
        whole = (x, z, None, None, labels, torch.tensor(0.7).double(), 2.0, [1.0, 0.0, 1.0, 0.0], weigh, True, True)
        torch.testing.assert_close(statistics(x, z, labels, weigh, [0, self.VOCAB]), reference.block_stats(*whole))

    def test_the_moments_are_the_sums_that_they_stand_for(self, weigh: str) -> None:
        x, z, labels = self.rows(0)
        x, z, labels = x[:4], z[:4], labels[:4]
        found = statistics(x, z, labels, weigh, [0, 11, 20, 40, 57, self.VOCAB])
        y = torch.where((x == -torch.inf) | (z == -torch.inf), -torch.inf, 0.3 * x + 0.7 * z)
        w, o = {"target": (y, x), "student": (x, y), "": (x, y)}[weigh]
        u, v = ((side - side.amax(1, keepdim=True)) / 2.0 for side in (w, o))
        banned = (w == -torch.inf) | (o == -torch.inf)
        mass, moment = (term.masked_fill(banned, 0.0).sum(1) * (weigh != "") for term in (u.exp(), u.exp() * (u - v)))
        # t = 0.7 went through float32
        torch.testing.assert_close(found[:, AT["mass"]], mass, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found[:, AT["moment"]], moment, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    @pytest.mark.parametrize("column", [0, 33, 59])
    def test_a_bad_logit_is_not_hidden(self, weigh: str, column: int, model: str, bad: float) -> None:
        x, z, labels = self.rows(0)
        right = statistics(x, z, labels, weigh, [0, 15, 30, 45, self.VOCAB])
        (x if model == "student" else z)[0, column] = bad
        found = statistics(x, z, labels, weigh, [0, 15, 30, 45, self.VOCAB])
        assert found[0, AT["log_sum_x_T" if model == "student" else "log_sum_z_T"]].isnan()
        assert found[0, AT["log_sum_y_T"]].isnan()
        torch.testing.assert_close(found[1:], right[1:], rtol=0, atol=0, equal_nan=True)
        if weigh:
            divergence = next(resolve(name) for name in ONE_SWEEP if resolve(name).one_sweep == weigh)
            sums = sums_of_one_sweep(found, divergence)
            assert sums[0, :2].isnan().all()
            assert not sums[1:].isnan().any()

    def test_of_equal_largest_entries_the_first_wins(self, weigh: str) -> None:
        x, z, labels = self.rows(0)
        x[0, [12, 13, 31, 50]], z[0, [29, 30]] = 500.0, 500.0
        for edges in ([0, 60], [0, 13, 60], [0, 12, 13, 14, 30, 31, 60], [0, 40, 60]):
            found = statistics(x, z, labels, weigh, edges)
            assert found[0, AT["argmax_x"]] == 12
            assert found[0, AT["argmax_z"]] == 29
