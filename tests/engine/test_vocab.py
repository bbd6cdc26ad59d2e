"""Streaming the vocabulary in blocks changes what a step costs, and nothing of what it gives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import reference
from kdkernels.backends.columns import STATS_COLUMNS
from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.divergences import resolve
from kdkernels.engine.cut import column_bytes
from tests.support.cases import NATIVE_DTYPES, Case, draw, dressed, parameters, running, strategies_that_run, strided
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
    assert backends.select(torch.device("cpu"), torch.float64) is backends.reference.BACKEND
    monkeypatch.setattr(reference, "block_stats", lambda *_: pytest.fail("as it should"))
    with pytest.raises(pytest.fail.Exception, match="as it should"):
        case.loss(strategy="vocab")
