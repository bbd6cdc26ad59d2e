"""What the public losses accept: every check, before any work. An error names the argument, what came and what is accepted."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kdkernels.divergences import Divergence, resolve
from kdkernels.engine.cut import STRATEGIES
from kdkernels.losses.signatures import Reduction
from kdkernels.scalars import flag, one_of, positive, share, temperature_of, vocabulary, weight_of, whole

logger = logging.getLogger(__name__)

REDUCTIONS = get_args(Reduction)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class LMHead:
    """An output head: logits = softcap * tanh(logit_scale * (H Wᵀ + bias) / softcap), without the tanh where softcap is None.

    weight: (V, D). bias: (V,) or None. logit_scale: a positive factor (Cohere, Granite). softcap: a positive bound (Gemma 2); both
    from 1e-18 to 1e18.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def detach(self) -> LMHead:
        """The same head, held constant."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def __repr__(self) -> str:
        """Of the tensors what they are, not their values."""
        parts = ", ".join(f"{name}={_described(value)}" for name, value in vars(self).items())
        return f"LMHead({parts})"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    learned = ", requires_grad" if value.requires_grad else ""
    return f"<{tuple(value.shape)}, {value.dtype}, {value.device}{learned}>"


def _as_head(name: str, value: Any) -> LMHead:
    if isinstance(value, LMHead):
        return value
    if isinstance(value, Tensor):
        return LMHead(value)
    raise TypeError(f"{name} is an LMHead or a (V, D) tensor, got {type(value).__name__}{_instead_of(value)}")


def _instead_of(value: Any) -> str:
    """What to pass for something that holds a head."""
    weight = getattr(value, "weight", value)
    if callable(weight) and not isinstance(weight, nn.Module):
        return "; of a quantised layer pass head.weight().dequantize()"
    if isinstance(value, (nn.Linear, nn.Embedding)):
        bias = getattr(value, "bias", None) is not None
        return "; pass kd.LMHead(head.weight, head.bias)" if bias else "; pass head.weight"
    if isinstance(value, nn.Module):
        return "; of a model of transformers pass kdkernels.transformers.lm_head(model)"
    return ""


def tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} is {'nested' if value.is_nested else value.layout}; accepted: dense tensors (torch.strided)")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, the student on {device}; both must be on one device")
    return value


def float_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    found = tensor(name, value, device)
    if found.dtype not in FLOATS:
        raise TypeError(f"{name} is {found.dtype}; accepted: {', '.join(map(str, FLOATS))}")
    return found


def integer_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    found = tensor(name, value, device)
    if found.dtype not in INTEGERS:
        raise TypeError(f"{name} is {found.dtype}; accepted: integers such as torch.int64")
    return found


def constant(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but is held constant; pass {name}.detach()")


def scalar(name: str, value: Tensor, accepted: str, device: torch.device, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """A 0-dim tensor that can be brought to the device, cut from its graph. dtypes: what is accepted, None for any float."""
    fits = value.is_floating_point() if dtypes is None else value.dtype in dtypes
    if value.dim() != 0 or not fits:
        raise ValueError(f"{name} is {accepted}, got shape {tuple(value.shape)}, {value.dtype}")
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{name} is on meta, where it has no value, the student on {device}")
    return value.detach()


def head_of(name: str, value: Any, hidden: Tensor, hidden_name: str) -> LMHead:
    """The head, checked against the hidden states that it multiplies."""
    head = _as_head(name, value)
    weight = float_tensor(f"{name}.weight", head.weight, hidden.device)
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{name}.weight is (V, D) with at least one row and column, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} has shape {tuple(hidden.shape)}, but {name}.weight is {tuple(weight.shape)}: "
            f"the last dimension of {hidden_name} must be D = {weight.shape[1]}"
        )
    if head.bias is not None:
        bias = float_tensor(f"{name}.bias", head.bias, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.bias is ({weight.shape[0]},) like the rows of its weight, got {tuple(bias.shape)}")
    scale = positive(f"{name}.logit_scale", head.logit_scale)
    softcap = None if head.softcap is None else positive(f"{name}.softcap", head.softcap, " or None")
    return LMHead(weight, head.bias, scale, softcap)


def compute_dtype(hidden: Tensor, weight: Tensor, names: str) -> torch.dtype:
    """The dtype of a model's products: autocast's where it is on (float64 it leaves alone), else the tensors' own."""
    device_type, dtypes = hidden.device.type, (hidden.dtype, weight.dtype)
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    if autocast and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        rule = "torch.autocast leaves float64 alone: both must be it, or neither" if autocast else (
            "outside torch.autocast they must have one dtype"
        )  # fmt: skip
        raise TypeError(f"{names} are {hidden.dtype} and {weight.dtype}; {rule}")
    return hidden.dtype


@dataclass(frozen=True)
class Loss:
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


