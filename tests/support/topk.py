"""``linear_topk_kd_loss`` on the problems of cases.py, and the formulas beside it, row by row."""

from __future__ import annotations

import decimal
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import oracle
from tests.support.cases import (
    Case,
    Result,
    draw,
    dressed,
    keywords,
)
from tests.support.oracle import Options

NAN, INF = torch.nan, torch.inf
TAILS = ("renormalize", "bucket")
# In small cases two or three tokens of six, or a dozen columns of 37.
BUDGET = 300
both_tails = pytest.mark.parametrize("tail", TAILS)


def default_tail(name: str) -> str:
    """The tail with which a divergence is one: over one token alone, of which the student takes mass away, some fall below 0."""
    value = oracle.FORMULAS[name](torch.tensor(0.0), torch.tensor(0.6).log(), oracle.DEFAULTS.get(name, 0.0))
    return "bucket" if value < 0 else "renormalize"


@dataclass(frozen=True)
class Kept:
    """A student's case, and what was kept of the teacher: ids and log-probabilities (..., K), perhaps that of the rest (...)."""

    case: Case
    ids: Tensor
    log_probs: Tensor
    tail: str = "renormalize"
    rest: Tensor | None = None

    def learned(self) -> dict[str, Tensor]:
        return self.case.learned()

    def loss(self, leaves: dict[str, Tensor] | None = None, **more: Any) -> Any:
        leaves = self.learned() if leaves is None else leaves
        head, _ = self.case.heads(leaves)
        given = {"token_weight": self.case.token_weight, "tail": self.tail, "topk_rest": self.rest}
        options = {**keywords(self.case.options), **given, **more}
        return kd.linear_topk_kd_loss(leaves["student_hidden"], head, self.ids, self.log_probs, self.case.labels, **options)

    def run(self, **more: Any) -> Result:
        """Losses of the tokens, their reduction, and its gradients."""
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in self.learned().items()}
        loss = self.loss(leaves, **more)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        with torch.no_grad():
            per_token = self.loss(leaves, **{**more, "reduction": "none", "normalizer": None})
        return {"losses": per_token, "loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}

    def plain(self, dtype: torch.dtype = torch.float64) -> Result:
        """The formulas with autograd, in ``dtype``."""
        case, options = self.case, self.case.options
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in self.learned().items()}
        x = oracle.after_head(
            *(leaves.get(name) for name in ("student_hidden", "student_weight", "student_bias")),  # type: ignore[arg-type]
            case.student_scale,
            case.student_softcap,
        )
        keep = oracle.kept(x.shape[:-1], case.labels, case.token_weight, options.ignore_index)
        of_rows = [
            divergence(row, ids, log_probs, self.tail, options, None if self.rest is None else self.rest[keep][at])
            for at, (row, ids, log_probs) in enumerate(zip(x[keep], self.ids[keep], self.log_probs[keep], strict=True))
        ]
        square = options.temperature**2 if options.square_temperature else 1.0
        loss = options.kd_weight * square * torch.stack([*of_rows, x.sum() * 0])[:-1]
        if options.ce_weight and case.labels is not None:
            loss = loss + options.ce_weight * oracle.cross_entropy(x[keep], case.labels[keep])
        if case.token_weight is not None:
            loss = loss * case.token_weight[keep].to(loss.dtype)
        per_token = torch.zeros(keep.shape, dtype=loss.dtype).masked_scatter(keep, loss)
        mean = oracle.mean(per_token, case.labels, case.token_weight, options)
        grads = torch.autograd.grad(mean, list(leaves.values()))
        return {"losses": per_token.detach(), "loss": mean.detach(), **dict(zip(leaves, grads, strict=True))}


def log_of_rest(log_probs: list[float], least: float = 2.0**-23) -> float:
    """log(1 - sum of exp), in fifty digits: what is left may be far below the roundings of 1. At least 2^-23, as is documented."""
    with decimal.localcontext(decimal.Context(prec=50)):
        rest = max(1 - sum(Decimal(value).exp() for value in log_probs), Decimal(least))
        return float(rest.ln()) if rest > 0 else -INF


def of_one_row(
    x: Tensor, ids: Tensor, log_probs: Tensor, tail: str, options: Options, rest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target and student over the outcomes of a row: x [V], ids and log_probs [K], rest 0-dim."""
    lq = torch.log_softmax(x / options.temperature, -1)
    used = log_probs != -INF
    chosen, given = ids[used], log_probs[used].to(x.dtype)
    own = lq[chosen]
    if tail == "bucket":
        outside = torch.ones(len(x), dtype=torch.bool)
        outside[chosen] = False
        own_rest = lq[outside].logsumexp(0) if outside.any() else x.new_tensor(-INF)
        # of no rest that the student has, none is made up
        left = log_of_rest(log_probs[used].tolist(), 2.0**-23 if own_rest > -INF else 0.0) if rest is None else rest
        own, given = torch.cat([own, own_rest[None]]), torch.cat([given, x.new_tensor([float(left)])])
    return torch.log_softmax(oracle.target_logits(own, given, options.t), -1), own


def divergence(x: Tensor, ids: Tensor, log_probs: Tensor, tail: str, options: Options, rest: Tensor | None = None) -> Tensor:
    lp, lq = of_one_row(x, ids, log_probs, tail, options, rest)
    if not len(lq):
        return x.sum() * 0
    banned = (lp == -INF) | (lq == -INF)
    parameter = oracle.DEFAULTS.get(options.divergence, 0.0) if options.parameter is None else options.parameter
    terms = oracle.FORMULAS[options.divergence](lp.masked_fill(banned, 0.0), lq.masked_fill(banned, 0.0), parameter)
    return terms.masked_fill(banned, 0.0).sum()


def keep(
    case: Case,
    count: int,
    tail: str = "renormalize",
    dtype: torch.dtype = torch.float32,
    ragged: bool = False,
    floor: float = 0.0,
    rest: bool = False,
) -> Kept:
    """The teacher's ``count`` most likely tokens of each position of a case.

    ragged: every second position has two unused slots, in front, with ids that no token has. floor: probability that the teacher
    spreads evenly over the vocabulary. rest: keep the others' log-probability too.
    """
    _, z = case.logits()
    p = (1 - floor) * torch.softmax(z / case.options.temperature, -1) + floor / z.shape[-1]
    whole = p.log() if floor else torch.log_softmax(z / case.options.temperature, -1)
    log_probs, ids = whole.topk(count)
    if ragged:
        ids.view(-1, count)[::2, 0], ids.view(-1, count)[::2, 1] = -7, 10**9
        log_probs.view(-1, count)[::2, :2] = -INF
    listed = ids.where(log_probs > -INF, ids[..., -1:])
    others = whole.scatter(-1, listed, -INF).logsumexp(-1).to(dtype) if rest else None
    return Kept(case, ids, log_probs.to(dtype), tail, others)


def full(tail: str = "bucket", dtype: torch.dtype = torch.float32, **options: Any) -> Kept:
    """Six tokens, one ignored and one of weight 0, everything that a head can have, and slots that are not used."""
    options = {"temperature": 2.0, "ce_weight": 0.5, **options}
    case = replace(dressed(draw(dtype=dtype)), options=Options(**options))
    return keep(case, 5, tail, torch.float64 if dtype == torch.float64 else torch.float32, ragged=True)
