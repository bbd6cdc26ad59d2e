"""Streaming the vocabulary in blocks changes what a step costs, and nothing of what it gives."""

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
from kdkernels import backends
from kdkernels.backends import reference
from kdkernels.backends.merge import merged, sums_of_one_sweep
from kdkernels.backends.operators import STATS_COLUMNS, accumulate_dtype
from kdkernels.divergences import resolve
from kdkernels.engine.cut import block_columns, column_bytes
from kdkernels.engine.scratch import row_stride
from tests.engine.test_cost import US, UT, N, Products, V, count
from tests.engine.test_cost import case as counted_case
from tests.support.cases import (
    NATIVE_DTYPES,
    Case,
    InsideOperators,
    draw,
    dressed,
    parameters,
    running,
    strategies_that_run,
    strided,
)
from tests.support.oracle import Options

ONE_SWEEP = [name for name in kd.divergences() if resolve(name).one_sweep]
TWO_SWEEPS = [name for name in kd.divergences() if not resolve(name).one_sweep]
EVERYTHING = ("student_hidden", "student_weight", "student_bias")
AT = {name: column for column, name in enumerate(STATS_COLUMNS)}
every_backend = pytest.mark.parametrize("backend", parameters(("native", "reference")))


def budget(case: Case, columns: int, dtype: torch.dtype | None = None) -> int:
    """The memory that ``columns`` columns of all tokens take."""
    dtype = case.student_weight.dtype if dtype is None else dtype
    tokens = math.prod(case.student_hidden.shape[:-1])
    return columns * tokens * column_bytes(dtype, dtype, torch.device("cpu"))


def run(case: Case, learn: tuple[str, ...] = EVERYTHING, **more: Any) -> dict[str, Tensor]:
    """Loss, metrics if asked for, and the gradients of what learns."""
    leaves = {name: leaf.detach().requires_grad_(name in learn) for name, leaf in case.learned().items()}
    made = case.loss(leaves, **more)
    loss, metrics = made if isinstance(made, tuple) else (made, {})
    asked = [name for name in leaves if name in learn]
    upstream = torch.linspace(1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    grads = torch.autograd.grad(loss, [leaves[name] for name in asked], upstream)
    return {"loss": loss.detach(), **metrics, **dict(zip(asked, grads, strict=True))}


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor], case: Case) -> None:
    """Within what regrouping sums over the vocabulary can change, and one rounding of the result."""
    assert set(found) == set(right)
    eps = torch.finfo(accumulate_dtype(case.student_weight.dtype)).eps
    for name, value in right.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        largest = value.double().abs().max().item() if value.numel() else 0.0
        tolerance = case.student_weight.shape[0] * eps * largest + torch.finfo(value.dtype).eps * largest
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, of=name: f"{of}: {text}")


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(found) == set(right)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=lambda text, of=name: f"{of}: {text}")


def both(case: Case, columns: int = 40, **more: Any) -> None:
    """Strategy "vocab" in blocks of about ``columns`` gives what "tokens" gives."""
    assert columns < case.student_weight.shape[0], "this would be one block"
    memory = budget(case, columns)
    assert_equal(run(case, strategy="vocab", memory_budget=memory, **more), run(case, strategy="tokens", **more), case)


def full(**more: Any) -> Case:
    options = {"t": 0.6, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 0.75, **more}
    return replace(dressed(draw(tokens=(2, 9), vocab=150)), options=Options(**options))


