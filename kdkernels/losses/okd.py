"""Online knowledge distillation (OKD, arXiv 2409.12512): the teacher's LoRA modules train along with the student.

Both losses and both models' gradients come from one pass over the same logits. Each loss holds the other model's distribution
constant, so the teacher's is the student's with the roles swapped: there is no second set of formulas.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor

from kdkernels.backends.operators import accumulate_dtype
from kdkernels.divergences import Divergence, DivergenceName
from kdkernels.engine.cut import Strategy
from kdkernels.losses.checks import LMHead, checked, rows_of
from kdkernels.losses.linear import models_of
from kdkernels.losses.reduction import reduced, terms_of
from kdkernels.losses.signatures import Metrics, OKDOptions, Reduction
from kdkernels.parallel.ranks import group_name, told
from kdkernels.scalars import share

if TYPE_CHECKING:
    from typing_extensions import Unpack

MetricsOrNone = TypeVar("MetricsOrNone", bound="Metrics | None")


class OKDLoss(tuple[Any, ...], Generic[MetricsOrNone]):
    """(student, teacher) losses, with metrics as a third where they were asked for."""

    def __new__(
        cls,
        student: Tensor,
        teacher: Tensor,
        metrics: MetricsOrNone = None,  # type: ignore[assignment]
    ) -> OKDLoss[MetricsOrNone]:
        return super().__new__(cls, (student, teacher) if metrics is None else (student, teacher, metrics))

    @property
    def student(self) -> Tensor:
        """For all student parameters."""
        return self[0]  # type: ignore[no-any-return]

    @property
    def teacher(self) -> Tensor:
        """For the teacher's trained modules."""
        return self[1]  # type: ignore[no-any-return]

    @property
    def metrics(self) -> MetricsOrNone:
        """As ``linear_kd_loss`` returns them; None where they were not asked for."""
        return self[2] if len(self) == 3 else None  # type: ignore[return-value]


@overload
def linear_okd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[OKDOptions],
) -> OKDLoss[None]: ...
@overload
def linear_okd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[OKDOptions],
) -> OKDLoss[Metrics]: ...
@overload
def linear_okd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None,
    *,
    return_metrics: bool,
    **options: Unpack[OKDOptions],
) -> OKDLoss[Metrics | None]: ...
def linear_okd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None,
    *,
    divergence: Divergence | DivergenceName = "forward_kl",
    teacher_alpha: float = 0.5,
    temperature: float = 1.0,
    square_temperature: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    strategy: Strategy = "auto",
    memory_budget: int | None = None,
    process_group: Any = None,
    return_metrics: bool = False,
) -> OKDLoss[Any]:
    """Losses of a student and of the teacher that adapts to it (OKD, arXiv 2409.12512), from hidden states and heads.

    Per token, with p = softmax(z / T), q = softmax(x / T) and label c:

        student = kd_weight T² D(p, q) + ce_weight CE(c, softmax(x)),    p constant;
        teacher = teacher_alpha T² KL(q, p) + (1 - teacher_alpha) CE(c, softmax(z)),    q constant.

    ``student`` gives gradients to the student's hidden states and head, ``teacher`` to the teacher's hidden states, and to its head
    where that requires them (in OKD it is frozen). Add the two for one backward; of two backwards the first needs retain_graph.

    teacher_alpha: number in [0, 1]; 1 leaves the teacher without an anchor in the data. The paper does not say what it took; 0.5 is
        this library's. labels may be None only where no term looks at them: teacher_alpha 1 and ce_weight 0.
    process_group: as there; the gradient of the teacher's hidden states is whole on every rank too.
    The other arguments, metrics (of the student's loss), dtypes and errors are those of ``linear_kd_loss``; token weights,
    reduction and normalizer apply to both losses.
    """
    group = group_name(process_group)
    with told(group, student_hidden, teacher_hidden):
        models, vocab = models_of(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            vocab_size,
            strategy,
            memory_budget,
            None,
            group,
        )
        teacher_alpha = share("teacher_alpha", teacher_alpha)
        if labels is None and teacher_alpha < 1.0:
            raise ValueError(f"labels is None, but teacher_alpha={teacher_alpha} asks for the teacher's cross-entropy on them")
        loss = checked(
            student_hidden,
            "student_hidden",
            labels,
            divergence=divergence,
            t=1.0,
            temperature=temperature,
            square_temperature=square_temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            token_weight=token_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            return_metrics=return_metrics,
        )
    square = math.pow(loss.temperature, 2) if square_temperature else 1.0
    others = (
        loss.labels,
        *terms_of(loss, models.head),
        teacher_alpha * square,
        1.0 - teacher_alpha,
        loss.ignore_index,
        vocab,
        *models.dtypes,
        models.strategy,
        models.budget,
        group,
    )
    differentiable = tuple(
        part
        for hidden, head in ((student_hidden, models.student), (teacher_hidden, models.teacher))
        for part in (rows_of(hidden), head.weight, head.bias)
    )
    sum_dtype = accumulate_dtype(torch.promote_types(*models.dtypes))
    (student, teacher), metrics = reduced(loss, "linear_okd", differentiable, sum_dtype, others)
    return OKDLoss(student, teacher, metrics if loss.return_metrics else None)
