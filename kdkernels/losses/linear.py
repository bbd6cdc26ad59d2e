"""The public losses: checks, the choice of dtypes, and the reduction. What they compute is in divergences.py.

Notation: x student logits, z teacher logits, y = (1 - t) x + t z target logits with x held constant, q = softmax(x / T),
p = softmax(y / T); N tokens, V vocabulary, D hidden size. Losses are in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from kdkernels.backends.operators import accumulate_dtype
from kdkernels.divergences import Divergence, DivergenceName, resolve
from kdkernels.engine.cut import Strategy
from kdkernels.engine.step import METRICS
from kdkernels.losses import operators as ops  # noqa: F401  (registers the operators)
from kdkernels.losses.autograd import OWNERS, SummedLoss, anchors_of, losses_of, refuse_transforms, total
from kdkernels.losses.checks import Linear, LMHead, Loss, checked, float_tensor, kept_weight, linear_of, rows_of
from kdkernels.losses.signatures import LinearOptions, LogitsOptions, Metrics, Reduction
from kdkernels.parallel.ranks import group_name, told
from kdkernels.scalars import whole

if TYPE_CHECKING:
    from typing_extensions import Unpack

Returned = TypeVar("Returned")


def reduced(
    loss: Loss, name: str, differentiable: tuple[Tensor | None, ...], dtype: torch.dtype, others: tuple[Any, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and metrics of the operator of that name, with the backward that fits the reduction. dtype: of the losses."""
    refuse_transforms(differentiable)
    rows = differentiable[0]
    assert rows is not None
    operator, owners, metrics = getattr(torch.ops.kdkernels, name), OWNERS[name], loss.return_metrics
    factor = _factor(loss, rows, dtype)
    if not torch.is_grad_enabled():
        # Inside SummedLoss this can no longer be seen: it would make gradients that nobody can ask for.
        differentiable = tuple(None if argument is None else argument.detach() for argument in differentiable)
    # An exported program holds no SummedLoss: there the operator's own backward makes the gradients.
    if loss.reduction == "none" or torch.compiler.is_exporting():
        weights, one, needs = [loss.token_weight] * losses_of(owners), torch.ones_like(factor), [False] * len(owners)
        *values, summary = operator(*differentiable, *weights, one, None, *others, needs, metrics)
        values = values[: len(weights)]
    else:
        # Divided by the token count, float16 gradients of single tokens would underflow before a gradient scaler sees them. Until
        # the backward they are kept larger, by that count at most.
        small = any(argument is not None and argument.dtype == torch.float16 for argument in differentiable)
        lift = (1.0 / factor).clamp(1.0, 1024.0) if small and loss.reduction == "mean" else None
        *values, summary = SummedLoss.apply(  # type: ignore[no-untyped-call]
            operator, owners, metrics, factor, lift, anchors_of(differentiable), *differentiable, loss.token_weight, *others
        )
    if loss.reduction == "none":
        values = [value.reshape(loss.shape) for value in values]
    elif torch.compiler.is_exporting():
        values = [total(value, factor) for value in values]
    of = dict(zip(METRICS, summary.unbind(), strict=True)) if metrics else {}
    if loss.labels is None:
        of.pop("ce", None)
    return values, of


