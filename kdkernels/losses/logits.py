"""The public loss from logits that exist already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.divergences import Divergence, DivergenceName
from kdkernels.losses.checks import constant_target, float_tensor
from kdkernels.losses.reduction import reduced
from kdkernels.losses.signatures import LogitsOptions, Metrics, Reduction
from kdkernels.losses.terms import share_of_teacher, terms_of
from kdkernels.losses.tokens import tokens_of
from kdkernels.scalars import flag

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor, Metrics]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: bool,
    **options: Unpack[LogitsOptions],
) -> Tensor | tuple[Tensor, Metrics]: ...
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | DivergenceName = "forward_kl",
    t: float | Tensor = 1.0,
    temperature: float = 1.0,
    square_temperature: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    check_labels: bool = True,
    return_metrics: bool = False,
) -> Any:
    """The loss of ``linear_kd_loss`` from logits that exist already: student_logits and teacher_logits, both (..., V).

    The other arguments, what is returned and what is raised are as there. The gradient goes to student_logits.
    """
    float_tensor("student_logits", student_logits)
    float_tensor("teacher_logits", teacher_logits, student_logits.device)
    if student_logits.dim() < 1 or student_logits.shape[-1] == 0 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} must have one "
            "shape, (..., V) with V at least 1"
        )
    constant_target("teacher_logits", teacher_logits, "kd_loss")
    both = accumulate_dtype(student_logits.dtype, teacher_logits.dtype)
    given = {
        "student_logits": _rows(student_logits),
        "teacher_logits": _rows(teacher_logits.detach()),
        **terms_of(divergence, temperature, square_temperature, kd_weight, ce_weight),
        "head": [1.0, 0.0, 1.0, 0.0],
        "t": share_of_teacher(t, both, student_logits.device),
    }
    tokens = tokens_of(
        "student_logits", student_logits, labels, token_weight, ignore_index, reduction, normalizer, check_labels, ce_weight
    )
    return_metrics = flag("return_metrics", return_metrics)
    (value,), metrics = reduced("logits_kd", given, tokens, accumulate_dtype(student_logits.dtype), return_metrics)
    return (value, metrics) if return_metrics else value


def _rows(logits: Tensor) -> Tensor:
    """[N, V] with adjacent entries in a row, without a copy where the strides allow."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
