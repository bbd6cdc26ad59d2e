"""The public loss from hidden states and heads. Its checks are in the files beside it, the formulas in divergences.py.

Notation: x student logits, z teacher logits, y = (1 - t) x + t z target logits with x held constant, q = softmax(x / T),
p = softmax(y / T); N tokens, V vocabulary, D hidden size. Losses are in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from torch import Tensor, nn

from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.divergences import Divergence, DivergenceName, resolve
from kdkernels.engine.cut import Strategy
from kdkernels.losses.head import LMHead
from kdkernels.losses.models import models_of, sizing_of
from kdkernels.losses.reduction import reduced
from kdkernels.losses.signatures import LinearOptions, Metrics, Reduction
from kdkernels.losses.terms import share_of_teacher, terms_of
from kdkernels.losses.tokens import tokens_of
from kdkernels.parallel.ranks import group_name, told
from kdkernels.scalars import flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

Returned = TypeVar("Returned")


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
    check_labels: bool = True,
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
    token_weight: (...) floats, constant factors of each token's loss, of any sign; a weight of 0 drops the token.
    reduction: "mean" = sum(token_weight loss) / sum(token_weight) over kept tokens, or / ``normalizer`` (a positive number or 0-dim
        tensor, e.g. the token count of an accumulated step), and 0 where that is 0; "sum"; "none", shaped like labels, with the
        token weights in and 0 at dropped tokens.
    check_labels: False where the host must not wait for a GPU, as while a CUDA graph is captured. How many tokens count is then not
        read, so dropped ones are multiplied with the others, as zeros; a label out of range makes the loss NaN, and raises nothing.
        With a process_group it makes no difference: what ranks agree on is read all the same.
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
        models = models_of(
            student_hidden, student_head, teacher_hidden, teacher_head, vocab_size, group, constant_in="linear_kd_loss"
        )
        dtype = accumulate_dtype(models.student.dtype)
        given = {
            **models.arguments(),
            **sizing_of(strategy, memory_budget),
            **terms_of(divergence, temperature, square_temperature, kd_weight, ce_weight),
            "t": share_of_teacher(t, dtype, student_hidden.device),
        }
        tokens = tokens_of(
            "student_hidden", student_hidden, labels, token_weight, ignore_index, reduction, normalizer, check_labels, ce_weight
        )
        return_metrics = flag("return_metrics", return_metrics)
    (value,), metrics = reduced("linear_kd", given, tokens, dtype, return_metrics)
    return (value, metrics) if return_metrics else value


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
