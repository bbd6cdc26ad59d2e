"""The CUDA product that stores 16-bit offsets (product.cu), on a CPU (tests/support/hopper.cpp): in whatever order its threads,
copies and products go on, it stores what a float64 product has."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kdkernels.backends.cuda import product
from tests.support.hopper import Changes, on_this_machine
from tests.support.needs import needs_compiler

pytestmark = needs_compiler
INF, NAN = torch.inf, torch.nan
EPS = torch.finfo(torch.float32).eps
BF16 = torch.bfloat16
UNTOUCHED = 9.0


def padded(values: Tensor, multiple: int, by: float) -> Tensor:
    """The same in rows that start at multiples of so many entries; behind each, and in a row more, there is ``by``."""
    count, width = values.shape
    room = torch.full((count + 1, -(-width // multiple) * multiple + multiple), by, dtype=values.dtype)
    room[:count, :width] = values
    return room[:count, :width]


@dataclass(frozen=True)
class Problem:
    """hidden [N, D] and weight [V, D]; what lies behind their rows is NaN."""

    hidden: Tensor
    weight: Tensor
    factor: float = 1.0

    def exact(self) -> Tensor:
        return self.factor * self.hidden.double() @ self.weight.double().T


def problem(
    tokens: int, vocab: int, width: int, *, spread: float = 3.0, dtype: torch.dtype = BF16, seed: int = 0, factor: float = 1.0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(count, width, generator=generator) for count in (tokens, vocab))
    weight *= spread / factor / width**0.5
    return Problem(*(padded(side.to(dtype), 8, NAN) for side in (hidden, weight)), factor)


@dataclass(frozen=True)
class Stored:
    codes: Tensor
    largest: Tensor
    sums: Tensor

    @classmethod
    def of(cls, one: Problem, t: float | None = None) -> Stored:
        tokens, vocab = len(one.hidden), len(one.weight)
        codes = padded(torch.full((tokens, vocab), UNTOUCHED, dtype=torch.float16), 64, UNTOUCHED)
        largest, sums = (torch.full((tokens + 1, -(-vocab // product.BLOCK_V)), UNTOUCHED) for _ in range(2))
        at = None if t is None else torch.tensor(t)
        assert product.stored(one.hidden, one.weight, one.factor, codes, largest, sums, at)
        return cls(codes, largest, sums)

    def by_columns(self) -> Tensor:
        """The largest of each column's tile, less what codes are counted from."""
        tokens, vocab = self.codes.shape
        return self.largest[:tokens].repeat_interleave(product.BLOCK_V, 1)[:, :vocab]

    def assert_of(self, exact: Tensor, noise: float) -> None:
        """noise: what float32 sums may be off by."""
        tokens, vocab = exact.shape
        count = self.largest.shape[1]
        tiles = torch.nn.functional.pad(exact, (0, count * product.BLOCK_V - vocab), value=-INF).view(tokens, count, -1)
        assert ((self.largest[:tokens] - tiles.amax(-1)).abs() <= noise).all()
        decoded = self.codes.double() + (self.by_columns() - 1.0)
        code = (exact - tiles.amax(-1).repeat_interleave(product.BLOCK_V, 1)[:, :vocab] + 1.0).abs()
        half_a_step = torch.finfo(torch.float16).eps / 2 * 2 ** code.clamp(min=2.0**-14).log2().floor()
        assert ((decoded - exact).abs() <= half_a_step * (1 + 1e-3) + noise).all()
        above = torch.nn.functional.pad((self.codes.double() - 1.0).exp(), (0, count * product.BLOCK_V - vocab))
        sums = self.sums[:tokens].double()
        torch.testing.assert_close(sums.abs(), above.view(tokens, count, -1).sum(-1), rtol=2e-6, atol=0)
        banned = torch.nn.functional.pad(self.codes == -INF, (0, count * product.BLOCK_V - vocab)).view(tokens, count, -1).any(-1)
        assert torch.equal(sums.signbit(), banned)

    def assert_nothing_beside(self) -> None:
        tokens, vocab = self.codes.shape
        rows = self.codes.as_strided((tokens + 1, self.codes.stride(0)), (self.codes.stride(0), 1))
        for part in (rows[:, vocab:], rows[tokens], self.largest[tokens], self.sums[tokens]):
            assert (part == UNTOUCHED).all()

    def same(self, other: Stored) -> bool:
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in ("codes", "largest", "sums"))


def noise_of(one: Problem) -> float:
    return 4 * EPS * one.factor * (one.hidden.double().abs() @ one.weight.double().abs().T).max().item()


# Tokens, columns, hidden size: tails of each; less than a box; one tile; several for each cluster, and more steps than stages.
SHAPES = ((300, 600, 136), (1, 3, 5), (128, 256, 64), (260, 1030, 72), (130, 300, 456))


