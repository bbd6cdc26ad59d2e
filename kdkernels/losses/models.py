"""Both models of a loss as the caller gave them: that they fit each other, and what the operators take of them."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.dtypes import compute_dtype
from kdkernels.engine.cut import STRATEGIES
from kdkernels.losses.checks import constant_target, float_tensor
from kdkernels.losses.head import LMHead, head_of
from kdkernels.scalars import one_of, vocabulary, whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One model. hidden: (..., D). head: fits it. dtype: what their product was asked for in."""

    hidden: Tensor
    head: LMHead
    dtype: torch.dtype

    def arguments(self, name: str) -> dict[str, Any]:
        """An operator's, of the model of that name; of the hidden states their rows [N, D]."""
        parts = {"hidden": rows_of(self.hidden), "weight": self.head.weight, "bias": self.head.bias, "dtype": self.dtype}
        return {f"{name}_{part}": value for part, value in parts.items()}

    @property
    def transform(self) -> list[float]:
        """What the head does to its logits: a factor, and a softcap, 0 for none."""
        return [self.head.logit_scale, self.head.softcap or 0.0]

    def detach(self) -> Side:
        return Side(self.hidden.detach(), self.head.detach(), self.dtype)


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def side_of(name: str, hidden: Any, head: Any, device: torch.device | None = None) -> Side:
    """name: "student" or "teacher". device: where the hidden states must be; None for anywhere."""
    hidden_name, head_name = f"{name}_hidden", f"{name}_head"
    float_tensor(hidden_name, hidden, device)
    found = head_of(head_name, head, hidden, hidden_name)
    return Side(hidden, found, compute_dtype(hidden, found.weight, f"{hidden_name} and {head_name}"))


@dataclass(frozen=True)
class Models:
    """Hidden states and heads that fit each other; vocab: what both heads are cut to.

    Ranks of a group know the height of a whole head later: there vocab is vocab_size as it came.
    """

    student: Side
    teacher: Side
    vocab: int | None
    group: str

    def arguments(self) -> dict[str, Any]:
        """An operator's."""
        both = self.student.arguments("student") | self.teacher.arguments("teacher")
        return {**both, "head": self.student.transform + self.teacher.transform, "vocab": self.vocab, "group": self.group}


def models_of(
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any,
    teacher_head: Any,
    vocab_size: int | None,
    group: str,
    constant_in: str | None = None,
) -> Models:
    """constant_in: the loss that holds the teacher constant; None where it learns too."""
    student = side_of("student", student_hidden, student_head)
    teacher = side_of("teacher", teacher_hidden, teacher_head, student_hidden.device)
    if constant_in is not None:
        constant_target("teacher_hidden", teacher_hidden, constant_in)
        _warn_of_constant(teacher.head, student.head, constant_in)
        teacher = teacher.detach()
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)} must agree in all "
            "dimensions but the last"
        )
    if not group:
        vocab_size = vocabulary(student.head.weight.shape[0], teacher.head.weight.shape[0], vocab_size)
    elif vocab_size is not None and abs(whole("vocab_size", vocab_size, "an integer")) >= 2**63:  # no operator takes it
        raise ValueError(f"vocab_size={vocab_size}; accepted: 1 to the rows that both heads have on all ranks")
    return Models(student, teacher, vocab_size, group)


def sizing_of(strategy: Any, memory_budget: Any) -> dict[str, Any]:
    """An operator's arguments of how it is cut, checked. A budget of 0 is what the device decides: the operators ask it, since a
    compiler cannot look into that."""
    one_of("strategy", strategy, STRATEGIES)
    budget = 0
    if memory_budget is not None:
        budget = whole("memory_budget", memory_budget, "a number of bytes")
        if budget < 1:
            raise ValueError(f"memory_budget is a positive number of bytes, got {budget}")
    # The operators take an int64; no scratch comes near it.
    return {"strategy": strategy, "memory_budget": min(budget, 2**62)}


def _warn_of_constant(teacher: LMHead, student: LMHead, loss: str) -> None:
    """No error: a teacher that was loaded and never frozen has such a head. One that both models share learns as the student's."""
    learns = any(part is not None and part.requires_grad for part in (teacher.weight, teacher.bias))
    if learns and torch.is_grad_enabled() and not torch.compiler.is_compiling() and teacher.weight is not student.weight:
        _warn_once(
            f"teacher_head requires grad, but the target of {loss} is constant: the head gets no gradient. Freeze the teacher "
            "(teacher.requires_grad_(False)) or pass LMHead.detach(); to train it use linear_okd_loss."
        )


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