def _factor(loss: Loss, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What the sum of the losses is multiplied by."""
    if loss.reduction != "mean":
        return torch.ones((), dtype=dtype, device=rows.device)
    if loss.normalizer is None:
        normalizer = kept_weight(loss, rows.shape[0], dtype, rows.device)
    elif isinstance(loss.normalizer, Tensor):
        normalizer = loss.normalizer.detach().to(device=rows.device, dtype=dtype)
    else:
        normalizer = torch.full((), loss.normalizer, dtype=dtype, device=rows.device)
    return torch.where(normalizer == 0, 0.0, 1.0 / normalizer)


def models_of(
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any,
    teacher_head: Any,
    vocab_size: int | None,
    strategy: Any,
    memory_budget: Any,
    constant_target: str | None,
    group: str,
) -> tuple[Linear, int | None]:
    """``linear_of``, and what to cut both heads to. Ranks of a ``group`` know the height of a whole head later: there that is
    vocab_size as it came."""
    if not group:
        models = linear_of(
            student_hidden, student_head, teacher_hidden, teacher_head, vocab_size, strategy, memory_budget, constant_target
        )
        return models, models.vocab
    if vocab_size is not None and abs(whole("vocab_size", vocab_size, "an integer")) >= 2**63:  # no operator takes it
        raise ValueError(f"vocab_size={vocab_size}; accepted: 1 to the rows that both heads have on all ranks")
    # every rank has a first row of both heads
    return linear_of(
        student_hidden, student_head, teacher_hidden, teacher_head, 1, strategy, memory_budget, constant_target
    ), vocab_size


def terms_of(loss: Loss, head: list[float]) -> tuple[Any, ...]:
    return (loss.divergence.name, float(loss.divergence.a), loss.temperature, loss.kd_scale, loss.ce_weight, head)


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[LinearOptions],
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, Metrics]: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None = None,
    *,
    return_metrics: bool,
    **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, Metrics]: ...
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
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
    vocab_size: int | None = None,
    strategy: Strategy = "auto",
    memory_budget: int | None = None,
    process_group: Any = None,
    return_metrics: bool = False,
) -> Any:
    """Distillation loss from hidden states and heads; the [N, V] logits never exist whole.

    Per token: kd_weight T² D(p, q) + ce_weight CE(label, softmax(x)), with p = softmax(y / T), q = softmax(x / T) and the constant
    target y = (1 - t) x + t z. t = 1 is plain distillation; t < 1 is TAID (arXiv 2501.16937), with ``TAIDSchedule`` to move it.

    student_hidden: (..., D_s); teacher_hidden: (..., D_t), same leading dimensions; float32, bfloat16, float16 or float64.
    student_head, teacher_head: an LMHead or its (V, D) weight, in the dtype of its hidden states unless torch.autocast is on.
        Gradients go to the student's hidden states, weight and bias where they require them; a frozen head costs no product.
    labels: (...) integers, the token to predict at each position (no shift inside); ``ignore_index`` drops a position.
    divergence: a name of ``kd.divergences()`` or a Divergence such as ``kd.jsd(0.3)``.
    t: number in [0, 1] or 0-dim tensor (not range-checked). temperature: T, 1e-9 to 1e5; square_temperature=False leaves the
        T² out.
    token_weight: (...) constant factors of each token's loss; a weight of 0 drops the token.
    reduction: "mean" = sum(token_weight loss) / sum(token_weight) over kept tokens, or / ``normalizer`` (a positive number or 0-dim
        tensor, e.g. the token count of an accumulated step), and 0 where that is 0; "sum"; "none", shaped like labels, with the
        token weights in and 0 at dropped tokens.
    vocab_size: cut both heads to their first rows (padded vocabularies); the rest gets zero gradient.
    strategy: "tokens" cuts the tokens and takes the fewest products; "vocab" cuts the vocabulary, multiplies twice or three times
        for the logits and takes the least memory; "auto" is the one that ``kd.plan`` predicts to be faster.
    memory_budget: bytes of scratch for logits (default a sixteenth of a GPU's memory; 512 MiB on a CPU, where the scratch stays
        allocated for the next call until ``kd.free_scratch()``; 1 GiB elsewhere).
    process_group: a torch.distributed.ProcessGroup over whose ranks the vocabulary is split. Each rank passes its own rows of both
        heads (and biases): those of rank r follow those of rank r - 1, as many as it has, at least one, the same of both heads.
        Everything else is the same on every rank: hidden states, labels (tokens of the whole vocabulary), weights, options, and
        vocab_size, which is that of the whole. Every rank gets the same loss and metrics, the gradient of its own rows, and the
        whole gradient of the hidden states, which must not be summed over the group again. memory_budget is then each rank's, and
        the least of them is taken. Ranks that were called with different options, counts or labels raise the same ValueError.
    return_metrics: also return a dict of detached 0-dim tensors, means over kept tokens, of the same pass: kd (D, without factors)
        and target_entropy, ce (if there are labels), student_entropy, agreement (of the most likely tokens of student and teacher),
        overlap (sum of min(q, softmax(z / T))), and tokens, how many were kept. Entropies in nats, at temperature T.

    Returns the loss in float32 (float64 for float64 inputs). Raises ValueError or TypeError for bad input before any work.
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
            "linear_kd_loss",
            group,
        )
        loss = checked(
            student_hidden,
            "student_hidden",
            labels,
            divergence=divergence,
            t=t,
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
    sum_dtype = accumulate_dtype(models.dtypes[0])
    student, teacher = models.student, models.teacher
    others = (
        rows_of(teacher_hidden.detach()),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        loss.labels,
        loss.t.to(device=models.device, dtype=sum_dtype),
        *terms_of(loss, models.head),
        loss.ignore_index,
        vocab,
        *models.dtypes,
        models.strategy,
        models.budget,
        group,
    )
    differentiable = (rows_of(student_hidden), student.weight, student.bias)
    (value,), metrics = reduced(loss, "linear_kd", differentiable, sum_dtype, others)
    return (value, metrics) if loss.return_metrics else value


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
    if teacher_logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_logits requires grad, but the target of kd_loss is constant: run the teacher under torch.no_grad(), or "
            "train it along with linear_okd_loss"
        )
    loss = checked(
        student_logits,
        "student_logits",
        labels,
        divergence=divergence,
        t=t,
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
    sum_dtype = accumulate_dtype(torch.promote_types(student_logits.dtype, teacher_logits.dtype))
    others = (
        _rows(teacher_logits.detach()),
        loss.labels,
        loss.t.to(device=student_logits.device, dtype=sum_dtype),
        *terms_of(loss, [1.0, 0.0, 1.0, 0.0]),
        loss.ignore_index,
    )
    dtype = accumulate_dtype(student_logits.dtype)
    (value,), metrics = reduced(loss, "logits_kd", (_rows(student_logits),), dtype, others)
    return (value, metrics) if loss.return_metrics else value


def _rows(logits: Tensor) -> Tensor:
    """[N, V] with adjacent entries in a row, without a copy where the strides allow."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class LinearKDLoss(nn.Module, Generic[Returned]):
    """``linear_kd_loss`` with its options bound; call it with hidden states, heads and labels.

    Options given to a call (t, say) win over those given here. Takes the keyword arguments of ``linear_kd_loss``.
    """

    @overload
    def __init__(
        self: LinearKDLoss[Tensor], *, return_metrics: Literal[False] = False, **options: Unpack[LinearOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: LinearKDLoss[tuple[Tensor, Metrics]], *, return_metrics: Literal[True], **options: Unpack[LinearOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: LinearKDLoss[Tensor | tuple[Tensor, Metrics]], *, return_metrics: bool, **options: Unpack[LinearOptions]
    ) -> None: ...
    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = set(linear_kd_loss.__kwdefaults__ or {})
        if unknown := sorted(set(options) - known):
            raise TypeError(f"LinearKDLoss got {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
        if "divergence" in options:
            resolve(options["divergence"])
        self.options = options

    @overload
    def forward(
        self,
        student_hidden: Tensor,
        student_head: LMHead | Tensor,
        teacher_hidden: Tensor,
        teacher_head: LMHead | Tensor,
        labels: Tensor | None = None,
        **options: Unpack[LinearOptions],
    ) -> Returned: ...
    @overload
    def forward(
        self,
        student_hidden: Tensor,
        student_head: LMHead | Tensor,
        teacher_hidden: Tensor,
        teacher_head: LMHead | Tensor,
        labels: Tensor | None = None,
        *,
        return_metrics: bool,
        **options: Unpack[LinearOptions],
    ) -> Tensor | tuple[Tensor, Metrics]: ...
    def forward(
        self,
        student_hidden: Tensor,
        student_head: LMHead | Tensor,
        teacher_hidden: Tensor,
        teacher_head: LMHead | Tensor,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return linear_kd_loss(student_hidden, student_head, teacher_hidden, teacher_head, labels, **{**self.options, **options})

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
