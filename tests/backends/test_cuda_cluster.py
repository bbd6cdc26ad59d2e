"""The cluster row kernel (rows.cu) ends, and gives the same, in whatever order its threads, copies and sends go on; and the machine
that says so (tests/support/cluster_machine.cpp) finds what would break that."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

from kdkernels.backends.cuda import rows
from tests.support.cluster import Machine, Problem, cut, problem
from tests.support.needs import needs_compiler

pytestmark = needs_compiler

# One sweep or two.
divergences = pytest.mark.parametrize("name", ["forward_kl", "jsd"])
with_metrics = pytest.mark.parametrize("metrics", [False, True], ids=["loss", "metrics"])
# Columns, blocks of a cluster, warps of a block: several chunks of a block, the last ones shorter; blocks without a column.
SHAPES = ((1213, 1, 2), (3013, 2, 2), (5003, 8, 1), (100, 4, 4), (9001, 2, 8), (9001, 16, 1))


@divergences
@with_metrics
class TestOrder:
    @pytest.mark.parametrize(("vocab", "cluster", "warps"), SHAPES)
    def test_every_access_is_ordered_and_every_order_gives_the_same(
        self, name: str, metrics: bool, vocab: int, cluster: int, warps: int
    ) -> None:
        given = [problem(name, 0, vocab, 3.0), problem(name, 0, vocab, 3.0, dressed=True, temperature=2.0, t=0.4)]
        with cut(cluster, warps):
            right = [one.run(metrics=metrics) for one in given]
        for seed in range(4 if cluster < 8 else 2):
            with cut(cluster, warps, Machine(seed=seed, checked=True)):
                for one, expected in zip(given, right, strict=True):
                    for part, value in one.run(metrics=metrics).items():
                        assert torch.equal(value, expected[part])

    def test_rows_as_long_and_as_many_as_those_of_models(self, name: str, metrics: bool) -> None:
        """Each cluster takes several, in several chunks; every entry is held to float64."""
        one = problem(name, 1, 50_257, 3.0, count=16, t=0.4 if metrics else 1.0)
        exact = one.plain(torch.float64, metrics)
        with cut(8, 8, Machine(clusters=3)):
            found = one.run(metrics=metrics)
        for part in found.keys() - {"x"}:
            torch.testing.assert_close(found[part].double(), exact[part], rtol=1e-6, atol=0)
        largest = exact["x"].abs().amax(1, keepdim=True)
        assert ((found["x"] - exact["x"]).abs() <= 2e-5 * exact["x"].abs() + 1e-6 * largest).all()


def mirrored(one: Problem) -> Problem:
    """Its second half of columns has the logits of the first, backwards."""
    half = one.x.shape[1] // 2
    x, z = (torch.cat([side[:, :half], side[:, :half].flip(1)], 1) for side in (one.x, one.z))
    return replace(one, x=x, z=z)


# Products and additions in one instruction, which only a compiler for x86 has to be allowed to take.
FUSED = ("-O2", "-ffp-contract=fast", *(("-mfma",) if platform.machine() == "x86_64" else ()))


@divergences
def test_all_threads_have_the_same_statistics(name: str) -> None:
    """Also where products and additions are fused, as on GPUs: equal logits have gradients that are equal bit for bit."""
    for cluster, warps in ((4, 2), (8, 2)):
        with cut(cluster, warps, Machine(options=FUSED)):
            dx = mirrored(problem(name, 0, 3008, 5.0)).run()["x"]
        assert torch.equal(dx, dx.flip(1))


@contextmanager
def broken(*changes: tuple[str, str]) -> Iterator[None]:
    math, machine, kernel = rows._sources()
    for was, becomes in changes:
        assert kernel.count(was) == 1
        kernel = kernel.replace(was, becomes)
    with mock.patch.object(rows, "_sources", return_value=(math, machine, kernel)):
        yield


def test_sums_are_the_first_lanes() -> None:
    """Whatever a compiler fuses: here lanes differ by more than a rounding."""
    one = mirrored(problem("forward_kl", 0, 3008, 5.0))
    added = "v += of_lane(v, threadIdx.x % 32 ^ mask);\n  return v"
    apart = f"{added};", f"{added} * (1.f + threadIdx.x % 32 * 1e-6f);"
    each = "return of_lane(sum_of_parts<LANES>(v), 0);", "return sum_of_parts<LANES>(v);"
    for changes, same in (((apart,), True), ((apart, each), False)):
        with broken(*changes), cut(4, 2):
            dx = one.run()["x"]
        assert torch.equal(dx, dx.flip(1)) is same


UNORDERED, FOREVER, BARRIER = "nothing orders them", "waits forever", "barrier|arrivals"


@pytest.mark.parametrize(
    ("was", "becomes", "found"),
    [
        ("    before_copies();\n", "", UNORDERED),
        ("    __syncwarp();\n    if (threadIdx.x % 32 == 0) arrive", "    if (threadIdx.x % 32 == 0) arrive", UNORDERED),
        ("      __syncwarp();  // of_warps is read", "      // of_warps is read", UNORDERED),
        ("shared.of_warps[warp] = found;\n    together();", "shared.of_warps[warp] = found;", UNORDERED),
        ("sums_of_warps[warp] = total;\n      together();", "sums_of_warps[warp] = total;", UNORDERED),
        ("      if (turn) await(shared.empty + chunk, (turn - 1) & 1);\n", "", BARRIER),
        ("    await(shared.full + chunk, parity);\n", "", f"{UNORDERED}|under way"),
        ("    await_sent(shared.statistics_sent + parity, used);\n", "", UNORDERED),
        ("      await_sent(shared.sums_sent + parity, used);\n", "", UNORDERED),
        ("await_sent(shared.sums_sent", "await(shared.sums_sent", "does not order"),
        ("used = turn >> 1 & 1", "used = turn & 1", f"{UNORDERED}|{BARRIER}"),
        ("sizeof shared.statistics[parity]", "sizeof shared.statistics[parity] / 2", UNORDERED),
        ("sizeof shared.sums[parity]", "2 * sizeof shared.sums[parity]", FOREVER),
        ("  }\n  cluster_together();\n", "  }\n", "was not set up"),
    ],
)
def test_the_machine_finds_what_is_broken(was: str, becomes: str, found: str) -> None:
    one, cluster, warps = problem("jsd", 0, 5003, 3.0), 2, 2
    if "of_warps is read" in was:  # only blocks without a column have nothing else that orders it
        one, cluster, warps = problem("forward_kl", 0, 100, 3.0), 4, 4

    def all_of_them() -> None:
        for seed in range(8):
            with cut(cluster, warps, Machine(seed=seed, checked=True)):
                one.run()

    with broken((was, becomes)), pytest.raises(AssertionError, match=found):
        all_of_them()
