"""Online knowledge distillation (OKD, arXiv 2409.12512): the teacher's LoRA modules train along with the student.

Both losses and both models' gradients come from one pass over the same logits. Each loss holds the other model's distribution
constant, so the teacher's is the student's with the roles swapped: there is no second set of formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from torch import Tensor

from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.divergences import Divergence, DivergenceName
from kdkernels.engine.cut import Strategy
from kdkernels.losses.head import LMHead
from kdkernels.losses.models import models_of, sizing_of
from kdkernels.losses.reduction import reduced
from kdkernels.losses.signatures import Metrics, OKDOptions, Reduction
from kdkernels.losses.terms import square_of, terms_of
from kdkernels.losses.tokens import tokens_of
from kdkernels.parallel.ranks import group_name, told
from kdkernels.scalars import flag, share

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
    check_labels: bool = True,
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
        models = models_of(student_hidden, student_head, teacher_hidden, teacher_head, vocab_size, group)
        teacher_alpha = share("teacher_alpha", teacher_alpha)
        if labels is None and teacher_alpha < 1.0:
            raise ValueError(f"labels is None, but teacher_alpha={teacher_alpha} asks for the teacher's cross-entropy on them")
        terms = terms_of(divergence, temperature, square_temperature, kd_weight, ce_weight)
        given = {
            **models.arguments(),
            **sizing_of(strategy, memory_budget),
            **terms,
            "teacher_kd_scale": teacher_alpha * square_of(terms["temperature"], square_temperature),
            "teacher_ce_scale": 1.0 - teacher_alpha,
        }
        tokens = tokens_of(
            "student_hidden", student_hidden, labels, token_weight, ignore_index, reduction, normalizer, check_labels, ce_weight
        )
        return_metrics = flag("return_metrics", return_metrics)
    dtype = accumulate_dtype(models.student.dtype, models.teacher.dtype)
    (student, teacher), metrics = reduced("linear_okd", given, tokens, dtype, return_metrics)
    return OKDLoss(student, teacher, metrics if return_metrics else None)