def checked(
    leading: Tensor,
    name: str,
    labels: Any,
    *,
    divergence: Any,
    t: Any,
    temperature: Any,
    square_temperature: Any,
    kd_weight: Any,
    ce_weight: Any,
    token_weight: Any,
    ignore_index: Any,
    reduction: Any,
    normalizer: Any,
    return_metrics: Any,
) -> Loss:
    """``leading``: the student's tensor, whose dimensions before the last are those of the tokens; ``name``: its name."""
    shape, device = leading.shape[:-1], leading.device
    chosen = resolve(divergence)
    either = " or a 0-dim float tensor"
    if isinstance(t, Tensor):
        constant("t", t)
        t = scalar("t", t, f"a number in [0, 1]{either}", device)
    else:
        t = share("t", t, either)
    temperature = temperature_of("temperature", temperature)
    square_temperature = flag("square_temperature", square_temperature)
    kd_weight = weight_of("kd_weight", kd_weight)
    ce_weight = weight_of("ce_weight", ce_weight)
    ignore_index = whole("ignore_index", ignore_index, "an integer")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is an integer that int64 holds, got {ignore_index}")
    if labels is not None:
        integer_tensor("labels", labels, device)
        if labels.shape != shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; {name} {tuple(leading.shape)} needs {tuple(shape)}")
    elif ce_weight != 0.0:
        raise ValueError(f"labels is None, but ce_weight={ce_weight} asks for the cross-entropy on them")
    if token_weight is not None:
        float_tensor("token_weight", token_weight, device)
        if token_weight.shape != shape:
            raise ValueError(
                f"token_weight has shape {tuple(token_weight.shape)}; {name} {tuple(leading.shape)} needs {tuple(shape)}"
            )
        if token_weight.requires_grad:
            raise ValueError("token_weight is held constant, but requires grad; pass token_weight.detach()")
    one_of("reduction", reduction, REDUCTIONS)
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer divides the sum of reduction='mean'; reduction is {reduction!r}")
        if isinstance(normalizer, Tensor):
            constant("normalizer", normalizer)
            scalar("normalizer", normalizer, "a positive number or a 0-dim tensor of one", device, (*FLOATS, *INTEGERS))
        else:
            normalizer = positive("normalizer", normalizer, " or a 0-dim tensor of one")
    kd_scale = kd_weight * (temperature**2 if square_temperature else 1.0)
    return Loss(
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
        return_metrics=flag("return_metrics", return_metrics),
        shape=shape,
    )


def kept_weight(loss: Loss, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of the token weights over kept tokens."""
    if loss.labels is None:
        kept = torch.full((), tokens, dtype=dtype, device=device)
        return kept if loss.token_weight is None else loss.token_weight.sum(dtype=dtype)
    counted = loss.labels != loss.ignore_index
    if loss.token_weight is None:
        return counted.sum().to(dtype)
    return loss.token_weight.to(dtype).where(counted, 0.0).sum()


def scratch_of(strategy: Any, memory_budget: Any) -> int:
    """The bytes of scratch for logits, after a look at both. 0 where the device decides: the operators ask it, since a compiler
    cannot look into that."""
    one_of("strategy", strategy, STRATEGIES)
    if memory_budget is None:
        return 0
    budget = whole("memory_budget", memory_budget, "a number of bytes")
    if budget < 1:
        raise ValueError(f"memory_budget is a positive number of bytes, got {budget}")
    # The operators take an int64; no scratch comes near it.
    return min(budget, 2**62)


@dataclass(frozen=True)
class Linear:
    """Hidden states and heads that fit each other; vocab: what both heads are cut to; dtypes: what the models' products run in."""

    student_hidden: Tensor
    student: LMHead
    teacher_hidden: Tensor
    teacher: LMHead
    vocab: int
    dtypes: tuple[torch.dtype, torch.dtype]
    strategy: str
    budget: int

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device

    @property
    def head(self) -> list[float]:
        """What both heads do to their logits, as the operators take it."""
        return [self.student.logit_scale, self.student.softcap or 0.0, self.teacher.logit_scale, self.teacher.softcap or 0.0]


def rows_of(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


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


def linear_of(
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any,
    teacher_head: Any,
    vocab_size: int | None,
    strategy: Any,
    memory_budget: Any,
    constant_target: str | None,
) -> Linear:
    """constant_target: the loss that holds the teacher constant; None where the teacher learns too."""
    float_tensor("student_hidden", student_hidden)
    device = student_hidden.device
    float_tensor("teacher_hidden", teacher_hidden, device)
    if constant_target is not None and teacher_hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"teacher_hidden requires grad, but the target of {constant_target} is constant: run the teacher under "
            "torch.no_grad(), or train it along with linear_okd_loss"
        )
    student = head_of("student_head", student_head, student_hidden, "student_hidden")
    teacher = head_of("teacher_head", teacher_head, teacher_hidden, "teacher_hidden")
    if constant_target is not None:
        _warn_of_constant(teacher, student, constant_target)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)} must agree in all "
            "dimensions but the last"
        )
    vocab = vocabulary(student.weight.shape[0], teacher.weight.shape[0], vocab_size)
    budget = scratch_of(strategy, memory_budget)
    dtypes = (
        compute_dtype(student_hidden, student.weight, "student_hidden and student_head"),
        compute_dtype(teacher_hidden, teacher.weight, "teacher_hidden and teacher_head"),
    )
    return Linear(student_hidden, student, teacher_hidden, teacher, vocab, dtypes, strategy, budget)
