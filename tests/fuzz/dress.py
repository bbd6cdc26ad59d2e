"""What is done to a call that must make no difference, or a known one: views, special values, other labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.fuzz.calls import BARELY, INF, NAN, Call, get, put, tensors, vocab_of


def _offset(tensor: Tensor) -> Tensor:
    """The same in a larger storage, from an odd place on."""
    storage = torch.zeros(tensor.numel() + 7, dtype=tensor.dtype)
    storage[3 : 3 + tensor.numel()] = tensor.reshape(-1)
    return storage[3 : 3 + tensor.numel()].view(tensor.shape)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.dim())))).contiguous().permute(tuple(reversed(range(tensor.dim()))))


def _gaps(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1).repeat_interleave(3, -1)[..., 1]


def _expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape) if tensor.dim() and len(tensor) else tensor


def _negated_view(tensor: Tensor) -> Tensor:
    """The same values, of which the memory holds the negative: the imaginary part of a conjugate."""
    return (
        torch.complex(torch.zeros_like(tensor), -tensor).conj().imag if tensor.dtype in (torch.float32, torch.float64) else tensor
    )


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset": _offset,
    "transposed": _transposed,
    "gaps": _gaps,
    "expanded": _expanded,
    "flipped": lambda tensor: tensor.flip(-1).flip(-1) if tensor.dim() else tensor,
    "negated view": _negated_view,
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "inference tensor": lambda tensor: _in_inference_mode(tensor),
}


def _in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def dress(call: Call) -> None:
    kind = call.rng.choices((_dress_view, _dress_special, _dress_labels, _dress_weight, _dress_extreme), (50, 20, 12, 8, 10))[0]
    kind(call)


def _dress_view(call: Call) -> None:
    name, view = call.rng.choice(tensors(call)), call.rng.choice(tuple(VIEWS))
    value = get(call, name)
    if value.dtype in BARELY or name in ("t", "normalizer") or (view == "inference tensor" and value.requires_grad):
        return
    if view == "parameter" and not value.is_floating_point():
        return
    if name.startswith("topk") and view == "expanded":
        return  # tokens and their probabilities go together
    with torch.no_grad():
        made = VIEWS[view](value.detach())
    put(call, name, made.requires_grad_() if value.requires_grad else made)
    call.changes.append(f"{name} {view}")


def _dress_special(call: Call) -> None:
    """Single entries, rows or all of a tensor that are not finite."""
    rng = call.rng
    of = {"kd_loss": ("student_logits", "teacher_logits")}.get(
        call.function, ("student_hidden", "teacher_hidden", "student_bias", "teacher_bias", "topk_logprobs")
    )
    name = rng.choice([one for one in of if isinstance(get(call, one), Tensor)])
    value = get(call, name)
    if value.numel() == 0 or value.is_inference():
        return
    made = value.detach().clone(memory_format=torch.contiguous_format)
    bad = rng.choice((-INF,) if name.endswith("bias") else (NAN, -INF) if name == "topk_logprobs" else (NAN, INF, -INF, -INF))
    where = rng.choice(("entry", "entry", "row", "all")) if not name.endswith("bias") else "entry"
    if where == "all":
        made.fill_(bad)
    elif where == "row" and made.dim() > 1:
        made.view(-1, made.shape[-1])[rng.randrange(made.numel() // made.shape[-1])] = bad
    else:
        made.view(-1)[rng.randrange(made.numel())] = bad
    if name == "topk_logprobs":
        made[value == -INF] = -INF  # what an unused slot points at may be no token
    put(call, name, made.requires_grad_() if value.requires_grad else made)
    call.changes.append(f"{name} {where} {bad}")


def _dress_labels(call: Call) -> None:
    labels = call.arguments.get("labels")
    if labels is None or labels.is_inference() or not labels.dtype.is_signed:
        return
    rng, vocab = call.rng, vocab_of(call)
    kind = rng.choice(("dtype", "all masked", "inside", "far"))
    labels = labels.clone()
    if kind == "all masked":
        labels.fill_(call.arguments.get("ignore_index", -100))
    elif kind == "inside" and "ignore_index" not in call.arguments:
        call.arguments["ignore_index"] = rng.randrange(vocab)
        labels[labels < 0] = call.arguments["ignore_index"]
    elif kind == "far" and "ignore_index" not in call.arguments and labels.dtype == torch.int64:
        call.arguments["ignore_index"] = rng.choice((2**62, -(2**63), 2**63 - 1, vocab))
        labels[labels < 0] = call.arguments["ignore_index"]
    elif kind == "dtype" and "ignore_index" not in call.arguments:
        unsigned = (torch.uint8, *BARELY)
        dtype = rng.choice((torch.int8, torch.int16, torch.int32, *unsigned))
        if vocab > 100 and dtype.itemsize == 1:
            dtype = torch.int32
        if dtype in unsigned:
            labels[labels < 0] = 0
        labels = labels.to(dtype)
    call.arguments["labels"] = labels
    call.changes.append(f"labels {kind}")


def _dress_weight(call: Call) -> None:
    weight, rng = call.arguments.get("token_weight"), call.rng
    if weight is None or weight.numel() == 0 or weight.is_inference():
        return
    kind = rng.choice(("zero", "negative", "nan", "inf"))
    weight = weight.clone(memory_format=torch.contiguous_format)
    if kind == "zero":
        weight.zero_()
    elif kind == "negative":
        weight.neg_()
    else:
        weight.view(-1)[-1] = float(kind)
    call.arguments["token_weight"] = weight
    call.changes.append(f"token_weight {kind}")


def _dress_extreme(call: Call) -> None:
    name, values = call.rng.choice(
        [
            ("temperature", (1e-9, 1e5, 1e-3, 1e4)),
            ("kd_weight", (1e-300, 1e18, 1e-20)),
            ("ce_weight", (1e-300, 1e18)),
            ("t", (1e-30, 1.0 - 2.0**-24)),
        ]
    )
    if (name == "t" and call.function == "linear_okd_loss") or (name == "ce_weight" and call.arguments.get("labels") is None):
        return
    call.arguments[name] = call.rng.choice(values)
    call.changes.append(f"{name} extreme")
