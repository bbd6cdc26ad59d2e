"""The losses once more, in plain PyTorch with autograd: in float64 this is what the library is held against.

Nothing here comes from the library. Formulas are written as in the papers, over log-probabilities; gradients are autograd's. Run
in another dtype the same code is what a user without the library would write in that dtype: the eager computation whose error
gives the tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _log_mixture(lp: Tensor, lq: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q)."""
    return torch.logaddexp(lp + math.log(share), lq + math.log1p(-share))


def _jsd(lp: Tensor, lq: Tensor, beta: float) -> Tensor:
    lm = _log_mixture(lp, lq, beta)
    return beta * lp.exp() * (lp - lm) + (1 - beta) * lq.exp() * (lq - lm)


# One entry's contribution, from the log-probabilities of target and student.
FORMULAS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda lp, lq, _: lp.exp() * (lp - lq),
    "reverse_kl": lambda lp, lq, _: lq.exp() * (lq - lp),
    "jsd": _jsd,
    "skew_forward_kl": lambda lp, lq, alpha: lp.exp() * (lp - _log_mixture(lp, lq, alpha)),
    "skew_reverse_kl": lambda lp, lq, alpha: lq.exp() * (lq - _log_mixture(lp, lq, 1 - alpha)),
    "total_variation": lambda lp, lq, _: 0.5 * (lp.exp() - lq.exp()).abs(),
}
DEFAULTS = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}


@dataclass(frozen=True)
class Options:
    """What the public losses call by the same names."""

    divergence: str = "forward_kl"
    parameter: float | None = None
    t: float = 1.0
    temperature: float = 1.0
    square_temperature: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    ignore_index: int = -100
    normalizer: float | None = None


def after_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    logits = hidden @ weight.mT
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def target_logits(x: Tensor, z: Tensor, t: float) -> Tensor:
    """(1 - t) x + t z with the student held constant; at both ends one model alone, whatever the other one bans."""
    x = x.detach()
    return x if t == 0 else z if t == 1 else (1 - t) * x + t * z


def divergence(x: Tensor, y: Tensor, options: Options) -> Tensor:
    """D of each row from student and target logits. An entry that is -inf in either adds nothing."""
    lq, lp = torch.log_softmax(x / options.temperature, -1), torch.log_softmax(y / options.temperature, -1)
    banned = (lp == -torch.inf) | (lq == -torch.inf)
    parameter = DEFAULTS.get(options.divergence, 0.0) if options.parameter is None else options.parameter
    if options.divergence not in FORMULAS:
        raise KeyError(f"add the textbook formula of {options.divergence} to FORMULAS in tests/support/oracle.py")
    # Masked twice: autograd through a term that is dropped must stay finite too.
    terms = FORMULAS[options.divergence](lp.masked_fill(banned, 0.0), lq.masked_fill(banned, 0.0), parameter)
    return terms.masked_fill(banned, 0.0).sum(-1)


def cross_entropy(x: Tensor, labels: Tensor) -> Tensor:
    return -torch.log_softmax(x, -1).gather(-1, labels[..., None])[..., 0]


def kept(shape: torch.Size, labels: Tensor | None, token_weight: Tensor | None, ignore_index: int) -> Tensor:
    keep = torch.ones(shape, dtype=torch.bool)
    if labels is not None:
        keep &= labels != ignore_index
    if token_weight is not None:
        keep &= token_weight != 0
    return keep


def losses(x: Tensor, z: Tensor, labels: Tensor | None, token_weight: Tensor | None, options: Options) -> Tensor:
    """Loss of each token, its weight included and 0 where dropped, shaped like the leading dimensions of the logits."""
    keep = kept(x.shape[:-1], labels, token_weight, options.ignore_index)
    x, z = x[keep], z[keep]
    square = options.temperature**2 if options.square_temperature else 1.0
    loss = options.kd_weight * square * divergence(x, target_logits(x, z, options.t), options)
    if options.ce_weight and labels is not None:
        loss = loss + options.ce_weight * cross_entropy(x, labels[keep])
    if token_weight is not None:
        loss = loss * token_weight[keep].to(loss.dtype)
    return torch.zeros(keep.shape, dtype=loss.dtype).masked_scatter(keep, loss)


