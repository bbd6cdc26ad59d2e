"""``linear_okd_loss`` on the problems of cases.py, and the formulas beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import oracle
from tests.support.cases import (
    Case,
    Result,
    assert_close,
    draw,
    dressed,
    keywords,
    parameters,
)
from tests.support.oracle import Options

OF_STUDENT = ("student_hidden", "student_weight", "student_bias")
OF_TEACHER = ("teacher_hidden", "teacher_weight", "teacher_bias")
EVERYTHING = (*OF_STUDENT, *OF_TEACHER)
FROZEN_HEAD = ("student_hidden", "student_weight", "teacher_hidden")
# In small cases the budget is two tokens of six, or a dozen columns of 37.
BUDGET = 1000
one_of_each = pytest.mark.parametrize("variant", parameters(("native", "native-vocab", "reference", "reference-vocab")))


def leaves_of(case: Case, learn: tuple[str, ...] = EVERYTHING) -> dict[str, Tensor]:
    parts = {name: getattr(case, name) for name in EVERYTHING}
    return {name: part.detach().requires_grad_(name in learn) for name, part in parts.items() if part is not None}


def heads(case: Case, leaves: dict[str, Tensor]) -> tuple[kd.LMHead, kd.LMHead]:
    return (
        kd.LMHead(leaves["student_weight"], leaves.get("student_bias"), case.student_scale, case.student_softcap),
        kd.LMHead(leaves["teacher_weight"], leaves.get("teacher_bias"), case.teacher_scale, case.teacher_softcap),
    )


def call(case: Case, leaves: dict[str, Tensor] | None = None, **more: Any) -> kd.OKDLoss:
    leaves = leaves_of(case, ()) if leaves is None else leaves
    student, teacher = heads(case, leaves)
    options = {**keywords(case.options), "token_weight": case.token_weight, **more}
    del options["t"]
    return kd.linear_okd_loss(leaves["student_hidden"], student, leaves["teacher_hidden"], teacher, case.labels, **options)


def upstream(loss: Tensor, end: float) -> Tensor:
    """An own factor for each token, 1 to ``end``; 1 for a loss of all."""
    return torch.linspace(1.0, end, loss.numel(), dtype=loss.dtype).view(loss.shape)


def run(case: Case, learn: tuple[str, ...] = EVERYTHING, **more: Any) -> Result:
    """Both losses, metrics if asked for, and the gradients of what learns."""
    leaves = leaves_of(case, learn)
    made = call(case, leaves, **more)
    asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(made[:2], list(asked.values()), [upstream(made.student, 2.0), upstream(made.teacher, 3.0)])
    losses = {"student": made.student.detach(), "teacher": made.teacher.detach()}
    return {**losses, **(made.metrics or {}), **dict(zip(asked, grads, strict=True))}


def plain(case: Case, alpha: float, dtype: torch.dtype = torch.float64) -> dict[str, Result]:
    """The formulas with autograd, in ``dtype``."""

    def logits(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        return (
            oracle.after_head(*(leaves.get(name) for name in OF_STUDENT), case.student_scale, case.student_softcap),  # type: ignore[arg-type]
            oracle.after_head(*(leaves.get(name) for name in OF_TEACHER), case.teacher_scale, case.teacher_softcap),  # type: ignore[arg-type]
        )

    return oracle.online(logits, leaves_of(case), dtype, case.labels, case.token_weight, case.options, alpha)


def results(case: Case, alpha: float, per_token: bool = True, **more: Any) -> dict[str, Result]:
    """The library's, as ``plain`` gives them; the losses of the tokens, which take a call of their own, only if ``per_token``."""
    leaves = leaves_of(case)
    made = call(case, leaves, teacher_alpha=alpha, **more)
    losses = None
    if per_token:
        with torch.no_grad():
            losses = call(case, leaves, teacher_alpha=alpha, **{**more, "reduction": "none", "normalizer": None})
    grads = dict(zip(leaves, torch.autograd.grad(made.student + made.teacher, list(leaves.values())), strict=True))
    return {
        learner: {
            **({} if losses is None else {"losses": getattr(losses, learner)}),
            "loss": getattr(made, learner).detach(),
            **{name: grad for name, grad in grads.items() if name.startswith(learner)},
        }
        for learner in ("student", "teacher")
    }


def full(dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Six tokens, one of them ignored and one of weight 0, with everything that heads can have."""
    return replace(dressed(draw(dtype=dtype)), options=Options(**{"temperature": 2.0, "ce_weight": 0.5, **options}))


def assert_as_plain(case: Case, alpha: float, **more: Any) -> None:
    exact = plain(case, alpha)
    share = 37 * max(torch.finfo(part.dtype).eps for part in (case.student_weight, case.teacher_weight))
    for learner, found in results(case, alpha, **more).items():
        assert_close(found, {name: exact[learner][name] for name in found}, share)
