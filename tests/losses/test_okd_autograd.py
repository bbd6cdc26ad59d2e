"""Gradients of both learners follow autograd's rules, and the operator keeps torch.library's contracts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cases import (
    DTYPES,
    REDUCTIONS,
    Recorder,
    assert_same,
    both_strategies,
    draw,
)
from tests.support.okd import (
    BUDGET,
    EVERYTHING,
    FROZEN_HEAD,
    OF_STUDENT,
    OF_TEACHER,
    call,
    full,
    leaves_of,
    plain,
    run,
    upstream,
)
from tests.support.oracle import Options


class TestAutograd:
    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_each_loss_has_gradients_for_its_own_model_only(self, reduction: str, strategy: str) -> None:
        case = full()
        together = run(case, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        for which, own in enumerate((OF_STUDENT, OF_TEACHER)):
            leaves = leaves_of(case)
            loss = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)[which]
            loss.backward(upstream(loss, 2.0 + which))
            for name, leaf in leaves.items():
                if name in own:
                    torch.testing.assert_close(leaf.grad, together[name], rtol=0, atol=0)
                else:
                    assert leaf.grad is None, name

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_added_or_one_after_the_other_in_either_order(self, dtype: torch.dtype, reduction: str, strategy: str) -> None:
        case = full(dtype)
        grads = []
        for order in ("added", (0, 1), (1, 0)):
            leaves = leaves_of(case)
            made = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
            if order == "added":
                (made.student + made.teacher).sum().backward()
            else:
                made[order[0]].sum().backward(retain_graph=True)
                made[order[1]].sum().backward()
            grads.append([leaf.grad for leaf in leaves.values()])
        assert_same(grads[1], grads[0])
        assert_same(grads[2], grads[0])

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_backward_twice_gives_the_same_gradient_twice(self, dtype: torch.dtype, reduction: str, strategy: str) -> None:
        case = full(dtype)
        leaves = leaves_of(case)
        made = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        total, inputs = (0.25 * made.student + 3 * made.teacher).sum(), list(leaves.values())
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        kept = [grad.clone() for grad in first]
        second = torch.autograd.grad(total, inputs, retain_graph=True)
        assert_same(second, kept)
        for grad in (*first, *second):
            grad.fill_(torch.nan)  # what a caller does with a gradient is their own business
        assert_same(torch.autograd.grad(total, inputs), kept)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_each_loss_has_its_own_upstream_gradient(self, reduction: str) -> None:
        case = full(torch.float64)
        leaves = leaves_of(case)
        inputs = list(leaves.values())
        made = call(case, leaves, reduction=reduction)
        once = torch.autograd.grad((made.student + made.teacher).sum(), inputs, retain_graph=True)
        scaled = torch.autograd.grad((3 * made.student - 0.5 * made.teacher).sum(), inputs)
        for name, one, other in zip(leaves, scaled, once, strict=True):
            torch.testing.assert_close(one, other * (3.0 if name in OF_STUDENT else -0.5), rtol=1e-12, atol=1e-15)

    @both_strategies
    def test_each_token_has_its_own_upstream_gradient_in_each_loss(self, strategy: str) -> None:
        """Zeros in one, in the other and in both: a token counts where either of its two is not 0."""
        case = replace(full(torch.float64), labels=torch.arange(6), token_weight=None)
        leaves = leaves_of(case)
        inputs = list(leaves.values())
        factors = torch.tensor([[1.0, -2.0, 0.5, 0.0, 0.0, 3.0], [2.0, 0.0, 1.0, 0.0, -1.0, 1e-3]]).double()
        made = call(case, leaves, reduction="none", strategy=strategy, memory_budget=BUDGET)
        together = torch.autograd.grad(made[:2], inputs, list(factors), retain_graph=True)
        for name, inp, found in zip(leaves, inputs, together, strict=True):
            which = 0 if name in OF_STUDENT else 1
            by_hand = sum(
                factor * torch.autograd.grad(made[which][token], inp, retain_graph=True)[0]
                for token, factor in enumerate(factors[which].tolist())
            )
            torch.testing.assert_close(found, by_hand, rtol=1e-10, atol=1e-14)

    @both_strategies
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize(
        "learn",
        [("student_hidden",), ("teacher_hidden",), ("teacher_bias",), FROZEN_HEAD, OF_TEACHER, ("student_bias", "teacher_weight")],
    )
    def test_gradients_go_only_where_they_are_asked_for(self, learn: tuple[str, ...], reduction: str, strategy: str) -> None:
        case = full()
        everything = run(case, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        leaves = leaves_of(case, learn)
        made = call(case, leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        for loss, end in zip(made, (2.0, 3.0), strict=True):
            assert loss.requires_grad  # one function makes both
            loss.backward(upstream(loss, end), retain_graph=True)
        for name, leaf in leaves.items():
            if name in learn:
                torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-6, atol=1e-9)
            else:
                assert leaf.grad is None

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_there_are_only_losses(self, context: Callable[[], Any]) -> None:
        case = full()
        right = [loss.detach() for loss in call(case, leaves_of(case))]
        with context():
            made = call(case, leaves_of(case))
        assert not any(loss.requires_grad for loss in made)
        assert_same(made, right)

    def test_the_teachers_modules_learn_through_its_hidden_states(self) -> None:
        """A LoRA module below a frozen head, as in the paper: gradients arrive, and those of the student's loss do not."""
        case = full(torch.float64)
        module = torch.nn.Linear(12, 12, dtype=torch.float64)
        leaves = leaves_of(case, FROZEN_HEAD)
        leaves["teacher_hidden"] = module(case.teacher_hidden)
        made = call(case, leaves)
        made.student.backward(retain_graph=True)
        assert module.weight.grad is None
        made.teacher.backward()
        through = plain(replace(case, teacher_hidden=leaves["teacher_hidden"].detach()), 0.5)["teacher"]["teacher_hidden"]
        torch.testing.assert_close(module.weight.grad, through.mT @ case.teacher_hidden, rtol=1e-10, atol=1e-13)

    def test_second_derivatives_are_refused(self) -> None:
        leaves = leaves_of(full(torch.float64))
        made = call(full(torch.float64), leaves)
        (first,) = torch.autograd.grad((made.student + made.teacher).square(), [leaves["teacher_hidden"]], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_keeps_the_contracts_of_torch_library(dtype: torch.dtype, bare: bool) -> None:
    case = draw(dtype=dtype, options=Options("jsd")) if bare else full(dtype)
    with Recorder() as recorder:
        call(case, leaves_of(case, FROZEN_HEAD if bare else EVERYTHING), teacher_alpha=1.0, return_metrics=not bare)
    torch.library.opcheck(torch.ops.kdkernels.linear_okd.default, recorder.calls["linear_okd"])


def test_the_operators_fake_says_what_two_dtypes_make() -> None:
    case = full(torch.bfloat16)
    case = replace(case, **{name: getattr(case, name).double() for name in OF_TEACHER})
    with Recorder() as recorder:
        call(case, leaves_of(case))
    torch.library.opcheck(torch.ops.kdkernels.linear_okd.default, recorder.calls["linear_okd"])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("reduction", "dtype"), [("mean", torch.float32), ("mean", torch.float16), ("none", torch.float32)])
def test_it_compiles_to_one_graph(reduction: str, dtype: torch.dtype) -> None:
    case = full(dtype, divergence="jsd")

    def step(leaves: dict[str, Tensor]) -> Any:
        made = call(case, leaves, reduction=reduction, return_metrics=True)
        student, teacher, metrics = made
        return (made.student * 1.5).sum() + teacher.sum(), student.detach(), metrics

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = {name: leaf.clone().detach().requires_grad_() for name, leaf in leaves_of(case).items()}
        total, student, metrics = function(leaves)
        total.backward()
        found.append([total.detach(), student, *metrics.values(), *(leaf.grad for leaf in leaves.values())])
    for compiled, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(compiled, expected, rtol=2 * torch.finfo(compiled.dtype).eps, atol=1e-7)
