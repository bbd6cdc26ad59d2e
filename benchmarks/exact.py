"""The float64 results of a problem, and how far a contender's are off.

tests/support/oracle.py, the textbook's formula, over the inputs as rounded to the case's dtype, a few tokens at a time. Errors are
relative: norm of the difference over norm of the float64 result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import IGNORED, Problem
from benchmarks.contenders import TAID_T
from tests.support import oracle

BLOCK = 8192  # rows of a head that are widened at a time


@dataclass(frozen=True)
class Exact:
    """The mean loss of K tokens in float64. value and target_entropy: 0-dim; hidden_grad: [K, D_s].

    dW = dxᵀ hidden, of which ``rows`` [S] are compared. dx: [K, S], hidden: [K, D_s].
    """

    value: Tensor
    target_entropy: Tensor
    hidden_grad: Tensor
    dx: Tensor
    hidden: Tensor
    rows: Tensor

    def repeated(self, places: Tensor) -> Exact:
        """Of tokens [N] that are these K, each as often as the others. places: [N], which of them a token is."""
        return replace(self, hidden_grad=self.hidden_grad[places] * (len(self.hidden) / len(places)))


def sampled(vocab: int, most: int) -> Tensor:
    """At most ``most`` indices below ``vocab``, evenly spread."""
    return torch.linspace(0, vocab - 1, min(most, vocab), dtype=torch.float64).round().long()


@dataclass(frozen=True)
class Tokens:
    """The float64 loss of each token, whatever its label: value and target_entropy [N], hidden_grad [N, D_s], dx [N, S]."""

    value: Tensor
    target_entropy: Tensor
    hidden_grad: Tensor
    dx: Tensor

    def mean(self, given: Problem, rows: Tensor) -> Exact:
        """Of the tokens that count."""
        hidden = given.hidden.detach().double()
        counts = (torch.ones(len(hidden)) if given.labels is None else given.labels != IGNORED).double()
        share = counts / counts.sum()
        mean = share @ self.value, share @ self.target_entropy, share[:, None] * self.hidden_grad
        return Exact(*mean, share[:, None] * self.dx, hidden, rows)


def tokens(given: Problem, loss: str, rows: Tensor) -> Tokens:
    """By autograd at the logits. rows: [S], of dW."""
    options = oracle.Options("forward_kl", t=TAID_T) if loss == "taid" else oracle.Options(loss)
    hidden, teacher_hidden = given.hidden.detach().double(), given.teacher_hidden.detach().double()
    head, teacher_head = given.head.detach(), given.cut_teacher_head
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, given.vocab, BLOCK)]
    some = max(1, 2**24 // given.vocab)
    found: list[tuple[Tensor, ...]] = []
    for begin in range(0, len(hidden), some):
        here = slice(begin, begin + some)
        x = torch.cat([hidden[here] @ head[block].double().T for block in blocks], -1).requires_grad_()
        z = torch.cat([teacher_hidden[here] @ teacher_head[block].double().T for block in blocks], -1)
        y = oracle.target_logits(x, z, options.t)
        values = oracle.divergence(x, y, options)
        (dx,) = torch.autograd.grad(values.sum(), x)
        hidden_grad = torch.zeros_like(hidden[here])
        for block in blocks:
            hidden_grad += dx[:, block] @ head[block].double()
        found.append((values.detach(), torch.special.entr(y.softmax(-1)).sum(-1), hidden_grad, dx[:, rows]))
    return Tokens(*map(torch.cat, zip(*found, strict=True)))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


def errors(value: Tensor, given: Problem, exact: Exact, of_cross_entropy: bool = False) -> dict[str, float]:
    """Of a value and of the gradients that ``given`` holds; of_cross_entropy: the value is not the KL alone."""
    hidden_grad, head_grad = given.hidden.grad, given.head.grad
    if hidden_grad is None or head_grad is None or not all(bool(part.isfinite().all()) for part in (value, hidden_grad, head_grad)):
        raise ArithmeticError("the value or a gradient is missing or not finite")
    wrong, whole = 0.0, 0.0
    for begin in range(0, len(exact.rows), BLOCK):
        block = slice(begin, begin + BLOCK)
        right = exact.dx[:, block].T @ exact.hidden
        wrong += float((head_grad[exact.rows[block]].double() - right).square().sum())
        whole += float(right.square().sum())
    return {
        "value_error": relative(value, exact.value + (exact.target_entropy if of_cross_entropy else 0.0)),
        "hidden_grad_error": relative(hidden_grad, exact.hidden_grad),
        "head_grad_error": (wrong / whole) ** 0.5,
    }
