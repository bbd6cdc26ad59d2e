"""The roofline: passes counted from what eager PyTorch does, and its own closed forms."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd
from kdkernels.cli.compare import Predicted, compare
from kdkernels.divergences import resolve
from kdkernels.planning import roofline
from kdkernels.planning.devices import DEVICES, NOMINAL_CPU
from kdkernels.planning.roofline import (
    EAGER_TRAFFIC,
    Pass,
    eager_passes,
    filled,
    seconds,
    tokens_passes,
    total_bytes,
    total_flops,
    vocab_passes,
)
from tests.support.trace import Trace

N, V, STUDENT, TEACHER = 512, 4096, 64, 96
SIZES = (N, V, STUDENT, TEACHER)
US, UT = 2 * N * V * STUDENT, 2 * N * V * TEACHER
H100 = DEVICES["H100"]


def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, per token."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
    mixture = torch.lerp(log_q.exp(), log_p.exp(), 0.5)
    return 0.5 * kl(mixture.log(), log_p) + 0.5 * kl(mixture.log(), log_q)


EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_q, log_p: kl(log_p, log_q),
    "jsd": jsd,
    "skew_forward_kl": lambda log_q, log_p: kl(torch.lerp(log_q.exp(), log_p.exp(), 0.1).log(), log_p),
    "skew_reverse_kl": lambda log_q, log_p: kl(torch.lerp(log_p.exp(), log_q.exp(), 0.1).log(), log_q),
    "total_variation": lambda log_q, log_p: 0.5 * (log_q.exp() - log_p.exp()).abs().sum() / len(log_q),
}


def traced(divergence: str, dtype: torch.dtype, *, train_head: bool, cached_row: int) -> list[Pass]:
    """Every operation of one plain step."""

    def tensor(*shape: int, learned: bool = False) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=learned)

    hidden, head = tensor(N, STUDENT, learned=True), tensor(V, STUDENT, learned=train_head)
    teacher, teacher_head = tensor(N, TEACHER), tensor(V, TEACHER)
    with Trace(cached_row) as counted:
        log_q = (hidden @ head.t()).float().log_softmax(-1)
        log_p = (teacher @ teacher_head.t()).float().log_softmax(-1)
        EAGER[divergence](log_q, log_p).backward()
    return counted.passes


class TestEager:
    @pytest.mark.parametrize("divergence", EAGER)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("train_head", [True, False])
    @pytest.mark.parametrize("cached_row", [0, 4 * V])
    def test_the_closed_form_is_what_its_operations_move(
        self, divergence: str, dtype: torch.dtype, train_head: bool, cached_row: int
    ) -> None:
        counted = traced(divergence, dtype, train_head=train_head, cached_row=cached_row)
        closed = eager_passes(*SIZES, dtype, divergence=divergence, train_head=train_head, cached_row=cached_row)
        assert total_flops(closed) == total_flops(counted)
        assert total_bytes(closed) == pytest.approx(total_bytes(counted), rel=1e-3)
        # what is smaller than a tensor [N, V] are operations on one number per token, or on one
        assert sum(step.launches for step in closed) == sum(1 for step in counted if step.bytes >= N * V)

    def test_every_entry_is_counted_again(self) -> None:
        assert set(EAGER_TRAFFIC) == set(EAGER) <= set(kd.divergences())

    def test_what_is_not_listed_takes_the_longest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        longest = eager_passes(*SIZES, torch.float32, divergence="jsd")
        monkeypatch.delitem(EAGER_TRAFFIC, "forward_kl")
        assert eager_passes(*SIZES, torch.float32) == longest


class TestTrace:
    def test_an_expanded_tensor_is_as_many_bytes_as_it_has_elements(self) -> None:
        with Trace(0) as counted:
            row = torch.empty(8, 1, device="meta")
            row.expand(8, 100) * 2.0
        assert [step.bytes for step in counted.passes] == [4 * 8 + 4 * 800]

    def test_views_and_new_storage_move_nothing(self) -> None:
        with Trace(0) as counted:
            torch.empty(8, 100, device="meta")[3:].view(-1).view(100, 5).t()
        assert counted.passes == []

    def test_the_peak_counts_what_is_alive(self) -> None:
        with Trace(0) as counted:
            x = torch.zeros(1000, device="meta")
            y = x + 1
            del x
            z = y + 1
            z += y
        assert counted.peak == 2 * 4000
        assert len(counted.passes) == 4
        assert counted.passes[-1].bytes == 3 * 4000

    def test_a_row_that_stays_in_the_cache_is_read_once(self) -> None:
        for cached_row, reads in ((0, 3), (400, 1)):
            with Trace(cached_row) as counted:
                torch.empty(8, 100, device="meta").log_softmax(-1)
            assert counted.passes[-1].bytes == (reads + 1) * 3200


class TestProducts:
    @pytest.mark.parametrize("chunks", [1, 3, 512])
    @pytest.mark.parametrize("divergence", kd.divergences())
    def test_tokens_makes_the_fewest(self, divergence: str, chunks: int) -> None:
        rows = -(-N // chunks)
        assert total_flops(tokens_passes(*SIZES, torch.bfloat16, chunk_rows=rows, divergence=divergence)) == 3 * US + UT
        frozen = tokens_passes(*SIZES, torch.bfloat16, chunk_rows=rows, divergence=divergence, train_head=False)
        assert total_flops(frozen) == 2 * US + UT

    @pytest.mark.parametrize("blocks", [1, 3, 4096])
    @pytest.mark.parametrize("divergence", kd.divergences())
    def test_vocab_recomputes(self, divergence: str, blocks: int) -> None:
        products = 4 * US + 2 * UT if resolve(divergence).one_sweep else 5 * US + 3 * UT
        columns = -(-V // blocks)
        assert total_flops(vocab_passes(*SIZES, torch.bfloat16, block_columns=columns, divergence=divergence)) == products
        frozen = vocab_passes(*SIZES, torch.bfloat16, block_columns=columns, divergence=divergence, train_head=False)
        assert total_flops(frozen) == products - US

    def test_eager_makes_the_fewest(self) -> None:
        assert total_flops(eager_passes(*SIZES, torch.bfloat16)) == 3 * US + UT

    def test_the_plan_counts_the_same(self) -> None:
        plan = kd.plan(*SIZES)
        assert plan.flops == total_flops(tokens_passes(*SIZES, torch.float32, chunk_rows=plan.chunk_rows))
        assert plan.eager_flops == total_flops(eager_passes(*SIZES, torch.float32))


class TestBytes:
    def test_of_one_chunk(self) -> None:
        """By hand, in bfloat16: what each of the two heads and hidden states, both logit tiles and the gradients move."""
        logits, grad, head, hidden = 4 * N * V, 2 * N * V, 2 * V * STUDENT, 2 * N * STUDENT
        teacher = 2 * (N + V) * TEACHER
        forward = hidden + head + logits + teacher + logits
        row_kernel = 2 * (2 * logits) + grad + N * (2 + 6) * 4  # weight, t; six columns
        backward = (grad + head + hidden) + (grad + hidden + head)
        assert total_bytes(tokens_passes(*SIZES, torch.bfloat16)) == forward + row_kernel + backward

    def test_of_one_block(self) -> None:
        """By hand: statistics once, or twice for a divergence that needs them first; the gradient tile out once and in twice."""
        operands, grad = 2 * (N + V) * (STUDENT + TEACHER), 2 * N * V
        head, hidden = 2 * V * STUDENT, 2 * N * STUDENT
        statistics, sums, gradient = 13 * 4 * N + 4, (8 + 5) * 4 * N + 4, 8 * 4 * N + 4
        backward = (operands + gradient + grad) + (grad + head + 4 * hidden) + (grad + hidden + head) + 3 * hidden
        for divergence, forward in (("forward_kl", operands + statistics), ("jsd", 2 * operands + statistics + sums)):
            assert total_bytes(vocab_passes(*SIZES, torch.bfloat16, divergence=divergence)) == forward + backward

    def test_more_chunks_read_heads_again_and_sum_in_float32(self) -> None:
        one, two = (total_bytes(tokens_passes(*SIZES, torch.bfloat16, chunk_rows=N // chunks)) for chunks in (1, 2))
        heads = 2 * V * (2 * STUDENT + TEACHER)
        summed = 2 * (8 * V * STUDENT) - 2 * V * STUDENT + V * STUDENT * (4 + 2)
        assert two - one == heads + summed


class TestSeconds:
    def test_of_a_product_and_of_a_copy(self) -> None:
        """Units: 989.4 Tflop at 0.78 of 989.4 Tflop/s; 3.35 TB at 0.92 of 3.35 TB/s."""
        assert seconds([Pass(989.4e12, 0, torch.bfloat16, 0)], H100) == pytest.approx(1 / 0.78)
        assert seconds([Pass(0, 3.35e12, launches=0)], H100) == pytest.approx(1 / 0.92)
        assert seconds([Pass(0, 0, launches=1, times=1000)], H100) == pytest.approx(1000 * H100.overhead)

    def test_a_pass_takes_the_longer_of_the_two(self) -> None:
        products, copies = Pass(1e15, 0, torch.bfloat16), Pass(0, 1e12)
        both = replace(products, bytes=1e12)
        assert seconds([both], H100) == max(seconds([products], H100), seconds([copies], H100))
        assert seconds([products, copies], H100) == pytest.approx(seconds([products], H100) + seconds([copies], H100))

    def test_a_library_product_leaves_half_of_the_shorter_exposed(self) -> None:
        shape = 8192, 131_072, 4096  # whole tiles, in whole waves but for one
        flops, moved = 2.0 * math.prod(shape), 2.0 * (shape[0] * shape[1] + shape[2] * (shape[0] + shape[1]))
        whole, bare = (Pass(flops, bytes_, torch.bfloat16, 0, shape=shape) for bytes_ in (moved, 0.0))
        copied = seconds([Pass(0.0, moved, launches=0)], H100)
        multiplied = seconds([bare], H100)
        assert seconds([whole], H100) == pytest.approx(max(multiplied, copied) + 0.5 * min(multiplied, copied))

    @pytest.mark.parametrize("name", DEVICES)
    @pytest.mark.parametrize("passes", [eager_passes, tokens_passes, vocab_passes])
    def test_more_of_anything_is_never_cheaper(self, passes: Callable[..., tuple[Pass, ...]], name: str) -> None:
        for at in range(4):
            times = []
            for factor in (1, 2, 3, 8):
                sizes = [*SIZES]
                sizes[at] *= factor
                times.append(seconds(passes(*sizes, torch.bfloat16), DEVICES[name]))
            assert times == sorted(times)
            assert times[0] < times[-1]

    @pytest.mark.parametrize("tokens", [1000, 8192, 30_000])
    def test_more_tokens_are_never_cheaper_in_the_comparison(self, tokens: int) -> None:
        some, more = (compare(count, 151_936, 896, 3584, torch.bfloat16, on=H100) for count in (tokens, tokens + 256))
        for before, after in zip(some, more, strict=True):
            assert after.seconds >= before.seconds
            assert after.flops > before.flops

    def test_a_faster_device_is_faster(self) -> None:
        times = [
            compare(8192, 151_936, 896, 3584, torch.bfloat16, on=DEVICES[name]) for name in ("A100-80", "H100", "H200", "B200")
        ]
        for way, count in enumerate((4, 4, 3)):  # vocab's kernels on a B200: an estimate far below the H100's
            of_way = [row[way].seconds for row in times[:count]]
            assert of_way == sorted(of_way, reverse=True)


class TestTiles:
    """On 132 multiprocessors, in units of tiles of 128 x 256."""

    def test_whole_waves_of_whole_tiles_lose_nothing(self) -> None:
        assert filled((128 * 12, 256 * 11, 64), 132) == 1.0
        assert filled((256 * 11, 128 * 12, 64), 132) == 1.0, "the other way round"

    def test_a_tile_that_hangs_over_takes_as_long_as_a_whole_one(self) -> None:
        for one in (128 * 24 + 1, 128 * 24 + 100):
            assert filled((one, 256 * 132, 64), 132) == pytest.approx(one / (128 * 25) * 25 * 132 / (25 * 132))

    def test_a_wave_takes_as_long_however_few_tiles_there_are_in_it(self) -> None:
        """133 tiles take two waves; twice as many small tiles take three, at 0.88 of the rate."""
        shape = (128, 256 * 133, 64)
        assert filled(shape, 132) == pytest.approx(max(133 / 264, 0.88 * 266 / (3 * 132)))

    def test_few_tiles_are_split_along_the_inner_size(self) -> None:
        """Four parts of each of 32 tiles, if they are long enough: 128 of 132 busy, less what adding them up takes."""
        assert filled((4096, 256, 100_000), 132) == pytest.approx(0.93 * 128 / 132)
        assert filled((4096, 256, 1024), 132) == pytest.approx(max(0.93 * 64 / 132, 0.88 * 0.93 * 2 * 64 / 132))
        assert filled((4096, 256, 64), 132) == pytest.approx(0.88 * 64 / 132)

    def test_more_of_anything_never_takes_less_time(self) -> None:
        for at in range(3):
            times = []
            for more in range(1, 6000, 7):
                shape = [1000, 700, 600]
                shape[at] = more
                times.append(math.prod(shape) / filled((shape[0], shape[1], shape[2]), 132))
            assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(times))

    def test_products_take_that_much_longer_on_a_gpu_and_not_on_a_processor(self) -> None:
        whole, over = (roofline.product(rows, 4096, 256 * 132, torch.bfloat16) for rows in (128, 129))
        took = [seconds([replace(one, bytes=0.0, launches=0)], H100) for one in (whole, over)]
        assert took[1] == pytest.approx(took[0] * 2), "a second wave"
        took = [seconds([replace(one, bytes=0.0, launches=0)], NOMINAL_CPU) for one in (whole, over)]
        assert took[1] == pytest.approx(took[0] * 129 / 128)


class TestRowKernel:
    def test_it_takes_as_long_as_its_bytes_or_its_instructions(self) -> None:
        """132 multiprocessors of 128 lanes at 1.98 GHz, of which 0.64 are taken to issue."""
        assert seconds([Pass(0.0, 0.0, launches=0, instructions=132 * 128 * 1.98e9)], H100) == pytest.approx(1 / 0.64)
        assert seconds([Pass(0.0, 3.35e12, launches=0, instructions=1e13)], H100) == pytest.approx(1 / 0.92)

    def test_instructions_are_those_of_its_sweeps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roofline, "ROW_INSTRUCTIONS", {"forward_kl": (70, 0, 40), "jsd": (50, 60, 80)})
        counts = {name: roofline.row_instructions(name) for name in kd.divergences()}
        assert counts["forward_kl"] == (70, 0, 40)
        assert counts["jsd"] == (50, 60, 80)
        assert counts["reverse_kl"] == (70, 0, 80), "not listed: the most of each sweep that it makes"
        assert counts["total_variation"] == (70, 60, 80)
        for name, count in counts.items():
            passes = tokens_passes(*SIZES, torch.bfloat16, chunk_rows=200, divergence=name)
            assert sum(step.times * step.instructions for step in passes) == N * V * sum(count)
        both = tokens_passes(*SIZES, torch.bfloat16, divergence="jsd", online_teacher=True)
        assert sum(step.instructions for step in both) == N * V * (190 + 110), "the teacher's is another, of forward KL"

    def test_every_count_is_of_a_divergence_that_there_is(self) -> None:
        for name, (statistics, sums, gradient) in roofline.ROW_INSTRUCTIONS.items():
            assert min(statistics, gradient) > 0
            assert (sums > 0) == (not resolve(name).one_sweep)


def test_a_kernel_that_multiplies_itself_is_counted_at_its_own_rate() -> None:
    """On a GPU; products of a library, which make the tiles elsewhere, at the library's."""
    own, shared = (vocab_passes(*SIZES, torch.bfloat16, shared=shared) for shared in (False, True))
    assert total_flops(own) == total_flops(shared) == 4 * US + 2 * UT
    fused = [sum(step.flops * step.times for step in passes if step.fused) for passes in (own, shared)]
    assert fused == [2 * (US + UT), 0]
    for name, part in (("H100", 0.7), ("A100-80", 0.32)):
        by_library, by_kernel = (seconds([Pass(1e15, 0.0, torch.bfloat16, 0, fused=one)], DEVICES[name]) for one in (False, True))
        assert by_kernel == pytest.approx(by_library / part)


