"""The cluster row kernel (rows.cu), compiled for a CPU, is as good as eager PyTorch.

The launcher is the library's own; what it would start on a GPU runs here on tests/support/cluster_machine.cpp, with exact
exponentials and quotients for the hardware's quick ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import kdkernels as kd
from tests.support.cases import assert_as_good_as_eager, ratios
from tests.support.cluster import Problem, cut, problem
from tests.support.needs import needs_compiler

INF, NAN = torch.inf, torch.nan
pytestmark = needs_compiler

every_divergence = pytest.mark.parametrize("name", kd.divergences())


def compared(problems: Sequence[Problem]) -> dict[str, float]:
    found, eager, exact = [], [], []
    for one in problems:
        found.append(one.run())
        eager.append(one.plain(torch.float32))
        exact.append(one.plain(torch.float64))
    return ratios(found, eager, exact)


@every_divergence
@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "dressed"])
class TestWholeRows:
    # blocks with a chunk and a part of one, the last one shorter; blocks without a column; one thread's entries
    SIZES = ((1213, 2, 2), (100, 4, 1), (3, 1, 1))

    def test_as_good_as_eager(self, name: str, dressed: bool) -> None:
        found = {}
        temperature = 2.0 if dressed else 1.0
        for vocab, cluster, warps in self.SIZES if dressed or name in ("jsd", "forward_kl") else self.SIZES[:1]:
            with cut(cluster, warps):
                for t in (1.0, 0.4):
                    for spread in (1.0, 10.0, 30.0):
                        problems = [
                            problem(name, seed, vocab, spread, t=t, temperature=temperature, dressed=dressed)
                            for seed in range(2 if vocab > 1000 else 6)
                        ]
                        found[(vocab, t, spread)] = compared(problems)
        assert_as_good_as_eager(found)

    def test_two_runs_agree_bit_for_bit(self, name: str, dressed: bool) -> None:
        one = problem(name, 0, 1213, 3.0, dressed=dressed, temperature=2.0 if dressed else 1.0)
        with cut(2, 2):
            first, second = one.run(), one.run()
        for part in first:
            assert torch.equal(first[part], second[part])

    def test_a_loss_without_a_gradient_is_the_same(self, name: str, dressed: bool) -> None:
        one = problem(name, 0, 1213, 3.0, dressed=dressed, temperature=2.0 if dressed else 1.0)
        with cut(2, 2):
            assert torch.equal(one.run()["losses"], one.run(grad=False)["losses"])


@every_divergence
class TestNearAndFlat:
    @pytest.mark.parametrize("temperature", [1.0, 100.0])
    def test_a_student_close_to_its_teacher(self, name: str, temperature: float) -> None:
        found = {}
        with cut(2, 2):
            for spread in (1.0, 10.0):
                problems = [problem(name, seed, 1213, spread, temperature=temperature) for seed in range(3)]
                noise = [
                    torch.randn(one.x.shape, generator=torch.Generator().manual_seed(seed)) for seed, one in enumerate(problems)
                ]
                near = [replace(one, z=one.x + 0.01 * spread * by) for one, by in zip(problems, noise, strict=True)]
                found[spread] = compared(near)
        assert_as_good_as_eager(found)


@every_divergence
class TestSpecialValues:
    VOCAB = 1213  # the second of two blocks begins at 640

    @pytest.mark.parametrize("model", ["student", "teacher", "both", "apart"])
    def test_banned_tokens_add_nothing(self, name: str, model: str) -> None:
        """Single ones, all of a chunk, all of a block, and all but one."""
        found = {}
        for t in (1.0, 0.4):
            problems = []
            for seed in range(3):
                one = problem(name, seed, self.VOCAB, 3.0, t=t)
                one.ban(model)
                problems.append(one)
            with cut(2, 2):
                found[t] = compared(problems)
        assert_as_good_as_eager(found)

    def test_a_student_that_masks_by_the_least_number_has_its_gradient(self, name: str) -> None:
        x = problem(name, 4, 1003, 3.0).x
        x[:, 700:] = torch.finfo(torch.float32).min
        one = replace(problem(name, 4, 1003, 3.0), x=x)
        with cut(4, 2):
            found = one.run()["x"]
        torch.testing.assert_close(found.double(), one.plain(torch.float64)["x"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize("model", ["student", "teacher"])
    def test_a_bad_entry_makes_its_row_nan_and_no_other(self, name: str, model: str, value: float) -> None:
        places = (0, 3, 511, 640, self.VOCAB - 1)
        clean = problem(name, 0, self.VOCAB, 3.0)
        with cut(2, 2):
            right = clean.run()
            for t in (1.0, 0.4):
                one = problem(name, 0, self.VOCAB, 3.0, t=t)
                for row, place in enumerate(places):
                    (one.x if model == "student" else one.z)[row, place] = value
                found = one.run()
                assert found["losses"][:5].isnan().all()
                assert found["x"][:5].isnan().all()
                if t == 1.0:
                    for part in right:
                        assert torch.equal(found[part][5:], right[part][5:])

    def test_rows_of_weight_zero_are_not_computed(self, name: str) -> None:
        weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        one = replace(problem(name, 0, self.VOCAB, 3.0), weight=weight)
        one.x[weight == 0], one.z[weight == 0] = NAN, INF
        with cut(2, 2):
            found = one.run()
        assert not found["losses"][weight == 0].any()
        assert not found["x"][weight == 0].any()
        assert found["x"].isfinite().all()
