"""The backward passes of the library operators of ops.py.

An operator takes its differentiable arguments first, then a token_weight for each of its losses, grad_scale and lift, and ends
with ``needs`` (which of the differentiable ones need a gradient) and ``metrics``; it returns its losses, a gradient for each
differentiable argument, and metrics. ``owners`` says which loss each differentiable argument belongs to; the first of each is a
hidden state. ``apply`` takes one token_weight for all losses: torch.compile traces no function that takes a tensor twice.

A summed loss has its gradients made in the forward, and the backward only scales them. A loss per token learns its upstream
gradient in the backward, so it computes there again, with that gradient as token weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Arguments of ``apply`` before the operator's own.
_OWN = 5


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """The saved gradient times the upstream one.

    A graph that this backward frees gives its buffers away, scaled in place; one that is kept must keep them as they are.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return grad * scale
    if scale.device.type == "cpu" and scale.item() == 1.0:
        return grad
    return grad.mul_(scale)


def _losses(owners: tuple[int, ...]) -> int:
    return owners[-1] + 1


def _is_hidden(owners: tuple[int, ...], at: int) -> bool:
    return at == 0 or owners[at] != owners[at - 1]


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's, which refuses a second derivative only where the upstream gradient has one: that of ``loss.backward()`` is a
    constant, and a penalty on gradients would be dropped in silence."""

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Any) -> Any:
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # enabled by create_graph=True
            return grads
        refuse = torch._C._functions.DelayedError(
            b"the gradients of kdkernels' losses have no derivatives of their own (create_graph=True): they are marked "
            b"once_differentiable",
            len(grads),
        )
        given: list[Any] = [grad if grad is None else grad.detach().requires_grad_() for grad in grads]
        return refuse(*given)

    return once


class SummedLoss(torch.autograd.Function):
    """(each sum of losses times ``factor``, metrics); gradients of hidden states, which are of single tokens, are made ``lift``
    times as large."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, owners: tuple[int, ...], metrics: bool, factor: Tensor, lift: Tensor | None, *arguments: Any
    ) -> Any:
        count, inputs = _losses(owners), len(owners)
        ctx.owners, ctx.needs = owners, [bool(need) for need in ctx.needs_input_grad[_OWN : _OWN + inputs]]
        weights = [arguments[inputs]] * count
        made = operator(*arguments[:inputs], *weights, factor, lift, *arguments[inputs + 1 :], ctx.needs, metrics)
        losses, grads, summary = made[:count], made[count:-1], made[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lift, *grads)
        ctx.mark_non_differentiable(summary)
        return *((loss.sum(dtype=torch.float64) * factor).to(loss.dtype) for loss in losses), summary

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


class LossPerToken(torch.autograd.Function):
    """(losses of each token, metrics); ``factor`` is 1 and ``lift`` None here."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, owners: tuple[int, ...], metrics: bool, factor: Tensor, lift: Tensor | None, *arguments: Any
    ) -> Any:
        count, inputs = _losses(owners), len(owners)
        weights = [arguments[inputs]] * count
        made = operator(*arguments[:inputs], *weights, factor, None, *arguments[inputs + 1 :], [False] * inputs, metrics)
        losses, summary = made[:count], made[-1]
        ctx.operator, ctx.owners = operator, owners
        ctx.saved = [_may_be_saved(argument) for argument in arguments]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(factor, *[argument for argument, saved in zip(arguments, ctx.saved, strict=True) if saved])
        ctx.others = [argument for argument, saved in zip(arguments, ctx.saved, strict=True) if not saved]
        ctx.mark_non_differentiable(summary)
        return *losses, summary

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        (factor, *saved), others = ctx.saved_tensors, list(ctx.others)
        arguments = [saved.pop(0) if was_saved else others.pop(0) for was_saved in ctx.saved]
        count, inputs = _losses(ctx.owners), len(ctx.owners)
        needs = [
            bool(need) and upstream[owner] is not None
            for need, owner in zip(ctx.needs_input_grad[_OWN : _OWN + inputs], ctx.owners, strict=True)
        ]
        present = next((one for one in upstream[:count] if one is not None), None)
        if present is None:
            return (None,) * (_OWN + len(arguments))
        token_weight, weights = arguments[inputs], []
        for one in upstream[:count]:
            one = torch.zeros_like(present) if one is None else one
            weights.append(one if token_weight is None else token_weight * one)
        made = ctx.operator(*arguments[:inputs], *weights, factor, None, *arguments[inputs + 1 :], needs, False)
        grads = [grad if need else None for grad, need in zip(made[count:-1], needs, strict=True)]
        return (*[None] * _OWN, *grads, *[None] * (len(arguments) - inputs))
