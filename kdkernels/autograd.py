"""The backward passes of the library operators of ops.py.

An operator takes its differentiable arguments first, then token_weight, grad_scale and lift, and ends with ``needs`` (which of the
differentiable ones need a gradient) and ``metrics``; it returns losses, a gradient for each differentiable argument, and metrics.

A summed loss has its gradients made in the forward, and the backward only scales them. A loss per token learns its upstream
gradient in the backward, so it computes there again, with that gradient as token weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


class SummedLoss(torch.autograd.Function):
    """(sum of losses times ``factor``, metrics); the first gradient, that of single tokens, is made ``lift`` times as large."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, differentiable: int, metrics: bool, factor: Tensor, lift: Tensor | None, *arguments: Any
    ) -> Any:
        ctx.needs = [bool(need) for need in ctx.needs_input_grad[_OWN : _OWN + differentiable]]
        weighted, rest = arguments[: differentiable + 1], arguments[differentiable + 1 :]
        losses, *grads, summary = operator(*weighted, factor, lift, *rest, ctx.needs, metrics)
        ctx.save_for_backward(lift, *grads)
        ctx.mark_non_differentiable(summary)
        return (losses.sum(dtype=torch.float64) * factor).to(losses.dtype), summary

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        lift, *grads = ctx.saved_tensors
        scales = [upstream if lift is None else upstream / lift, *[upstream] * (len(grads) - 1)]
        scaled = [_scaled(*pair) if need else None for *pair, need in zip(grads, scales, ctx.needs, strict=True)]
        return (*[None] * _OWN, *scaled, *[None] * (len(ctx.needs_input_grad) - _OWN - len(scaled)))


class LossPerToken(torch.autograd.Function):
    """(loss of each token, metrics); ``factor`` is 1 and ``lift`` None here."""

    @staticmethod
    def forward(
        ctx: Any, operator: Any, differentiable: int, metrics: bool, factor: Tensor, lift: Tensor | None, *arguments: Any
    ) -> Any:
        weighted, rest = arguments[: differentiable + 1], arguments[differentiable + 1 :]
        losses, *_, summary = operator(*weighted, factor, None, *rest, [False] * differentiable, metrics)
        ctx.operator, ctx.differentiable = operator, differentiable
        ctx.tensors = [isinstance(argument, Tensor) for argument in arguments]
        ctx.save_for_backward(factor, *[argument for argument in arguments if isinstance(argument, Tensor)])
        ctx.others = [argument for argument in arguments if not isinstance(argument, Tensor)]
        ctx.mark_non_differentiable(summary)
        return losses, summary

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        (factor, *saved), others = ctx.saved_tensors, list(ctx.others)
        arguments = [saved.pop(0) if tensor else others.pop(0) for tensor in ctx.tensors]
        inputs, (token_weight, *rest) = arguments[: ctx.differentiable], arguments[ctx.differentiable :]
        weight = upstream if token_weight is None else token_weight * upstream
        needs = [bool(need) for need in ctx.needs_input_grad[_OWN : _OWN + ctx.differentiable]]
        _, *grads, _ = ctx.operator(*inputs, weight, factor, None, *rest, needs, False)
        made = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return (*[None] * _OWN, *made, *[None] * (len(arguments) - len(made)))