def mean(per_token: Tensor, labels: Tensor | None, token_weight: Tensor | None, options: Options) -> Tensor:
    if options.normalizer is not None:
        return per_token.sum() / options.normalizer
    keep = kept(per_token.shape, labels, token_weight, options.ignore_index)
    if not keep.any():
        return per_token.sum() * 0
    return per_token.sum() / (keep.sum() if token_weight is None else token_weight[keep].to(per_token.dtype).sum())


def metrics(x: Tensor, z: Tensor, labels: Tensor | None, token_weight: Tensor | None, options: Options) -> dict[str, Tensor]:
    """Means over the kept tokens, in nats, at temperature T except for the cross-entropy."""
    keep = kept(x.shape[:-1], labels, token_weight, options.ignore_index)
    x, z = x[keep], z[keep]
    y = target_logits(x, z, options.t)
    q, p, teacher = ((logits / options.temperature).softmax(-1) for logits in (x, y, z))
    found = {
        "kd": divergence(x, y, options),
        "target_entropy": torch.special.entr(p).sum(-1),
        "student_entropy": torch.special.entr(q).sum(-1),
        "agreement": (x.argmax(-1) == z.argmax(-1)).to(x.dtype),
        "overlap": torch.minimum(q, teacher).sum(-1),
    }
    if labels is not None:
        found["ce"] = cross_entropy(x, labels[keep])
    means = {name: values.mean() if keep.any() else values.sum() for name, values in found.items()}
    return {**means, "tokens": keep.sum().to(x.dtype)}


def with_gradients(
    logits: Callable[..., tuple[Tensor, Tensor]],
    leaves: dict[str, Tensor],
    dtype: torch.dtype,
    labels: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
) -> dict[str, Tensor]:
    """Losses of the tokens, their mean, and its gradients, computed in ``dtype``; ``logits`` makes x and z from the leaves."""
    inputs = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    per_token = losses(*logits(**inputs), labels, token_weight, options)
    loss = mean(per_token, labels, token_weight, options)
    grads: Any = torch.autograd.grad(loss, list(inputs.values()))
    return {"losses": per_token.detach(), "loss": loss.detach(), **dict(zip(inputs, grads, strict=True))}


def teacher_losses(
    x: Tensor, z: Tensor, labels: Tensor | None, token_weight: Tensor | None, options: Options, alpha: float
) -> Tensor:
    """OKD: alpha T² KL(q, p) + (1 - alpha) CE of the teacher, with the student's q constant; weights and shape as in ``losses``."""
    keep = kept(x.shape[:-1], labels, token_weight, options.ignore_index)
    x, z = x[keep].detach(), z[keep]
    lq, lp = torch.log_softmax(x / options.temperature, -1), torch.log_softmax(z / options.temperature, -1)
    banned = (lp == -torch.inf) | (lq == -torch.inf)
    difference = lq.masked_fill(banned, 0.0) - lp.masked_fill(banned, 0.0)
    square = options.temperature**2 if options.square_temperature else 1.0
    loss = alpha * square * (lq.exp() * difference).sum(-1)
    if alpha < 1 and labels is not None:
        loss = loss + (1 - alpha) * cross_entropy(z, labels[keep])
    if token_weight is not None:
        loss = loss * token_weight[keep].to(loss.dtype)
    return torch.zeros(keep.shape, dtype=loss.dtype).masked_scatter(keep, loss)


def online(
    logits: Callable[..., tuple[Tensor, Tensor]],
    leaves: dict[str, Tensor],
    dtype: torch.dtype,
    labels: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    alpha: float,
) -> dict[str, dict[str, Tensor]]:
    """OKD for "student" and "teacher", whose leaves start with these names: losses of the tokens, their mean, and its gradients."""
    inputs = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    x, z = logits(**inputs)
    found = {}
    for learner, per_token in {
        "student": losses(x, z.detach(), labels, token_weight, options),
        "teacher": teacher_losses(x, z, labels, token_weight, options, alpha),
    }.items():
        loss = mean(per_token, labels, token_weight, options)
        own = {name: leaf for name, leaf in inputs.items() if name.startswith(learner)}
        grads: Any = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
        found[learner] = {"losses": per_token.detach(), "loss": loss.detach(), **dict(zip(own, grads, strict=True))}
    return found
