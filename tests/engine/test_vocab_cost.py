"""What streaming the vocabulary costs: products by divergence, no tile larger than a block, blocks that fill the budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

import kdkernels as kd
from kdkernels.engine.cut import block_columns, column_bytes
from kdkernels.engine.scratch import row_stride
from tests.engine.test_vocab import EVERYTHING, ONE_SWEEP, TWO_SWEEPS, budget, every_backend, run
from tests.support.cases import NATIVE_DTYPES, Case, InsideOperators, draw, dressed, running
from tests.support.counting import US, UT, N, Products, V, count
from tests.support.counting import case as counted_case
from tests.support.oracle import Options

SMALL = 16  # columns of a block: four blocks of V
TOKENS_HALF = torch.arange(N) % 2 == 0


@every_backend
class TestProducts:
    """What the docstring of vocab.py promises, counted."""

    def several(self, case: Case, learn: tuple[str, ...] = EVERYTHING, **more: Any) -> int:
        return count(case, learn, strategy="vocab", memory_budget=budget(case, SMALL), **more)

    @pytest.mark.parametrize("name", ONE_SWEEP)
    def test_four_of_the_students_and_two_of_the_teachers(self, backend: str, name: str) -> None:
        with running(backend):
            assert self.several(counted_case(options=Options(name, t=0.5))) == 4 * US + 2 * UT

    @pytest.mark.parametrize("name", TWO_SWEEPS)
    def test_one_more_of_each_where_one_sweep_is_not_enough(self, backend: str, name: str) -> None:
        with running(backend):
            assert self.several(counted_case(options=Options(name, t=0.5))) == 5 * US + 3 * UT

    @pytest.mark.parametrize("name", kd.divergences())
    def test_metrics_take_two_sweeps(self, backend: str, name: str) -> None:
        case, memory = counted_case(options=Options(name)), budget(counted_case(), SMALL)
        with running(backend), Products() as products:
            case.loss({"student_weight": case.student_weight, "student_hidden": case.student_hidden.requires_grad_()},
                      strategy="vocab", memory_budget=memory, return_metrics=True)  # fmt: skip
        assert products.flops == 4 * US + 3 * UT  # the head is frozen

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("metrics", [False, True])
    def test_a_vocabulary_in_one_block_is_multiplied_once(self, backend: str, metrics: bool, name: str) -> None:
        case = counted_case(options=Options(name))
        with running(backend), Products() as products:
            leaves = {part: leaf.detach().requires_grad_() for part, leaf in case.learned().items()}
            case.loss(leaves, strategy="vocab", memory_budget=budget(case, V), return_metrics=metrics)
        assert products.flops == 3 * US + UT

    @pytest.mark.parametrize(("name", "sweeps"), [*((name, 1) for name in ONE_SWEEP), *((name, 2) for name in TWO_SWEEPS)])
    def test_without_gradients_there_are_the_sweeps_alone(self, backend: str, name: str, sweeps: int) -> None:
        with running(backend):
            assert self.several(counted_case(options=Options(name)), ()) == sweeps * (US + UT)

    def test_a_frozen_head_or_frozen_hidden_states_cost_none(self, backend: str) -> None:
        with running(backend):
            assert self.several(counted_case(), ("student_hidden",)) == 3 * US + 2 * UT
            assert self.several(counted_case(), ("student_weight",)) == 3 * US + 2 * UT

    def test_a_bias_costs_none(self, backend: str) -> None:
        with running(backend):
            assert self.several(counted_case(student_bias=torch.zeros(V)), ("student_bias",)) == 2 * US + 2 * UT

    def test_a_teacher_that_nobody_looks_at_costs_none(self, backend: str) -> None:
        case = counted_case(labels=torch.zeros(N, dtype=torch.int64), options=Options(kd_weight=0.0, ce_weight=1.0))
        with running(backend):
            assert self.several(case) == 4 * US
            assert self.several(replace(case, options=replace(case.options, divergence="jsd"))) == 4 * US
            assert count(case, strategy="vocab", memory_budget=budget(case, V)) == 3 * US

    @pytest.mark.parametrize("dropped_by", ["labels", "token_weight"])
    def test_dropped_tokens_cost_nothing(self, backend: str, dropped_by: str) -> None:
        drop = {"labels": torch.where(TOKENS_HALF, 3, -100), "token_weight": TOKENS_HALF.float()}[dropped_by]
        nothing = torch.full_like(drop, -100 if dropped_by == "labels" else 0)
        with running(backend):
            half = count(counted_case(**{dropped_by: drop}), strategy="vocab", memory_budget=budget(counted_case(), SMALL) // 2)
            assert half == (4 * US + 2 * UT) // 2
            assert self.several(counted_case(**{dropped_by: nothing})) == 0

    def test_a_cut_vocabulary_costs_what_is_left(self, backend: str) -> None:
        with running(backend):
            assert self.several(counted_case(), vocab_size=V // 2) == (4 * US + 2 * UT) // 2

    def test_losses_per_token_are_computed_again_in_the_backward(self, backend: str) -> None:
        with running(backend):
            assert self.several(counted_case(), reduction="none") == (US + UT) + (4 * US + 2 * UT)


class Largest(InsideOperators):
    """Bytes of the largest tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def after(self, name: str, made: Any) -> None:
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)


