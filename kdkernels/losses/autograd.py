"""The backward passes of the library operators of operators.py.

An operator takes its differentiable arguments first, then a token_weight for each of its losses, grad_scale and lift, and ends
with ``needs`` (which of the differentiable ones need a gradient) and ``metrics``; it returns its losses, a gradient for each
differentiable argument, and metrics. ``OWNERS`` says which loss each differentiable argument belongs to; the first of each is a
hidden state.

A summed loss has its gradients made in the forward, and the backward only scales them: ``SummedLoss``, which takes one token_weight
for all losses, as torch.compile traces no function that takes a tensor twice. A loss per token learns its upstream gradient in the
backward, so it computes there again, with that gradient as token weights: this is the operator's own backward, ``of_operator``,
which an exported program takes too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

OWNERS = {"linear_kd": (0, 0, 0), "linear_okd": (0, 0, 0, 1, 1, 1), "linear_topk_kd": (0, 0, 0), "logits_kd": (0,)}
# Arguments of ``apply`` before the operator's own.
_OWN = 6


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """The saved gradient times the upstream one.

    A graph that this backward frees gives its buffers away, scaled in place; one that is kept must keep them as they are.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph() or _batched(scale):
        return grad * scale
    if scale.device.type == "cpu" and scale.item() == 1.0:
        return grad
    return grad.mul_(scale)


def _batched(upstream: Tensor) -> bool:
    """Several upstream gradients at once: torch.autograd.grad(..., is_grads_batched=True)."""
    return torch._C._dispatch_keys(upstream).has("Batched")


def losses_of(owners: tuple[int, ...]) -> int:
    return owners[-1] + 1


def total(losses: Tensor, factor: Tensor) -> Tensor:
    return (losses.sum(dtype=torch.float64) * factor).to(losses.dtype)


def refuse_transforms(differentiable: tuple[Tensor | None, ...]) -> None:
    """Raises RuntimeError under torch.func's transforms and forward-mode derivatives: a gradient made early has no part in them."""
    if torch.compiler.is_compiling():
        return
    forward = forward_ad._current_level >= 0 and any(
        one is not None and forward_ad.unpack_dual(one).tangent is not None for one in differentiable
    )
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or forward:
        what = "a transform of torch.func (grad, vmap, jacrev, jvp, ...)" if transformed else "forward-mode derivatives"
        raise RuntimeError(
            f"kdkernels' losses came under {what}, which they have no rules for; accepted: loss.backward() or torch.autograd.grad, "
            "also with torch.func.functional_call. What vmap would map over is one more leading dimension of the hidden states, "
            "with reduction='none' for a loss of each token"
        )


def _is_hidden(owners: tuple[int, ...], at: int) -> bool:
    return at == 0 or owners[at] != owners[at - 1]


class Anchor(torch.autograd.Function):
    """An empty tensor that hangs on what a loss was made of, where keeping that itself would cost memory."""

    @staticmethod
    def forward(ctx: Any, *sources: Tensor) -> Tensor:
        return sources[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise AssertionError("nothing is made from it that gradients go through")


def anchors_of(differentiable: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """None in a compiled graph, which has no second backward anyway."""
    learned = [argument for argument in differentiable if argument is not None and argument.requires_grad]
    return () if torch.compiler.is_compiling() or not learned else (Anchor.apply(*learned),)  # type: ignore[no-untyped-call]


class _NoFurther(torch.autograd.Function):
    """The gradient as it is; it hangs on ``sources``, and whoever differentiates it hears that this is not possible."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(
            "the gradients of kdkernels' losses have no derivatives of their own (create_graph=True): they are marked "
            "once_differentiable"
        )


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Unlike torch's, whose refusal hangs on nothing: there a penalty on gradients is dropped in silence where the upstream
    gradient is a constant, and torch.autograd.functional.hessian is 0."""

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Any) -> Any:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled by create_graph=True
            return grads
        sources = [one for one in (*ctx.anchors, *upstream) if isinstance(one, Tensor)]
        return tuple(grad if grad is None else _NoFurther.apply(grad, *sources) for grad in grads)  # type: ignore[no-untyped-call]

    return once


class SummedLoss(torch.autograd.Function):
    """(each sum of losses times ``factor``, metrics); gradients of hidden states, which are of single tokens, are made ``lift``
    times as large. anchors: see ``Anchor``; in a tuple, lest they be inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: Any,
        owners: tuple[int, ...],
        metrics: bool,
        factor: Tensor,
        lift: Tensor | None,
        anchors: tuple[Tensor, ...],
        *arguments: Any,
    ) -> Any:
        count, inputs = losses_of(owners), len(owners)
        ctx.anchors = anchors
        ctx.owners, ctx.needs = owners, [bool(need) for need in ctx.needs_input_grad[_OWN : _OWN + inputs]]
        weights = [arguments[inputs]] * count
        made = operator(*arguments[:inputs], *weights, factor, lift, *arguments[inputs + 1 :], ctx.needs, metrics)
        losses, grads, summary = made[:count], made[count:-1], made[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lift, *grads)
        ctx.mark_non_differentiable(summary)
        return *(total(loss, factor) for loss in losses), summary

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        lift, *grads = ctx.saved_tensors
        scaled: list[Tensor | None] = []
        for at, (grad, need, owner) in enumerate(zip(grads, ctx.needs, ctx.owners, strict=True)):
            scale = upstream[owner]
            if not need or scale is None:
                scaled.append(None)
            else:
                lifted = lift is not None and _is_hidden(ctx.owners, at)
                scaled.append(_scaled(grad, scale / lift if lifted else scale))
        return (*[None] * _OWN, *scaled, *[None] * (len(ctx.needs_input_grad) - _OWN - len(scaled)))


def _may_be_saved(argument: Any) -> bool:
    """Tensors of inference mode, which a teacher's may be, autograd does not save: they have no version that it could look at."""
    return isinstance(argument, Tensor) and (torch.compiler.is_compiling() or not argument.is_inference())


def of_operator(operator: Any, owners: tuple[int, ...]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """setup_context and backward of an operator, as torch.library.register_autograd takes them."""
    count, inputs = losses_of(owners), len(owners)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.saved = [_may_be_saved(argument) for argument in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[argument for argument, saved in zip(inputs, ctx.saved, strict=True) if saved])
        ctx.others = [argument for argument, saved in zip(inputs, ctx.saved, strict=True) if not saved]
        ctx.mark_non_differentiable(*output[count:])

    @_once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        saved, others = list(ctx.saved_tensors), list(ctx.others)
        arguments = [saved.pop(0) if was_saved else others.pop(0) for was_saved in ctx.saved]
        ctx.anchors = arguments[:inputs]
        present = next((one for one in upstream[:count] if one is not None), None)
        if present is None:
            return (None,) * len(arguments)
        needs = [
            bool(need) and upstream[owner] is not None for need, owner in zip(ctx.needs_input_grad[:inputs], owners, strict=True)
        ]
        weights = [
            torch.zeros_like(present) if one is None else one if weight is None else weight * one
            for weight, one in zip(arguments[inputs : inputs + count], upstream[:count], strict=True)
        ]
        factor, _, *rest = arguments[inputs + count : -2]
        made = operator(*arguments[:inputs], *weights, factor, None, *rest, needs, False)
        grads = [grad if need else None for grad, need in zip(made[count:-1], needs, strict=True)]
        return (*grads, *[None] * (len(arguments) - inputs))

    return setup_context, backward
