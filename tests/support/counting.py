"""Floating-point operations of the products of a step, on a problem of fixed sizes: N tokens, V columns of the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.support.cases import Case, InsideOperators, draw

MIB = 2**20
N, V, STUDENT, TEACHER = 24, 50, 8, 12
US, UT = 2 * N * V * STUDENT, 2 * N * V * TEACHER


class Products(InsideOperators):
    """Counts floating point operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("aten::mm", "aten::addmm"):
            left, right = args[-2:] if name == "aten::addmm" else args[:2]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        assert name not in ("aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear"), f"{name} is not counted"


def count(case: Case, learn: tuple[str, ...] = ("student_hidden", "student_weight"), **more: Any) -> int:
    leaves = {name: leaf.detach().requires_grad_(name in learn) for name, leaf in case.learned().items()}
    with Products() as products:
        loss = case.loss(leaves, **more).sum()
        if learn:
            loss.backward()
    return products.flops


def case(**more: Any) -> Case:
    return replace(draw(tokens=(N,), vocab=V, dims=(STUDENT, TEACHER)), **more)