@every_backend
class TestSameAsTokens:
    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_divergence_and_reduction(self, backend: str, reduction: str, name: str) -> None:
        with running(backend):
            both(full(divergence=name), reduction=reduction)

    @pytest.mark.parametrize("columns", [1, 16, 64, 149])
    def test_every_size_of_block(self, backend: str, columns: int) -> None:
        with running(backend):
            both(full(), columns)
            both(full(divergence="jsd"), columns)

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_all_metrics(self, backend: str, reduction: str, name: str) -> None:
        with running(backend):
            both(full(divergence=name), return_metrics=True, reduction=reduction)

    @pytest.mark.parametrize("normalizer", [7.0, torch.tensor(7.0)])
    def test_a_normalizer(self, backend: str, normalizer: Any) -> None:
        with running(backend):
            both(full(), normalizer=normalizer)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_cut_vocabulary_and_its_padding_gets_no_gradient(self, backend: str, reduction: str) -> None:
        case = full()
        assert case.labels is not None
        case = replace(case, labels=case.labels.clamp(max=99))
        case.student_weight[100:], case.teacher_weight[100:] = torch.nan, torch.nan
        with running(backend):
            both(case, vocab_size=100, reduction=reduction, return_metrics=True)
            found = run(case, strategy="vocab", memory_budget=budget(case, 40), vocab_size=100, reduction=reduction)
        for name in ("student_weight", "student_bias"):
            assert (found[name][100:] == 0).all()
            assert (found[name][:100] != 0).any()

    @pytest.mark.parametrize(
        "learn", [("student_hidden",), ("student_weight",), ("student_bias",), ("student_hidden", "student_weight")]
    )
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_gradients_go_only_where_they_are_asked_for(self, backend: str, reduction: str, learn: tuple[str, ...]) -> None:
        with running(backend):
            both(full(), learn=learn, reduction=reduction)

    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_every_dtype(self, backend: str, dtype: torch.dtype) -> None:
        case = replace(dressed(draw(tokens=(18,), vocab=150, dtype=dtype)), options=Options(ce_weight=0.5))
        with running(backend):
            both(case)
            both(case, reduction="none")
            both(replace(case, labels=None, token_weight=None, options=Options()))

    def test_views_of_any_strides(self, backend: str) -> None:
        case = full()
        parts = {name: strided(part) for name, part in vars(case).items() if isinstance(part, Tensor)}
        assert not parts["student_weight"].is_contiguous()
        with running(backend):
            memory = budget(case, 40)
            found = run(replace(case, **parts), strategy="vocab", memory_budget=memory)
            assert_equal(found, run(case, strategy="tokens"), case)

    def test_labels_and_weights_with_holes_and_without(self, backend: str) -> None:
        case = full()
        with running(backend):
            for drop in ({"labels": None}, {"token_weight": None}, {"labels": None, "token_weight": None}):
                without = replace(case, **drop)
                if "labels" in drop:
                    without = replace(without, options=replace(case.options, ce_weight=0.0))
                both(without)
                both(without, return_metrics=True)

    def test_what_dropped_tokens_hold_does_not_matter(self, backend: str) -> None:
        case = full()
        assert case.labels is not None
        assert case.token_weight is not None
        options = {"strategy": "vocab", "memory_budget": budget(case, 40), "return_metrics": True}
        with running(backend):
            right = run(case, **options)
            dropped = (case.labels == -100) | (case.token_weight == 0)
            assert dropped.sum() == 2
            case.student_hidden[dropped], case.teacher_hidden[dropped] = torch.nan, torch.inf
            assert_same(run(case, **options), right)

    def test_labels_alone_do_not_look_at_the_teacher(self, backend: str) -> None:
        case = full(kd_weight=0.0, ce_weight=1.0)
        with running(backend):
            both(case)
            memory = budget(case, 40)
            right = run(case, strategy="vocab", memory_budget=memory)
            case.teacher_hidden.fill_(torch.nan)
            assert_same(run(case, strategy="vocab", memory_budget=memory), right)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_a_batch_without_a_token_to_learn_from_is_zero(self, backend: str, reduction: str) -> None:
        case = full()
        assert case.labels is not None
        masked = replace(case, labels=torch.full_like(case.labels, -100))
        empty = replace(
            case,
            student_hidden=case.student_hidden[:, :0],
            teacher_hidden=case.teacher_hidden[:, :0],
            labels=case.labels[:, :0],
            token_weight=None,
        )
        with running(backend):
            for nothing in (masked, empty):
                for memory in (None, 1):
                    found = run(nothing, strategy="vocab", memory_budget=memory, reduction=reduction, return_metrics=True)
                    assert_same(found, run(nothing, strategy="tokens", reduction=reduction, return_metrics=True))
                    for name, value in found.items():
                        assert (value == 0).all(), name

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_autocast(self, backend: str, reduction: str) -> None:
        case = full()
        case = replace(case, student_hidden=case.student_hidden.bfloat16(), teacher_hidden=case.teacher_hidden.bfloat16())
        with running(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            both(case, reduction=reduction)

    @pytest.mark.parametrize("name", kd.divergences())
    def test_a_bias_may_ban_a_whole_block(self, backend: str, name: str) -> None:
        case = replace(full(divergence=name), student_softcap=None, teacher_softcap=None, labels=None)
        case = replace(case, options=replace(case.options, ce_weight=0.0))
        assert case.student_bias is not None
        assert case.teacher_bias is not None
        case.student_bias[:50], case.teacher_bias[:50] = -torch.inf, -torch.inf
        case.student_bias[100:], case.teacher_bias[90:100] = -torch.inf, -torch.inf
        with running(backend):
            right = run(case, strategy="tokens", return_metrics=True)
            assert all(value.isfinite().all() for value in right.values())
            both(case, 16)
            both(case, 16, return_metrics=True)

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("model", ["student_hidden", "teacher_hidden"])
    def test_a_bad_token_is_nan_and_no_other(self, backend: str, model: str, name: str) -> None:
        case = draw(tokens=(6,), vocab=150, options=Options(name, t=0.5))
        options = {"strategy": "vocab", "memory_budget": budget(case, 40), "reduction": "none"}
        with running(backend):
            right = run(case, **options)
            getattr(case, model)[2, 3] = torch.nan
            found = run(case, **options)
        others = [0, 1, 3, 4, 5]
        for result in ("loss", "student_hidden"):
            assert found[result][2].isnan().all(), result
            torch.testing.assert_close(found[result][others], right[result][others], rtol=0, atol=0)
        assert found["student_weight"].isnan().all()


@every_backend
def test_agreement_is_of_places_in_the_row_and_not_in_a_block(backend: str) -> None:
    case = draw(tokens=(4,), vocab=64)
    student_bias, teacher_bias = torch.zeros(64), torch.zeros(64)
    student_bias[3], teacher_bias[16 + 3] = 1e3, 1e3
    case = replace(case, student_bias=student_bias, teacher_bias=teacher_bias)
    with running(backend):
        options = {"strategy": "vocab", "memory_budget": budget(case, 16), "return_metrics": True}
        assert run(case, **options)["agreement"] == 0
        assert run(replace(case, teacher_bias=student_bias), **options)["agreement"] == 1


class TestFloat64:
    @pytest.mark.parametrize("name", kd.divergences())
    def test_it_keeps_its_digits(self, name: str) -> None:
        case = dressed(draw(tokens=(2, 9), vocab=150, dtype=torch.float64))
        case = replace(case, options=Options(name, t=0.6, temperature=2.0, ce_weight=0.5))
        both(case)
        both(case, reduction="none", return_metrics=True)


class TestFloat16Range:
    """Gradients are made in the forward, where float16 must hold them until the backward."""

    @pytest.mark.parametrize("columns", [2, 8])
    def test_a_heads_gradient_may_be_a_sum_over_many_alike_tokens(self, columns: int) -> None:
        size = 100.0
        hidden, weight = torch.full((4096, 4), size).half(), torch.zeros(8, 4).half().requires_grad_()
        bias = torch.zeros(8).half().requires_grad_()
        teacher_weight = torch.zeros(8, 4).half()
        teacher_weight[0] = 1.0
        memory = columns * 4096 * column_bytes(weight.dtype, weight.dtype, torch.device("cpu"))
        head = kd.LMHead(weight, bias)
        kd.linear_kd_loss(hidden, head, hidden, teacher_weight, strategy="vocab", memory_budget=memory).backward()
        right = torch.full((), 1 / 8 - 1)
        assert weight.grad is not None
        assert bias.grad is not None
        eps = torch.finfo(torch.float16).eps
        torch.testing.assert_close(weight.grad[0].float(), (size * right).expand(4), rtol=2 * eps, atol=0)
        torch.testing.assert_close(bias.grad[0].float(), right, rtol=2 * eps, atol=0)

    @pytest.mark.parametrize("columns", [40, 101])
    def test_the_mean_over_many_tokens_survives_until_a_gradient_scaler_multiplies_it(self, columns: int) -> None:
        case, scale = draw(tokens=(4096,), vocab=101, spread=1.0, dtype=torch.float16), 2.0**14
        exact = case.plain()
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
        loss = case.loss(leaves, strategy="vocab", memory_budget=budget(case, columns))
        for (name, leaf), grad in zip(leaves.items(), torch.autograd.grad(loss * scale, list(leaves.values())), strict=True):
            right = exact[name] * scale
            assert grad.dtype == leaf.dtype
            off = (grad.double() - right).square().mean().sqrt() / right.square().mean().sqrt()
            assert off <= 2 * torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hidden_states_gradient_does_not_lose_digits_with_every_block(dtype: torch.dtype) -> None:
    case = draw(tokens=(32,), vocab=300, spread=1.0, dtype=dtype)
    exact = case.plain()["student_hidden"]
    off = {}
    for columns in (1, 300):
        found = run(case, strategy="vocab", memory_budget=budget(case, columns))["student_hidden"]
        off[columns] = ((found.double() - exact).square().mean() / exact.square().mean()).sqrt()
    assert off[1] <= 1.2 * off[300]
    assert off[1] <= torch.finfo(dtype).eps / 2


SMALL = 16  # columns of a block: four blocks of V
TOKENS_HALF = torch.arange(N) % 2 == 0


@every_backend
class TestProducts:
    """What the docstring of sweeps.py promises, counted."""

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


@every_backend
class TestAutograd:
    def options(self, case: Case) -> dict[str, Any]:
        return {"strategy": "vocab", "memory_budget": budget(case, 40)}

    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_two_runs_agree_bit_for_bit(self, backend: str, reduction: str, name: str) -> None:
        case = full(divergence=name)
        with running(backend):
            options = {**self.options(case), "reduction": reduction, "return_metrics": True}
            assert_same(run(case, **options), run(case, **options))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_backward_twice_gives_the_same_gradient_twice(self, backend: str, reduction: str) -> None:
        case = full()
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
        with running(backend):
            loss = case.loss(leaves, reduction=reduction, **self.options(case)).sum()
            first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
            kept = [grad.clone() for grad in first]
            for grad in first:
                grad.fill_(torch.nan)  # what a caller does with a gradient is his own business
            second = torch.autograd.grad(loss, list(leaves.values()))
        for one, other in zip(second, kept, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_inputs_are_never_written_to(self, backend: str, reduction: str) -> None:
        case = full()
        inputs = [part for part in vars(case).values() if isinstance(part, Tensor)]
        before, versions = [part.clone() for part in inputs], [part._version for part in inputs]
        with running(backend):
            run(case, reduction=reduction, **self.options(case))
        for one, other in zip(inputs, before, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert [part._version for part in inputs] == versions


# PyTorch warns of what PyTorch does: its tracer makes an instance of every autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_compiles_into_one_graph(reduction: str) -> None:
    case = full()
    options = {"strategy": "vocab", "memory_budget": budget(case, 40), "reduction": reduction, "return_metrics": True}

    def step(leaves: dict[str, Tensor]) -> Any:
        loss, metrics = case.loss(leaves, **options)
        return loss.sum(), metrics

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.learned().items()}
        loss, metrics = function(leaves)
        loss.backward()
        results.append({"loss": loss.detach(), **metrics, **{name: leaf.grad for name, leaf in leaves.items()}})
    assert_equal(results[1], results[0], case)


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
        add = kd.engine.gradients.Gradients.add

        def spied(grads: Any, head: Any, dx: Tensor, hidden: Tensor, counted: slice, block: slice, buffer: Tensor) -> None:
            seen.append((block.start, block.stop, tuple(dx.shape)))
            add(grads, head, dx, hidden, counted, block, buffer)

        monkeypatch.setattr(kd.engine.gradients.Gradients, "add", spied)
        run(case, strategy="vocab", memory_budget=budget(case, columns))
        width = block_columns(
            *(18, 150, column_bytes(dtype, dtype, torch.device("cpu")), budget(case, columns)), torch.device("cpu")
        )
        edges = [*range(0, 150, width), 150]
        assert seen == [(begin, end, (18, end - begin)) for begin, end in itertools.pairwise(edges)]


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


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy 'columns' is not known; accepted: auto, tokens, vocab"):
        draw().loss(strategy="columns")


def test_the_strategy_asked_for_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = strategies_that_run(monkeypatch)
    for strategy in ("tokens", "vocab"):
        draw().loss(strategy=strategy)
    assert ran == ["tokens", "vocab"]


def test_the_backend_that_was_chosen_makes_the_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(dtype=torch.float64)
    assert backends.select(torch.device("cpu"), torch.float64) == "reference"
    monkeypatch.setattr(reference, "block_stats", lambda *_: pytest.fail("as it should"))
    with pytest.raises(pytest.fail.Exception, match="as it should"):
        case.loss(strategy="vocab")
