"""The public losses: checks, the choice of dtypes, and the reduction. What they compute is in divergences.py.

Notation: x student logits, z teacher logits, y = (1 - t) x + t z target logits with x held constant, q = softmax(x / T),
p = softmax(y / T); N tokens, V vocabulary, D hidden size. Losses are in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import ops  # noqa: F401  (registers the operators)
from kdkernels.autograd import LossPerToken, SummedLoss
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.divergences import Divergence, resolve
from kdkernels.plan import STRATEGIES, default_budget
from kdkernels.step import METRICS

REDUCTIONS = ("mean", "sum", "none")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class LMHead:
    """An output head: logits = softcap * tanh(logit_scale * (H Wᵀ + bias) / softcap), without the tanh where softcap is None.

    weight: (V, D). bias: (V,) or None. logit_scale: a positive factor (Cohere, Granite). softcap: a positive bound (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def _number(name: str, value: Any, accepted: str, low: float = -math.inf, *, above: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {accepted}, got {type(value).__name__}")
    # not math.isfinite: a compiled graph may hold the number as a symbol
    if not -math.inf < value < math.inf or value < low or (above and value == low):
        raise ValueError(f"{name} is {accepted}, got {value}")
    return float(value)


def _tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, the student on {device}; both must be on one device")
    return value


def _float_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    tensor = _tensor(name, value, device)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} is {tensor.dtype}; accepted: {', '.join(map(str, FLOATS))}")
    return tensor


def _head(name: str, value: Any, hidden: Tensor, hidden_name: str) -> LMHead:
    """The head, checked against the hidden states that it multiplies."""
    if not isinstance(value, (LMHead, Tensor)):
        raise TypeError(f"{name} is an LMHead or a (V, D) tensor, got {type(value).__name__}")
    head = value if isinstance(value, LMHead) else LMHead(value)
    weight = _float_tensor(f"{name}.weight", head.weight, hidden.device)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name}.weight is (V, D) with at least one row and column, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} has shape {tuple(hidden.shape)}, but {name}.weight is {tuple(weight.shape)}: "
            f"the last dimension of {hidden_name} must be D = {weight.shape[1]}"
        )
    if head.bias is not None:
        bias = _float_tensor(f"{name}.bias", head.bias, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.bias is ({weight.shape[0]},) like the rows of its weight, got {tuple(bias.shape)}")
    _number(f"{name}.logit_scale", head.logit_scale, "a positive number", 0.0, above=True)
    if head.softcap is not None:
        _number(f"{name}.softcap", head.softcap, "a positive number or None", 0.0, above=True)
    return head


def _compute_dtype(hidden: Tensor, weight: Tensor, names: str) -> torch.dtype:
    """The dtype of a model's products: autocast's where it is on (float64 it leaves alone), else the tensors' own."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and weight.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"{names} are {hidden.dtype} and {weight.dtype}; outside torch.autocast they must have one dtype")
    return hidden.dtype


@dataclass(frozen=True)
class _Loss:
    """The checked options of a loss that do not depend on where its logits come from."""

    divergence: Divergence
    t: Tensor
    temperature: float
    kd_scale: float
    ce_weight: float
    labels: Tensor | None
    token_weight: Tensor | None
    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None
    return_metrics: bool
    shape: torch.Size


def _checked(
    leading: Tensor,
    name: str,
    labels: Any,
    *,
    divergence: Any,
    t: Any,
    temperature: Any,
    square_temperature: bool,
    kd_weight: Any,
    ce_weight: Any,
    token_weight: Any,
    ignore_index: Any,
    reduction: Any,
    normalizer: Any,
    return_metrics: bool,
) -> _Loss:
    """``leading``: the student's tensor, whose dimensions before the last are those of the tokens; ``name``: its name."""
    shape, device = leading.shape[:-1], leading.device
    chosen = resolve(divergence)
    if isinstance(t, Tensor):
        if t.dim() != 0 or not t.is_floating_point():
            raise ValueError(f"t is a number in [0, 1] or a 0-dim float tensor, got shape {tuple(t.shape)}, {t.dtype}")
        t = t.detach()
    else:
        if _number("t", t, "a number in [0, 1] or a 0-dim float tensor", 0.0) > 1.0:
            raise ValueError(f"t is a number in [0, 1] or a 0-dim float tensor, got {t}")
    temperature = _number("temperature", temperature, "a positive number", 0.0, above=True)
    kd_weight = _number("kd_weight", kd_weight, "a number of at least 0", 0.0)
    ce_weight = _number("ce_weight", ce_weight, "a number of at least 0", 0.0)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is an integer, got {type(ignore_index).__name__}")
    if labels is not None:
        _tensor("labels", labels, device)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels is {labels.dtype}; accepted: integers such as torch.int64")
        if labels.shape != shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; {name} {tuple(leading.shape)} needs {tuple(shape)}")
    elif ce_weight != 0.0:
        raise ValueError(f"labels is None, but ce_weight={ce_weight} asks for the cross-entropy on them")
    if token_weight is not None:
        _float_tensor("token_weight", token_weight, device)
        if token_weight.shape != shape:
            raise ValueError(
                f"token_weight has shape {tuple(token_weight.shape)}; {name} {tuple(leading.shape)} needs {tuple(shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError("token_weight is held constant, but requires grad; pass token_weight.detach()")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is not known; accepted: {', '.join(REDUCTIONS)}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer divides the sum of reduction='mean'; reduction is {reduction!r}")
        accepted = "a positive number or a 0-dim tensor"
        if not isinstance(normalizer, Tensor):
            normalizer = _number("normalizer", normalizer, accepted, 0.0, above=True)
        elif normalizer.dim() != 0:
            raise ValueError(f"normalizer is {accepted}, got shape {tuple(normalizer.shape)}")
    kd_scale = kd_weight * (temperature**2 if square_temperature else 1.0)
    return _Loss(
        divergence=chosen,
        t=t if isinstance(t, Tensor) else torch.full((), t, dtype=torch.float64, device=device),
        temperature=temperature,
        kd_scale=kd_scale,
        ce_weight=ce_weight,
        labels=None if labels is None else labels.reshape(-1).to(torch.int64),
        token_weight=None if token_weight is None else token_weight.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        normalizer=normalizer,
        return_metrics=bool(return_metrics),
        shape=shape,
    )


def _kept_weight(loss: _Loss, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of the token weights over kept tokens."""
    if loss.labels is None:
        kept = torch.full((), float(tokens), dtype=dtype, device=device)
        return kept if loss.token_weight is None else loss.token_weight.sum(dtype=dtype)
    counted = loss.labels != loss.ignore_index
    if loss.token_weight is None:
        return counted.sum().to(dtype)
    return loss.token_weight.to(dtype).where(counted, 0.0).sum()


def _reduced(
    loss: _Loss, operator: Any, differentiable: tuple[Tensor | None, ...], dtype: torch.dtype, others: tuple[Any, ...]
) -> Any:
    """Run the operator under the autograd function that fits the reduction. dtype: of the loss."""
    rows = differentiable[0]
    assert rows is not None
    factor = torch.ones((), dtype=dtype, device=rows.device)
    if loss.reduction == "mean":
        if loss.normalizer is None:
            normalizer = _kept_weight(loss, rows.shape[0], dtype, rows.device)
        elif isinstance(loss.normalizer, Tensor):
            normalizer = loss.normalizer.detach().to(device=rows.device, dtype=dtype)
        else:
            normalizer = torch.full((), loss.normalizer, dtype=dtype, device=rows.device)
        factor = torch.where(normalizer == 0, 0.0, 1.0 / normalizer)
    # Divided by the token count, float16 gradients of single tokens would underflow before a gradient scaler sees them. Until the
    # backward they are kept larger, by that count at most.
    if not torch.is_grad_enabled():
        # Inside the function this can no longer be seen: it would make gradients that nobody can ask for.
        differentiable = tuple(None if argument is None else argument.detach() for argument in differentiable)
    small = any(argument is not None and argument.dtype == torch.float16 for argument in differentiable)
    lift = (1.0 / factor).clamp(1.0, 1024.0) if small and loss.reduction == "mean" else None
    function = LossPerToken if loss.reduction == "none" else SummedLoss
    value, summary = function.apply(  # type: ignore[no-untyped-call]
        *(operator, len(differentiable), loss.return_metrics, factor, lift), *differentiable, loss.token_weight, *others
    )
    if loss.reduction == "none":
        value = value.reshape(loss.shape)
    if not loss.return_metrics:
        return value
    metrics = dict(zip(METRICS, summary.unbind(), strict=True))
    if loss.labels is None:
        del metrics["ce"]
    return value, metrics


def _terms(loss: _Loss, head: list[float]) -> tuple[Any, ...]:
    return (loss.divergence.name, loss.divergence.a, loss.temperature, loss.kd_scale, loss.ce_weight, head)


def linear_kd_loss(
    student_hidden: Tensor,
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor,
    teacher_head: LMHead | Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = "forward_kl",
    t: float | Tensor = 1.0,
    temperature: float = 1.0,
    square_temperature: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    strategy: str = "auto",
    memory_budget: int | None = None,
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
    t: number in [0, 1] or 0-dim tensor (not range-checked). temperature: T > 0; square_temperature=False leaves the T² out.
    token_weight: (...) constant factors of each token's loss; a weight of 0 drops the token.
    reduction: "mean" = sum(token_weight loss) / sum(token_weight) over kept tokens, or / ``normalizer`` (a positive number or 0-dim
        tensor, e.g. the token count of an accumulated step); "sum"; "none", shaped like labels, with the token weights in and 0 at
        dropped tokens.
    vocab_size: cut both heads to their first rows (padded vocabularies); the rest gets zero gradient.
    strategy: "tokens" cuts the tokens and takes the fewest products; "vocab" cuts the vocabulary, multiplies twice or three times
        for the logits and takes the least memory; "auto" is the one that ``kd.plan`` predicts to be faster.
    memory_budget: bytes of scratch for logits (default 1 GiB; 512 MiB on a CPU, where the scratch stays allocated for the next call
        until ``kd.free_scratch()``).
    return_metrics: also return a dict of detached 0-dim tensors, means over kept tokens, of the same pass: kd (D, without factors)
        and target_entropy, ce (if there are labels), student_entropy, agreement (of the most likely tokens of student and teacher),
        overlap (sum of min(q, softmax(z / T))), and tokens, how many were kept. Entropies in nats, at temperature T.

    Returns the loss in float32 (float64 for float64 inputs). Raises ValueError or TypeError for bad input before any work.
    """
    _float_tensor("student_hidden", student_hidden)
    device = student_hidden.device
    _float_tensor("teacher_hidden", teacher_hidden, device)
    if teacher_hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "teacher_hidden requires grad, but the target of linear_kd_loss is constant: run the teacher under torch.no_grad(), "
            "or train it along with linear_okd_loss"
        )
    student = _head("student_head", student_head, student_hidden, "student_hidden")
    teacher = _head("teacher_head", teacher_head, teacher_hidden, "teacher_hidden")
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)} must agree in all "
            "dimensions but the last"
        )
    vocab = _vocabulary(student.weight.shape[0], teacher.weight.shape[0], vocab_size)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not known; accepted: {', '.join(STRATEGIES)}")
    if memory_budget is not None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(f"memory_budget is a number of bytes, got {type(memory_budget).__name__}")
        if memory_budget < 1:
            raise ValueError(f"memory_budget is a positive number of bytes, got {memory_budget}")
    dtypes = (
        _compute_dtype(student_hidden, student.weight, "student_hidden and student_head"),
        _compute_dtype(teacher_hidden, teacher.weight, "teacher_hidden and teacher_head"),
    )
    loss = _checked(
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
    sum_dtype = accumulate_dtype(dtypes[0])
    head = [student.logit_scale, student.softcap or 0.0, teacher.logit_scale, teacher.softcap or 0.0]
    differentiable = (student_hidden.reshape(-1, student_hidden.shape[-1]), student.weight, student.bias)
    others = (
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher.weight.detach(),
        None if teacher.bias is None else teacher.bias.detach(),
        loss.labels,
        loss.t.to(device=device, dtype=sum_dtype),
        *_terms(loss, head),
        loss.ignore_index,
        vocab,
        *dtypes,
        strategy,
        default_budget(device) if memory_budget is None else memory_budget,
    )
    return _reduced(loss, torch.ops.kdkernels.linear_kd, differentiable, sum_dtype, others)


def _vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"student_head has {student} rows and teacher_head {teacher}; if the larger is padded, pass vocab_size= the number "
                "of tokens that both know"
            )
        return student
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size is an integer, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= min(student, teacher):
        raise ValueError(f"vocab_size={vocab_size}; accepted: 1 to {min(student, teacher)}, the rows that both heads have")
    return vocab_size


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = "forward_kl",
    t: float | Tensor = 1.0,
    temperature: float = 1.0,
    square_temperature: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_metrics: bool = False,
) -> Any:
    """The loss of ``linear_kd_loss`` from logits that exist already: student_logits and teacher_logits, both (..., V).

    The other arguments, what is returned and what is raised are as there. The gradient goes to student_logits.
    """
    _float_tensor("student_logits", student_logits)
    _float_tensor("teacher_logits", teacher_logits, student_logits.device)
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
    loss = _checked(
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
        *_terms(loss, [1.0, 0.0, 1.0, 0.0]),
        loss.ignore_index,
    )
    differentiable = (_rows(student_logits),)
    return _reduced(loss, torch.ops.kdkernels.logits_kd, differentiable, accumulate_dtype(student_logits.dtype), others)


def _rows(logits: Tensor) -> Tensor:
    """[N, V] with adjacent entries in a row, without a copy where the strides allow."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class LinearKDLoss(nn.Module):
    """``linear_kd_loss`` with its options bound; call it with hidden states, heads and labels.

    Options given to a call (t, say) win over those given here. Takes the keyword arguments of ``linear_kd_loss``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = set(linear_kd_loss.__kwdefaults__ or {})
        if unknown := sorted(set(options) - known):
            raise TypeError(f"LinearKDLoss got {', '.join(unknown)}; accepted: {', '.join(sorted(known))}")
        if "divergence" in options:
            resolve(options["divergence"])
        self.options = options

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

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
