"""Gradients follow autograd's rules: twice the same, scaled by what comes from above, in the dtypes of their inputs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import reference
from kdkernels.backends.products import HeadProducts
from kdkernels.engine import gradients
from tests.support.cases import DTYPES, NATIVE_DTYPES, REDUCTIONS, Case, assert_same, draw, dressed, keywords, running
from tests.support.oracle import Options

small_budget = pytest.mark.parametrize("memory_budget", [None, 1000], ids=["one-chunk", "a-row-at-a-time"])


def from_hidden(dtype: torch.dtype, **more: Any) -> tuple[list[Tensor], Callable[[], Any]]:
    """Leaves, and the loss of them."""
    case = replace(dressed(draw(dtype=dtype)), options=Options("jsd", t=0.6, temperature=2.0, ce_weight=0.5))
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.learned().items()}
    return list(leaves.values()), lambda: case.loss(leaves, **more)


def from_logits(dtype: torch.dtype, **more: Any) -> tuple[list[Tensor], Callable[[], Any]]:
    generator = torch.Generator().manual_seed(3)
    x, z = (torch.randn(2, 6, 37, generator=generator) * 3).to(dtype)
    x.requires_grad_()
    more.pop("memory_budget", None)
    return [x], lambda: kd.kd_loss(x, z, divergence="reverse_kl", temperature=2.0, **more)


both_roads = pytest.mark.parametrize("road", [from_hidden, from_logits])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_teacher_may_have_run_in_inference_mode(reduction: str) -> None:
    x = torch.randn(6, 37, generator=torch.Generator().manual_seed(3), requires_grad=True)
    z = torch.randn(6, 37, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        of_inference = z.clone()
    gradients = []
    for teacher_logits in (of_inference, z):
        loss = kd.kd_loss(x, teacher_logits, divergence="jsd", reduction=reduction)
        gradients.append(torch.autograd.grad(loss, x, torch.ones_like(loss)))
    assert_same(*gradients)


@both_roads
@small_budget
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_twice_gives_the_same_gradient_twice(
    dtype: torch.dtype, reduction: str, memory_budget: int | None, road: Callable[..., Any]
) -> None:
    leaves, loss = road(dtype, reduction=reduction, memory_budget=memory_budget)
    value = loss()
    upstream = torch.full_like(value, 0.25)
    first = torch.autograd.grad(value, leaves, upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(value, leaves, upstream, retain_graph=True)
    assert_same(second, kept)
    for grad in (*first, *second):
        grad.fill_(torch.nan)  # what a caller does with a gradient is his own business
    assert_same(torch.autograd.grad(value, leaves, upstream), kept)


@both_roads
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mutated_grad_does_not_reach_the_next_backward(reduction: str, road: Callable[..., Any]) -> None:
    leaves, loss = road(torch.float32, reduction=reduction)
    value = loss().sum()
    value.backward(retain_graph=True)
    kept = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad.zero_()
    value.backward()
    assert_same([leaf.grad for leaf in leaves], kept)


@both_roads
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_several_steps_add_up(reduction: str, road: Callable[..., Any]) -> None:
    leaves, loss = road(torch.float64, reduction=reduction)
    once = torch.autograd.grad(loss().sum(), leaves)
    for _ in range(3):
        loss().sum().backward()
    (loss().sum() * 2 + loss().sum()).backward()
    for leaf, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * grad, rtol=1e-12, atol=1e-15)


@both_roads
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [3.0, 0.25, -1.0, 0.0])
def test_gradients_scale_with_the_upstream_one(factor: float, dtype: torch.dtype, reduction: str, road: Callable[..., Any]) -> None:
    leaves, loss = road(dtype, reduction=reduction)
    plain = torch.autograd.grad(loss(), leaves)
    scaled = torch.autograd.grad(loss() * factor, leaves)
    for one, other in zip(scaled, plain, strict=True):
        smallest = torch.finfo(one.dtype).smallest_normal
        torch.testing.assert_close(one, other * factor, rtol=2 * torch.finfo(one.dtype).eps, atol=smallest)


@both_roads
def test_each_token_has_its_own_upstream_gradient(road: Callable[..., Any]) -> None:
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1e-3], dtype=torch.float64)
    leaves, loss = road(torch.float64, reduction="none")
    together = torch.autograd.grad(loss(), leaves, upstream)
    per_token = [torch.autograd.grad(loss()[token], leaves) for token in range(6)]
    for at, grad in enumerate(together):
        by_hand = sum(factor * grads[at] for factor, grads in zip(upstream, per_token, strict=True))
        torch.testing.assert_close(grad, by_hand, rtol=1e-10, atol=1e-14)


@both_roads
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype, reduction: str, road: Callable[..., Any]) -> None:
    leaves, loss = road(dtype, reduction=reduction)
    runs = []
    for _ in range(2):
        value = loss()
        runs.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
    assert_same(*runs)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_threads_change_no_bit_of_the_row_operations(dtype: torch.dtype) -> None:
    x, z = (torch.randn(2, 64, 2100, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    x.requires_grad_()
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        losses = kd.kd_loss(x, z, reduction="none")
        runs.append([losses.detach(), *torch.autograd.grad(losses.sum(), [x])])
    assert_same(*runs)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_never_written_to(dtype: torch.dtype, reduction: str, backend: str | None) -> None:
    case = dressed(draw(dtype=dtype))
    x, z = (logits.to(dtype) for logits in case.logits())
    assert case.labels is not None
    assert case.token_weight is not None
    t = torch.tensor(0.5)
    inputs = [*(part for part in vars(case).values() if isinstance(part, Tensor)), x, z, t]
    before, versions = [part.clone() for part in inputs], [part._version for part in inputs]
    with running(backend) if backend else contextlib.nullcontext():
        case.run(reduction=reduction, t=t, memory_budget=2000, return_metrics=False)
        for logits in (x, x.requires_grad_()):
            loss = kd.kd_loss(logits, z, case.labels, t=t, token_weight=case.token_weight, reduction=reduction)
        torch.autograd.grad(loss.sum(), [x])
    assert_same([part.detach() for part in inputs], before)
    assert [part._version for part in inputs] == versions


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_have_the_promised_dtypes(dtype: torch.dtype) -> None:
    of_loss = torch.float64 if dtype == torch.float64 else torch.float32
    for road, reduction in itertools.product((from_hidden, from_logits), REDUCTIONS):
        leaves, loss = road(dtype, reduction=reduction)
        value = loss()
        assert value.dtype == of_loss
        assert [grad.dtype for grad in torch.autograd.grad(value.sum(), leaves)] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(DTYPES, 2)))
def test_student_and_teacher_differ_in_dtype(student: torch.dtype, teacher: torch.dtype) -> None:
    case = draw(tokens=(5,), dtype=student, options=Options("jsd", t=0.5))
    case = replace(case, teacher_hidden=case.teacher_hidden.to(teacher), teacher_weight=case.teacher_weight.to(teacher))
    exact, found = case.plain(), case.run()
    x, z = (logits.to(dtype) for logits, dtype in zip(case.logits(), (student, teacher), strict=True))
    x.requires_grad_()
    from_logits = kd.kd_loss(x, z, **keywords(case.options))
    of_loss = torch.float64 if student == torch.float64 else torch.float32
    assert found["loss"].dtype == from_logits.dtype == of_loss
    assert kd.kd_loss(x, z, reduction="none").dtype == of_loss
    tolerance = 8 * max(torch.finfo(dtype).eps for dtype in (student, teacher) if dtype != torch.float64)
    for name, right in exact.items():
        torch.testing.assert_close(found[name].double(), right, rtol=tolerance, atol=tolerance * right.abs().max().item())
    torch.testing.assert_close(from_logits.double(), exact["loss"], rtol=tolerance * 3, atol=tolerance)
    assert torch.autograd.grad(from_logits, [x])[0].dtype == student


class TestAutocast:
    """bfloat16 hidden states over float32 master weights, which is how most people train."""

    def case(self) -> Case:
        case = dressed(draw(tokens=(16,), spread=1.0))
        return replace(
            case,
            student_hidden=case.student_hidden.bfloat16(),
            teacher_hidden=case.teacher_hidden.bfloat16(),
            options=Options(ce_weight=0.5, temperature=2.0),
        )

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @small_budget
    def test_values_are_right_and_gradients_come_in_the_parameters_dtypes(self, memory_budget: int | None, reduction: str) -> None:
        case = self.case()
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = case.loss(leaves, memory_budget=memory_budget, reduction=reduction)
        exact_case = replace(case, options=replace(case.options, normalizer=1.0 if reduction != "mean" else None))
        exact = exact_case.plain()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.sum().double(), exact["loss"], rtol=1e-2, atol=1e-2)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            assert grad.dtype == leaf.dtype
            torch.testing.assert_close(grad.double(), exact[name], rtol=2e-2, atol=1e-2 * exact[name].abs().max().item())

    def test_backward_may_run_inside_or_outside(self) -> None:
        case = self.case()
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
        for reduction in ("mean", "none"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = case.loss(leaves, reduction=reduction).sum()
                inside = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
            assert_same(torch.autograd.grad(loss, list(leaves.values())), inside)

    def test_without_it_two_dtypes_in_one_model_are_refused(self) -> None:
        case = self.case()
        with pytest.raises(TypeError, match=r"student_hidden and student_head are torch.bfloat16 and torch.float32.*autocast"):
            case.loss()
        case = replace(case, student_hidden=case.student_hidden.float())
        with pytest.raises(TypeError, match=r"teacher_hidden and teacher_head are torch.bfloat16 and torch.float32.*autocast"):
            case.loss()

    def test_float64_is_left_alone(self) -> None:
        case = draw(dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = case.run()
        assert_same(inside.values(), case.run().values())


@both_roads
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_only_a_loss(
    context: Callable[[], Any], road: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, loss = road(torch.float64)
    expected = loss()
    monkeypatch.setattr(HeadProducts, "hidden_grad", forbidden)
    monkeypatch.setattr(gradients, "add_head_grad", forbidden)
    monkeypatch.setattr(reference, "_grad", forbidden)
    with context():
        value = loss()
    assert not value.requires_grad
    assert value == expected.detach()
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert loss() == expected.detach()


def forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError("a gradient was computed though nobody can ask for it")


@pytest.mark.parametrize("learned", [names for n in (1, 2, 3) for names in itertools.combinations(range(3), n)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_go_only_where_they_are_asked_for(reduction: str, learned: tuple[int, ...]) -> None:
    all_leaves, loss = from_hidden(torch.float32, reduction=reduction)
    everything = torch.autograd.grad(loss().sum(), all_leaves)
    for at, leaf in enumerate(all_leaves):
        leaf.requires_grad_(at in learned)
    found = torch.autograd.grad(loss().sum(), [all_leaves[at] for at in learned])
    for grad, at in zip(found, learned, strict=True):
        torch.testing.assert_close(grad, everything[at], rtol=1e-6, atol=1e-9)


@both_roads
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction: str, road: Callable[..., Any]) -> None:
    leaves, loss = road(torch.float64, reduction=reduction)
    first = torch.autograd.grad(loss().square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in first).backward()


@both_roads
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_penalty_on_gradients_is_refused_and_not_dropped(reduction: str, road: Callable[..., Any]) -> None:
    """The upstream gradient of a loss is a constant: nothing asks for a derivative but the penalty."""
    leaves, loss = road(torch.float64, reduction=reduction)
    value = loss().sum()
    first = torch.autograd.grad(value, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivatives of their own"):
        (value + 100 * sum(grad.square().sum() for grad in first)).backward()
    again = torch.autograd.grad(loss().sum(), leaves)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=0)


def test_a_backward_that_keeps_nothing_frees_its_gradients() -> None:
    _, loss = from_hidden(torch.float32)
    value = loss()
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