class TestMemory:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("metrics", [False, True])
    def test_the_logits_never_exist(self, metrics: bool, reduction: str) -> None:
        case = replace(dressed(draw(tokens=(256,), vocab=600, dims=(8, 8))), options=Options("jsd", ce_weight=0.5))
        seen = {}
        for strategy, memory in (("vocab", budget(case, 32)), ("tokens", None)):
            kd.free_scratch()
            with Largest() as largest:
                run(case, strategy=strategy, memory_budget=memory, return_metrics=metrics, reduction=reduction)
            seen[strategy] = largest.bytes
        logits = 256 * 600 * 4
        assert seen["tokens"] >= logits, "allocations were seen at all"
        assert seen["vocab"] < logits / 2

    def test_the_scratch_is_the_budget_whatever_the_token_count(self) -> None:
        memory, dim, vocab = 2**18, 4, 8192
        for tokens in (64, 256, 1024):
            case = draw(tokens=(tokens,), vocab=vocab, dims=(dim, dim))
            kd.free_scratch()
            with Largest() as largest:
                run(case, ("student_hidden",), strategy="vocab", memory_budget=memory)
            assert largest.bytes <= memory + 4 * vocab * dim + 3 * 64  # a widened block of the head, and alignment

    def test_a_16_bit_heads_gradient_has_no_float32_copy(self) -> None:
        case = draw(tokens=(4,), vocab=4096, dims=(64, 4), dtype=torch.bfloat16)

        class Float32(Largest):
            def after(self, name: str, made: Any) -> None:
                if isinstance(made, Tensor) and made.dtype == torch.float32 and name.startswith(("aten::empty", "aten::new_empty")):
                    super().after(name, made)

        seen = {}
        for strategy in ("tokens", "vocab"):
            with Float32() as largest:
                run(case, strategy=strategy, memory_budget=budget(case, 128))
            seen[strategy] = largest.bytes
        assert seen["tokens"] == 4 * 4096 * 64, "allocations were seen at all"
        assert seen["vocab"] < seen["tokens"]


class TestBlockColumns:
    SIZES = strategies.tuples(*(strategies.integers(1, 5000) for _ in range(2)), strategies.integers(1, 60))
    MULTIPLES: ClassVar = {"cpu": (128, 64, 16), "cuda": (128, 64, 32, 16, 8)}
    devices = pytest.mark.parametrize("device", MULTIPLES)

    @staticmethod
    def most(tokens: int, per_logit: int, memory: int, device: str) -> int:
        """The widest block that the memory holds; on a GPU rows of 64 columns or more take a multiple of 64."""
        most = max(1, memory // (tokens * per_logit))
        return most if device == "cpu" or most < 64 else most // 64 * 64

    @devices
    @hypothesis.given(SIZES, strategies.integers(1, 10**8))
    def test_blocks_fit_are_even_and_are_no_more_than_needed(self, device: str, sizes: tuple[int, int, int], memory: int) -> None:
        tokens, vocab, per_logit = sizes
        columns = block_columns(tokens, vocab, per_logit, memory, torch.device(device))
        assert 1 <= columns <= vocab
        assert columns == 1 or row_stride(columns, torch.device(device)) * tokens * per_logit <= memory
        most = self.most(tokens, per_logit, memory, device)
        blocks = math.ceil(vocab / columns)
        assert blocks <= math.ceil(vocab / min(most, vocab))
        assert columns * blocks - vocab < max(128, columns), "the last block is not a stub"

    @devices
    @hypothesis.given(SIZES, strategies.integers(1, 10**8))
    def test_they_are_multiples_of_a_tile_where_that_fits(self, device: str, sizes: tuple[int, int, int], memory: int) -> None:
        tokens, vocab, per_logit = sizes
        columns = block_columns(tokens, vocab, per_logit, memory, torch.device(device))
        most = self.most(tokens, per_logit, memory, device)
        if columns < vocab:
            even = math.ceil(vocab / math.ceil(vocab / most))
            tile = next((tile for tile in self.MULTIPLES[device] if math.ceil(even / tile) * tile <= most), 1)
            assert columns % tile == 0
            assert columns - even < tile

    def test_a_vocabulary_that_fits_is_one_block(self) -> None:
        for device, stride in ((torch.device("cpu"), 1003), (torch.device("cuda"), 1024)):
            assert block_columns(10, 1003, 8, 10 * stride * 8, device) == 1003
            assert block_columns(10, 1003, 8, 10 * stride * 8 - 1, device) < 1003
            assert block_columns(0, 1003, 8, 2000, device) == 1003

    @pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.float64])
    @pytest.mark.parametrize("columns", [1, 16, 40, 150])
    def test_the_loss_runs_these_blocks(self, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        case, seen = draw(tokens=(18,), vocab=150, dtype=dtype), []
        add = kd.engine.gradients.Gradients.add_columns

        def spied(grads: Any, head: Any, dx: Tensor, hidden: Tensor, block: slice, buffer: Tensor) -> None:
            seen.append((block.start, block.stop, tuple(dx.shape)))
            add(grads, head, dx, hidden, block, buffer)

        monkeypatch.setattr(kd.engine.gradients.Gradients, "add_columns", spied)
        run(case, strategy="vocab", memory_budget=budget(case, columns))
        width = block_columns(
            *(18, 150, column_bytes(dtype, dtype, torch.device("cpu")), budget(case, columns)), torch.device("cpu")
        )
        edges = [*range(0, 150, width), 150]
        assert seen == [(begin, end, (18, end - begin)) for begin, end in itertools.pairwise(edges)]