class TestBareProducts:
    def test_of_what_learns(self) -> None:
        for learned, products_ in (
            ({}, 3 * US + UT),
            ({"train_head": False}, 2 * US + UT),
            ({"online_teacher": True}, 3 * US + 2 * UT),
            ({"online_teacher": True, "train_teacher_head": True}, 3 * US + 3 * UT),
        ):
            assert total_flops(roofline.products_passes(*SIZES, torch.bfloat16, **learned)) == products_

    def test_bytes_of_one_block_and_of_two(self) -> None:
        """By hand, in bfloat16: logits are as wide as the operands, and the head's gradient is read to be added to."""
        logits, head, hidden, teacher = (2 * size for size in (N * V, V * STUDENT, N * STUDENT, (N + V) * TEACHER))
        one = (hidden + head + logits) + (teacher + logits) + 2 * (logits + head + hidden)
        assert total_bytes(roofline.products_passes(*SIZES, torch.bfloat16)) == one
        tokens = 2 * roofline.PRODUCTS_BLOCK
        two, half = (total_bytes(roofline.products_passes(count, *SIZES[1:], torch.bfloat16)) for count in (tokens, tokens // 2))
        assert two == 2 * half + 2 * head

    def test_the_plan_has_their_time_wherever_it_has_its_own(self) -> None:
        for where in ("cpu", "H100", torch.device("cuda")):
            for dtype in (torch.bfloat16, torch.float64):
                plan = kd.plan(*SIZES, dtype, device=where)
                assert (plan.products_seconds is None) == (plan.seconds is None)
                if plan.seconds is not None:
                    assert 0 < plan.products_seconds <= plan.seconds


class TestCompare:
    def ways(self, **more: Any) -> dict[str, Predicted]:
        options = {"on": H100, **more}
        return {way.name: way for way in compare(8192, 151_936, 896, 3584, torch.bfloat16, **options)}

    def test_every_figure_is_the_plans(self) -> None:
        ways = self.ways(memory_budget=2**30)
        assert list(ways) == ["eager", "tokens", "vocab"]
        for strategy in ("tokens", "vocab"):
            plan = kd.plan(8192, 151_936, 896, 3584, torch.bfloat16, device="H100", strategy=strategy, memory_budget=2**30)
            way = ways[strategy]
            assert (way.peak_bytes, way.seconds, way.flops) == (plan.peak_bytes, plan.seconds, plan.flops)
            assert plan.products_seconds is not None
            assert way.over_products == way.seconds / plan.products_seconds > 1.0
            assert ways["eager"].peak_bytes == plan.eager_peak_bytes
            assert ways["eager"].seconds == plan.eager_seconds
        assert ways["vocab"].cut == f"{plan.blocks} blocks"

    def test_a_budget_bounds_both_strategies(self) -> None:
        little, much = self.ways(memory_budget=10**8), self.ways(memory_budget=2 * 10**9)
        for name in ("tokens", "vocab"):
            assert little[name].peak_bytes < much[name].peak_bytes
            assert little[name].seconds > much[name].seconds
        assert little["eager"] == much["eager"]

    def test_a_frozen_head_costs_less(self) -> None:
        trained, frozen = self.ways(), self.ways(train_head=False)
        for name, way in trained.items():
            assert frozen[name].flops < way.flops
            assert frozen[name].seconds < way.seconds
            if name != "eager":
                assert frozen[name].peak_bytes < way.peak_bytes
        # Eager peaks in its formula, before it makes gradients, unless there are few tokens: then the head's gradient decides.
        assert frozen["eager"].peak_bytes == trained["eager"].peak_bytes
        few = [compare(64, 151_936, 896, 3584, torch.bfloat16, on=H100, train_head=train)[0].peak_bytes for train in (True, False)]
        assert few[1] < few[0]

    def test_bad_sizes_are_the_plans_errors(self) -> None:
        with pytest.raises(ValueError, match="tokens is an integer, at least 1, got 0"):
            compare(0, 8, 8, 8, torch.float32, on=H100)

    def test_many_tokens_take_no_time_to_predict(self) -> None:
        assert compare(2**40, 151_936, 896, 3584, torch.bfloat16, on=H100)[1].seconds > 0


def test_it_needs_torch_alone() -> None:
    names = ("triton", "matplotlib", "transformers")
    script = f"import sys\nfor name in {names}: sys.modules[name] = None\nimport kdkernels.planning.roofline, kdkernels.cli.models"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
