"""What a well-formed call has to give: losses, metrics and gradients of the oracle in float64, each with a bound on roundings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz.calls import INF, NAN, Call, get, lead_of, vocab_of
from tests.support import oracle, topk
from tests.support.oracle import Options

# How many roundings the bounds on errors allow for each that they count.
ROUNDINGS = 8.0


@dataclass
class Side:
    """One model's counted rows in float64: leaves, logits before and after the head, and what they may be off by, [rows]."""

    leaves: dict[str, Tensor]
    raw: Tensor
    logits: Tensor
    off: Tensor
    scale: float
    eps: float
    tiny: float
    largest: float
    tainted: bool


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0).abs()


def eps_of(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _plain(value: Tensor) -> Tensor:
    return value.detach().clone().double()


def side_of(call: Call, model: str, keep: Tensor) -> Side:
    if call.function == "kd_loss":
        value = call.arguments[f"{model}_logits"]
        logits = _plain(value).reshape(-1, value.shape[-1])[keep].requires_grad_()
        least = max(eps_of(value.dtype) if value.dtype == torch.float64 else eps_of(torch.float32), 0.0)
        off = least * _finite(logits.detach()).amax(1)
        info = torch.finfo(value.dtype)
        return Side({f"{model}_logits": logits}, logits, logits, off, 1.0, eps_of(value.dtype), info.tiny, info.max, False)
    hidden, head = call.arguments[f"{model}_hidden"], call.arguments[f"{model}_head"]
    vocab = vocab_of(call)
    leaves = {
        f"{model}_hidden": _plain(hidden).reshape(-1, hidden.shape[-1])[keep].requires_grad_(),
        f"{model}_weight": _plain(head.weight)[:vocab].requires_grad_(),
    }
    rows, weight = leaves[f"{model}_hidden"], leaves[f"{model}_weight"]
    raw = rows @ weight.T
    size = _finite(rows.detach()) @ _finite(weight.detach()).T
    if head.bias is not None:
        bias = leaves[f"{model}_bias"] = _plain(head.bias)[:vocab].requires_grad_()
        raw = raw + bias
        size = size + _finite(bias.detach())
    logits = raw * float(head.logit_scale)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    info = torch.finfo(hidden.dtype)
    off = info.eps * size.amax(1) * head.logit_scale
    tainted = not bool(rows.isfinite().all() and weight.isfinite().all())
    return Side(leaves, raw, logits, off, float(head.logit_scale), info.eps, info.tiny, info.max, tainted)


@dataclass
class Learned:
    """A learner's loss of each counted row, what it and the gradient of a logit may be off by, and which rows must be NaN."""

    losses: Tensor
    off: Tensor
    gradient_off: Tensor
    spoilt: Tensor


def learn(
    own: Side, other: Side | None, divergence: Callable[[], Tensor], outcomes: Callable[[], list[tuple[Tensor, Tensor]]],
    given: Tensor, labels: Tensor | None, options: Options, kd_scale: float, ce_scale: float, always: bool = True,
) -> Learned:  # fmt: skip
    """outcomes: log-probabilities of target and student, row by row. given: the other model's logits, or what is known of them.
    always: whether a row of which nothing is known is looked at all the same."""
    x, temperature = own.logits, options.temperature
    rounding = 2.3e-16 if max(own.eps, other.eps if other else 0.0) < 1e-15 else 1.2e-7
    off_logits = own.off + (other.off if other else 0.0)
    reach = (_finite(x.detach()).amax(1) + _finite(given).amax(1)) / temperature
    steep = 1.0 + 2.0 * reach + math.log(x.shape[1])
    error = ROUNDINGS * (off_logits / temperature + rounding * steep)
    ce_error = ROUNDINGS * (off_logits + rounding * (1.0 + steep * temperature))
    nothing = torch.zeros(len(x), dtype=torch.float64)
    kd = divergence() if kd_scale != 0.0 else nothing
    ce = oracle.cross_entropy(x, labels) if labels is not None and ce_scale != 0.0 else nothing
    # NaN and +inf of either model; a term of factor 0 looks at nothing, and a row without a slot has nothing to look at.
    looks = (given != -INF).any(1) | always
    bad = ~(x.detach() < INF).all(1)
    spoilt = bad if ce_scale != 0.0 else torch.zeros_like(bad)
    if kd_scale != 0.0:
        spoilt = spoilt | (looks & (bad | ~(given < INF).all(1))) | kd.detach().isnan()
    gradient_off = kd_scale / temperature * error * steep + ce_scale * ce_error
    if options.divergence == "total_variation" and kd_scale != 0.0:
        # Where both probabilities are one within the error, the sign may be either.
        tied = [
            (q * ((q - p).abs() <= 4.0 * e * torch.maximum(q, p))).sum() for (p, q), e in zip(_exp(outcomes()), error, strict=True)
        ]
        gradient_off = gradient_off + kd_scale / temperature * 2.0 * torch.stack([*tied, x.sum() * 0])[:-1].detach().nan_to_num(2.0)
    return Learned(kd_scale * kd + ce_scale * ce, kd_scale * error * steep + ce_scale * ce_error, gradient_off, spoilt)


def _usual(log_probs: Tensor) -> bool:
    return bool(not log_probs.isnan().any() and (log_probs != -INF).any())


def _exp(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(lp.exp(), lq.exp()) for lp, lq in pairs]


def _outcomes(x: Tensor, z: Tensor, options: Options) -> list[tuple[Tensor, Tensor]]:
    y = oracle.target_logits(x, z, options.t)
    return [tuple(torch.log_softmax(row / options.temperature, -1) for row in pair) for pair in zip(y, x.detach(), strict=True)]  # type: ignore[misc]


@dataclass
class Expected:
    """losses: by learner, as returned. off: by learner. grads: by leaf, with what they may be off by (a tensor that broadcasts),
    and the rows or entries where nothing can be said. metrics with what they may be off by."""

    losses: list[Tensor] = field(default_factory=list)
    off: list[Tensor] = field(default_factory=list)
    grads: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    unsaid: bool = False


def options_of(call: Call) -> Options:
    given = call.arguments
    divergence = given.get("divergence", "forward_kl")
    name, parameter = (divergence, None) if isinstance(divergence, str) else (divergence.name, divergence.a)
    return Options(
        divergence=name,
        parameter=parameter if name in oracle.DEFAULTS else None,
        t=float(given.get("t", 1.0)),
        temperature=float(given.get("temperature", 1.0)),
        square_temperature=given.get("square_temperature", True),
        kd_weight=float(given.get("kd_weight", 1.0)),
        ce_weight=float(given.get("ce_weight", 0.0)),
        ignore_index=given.get("ignore_index", -100),
    )


def expect(call: Call, upstream: list[Tensor]) -> Expected:
    given, options, lead = call.arguments, options_of(call), lead_of(call)
    labels, weight = given.get("labels"), given.get("token_weight")
    flat = None if labels is None else labels.detach().clone().to(torch.int64).reshape(-1)
    weights = torch.ones(math.prod(lead), dtype=torch.float64) if weight is None else _plain(weight).reshape(-1)
    keep = weights != 0
    counted = torch.ones_like(keep) if flat is None else flat != options.ignore_index
    keep &= counted
    kept_labels = None if flat is None else flat[keep]
    square = options.temperature**2 if options.square_temperature else 1.0
    x = side_of(call, "student", keep)
    sides = [x]
    learned: list[Learned] = []
    known = call.function == "linear_topk_kd_loss"
    if known:
        ids, log_probs = (
            given[name].detach().clone().reshape(-1, given[name].shape[-1])[keep] for name in ("topk_ids", "topk_logprobs")
        )
        log_probs = log_probs.double()
        rest = given.get("topk_rest")
        proper = topk.default_tail(options.divergence) if rest is None else "bucket"
        tail = given.get("tail", proper)
        rests = [None] * len(log_probs) if rest is None else list(rest.detach().reshape(-1)[keep].double())
        rows, nothing = list(zip(x.logits, ids.to(torch.int64), log_probs, strict=True)), x.logits.new_full((1,), -INF)

        def of_outcomes() -> Tensor:
            values = [
                topk.divergence(*row, tail, options, left)
                if _usual(row[2])
                else torch.where(row[2].isnan().any(), NAN, 0.0)  # without a slot it is 0
                for row, left in zip(rows, rests, strict=True)
            ]
            return torch.stack([*values, x.logits.sum() * 0])[:-1]

        learned.append(
            learn(
                x, None, of_outcomes,
                lambda: [
                    topk.of_one_row(*row, tail, options, left) if _usual(row[2]) else (nothing, nothing)
                    for row, left in zip(rows, rests, strict=True)
                ],
                log_probs, kept_labels, options, options.kd_weight * square, options.ce_weight, always=tail == "bucket",
            )
        )  # fmt: skip
    else:
        z = side_of(call, "teacher", keep)
        sides.append(z)
        constant = z.logits.detach()
        learned.append(
            learn(
                x, z, lambda: oracle.divergence(x.logits, oracle.target_logits(x.logits, constant, options.t), options),
                lambda: _outcomes(x.logits, constant, options),
                constant, kept_labels, options, options.kd_weight * square, options.ce_weight,
            )
        )  # fmt: skip
        if call.function == "linear_okd_loss":
            alpha = float(given.get("teacher_alpha", 0.5))
            swapped = Options(temperature=options.temperature)
            learned.append(
                learn(
                    z, x, lambda: oracle.divergence(z.logits, x.logits.detach(), swapped), lambda: [],
                    x.logits.detach(), kept_labels, swapped, alpha * square, 1.0 - alpha,
                )
            )  # fmt: skip
    return _reduced(call, sides, learned, weights, keep, counted, upstream, known)


def _factor(call: Call, weights: Tensor, counted: Tensor) -> float:
    reduction, normalizer = call.arguments.get("reduction", "mean"), call.arguments.get("normalizer")
    if reduction != "mean":
        return 1.0
    total = float(weights[counted].sum()) if normalizer is None else float(normalizer)
    return 0.0 if total == 0.0 else 1.0 / total


def _reduced(
    call: Call, sides: list[Side], learned: list[Learned], weights: Tensor, keep: Tensor, counted: Tensor, upstream: list[Tensor],
    known: bool,
) -> Expected:  # fmt: skip
    found = Expected(tokens=int(keep.sum()))
    none = call.arguments.get("reduction", "mean") == "none"
    factor = _factor(call, weights, counted)
    kept = weights[keep]
    for side, learner, up in zip(sides, learned, upstream, strict=False):
        if factor == 0.0 and (learner.spoilt.any() or not (learner.losses * kept).isfinite().all()):
            found.unsaid = True  # 0 or NaN: nobody divides by 0 or infinity and wants to know
        rows = torch.where(learner.spoilt, NAN, learner.losses.detach()) * kept
        off = learner.off * kept.abs()
        # The largest number on the way must be one that the dtypes hold.
        most = (learner.off / 1e-7).nan_to_num(0.0).amax() if len(rows) else rows.sum()
        found.unsaid |= bool(most > min(3e38, sides[0].largest * 1e-3 if sides[0].eps > 1e-4 else 3e38))
        if none:
            each = torch.zeros(len(keep), dtype=torch.float64)
            found.losses.append(each.index_put((keep,), rows).reshape(lead_of(call)))
            found.off.append(each.index_put((keep,), off).reshape(lead_of(call)))
            pull = up.double().reshape(-1)[keep]
        else:
            found.losses.append(rows.sum() * factor)
            found.off.append(off.sum() * abs(factor))
            pull = up.double().expand(len(rows)) * factor
        if math.isfinite(factor):
            _gradients(call, found, side, learner, kept * pull, keep)
    # Where the sum is divided by 0 or by infinity no row counts, and none is looked at.
    if call.arguments.get("return_metrics") and not known and factor != 0.0:
        _metrics(call, found, sides, learned[0], keep)
    return found


def _gradients(call: Call, found: Expected, side: Side, learner: Learned, pull: Tensor, keep: Tensor) -> None:
    usable = ~learner.spoilt
    total = (torch.where(usable, learner.losses, 0.0) * torch.where(usable, pull, 0.0)).sum()
    if not total.requires_grad:
        total = total + sum(leaf.sum() * 0 for leaf in side.leaves.values())
    names = [name for name in side.leaves if get(call, name).requires_grad]
    if not names or call.mode != "grad":
        return
    grads = torch.autograd.grad(total, [side.raw, *(side.leaves[name] for name in names)], allow_unused=True)
    dx = torch.zeros_like(side.raw) if grads[0] is None else grads[0]
    # Per row: of an entry of dx before it is multiplied.
    fixed = side.tiny + (6e-8 if side.eps > 9e-4 and side.eps < 2e-3 else 0.0)
    size = dx.abs().nan_to_num(0.0, 0.0, 0.0).amax(1) if dx.shape[0] else dx.sum(1)
    off = (learner.gradient_off * side.scale * pull.abs() + ROUNDINGS * side.eps * size + fixed * (1 + pull.abs())).nan_to_num(0.0)
    spoilt = learner.spoilt | ~pull.isfinite()
    for name, grad in zip(names, grads[1:], strict=True):
        leaf = side.leaves[name]
        grad = torch.zeros_like(leaf) if grad is None else grad
        rounding = ROUNDINGS * side.eps * grad.abs().nan_to_num(0.0, 0.0, 0.0) + fixed
        if name.endswith("logits"):
            bound, unsaid = off[:, None] + rounding, spoilt[:, None].expand_as(grad)
        elif name.endswith("hidden"):
            weights = _finite(side.leaves[name.replace("hidden", "weight")].detach()).sum(0)
            bound, unsaid = off[:, None] * weights + rounding, spoilt[:, None].expand_as(grad)
        else:
            by = (
                _finite(side.leaves[name.replace("weight", "hidden")].detach())
                if name.endswith("weight")
                else torch.ones(len(off), 1)
            )
            bound = (off[:, None] * by).sum(0)
            bound = (bound if name.endswith("weight") else bound.sum()) + rounding
            unsaid = torch.full(grad.shape, bool(spoilt.any()))
        if side.tainted and not spoilt.any():
            continue
        if side.tainted:
            unsaid = torch.ones_like(unsaid)
        whole = get(call, name).shape
        if name.endswith(("logits", "hidden")):
            grad, bound, unsaid = (
                torch.zeros(len(keep), grad.shape[1], dtype=part.dtype).index_put((keep,), part.expand_as(grad)).reshape(whole)
                for part in (grad, bound, unsaid)
            )
        else:
            rest = (whole[0] - len(grad), *grad.shape[1:])
            grad, bound, unsaid = (
                torch.cat([part.expand_as(grad), torch.zeros(rest, dtype=part.dtype)]) for part in (grad, bound, unsaid)
            )
        found.grads[name] = (grad, bound, unsaid)


def _metrics(call: Call, found: Expected, sides: list[Side], learner: Learned, keep: Tensor) -> None:
    if any(not (side.logits < INF).all() for side in sides) or any((side.logits == -INF).all(1).any() for side in sides):
        return
    labels = call.arguments.get("labels")
    kept_labels = None if labels is None else labels.detach().clone().to(torch.int64).reshape(-1)[keep]
    options = options_of(call)
    right = oracle.metrics(
        sides[0].logits.detach(),
        sides[1].logits.detach(),
        kept_labels,
        None,
        Options(**{**vars(options), "ignore_index": -(2**63)}),
    )
    x, z = (side.logits.detach() for side in sides[:2])
    reach = 1.0 + 2.0 * (_finite(x).amax() + _finite(z).amax() if x.numel() else 0.0) / options.temperature + math.log(x.shape[1])
    eps = max(side.eps for side in sides)
    least = 2.3e-16 if eps < 1e-15 else 1.2e-7
    logits_off = sum((side.off.amax() if len(side.off) else torch.zeros(())) for side in sides)
    off = ROUNDINGS * reach**2 * (logits_off / options.temperature + least)
    for name in ("kd", "target_entropy", "student_entropy", "overlap", "ce"):
        if name in right:
            more = logits_off * ROUNDINGS + ROUNDINGS * least * reach * options.temperature if name == "ce" else 0.0
            found.metrics[name] = (float(right[name]), float(off + more))