class TestStored:
    @pytest.mark.parametrize(("tokens", "vocab", "width"), SHAPES)
    def test_as_in_float64_in_whatever_order(self, tokens: int, vocab: int, width: int) -> None:
        one = problem(tokens, vocab, width)
        found = []
        for seed in range(4):
            with on_this_machine(seed=seed) as kernel:
                found.append(Stored.of(one))
        pairs = -(-tokens // 256) * -(-vocab // 256)
        assert kernel.grids == [2 * min(2, pairs)]
        found[0].assert_of(one.exact(), noise_of(one))
        found[0].assert_nothing_beside()
        assert all(found[0].same(other) for other in found[1:])

    @pytest.mark.parametrize(("dtype", "spread", "factor"), [(torch.float16, 3.0, 1.0), (BF16, 30.0, 0.5), (BF16, 0.3, 1.25)])
    def test_dtypes_spreads_and_factors(self, dtype: torch.dtype, spread: float, factor: float) -> None:
        one = problem(140, 300, 72, dtype=dtype, spread=spread, factor=factor)
        with on_this_machine(clusters=1):
            Stored.of(one).assert_of(one.exact(), noise_of(one))

    def test_a_group_of_token_blocks_goes_through_the_vocabulary_and_the_next_one_follows(self) -> None:
        one = problem(8 * 256 + 40, 300, 8)
        with on_this_machine(clusters=1):
            found = Stored.of(one)
        found.assert_of(one.exact(), noise_of(one))
        found.assert_nothing_beside()

    def test_a_launch_for_the_teacher_alone_does_nothing_below_1(self) -> None:
        one = problem(140, 300, 72)
        with on_this_machine():
            right, at_1 = Stored.of(one), Stored.of(one, t=1.0)
            assert right.same(at_1)
            for t in (0.0, 0.4, NAN):
                found = Stored.of(one, t=t)
                assert all((part == UNTOUCHED).all() for part in (found.codes, found.largest, found.sums))


class TestSpecialValues:
    def test_what_is_not_finite_is_seen_in_its_rows_and_nowhere_else(self) -> None:
        one = problem(140, 300, 72)
        with on_this_machine():
            right = Stored.of(one)
            for value in (NAN, INF, -INF):
                one.hidden[[3, 128], 5] = value
                found = Stored.of(one)
                bad = torch.zeros(141, dtype=torch.bool).index_fill_(0, torch.tensor([3, 128]), True)
                assert found.sums[bad].isnan().all()
                assert torch.equal(found.sums[~bad], right.sums[~bad])
                assert torch.equal(found.codes[~bad[:140]], right.codes[~bad[:140]])

    def test_logits_of_minus_infinity_and_a_tile_of_nothing_else(self) -> None:
        """By a weight of -inf, and by an overflow. Codes are -inf, which the sum's sign says; of nothing else the sum is -0."""
        one = problem(20, 600, 72)
        one.hidden[:, 0] = 1.0
        one.hidden[:, 1] = 100.0
        one.weight[[3, 599], 0] = -INF
        one.weight[7] = 0.0
        one.weight[7, 1] = -3e38
        one.weight[256:512, 0] = -INF
        with on_this_machine():
            found = Stored.of(one)
        banned = torch.zeros(600, dtype=torch.bool)
        banned[[3, 7, 599]] = banned[256:512] = True
        assert (found.codes[:, banned] == -INF).all()
        assert found.codes[:, ~banned].isfinite().all()
        assert (found.largest[:20, 1] == -INF).all()
        assert (found.sums[:20, 1] == 0).all()
        above = torch.nn.functional.pad((found.codes.double() - 1.0).exp(), (0, 168)).view(20, 3, 256).sum(-1)
        torch.testing.assert_close(found.sums[:20].double().abs(), above, rtol=2e-6, atol=0)
        assert found.sums[:20].signbit().all()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ((("multiplied<1>();", "multiplied<2>();"),), "waited for|WRONG"),
        ((("WARPS * CLUSTER);", "WARPS);"),
          ("if (k && lane < CLUSTER) arrive_in(before, lane)", "if (k && !lane) arrive_in(before, rank)"),
          ("  if (lane < CLUSTER) arrive_in(before, lane);\n}", "  if (!lane) arrive_in(before, rank);\n}"),
          ("int half, int lane", "int rank, int half, int lane"), ("ring, own / 4", "ring, rank, own / 4")), "WRONG|barrier"),
        ((("    show_to_copies();\n", ""),), "not shown"),
        ((("stores_read<BOXES - 1>()", "stores_read<BOXES>()"),), "WRONG"),
        ((("swizzle = lane % 8", "swizzle = lane / 2 % 8"),), "WRONG"),
        ((("  multiplied<0>();\n", ""),), "WRONG"),
        ((("    if (lane == 0) stores_read<0>();\n", ""),), "a thread ends"),
        ((("  cluster_together();  // nobody leaves", "  // nobody leaves"),), "has ended"),
    ],
    ids=["stage too early", "other block not told", "fence", "box too early", "swizzle", "products", "stores", "end"],
)  # fmt: skip
def test_the_machine_finds_what_is_broken(changes: Changes, found: str) -> None:
    one = problem(300, 600, 200)

    def several() -> None:
        for seed in range(8):
            with on_this_machine(seed=seed, changes=changes):
                stored = Stored.of(one)
            try:
                stored.assert_of(one.exact(), noise_of(one))
            except AssertionError as error:
                raise AssertionError("WRONG") from error

    with pytest.raises(AssertionError, match=found):
        several()
