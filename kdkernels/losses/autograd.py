"""The backward passes of the library operators of operators.py.

An operator takes its differentiable arguments first, then a token_weight for each of its losses, grad_scale and lift, and ends
with ``needs`` (which of the differentiable ones need a gradient) and ``metrics``; it returns its losses, a gradient for each
differentiable argument, and metrics. ``Schema`` reads off an operator which argument is which.

A summed loss has its gradients made in the forward, and the backward only scales them: ``SummedLoss``, which takes one token_weight
for all losses, as torch.compile traces no function that takes a tensor twice. A loss per token learns its upstream gradient in the
backward, so it computes there again, with that gradient as token weights: this is the operator's own backward, ``of_operator``,
which an exported program takes too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdkernels import backends
from kdkernels.backends.operators import library


class Schema:
    """An operator, and what its arguments are, by their names.

    names: all of them. weights: the token weights, of each loss. learned: those that gradients go to. owner: the place of the loss
    whose gradient each of these takes. given: what is known before autograd has a part in it.
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.names = tuple(argument.name for argument in operator.default._schema.arguments)
        self.weights = tuple(name for name in self.names if name.endswith("token_weight"))
        self.learned = self.names[: self.names.index("token_weight")]
        self.owner = {name: int(name.startswith("teacher")) for name in self.learned}
        of_autograd = (*self.weights[1:], "grad_scale", "lift", "needs", "metrics")
        self.given = tuple(name for name in self.names if name not in of_autograd)

    def call(self, given: dict[str, Any], needs: dict[str, bool]) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
        """Losses, gradients (empty where not needed) and metrics."""
        given = {**given, "needs": [needs[name] for name in self.learned]}
        made = list(self.operator(*(given[name] for name in self.names)))
        losses = [made.pop(0) for _ in self.weights]
        return losses, {name: made.pop(0) for name in self.learned}, made.pop()


# Of every operator by its name; operators.py enters them.
SCHEMAS: dict[str, Schema] = {}
# Arguments of ``SummedLoss`` before the operator's own.
_OWN = 5


def _scale_(grad: Tensor, factor: Tensor) -> None:
    backends.select(grad.device, grad.dtype).scale_(grad, factor)


# An operator, so that whatever follows torch's operators from call to call (fake tensors, tracers) need not look into it.
library.define("scale_(Tensor(a!) grad, Tensor factor) -> ()")
library.impl("scale_", _scale_, "CompositeExplicitAutograd")
torch.library.register_fake("kdkernels::scale_", lambda grad, factor: None, lib=library)


def _scaled(grad: Tensor, scale: Tensor) -> Tensor:
    """The saved gradient times the upstream one.

    A graph that this backward frees gives its buffers away, scaled in place; one that is kept must keep them as they are.
    """
    if torch.compiler.is_compiling() or _batched(scale):
        return grad * scale
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()
    else:
        # Autograd then refuses it to another backward, should this one break off before its node is done and freed.
        torch.autograd.graph.increment_version(grad)
    torch.ops.kdkernels.scale_(grad, scale)
    return grad


def _batched(upstream: Tensor) -> bool:
    """Several upstream gradients at once: torch.autograd.grad(..., is_grads_batched=True)."""
    return torch._C._dispatch_keys(upstream).has("Batched")


def total(losses: Tensor, factor: Tensor) -> Tensor:
    return (losses.sum(dtype=torch.float64) * factor).to(losses.dtype)


def refuse_transforms(differentiable: Sequence[Tensor | None]) -> None:
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


class Anchor(torch.autograd.Function):
    """An empty tensor that hangs on what a loss was made of, where keeping that itself would cost memory."""

    @staticmethod
    def forward(ctx: Any, *sources: Tensor) -> Tensor:
        return sources[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise AssertionError("nothing is made from it that gradients go through")


def anchors_of(differentiable: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
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
    """(each sum of losses times ``factor``, metrics) of the operator of that name, whose ``Schema.given`` the arguments are.

    Gradients of single tokens, which are those of hidden states and logits, are made ``lift`` times as large. anchors: see
    ``Anchor``; in a tuple, lest they be inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, name: str, metrics: bool, factor: Tensor, lift: Tensor | None, anchors: tuple[Tensor, ...], *arguments: Any
    ) -> Any:
        schema = SCHEMAS[name]
        given = dict(zip(schema.given, arguments, strict=True))
        asked = dict(zip(schema.given, ctx.needs_input_grad[_OWN:], strict=True))
        needs = {learned: bool(asked[learned]) for learned in schema.learned}
        weights = dict.fromkeys(schema.weights, given["token_weight"])
        losses, grads, summary = schema.call({**given, **weights, "grad_scale": factor, "lift": lift, "metrics": metrics}, needs)
        ctx.anchors, ctx.name, ctx.needs = anchors, name, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lift, *grads.values())
        ctx.mark_non_differentiable(summary)
        return *(total(loss, factor) for loss in losses), summary

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        schema = SCHEMAS[ctx.name]
        lift, *grads = ctx.saved_tensors
        scaled: dict[str, Tensor] = {}
        for learned, grad in zip(schema.learned, grads, strict=True):
            scale = upstream[schema.owner[learned]]
            if ctx.needs[learned] and scale is not None:
                lifted = lift is not None and not learned.endswith(("weight", "bias"))
                scaled[learned] = _scaled(grad, scale / lift if lifted else scale)
        return (*[None] * _OWN, *(scaled.get(argument) for argument in schema.given))


def _may_be_saved(argument: Any) -> bool:
    """Tensors of inference mode, which a teacher's may be, autograd does not save: they have no version that it could look at."""
    return isinstance(argument, Tensor) and (torch.compiler.is_compiling() or not argument.is_inference())


def of_operator(schema: Schema) -> tuple[Callable[..., None], Callable[..., Any]]:
    """setup_context and backward of an operator, as torch.library.register_autograd takes them."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        given = dict(zip(schema.names, inputs, strict=True))
        saved = {name: value for name, value in given.items() if _may_be_saved(value)}
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved.values())
        ctx.saved = tuple(saved)
        ctx.others = {name: value for name, value in given.items() if name not in saved}
        ctx.mark_non_differentiable(*output[len(schema.weights) :])

    @_once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        given = {**ctx.others, **dict(zip(ctx.saved, ctx.saved_tensors, strict=True))}
        ctx.anchors = [given[name] for name in schema.learned]
        of_loss = dict(zip(schema.weights, upstream, strict=False))
        present = next((one for one in of_loss.values() if one is not None), None)
        if present is None:
            return (None,) * len(schema.names)
        asked = dict(zip(schema.names, ctx.needs_input_grad, strict=True))
        needs = {name: bool(asked[name]) and upstream[owner] is not None for name, owner in schema.owner.items()}
        for name, one in of_loss.items():
            weight = given[name]
            given[name] = torch.zeros_like(present) if one is None else one if weight is None else weight * one
        _, grads, _ = schema.call({**given, "lift": None, "metrics": False}, needs)
        return tuple(grads[name] if needs.get(name) else None for name in schema.names)

    return setup_context, backward
