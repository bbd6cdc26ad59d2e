"""The cluster row kernel's metrics, compiled for a CPU as in test_cuda_rows.py, are those of the oracle, and change no loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support.cases import SPREADS, Result, assert_as_good_as_eager, ratios
from tests.support.cluster import Problem, cut, problem
from tests.support.needs import needs_compiler

INF, NAN = torch.inf, torch.nan
pytestmark = needs_compiler
every_divergence = pytest.mark.parametrize("name", kd.divergences())
VOCAB = 1213  # of two blocks the second begins at 640, and a chunk has 512
# Columns, blocks of a cluster, warps of a block, as in test_cuda_rows.py; a cluster of the most blocks.
SIZES = ((VOCAB, 2, 2), (100, 4, 1), (3, 1, 1), (3013, 16, 1))


def assert_metrics(found: Result, one: Problem) -> None:
    """Of each row: a logit's rounding is in the logarithm of its probability, and sums of probabilities have it as it is."""
    right = one.plain(torch.float64, metrics=True)
    assert torch.equal(found["agreement"].double(), right["agreement"])
    logits = torch.cat([one.x, one.z], 1).nan_to_num(0.0, 0.0, 0.0)
    rounding = torch.finfo(torch.float32).eps * (2 * logits.abs().amax(1) + math.log(one.x.shape[1]))
    for name in right.keys() - {"losses", "x", "agreement"}:
        error = (found[name].double() - right[name]).abs()
        assert (error <= 4 * rounding * (1 + right[name].abs())).all(), (name, error, found[name], right[name])


@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "dressed"])
class TestWholeRows:
    @every_divergence
    def test_they_are_those_of_the_oracle(self, name: str, dressed: bool) -> None:
        for vocab, cluster, warps in SIZES if name in ("jsd", "forward_kl") else SIZES[:1]:
            with cut(cluster, warps):
                for t in (1.0, 0.4, 0.0):
                    for spread in SPREADS:
                        one = problem(name, 0, vocab, spread, t=t, temperature=2.0 if dressed else 1.0, dressed=dressed)
                        assert_metrics(one.run(metrics=True), one)

    @every_divergence
    def test_loss_and_gradient_are_as_good_as_eager_beside_them(self, name: str, dressed: bool) -> None:
        found = {}
        with cut(2, 2):
            for t in (1.0, 0.4):
                for spread in SPREADS:
                    given = [
                        problem(name, seed, VOCAB, spread, t=t, temperature=2.0 if dressed else 1.0, dressed=dressed)
                        for seed in range(2)
                    ]
                    made = [one.run(metrics=True) for one in given]
                    eager, exact = ([one.plain(dtype) for one in given] for dtype in (torch.float32, torch.float64))
                    found[(t, spread)] = ratios([{part: of[part] for part in ("losses", "x")} for of in made], eager, exact)
        assert_as_good_as_eager(found)

    @pytest.mark.parametrize("t", [1.0, 0.4])
    def test_they_are_the_same_without_a_gradient(self, dressed: bool, t: float) -> None:
        one = problem("jsd", 0, VOCAB, 3.0, t=t, dressed=dressed)
        with cut(2, 2):
            found, alone = one.run(metrics=True), one.run(grad=False, metrics=True)
        assert all(torch.equal(found[part], value) for part, value in alone.items())


def test_the_cross_entropy_is_told_where_it_is_no_part_of_the_loss() -> None:
    one = problem("jsd", 0, VOCAB, 3.0, dressed=True, temperature=2.0, t=0.4)
    one = replace(one, options=replace(one.options, ce_weight=0.0))
    with cut(2, 2):
        found, without = one.run(metrics=True), replace(one, labels=None).run(metrics=True)
    assert_metrics(found, one)
    assert torch.equal(found["x"], without["x"])
    assert torch.equal(found["losses"], without["losses"])


def peaks(*columns: tuple[int, ...]) -> Tensor:
    logits = torch.zeros(len(columns), VOCAB)
    for row, of_row in enumerate(columns):
        logits[row, list(of_row)] = 5.0
    return logits


@pytest.mark.parametrize("t", [1.0, 0.4])
def test_of_equal_logits_the_first_is_the_largest(t: float) -> None:
    """In entries that a thread takes together; of two threads, warps, chunks and blocks; the last column; all equal."""
    last = VOCAB - 1
    x = peaks((1, 2), (5, 9), (3, 200), (7, 513), (30, 700), (last,), (), (640, 700), (0, last), (2, 130))
    z = peaks((1, 3), (9,), (3,), (513,), (30, 31), (1, last), (0,), (640,), (last,), (2, 128))
    one = replace(problem("jsd", 0, VOCAB, 1.0, t=t), x=x, z=z)
    with cut(2, 2):
        found = one.run(metrics=True)
        swapped = replace(one, x=z, z=x).run(metrics=True)
    assert found["agreement"].tolist() == [1, 0, 1, 0, 1, 0, 1, 1, 0, 1] == swapped["agreement"].tolist()
    assert_metrics(found, one)


def test_the_teachers_largest_is_its_own_where_the_target_is_mixed() -> None:
    """One thread has both columns, in either order: the target's largest is the student's, far above the teacher's."""
    x, z = 10 * peaks((0,), (257,), (257,)), peaks((257,), (0,), (257,))
    one = replace(problem("jsd", 0, VOCAB, 1.0, t=0.4), x=x, z=z)
    with cut(2, 2):
        found = one.run(metrics=True)
    assert found["agreement"].tolist() == [0, 0, 1]
    assert_metrics(found, one)


class TestSpecialValues:
    @every_divergence
    @pytest.mark.parametrize("model", ["student", "teacher", "both", "apart"])
    def test_banned_tokens_add_nothing(self, name: str, model: str) -> None:
        for t in (1.0, 0.4, 0.0):
            one = problem(name, 0, VOCAB, 3.0, t=t)
            one.ban(model)
            with cut(2, 2):
                found = one.run(metrics=True)
            assert all(value.isfinite().all() for value in found.values())
            assert_metrics(found, one)

    @pytest.mark.parametrize("t", [1.0, 0.4])
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_a_bad_entry_shows_in_what_is_made_of_it(self, value: float, t: float) -> None:
        clean = problem("jsd", 0, VOCAB, 3.0, t=t)
        for model, parts in (
            ("student", ("losses", "student_entropy", "overlap")),
            ("teacher", ("losses", "target_entropy", "overlap")),
        ):
            one = problem("jsd", 0, VOCAB, 3.0, t=t)
            for row, place in enumerate((0, 3, 511, 640, VOCAB - 1)):
                (one.x if model == "student" else one.z)[row, place] = value
            with cut(2, 2):
                found, right = one.run(metrics=True), clean.run(metrics=True)
            for part in parts:
                assert found[part][:5].isnan().all(), part
            for part in right:
                assert torch.equal(found[part][5:], right[part][5:])

    def test_rows_of_weight_zero_are_not_computed(self) -> None:
        weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        one = replace(problem("jsd", 0, VOCAB, 3.0, t=0.4), weight=weight)
        one.x[weight == 0], one.z[weight == 0] = NAN, INF
        with cut(2, 2):
            found = one.run(metrics=True)
        for part, value in found.items():
            assert not value[weight == 0].any(), part
            assert value.isfinite().all(), part
