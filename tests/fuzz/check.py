"""Random calls of the public functions, well formed and then spoilt, and what has to come of each.

``draw(seed)`` makes a call. It is well formed; then it may be dressed in what must make no difference, or a known one (strides,
views, dtypes of labels, special values), and then spoilt: its ``bad`` says which arguments no longer mean anything. ``check``
runs it and holds it to two rules. What is bad is refused: by a ValueError or TypeError that is raised in the package and names one
of the arguments that are wrong. Anything else gives the right losses, metrics and gradients, within a bound on roundings; it warns
of nothing and changes no input. The right ones are those of oracle.py in float64. Where NaN or +inf come in, the row is NaN; -inf
bans.

``python -m tests.fuzz.check SEED`` repeats one case and prints it.
"""

from __future__ import annotations

import math
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native
from tests.losses import test_topk
from tests.support import oracle
from tests.support.oracle import Options

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
LEADS = ((5,), (5,), (4,), (2, 3), (1,), (), (0,), (2, 0))
VOCABULARIES = (1, 2, 5, 17, 37, 37, 300)
DIMS = (1, 3, 8)
# Integers for which torch itself has few operations.
BARELY = (torch.uint16, torch.uint32, torch.uint64)
PACKAGE = str(Path(kd.__file__).parent)
LINEAR = ("linear_kd_loss", "LinearKDLoss", "linear_okd_loss")
LOSSES = (*LINEAR, "linear_topk_kd_loss", "kd_loss")
# How many roundings the bounds on errors allow for each that they count.
ROUNDINGS = 8.0


@dataclass
class Call:
    """A public function and its arguments; heads are in them as LMHead.

    bad: sets of names, one for each thing that is wrong, of which an error may name any. mode: "grad", "no_grad" or "inference".
    variant: a backend, or an instruction set of the native one.
    """

    function: str
    arguments: dict[str, Any]
    rng: random.Random
    mode: str = "grad"
    variant: str = "reference"
    bad: list[frozenset[str]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def spoil(self, what: str, *names: str) -> None:
        self.bad.append(frozenset(names))
        self.changes.append(f"bad: {what}")

    def show(self) -> str:
        lines = [f"kd.{self.function} in mode {self.mode} on {self.variant}; {'; '.join(self.changes) or 'as drawn'}"]
        return "\n".join([*lines, *(f"  {name} = {_shown(value)}" for name, value in self.arguments.items())])


def _shown(value: Any) -> str:
    if isinstance(value, kd.LMHead):
        parts = (value.weight, value.bias, value.logit_scale, value.softcap)
        return f"LMHead({', '.join(_shown(part) for part in parts)})"
    if not isinstance(value, Tensor):
        return repr(value)
    kind = f"{type(value).__name__}{tuple(value.shape)} {value.dtype} {value.device} requires_grad={value.requires_grad}"
    if value.device.type == "meta" or value.layout != torch.strided:
        return kind
    values = value.detach().flatten().tolist() if value.numel() <= 12 else f"{value.numel()} values"
    return f"{kind} stride={value.stride()} {values}"


# What is drawn ------------------------------------------------------------------------------------------------------------------


def normal(rng: random.Random, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def integers(rng: random.Random, high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))


def variants() -> tuple[str, ...]:
    return (*native.instruction_sets(), "reference")


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    kind = rng.choices(("loss", "small"), (85, 15))[0]
    if kind == "small":
        return _draw_small(rng)
    call = _draw_loss(rng)
    for _ in range(rng.choices((0, 1, 2, 4), (25, 35, 25, 15))[0]):
        dress(call)
    for _ in range(rng.choices((0, 1, 2, 3), (50, 38, 8, 4))[0]):
        spoil(call)
    return call


def _draw_loss(rng: random.Random) -> Call:
    function = rng.choice(LOSSES)
    call = Call(function, {}, rng, rng.choices(("grad", "no_grad", "inference"), (80, 12, 8))[0], rng.choice(variants()))
    lead, vocab, dims = rng.choice(LEADS), rng.choice(VOCABULARIES), (rng.choice(DIMS), rng.choice(DIMS))
    spread = rng.choice((0.1, 1.0, 3.0, 10.0))
    arguments = call.arguments
    taught = function == "linear_okd_loss"
    # What shares products or logits with float64 is float64; other dtypes mix freely.
    dtypes = [rng.choice(DTYPES), rng.choice(DTYPES)]
    if rng.random() < 0.6:
        dtypes[1] = dtypes[0]
    if function == "kd_loss":
        for name, dtype in zip(("student_logits", "teacher_logits"), dtypes, strict=True):
            arguments[name] = normal(rng, *lead, vocab, scale=spread).to(dtype)
        if rng.random() < 0.1:
            arguments["teacher_logits"] = arguments["student_logits"].to(dtypes[1])
    else:
        for model, dtype, dim in zip(("student", "teacher"), dtypes, dims, strict=True):
            arguments[f"{model}_hidden"] = normal(rng, *lead, dim).to(dtype)
            bias = normal(rng, vocab).to(dtype) if rng.random() < 0.4 else None
            scale, softcap = rng.choice((1.0, 1.0, 0.5, 2)), rng.choice((None, None, 20.0, 5))
            weight = normal(rng, vocab, dim, scale=spread / dim**0.5).to(dtype)
            arguments[f"{model}_head"] = kd.LMHead(weight, bias, scale, softcap)
    if function == "linear_topk_kd_loss":
        del arguments["teacher_hidden"], arguments["teacher_head"]
        count = rng.randint(1, min(4, vocab))
        whole = torch.log_softmax(normal(rng, *lead, vocab, scale=spread), -1)
        of = whole.topk(count)
        arguments["topk_ids"], arguments["topk_logprobs"] = of.indices, of.values.to(rng.choice((torch.float32, torch.float64)))
        if rng.random() < 0.3:
            arguments["topk_rest"] = whole.scatter(-1, of.indices, -INF).logsumexp(-1)
        if count > 1 and rng.random() < 0.3:
            arguments["topk_logprobs"][..., 0] = -INF
            arguments["topk_ids"][..., 0] = rng.choice((-7, 10**9))
    wanted = ["student_logits"] if function == "kd_loss" else ["student_hidden", "student_weight", "student_bias"]
    wanted += ["teacher_hidden", "teacher_weight", "teacher_bias"] if taught else []
    if taught or rng.random() < 0.8:
        arguments["labels"] = integers(rng, vocab, lead)
        if arguments["labels"].numel() > 1:
            arguments["labels"].view(-1)[rng.randrange(arguments["labels"].numel())] = -100
    _draw_options(call, spread)
    for name in wanted:
        if rng.random() < 0.8:
            require_grad(call, name)
    return call


def _draw_options(call: Call, spread: float) -> None:
    rng, arguments = call.rng, call.arguments
    names = kd.divergences()
    own = {"jsd": kd.jsd(0.3), "skew_forward_kl": kd.skew_forward_kl(0.6), "skew_reverse_kl": kd.skew_reverse_kl(0.9)}
    name = rng.choice(names)
    choices: dict[str, Callable[[], Any]] = {
        "divergence": lambda: rng.choice((name, own.get(name, getattr(kd, name)()))),
        "t": lambda: rng.choice(
            (0.0, 0.3, np.float32(0.5), 0.8, 1, 1.0, torch.tensor(0.25), torch.tensor(0.5, dtype=torch.float16))
        ),
        "temperature": lambda: rng.choice((0.5, 2.0, 3, np.float64(1.5))),
        "square_temperature": lambda: rng.choice((True, False, np.bool_(True))),
        "kd_weight": lambda: rng.choice((0.0, 0.7, 2, np.int64(3))),
        "reduction": lambda: rng.choice(("mean", "sum", "none")),
        "return_metrics": lambda: rng.random() < 0.7,
        "token_weight": lambda: _token_weight(call),
        "normalizer": lambda: rng.choice((3, 2.5, torch.tensor(4), torch.tensor(7.0), torch.tensor(0.0))),
    }
    if arguments.get("labels") is not None:
        choices["ce_weight"] = lambda: rng.choice((0.5, 1, 0.0))
    if call.function == "linear_okd_loss":
        del choices["t"]
        choices["teacher_alpha"] = lambda: rng.choice((0.0, 0.3, 1, 1.0))
    if call.function == "linear_topk_kd_loss":
        choices["tail"] = lambda: rng.choice(("bucket",) if "topk_rest" in arguments else ("bucket", "renormalize"))
    if call.function != "kd_loss":
        choices["strategy"] = lambda: rng.choice(("auto", "tokens", "vocab"))
        choices["memory_budget"] = lambda: rng.choice((1, 100, np.int64(1000), 10**5, 2**40, 2**62, 2**63, 2**80))
        choices["vocab_size"] = lambda: rng.randint(1, arguments["student_head"].weight.shape[0])
    for option, value in choices.items():
        if rng.random() < 0.35:
            arguments[option] = value()
    if arguments.get("normalizer") is not None and arguments.get("reduction", "mean") != "mean":
        del arguments["normalizer"]
    if (size := arguments.get("vocab_size")) is not None:
        if "labels" in arguments:
            arguments["labels"].remainder_(size)  # -100 too becomes a token
        if "topk_ids" in arguments:
            used = arguments["topk_logprobs"] != -INF
            arguments["topk_logprobs"] = arguments["topk_logprobs"].masked_fill(used & (arguments["topk_ids"] >= size), -INF)


def lead_of(call: Call) -> tuple[int, ...]:
    first = next(iter(call.arguments.values()))
    return tuple(first.shape[:-1])


def _token_weight(call: Call) -> Tensor:
    weight = normal(call.rng, *lead_of(call)).abs() + 0.1
    if weight.numel() > 2:
        weight.view(-1)[0] = 0.0
    return weight.to(call.rng.choice((torch.float32, torch.float64, torch.bfloat16)))


def get(call: Call, name: str) -> Any:
    """An argument, or as student_weight the part of a head."""
    model, _, part = name.partition("_")
    if part in ("weight", "bias", "logit_scale", "softcap") and isinstance(call.arguments.get(f"{model}_head"), kd.LMHead):
        return getattr(call.arguments[f"{model}_head"], part)
    return call.arguments.get(name)


def put(call: Call, name: str, value: Any) -> None:
    model, _, part = name.partition("_")
    head = call.arguments.get(f"{model}_head")
    if part in ("weight", "bias", "logit_scale", "softcap") and head is not None:
        call.arguments[f"{model}_head"] = kd.LMHead(**{**vars(head), part: value})
    else:
        call.arguments[name] = value


def require_grad(call: Call, name: str) -> None:
    if (value := get(call, name)) is not None:
        put(call, name, value.detach().requires_grad_())


def tensors(call: Call) -> list[str]:
    """Names of all tensor arguments, and of the parts of heads."""
    names = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    parts = [f"{model}_{part}" for model in ("student", "teacher") for part in ("weight", "bias")]
    return names + [part for part in parts if isinstance(get(call, part), Tensor)]


# What must make no difference, or a known one -------------------------------------------------------------------------------------


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


def vocab_of(call: Call) -> int:
    if call.function == "kd_loss":
        return int(call.arguments["student_logits"].shape[-1])
    return int(call.arguments.get("vocab_size") or call.arguments["student_head"].weight.shape[0])


# What must be refused -------------------------------------------------------------------------------------------------------------

NUMBERS = (NAN, "1", None, [1.0], 1j, True, np.float32(NAN), np.bool_(True), torch.tensor(1.0), torch.ones(2))
POSITIVE = (*NUMBERS, 0, -1, -INF, INF, 1e-300, 1e300, 10**400, -0.0)
AT_LEAST_0 = (*NUMBERS, -1, -1e-300, INF, 1e300, 10**400)
INSIDE = (*(value for value in NUMBERS if not isinstance(value, Tensor)), -0.1, 1.1, 2**70, INF, torch.ones(2), torch.tensor(1))
FLAGS = (1, 0, "yes", None, torch.tensor(True), np.int64(1), [])
NAMES = (None, 3, "no such", "", b"mean", ["mean"], torch.tensor(1))
COUNTS = (0, -1, 1.0, "8", True, np.float64(3), torch.tensor(8), [8], 1j)
WRONG: dict[str, tuple[Any, ...]] = {
    "temperature": POSITIVE,
    "kd_weight": AT_LEAST_0,
    "ce_weight": AT_LEAST_0,
    "t": (*INSIDE, torch.tensor(True), torch.tensor(0.5j), torch.ones((), device="meta")),
    "teacher_alpha": (*INSIDE, torch.tensor(0.5)),
    "square_temperature": FLAGS,
    "return_metrics": FLAGS,
    "reduction": NAMES,
    "strategy": NAMES,
    "tail": NAMES[1:],
    "divergence": (*NAMES, kd.jsd, 0.5, kd.Divergence("kl", max), kd.Divergence("jsd", max, NAN)),
    "ignore_index": (1.0, None, "0", True, 2**63, -(2**63) - 1, 10**30, torch.tensor(1), np.float64(1)),
    "memory_budget": COUNTS,
    "vocab_size": (*COUNTS, 2**63, 10**30, 301),
    "normalizer": (*(value for value in POSITIVE if value is not None and not (isinstance(value, Tensor) and value.dim() == 0)),
                   torch.tensor(1j), torch.tensor(True), torch.ones((), device="meta")),
}  # fmt: skip
FOREIGN_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)


def spoil(call: Call) -> None:
    untouched = [name for name in (*call.arguments, *WRONG) if not any(name in names for names in call.bad)]
    kinds: list[tuple[Callable[[Call, str], None], str]] = []
    for name in dict.fromkeys(untouched):
        value = call.arguments.get(name)
        if name in WRONG and takes(call.function, name):
            kinds.append((_spoil_option, name))
        elif isinstance(value, (Tensor, kd.LMHead)) and name != "t":
            kinds += [(_spoil_tensor, name)] * 2
    if kinds:
        spoiler, name = call.rng.choice(kinds)
        spoiler(call, name)


def takes(function: str, name: str) -> bool:
    of = kd.linear_kd_loss if function == "LinearKDLoss" else getattr(kd, function)
    return name in (of.__kwdefaults__ or {})


def _spoil_option(call: Call, name: str) -> None:
    value = call.rng.choice(WRONG[name])
    names = {name}
    if name == "ce_weight" and call.arguments.get("labels") is None:
        names.add("labels")
    if name == "normalizer" and call.arguments.get("reduction", "mean") != "mean":
        names.add("reduction")
    if name == "vocab_size" and value is None:
        return
    if name == "memory_budget" and value is None:
        return
    if name == "reduction" and call.arguments.get("normalizer") is not None:
        names.add("normalizer")
    call.arguments[name] = value
    call.spoil(f"{name}={value!r}", *names)


def _spoil_tensor(call: Call, name: str) -> None:
    rng, value = call.rng, call.arguments[name]
    part, label = name, name
    if isinstance(value, kd.LMHead):
        part = name.replace("head", rng.choice(("weight", "weight", "bias", "logit_scale", "softcap", "head")))
        label = f"{name}.{part.split('_', 1)[1]}" if part != name else name
        if part == name:
            call.arguments[name] = rng.choice((None, "lm_head", 3, [[1.0]], torch.nn.Linear(2, 2), np.ones((2, 2))))
            return call.spoil(f"{name} is not a head", name)
        if part.endswith(("scale", "softcap")):
            choices = [one for one in POSITIVE if one is not None or part.endswith("scale")]
            put(call, part, rng.choice(choices))
            return call.spoil(f"{label}={get(call, part)!r}", label)
        value = get(call, part)
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return None
    everything = frozenset(call.arguments) | {"vocab_size"}
    kind = rng.choice(("type", "dtype", "device", "shape", "layout", "own", "own"))
    value = value.detach()
    if kind == "type":
        optional = name in ("labels", "token_weight", "normalizer") or part.endswith("bias")
        made: Any = rng.choice((1.5, "x", [1.0], np.ones(3), *(() if optional else (None,))))
        put(call, part, made)
        return call.spoil(f"{label} is {type(made).__name__}", label)
    if kind == "dtype":
        of = (torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn) if name in ("labels", "topk_ids") else FOREIGN_DTYPES
        dtype = rng.choice(of)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            put(call, part, torch.zeros(value.shape, dtype=dtype) if value.is_inference() else value.to(torch.float32).to(dtype))
        return call.spoil(f"{label} is {dtype}", label)
    if kind == "device":
        put(call, part, value.to("meta"))
        first = next(iter(call.arguments))
        return call.spoil(f"{label} on meta", *(everything if name == first else (label,)))
    if kind == "layout":
        if value.dim() == 0 or value.is_inference() or value.dtype in BARELY:
            return None
        put(call, part, value.to_sparse())
        return call.spoil(f"{label} is sparse", label)
    if kind == "shape":
        made = rng.choice(
            (lambda: value[None], lambda: value[..., None], lambda: value.new_zeros(value.shape[1:]), lambda: value[..., :-1],
             lambda: torch.cat([value, value]), lambda: value.new_zeros((0,)), lambda: value.new_zeros(()))
        )  # fmt: skip
        if value.dim() == 0:
            return None
        wrong = made()
        if wrong.shape == value.shape or (part.endswith("weight") and wrong.numel() > value.numel()):
            return None
        head_too = name == "student_head" or name == "teacher_head"
        put(call, part, wrong)
        return call.spoil(f"{label} of shape {tuple(wrong.shape)}", *everything, *([label] if head_too else []))
    return _spoil_in_its_own_way(call, name, value)


def _spoil_in_its_own_way(call: Call, name: str, value: Tensor) -> None:
    rng = call.rng
    if name == "labels" and value.numel() and value.dtype == torch.int64 and not value.is_inference():
        ignore = call.arguments.get("ignore_index", -100)
        vocab = 300 if call.bad else vocab_of(call)
        wrong = rng.choice([one for one in (vocab, vocab + 1000, 2**62, -1, -(2**62)) if one != ignore])
        made = value.clone(memory_format=torch.contiguous_format)
        made.view(-1)[rng.randrange(made.numel())] = wrong
        call.arguments[name] = made
        call.spoil(f"labels holds {wrong}", "labels")
    elif name == "token_weight":
        if value.is_inference():
            return
        call.arguments[name] = value.clone().requires_grad_()
        call.spoil("token_weight requires grad", name)
    elif name in ("teacher_hidden", "teacher_logits", "topk_logprobs") and call.mode == "grad":
        if call.function == "linear_okd_loss" or value.is_inference():
            return
        call.arguments[name] = value.clone().requires_grad_()
        call.spoil(f"{name} requires grad", name)


# What has to come -----------------------------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One model's counted rows in float64: leaves, logits before and after the head, and what they may be off by, [rows]."""

    leaves: dict[str, Tensor]
    raw: Tensor
    logits: Tensor
    off: Tensor
    scale: float
    eps: float
    tiny: float
    largest: float
    tainted: bool


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(0.0, 0.0, 0.0).abs()


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def _plain(value: Tensor) -> Tensor:
    return value.detach().clone().double()


def side_of(call: Call, model: str, keep: Tensor) -> Side:
    if call.function == "kd_loss":
        value = call.arguments[f"{model}_logits"]
        logits = _plain(value).reshape(-1, value.shape[-1])[keep].requires_grad_()
        least = max(_eps(value.dtype) if value.dtype == torch.float64 else _eps(torch.float32), 0.0)
        off = least * _finite(logits.detach()).amax(1)
        info = torch.finfo(value.dtype)
        return Side({f"{model}_logits": logits}, logits, logits, off, 1.0, _eps(value.dtype), info.tiny, info.max, False)
    hidden, head = call.arguments[f"{model}_hidden"], call.arguments[f"{model}_head"]
    vocab = vocab_of(call)
    leaves = {
        f"{model}_hidden": _plain(hidden).reshape(-1, hidden.shape[-1])[keep].requires_grad_(),
        f"{model}_weight": _plain(head.weight)[:vocab].requires_grad_(),
    }
    rows, weight = leaves[f"{model}_hidden"], leaves[f"{model}_weight"]
    raw = rows @ weight.T
    size = _finite(rows.detach()) @ _finite(weight.detach()).T
    if head.bias is not None:
        bias = leaves[f"{model}_bias"] = _plain(head.bias)[:vocab].requires_grad_()
        raw = raw + bias
        size = size + _finite(bias.detach())
    logits = raw * float(head.logit_scale)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    info = torch.finfo(hidden.dtype)
    off = info.eps * size.amax(1) * head.logit_scale
    tainted = not bool(rows.isfinite().all() and weight.isfinite().all())
    return Side(leaves, raw, logits, off, float(head.logit_scale), info.eps, info.tiny, info.max, tainted)


@dataclass
class Learned:
    """A learner's loss of each counted row, what it and the gradient of a logit may be off by, and which rows must be NaN."""

    losses: Tensor
    off: Tensor
    gradient_off: Tensor
    spoilt: Tensor


def learn(
    own: Side, other: Side | None, divergence: Callable[[], Tensor], outcomes: Callable[[], list[tuple[Tensor, Tensor]]],
    given: Tensor, labels: Tensor | None, options: Options, kd_scale: float, ce_scale: float, always: bool = True,
) -> Learned:  # fmt: skip
    """outcomes: log-probabilities of target and student, row by row. given: the other model's logits, or what is known of them.
    always: whether a row of which nothing is known is looked at all the same."""
    x, temperature = own.logits, options.temperature
    rounding = 2.3e-16 if max(own.eps, other.eps if other else 0.0) < 1e-15 else 1.2e-7
    off_logits = own.off + (other.off if other else 0.0)
    reach = (_finite(x.detach()).amax(1) + _finite(given).amax(1)) / temperature
    steep = 1.0 + 2.0 * reach + math.log(x.shape[1])
    error = ROUNDINGS * (off_logits / temperature + rounding * steep)
    ce_error = ROUNDINGS * (off_logits + rounding * (1.0 + steep * temperature))
    nothing = torch.zeros(len(x), dtype=torch.float64)
    kd = divergence() if kd_scale != 0.0 else nothing
    ce = oracle.cross_entropy(x, labels) if labels is not None and ce_scale != 0.0 else nothing
    # NaN and +inf of either model; a term of factor 0 looks at nothing, and a row without a slot has nothing to look at.
    looks = (given != -INF).any(1) | always
    bad = ~(x.detach() < INF).all(1)
    spoilt = bad if ce_scale != 0.0 else torch.zeros_like(bad)
    if kd_scale != 0.0:
        spoilt = spoilt | (looks & (bad | ~(given < INF).all(1))) | kd.detach().isnan()
    gradient_off = kd_scale / temperature * error * steep + ce_scale * ce_error
    if options.divergence == "total_variation" and kd_scale != 0.0:
        # Where both probabilities are one within the error, the sign may be either.
        tied = [
            (q * ((q - p).abs() <= 4.0 * e * torch.maximum(q, p))).sum() for (p, q), e in zip(_exp(outcomes()), error, strict=True)
        ]
        gradient_off = gradient_off + kd_scale / temperature * 2.0 * torch.stack([*tied, x.sum() * 0])[:-1].detach().nan_to_num(2.0)
    return Learned(kd_scale * kd + ce_scale * ce, kd_scale * error * steep + ce_scale * ce_error, gradient_off, spoilt)


def _usual(log_probs: Tensor) -> bool:
    return bool(not log_probs.isnan().any() and (log_probs != -INF).any())


def _exp(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(lp.exp(), lq.exp()) for lp, lq in pairs]


def _outcomes(x: Tensor, z: Tensor, options: Options) -> list[tuple[Tensor, Tensor]]:
    y = oracle.target_logits(x, z, options.t)
    return [tuple(torch.log_softmax(row / options.temperature, -1) for row in pair) for pair in zip(y, x.detach(), strict=True)]  # type: ignore[misc]


@dataclass
class Expected:
    """losses: by learner, as returned. off: by learner. grads: by leaf, with what they may be off by (a tensor that broadcasts),
    and the rows or entries where nothing can be said. metrics with what they may be off by."""

    losses: list[Tensor] = field(default_factory=list)
    off: list[Tensor] = field(default_factory=list)
    grads: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    unsaid: bool = False


def options_of(call: Call) -> Options:
    given = call.arguments
    divergence = given.get("divergence", "forward_kl")
    name, parameter = (divergence, None) if isinstance(divergence, str) else (divergence.name, divergence.a)
    return Options(
        divergence=name,
        parameter=parameter if name in oracle.DEFAULTS else None,
        t=float(given.get("t", 1.0)),
        temperature=float(given.get("temperature", 1.0)),
        square_temperature=given.get("square_temperature", True),
        kd_weight=float(given.get("kd_weight", 1.0)),
        ce_weight=float(given.get("ce_weight", 0.0)),
        ignore_index=given.get("ignore_index", -100),
    )


def expect(call: Call, upstream: list[Tensor]) -> Expected:
    given, options, lead = call.arguments, options_of(call), lead_of(call)
    labels, weight = given.get("labels"), given.get("token_weight")
    flat = None if labels is None else labels.detach().clone().to(torch.int64).reshape(-1)
    weights = torch.ones(math.prod(lead), dtype=torch.float64) if weight is None else _plain(weight).reshape(-1)
    keep = weights != 0
    counted = torch.ones_like(keep) if flat is None else flat != options.ignore_index
    keep &= counted
    kept_labels = None if flat is None else flat[keep]
    square = options.temperature**2 if options.square_temperature else 1.0
    x = side_of(call, "student", keep)
    sides = [x]
    learned: list[Learned] = []
    known = call.function == "linear_topk_kd_loss"
    if known:
        ids, log_probs = (
            given[name].detach().clone().reshape(-1, given[name].shape[-1])[keep] for name in ("topk_ids", "topk_logprobs")
        )
        log_probs = log_probs.double()
        rest = given.get("topk_rest")
        proper = "bucket" if rest is not None or "reverse" in options.divergence else "renormalize"
        tail = given.get("tail", proper)
        rests = [None] * len(log_probs) if rest is None else list(rest.detach().reshape(-1)[keep].double())
        rows, nothing = list(zip(x.logits, ids.to(torch.int64), log_probs, strict=True)), x.logits.new_full((1,), -INF)

        def of_outcomes() -> Tensor:
            values = [
                test_topk.divergence(*row, tail, options, left)
                if _usual(row[2])
                else torch.where(row[2].isnan().any(), NAN, 0.0)  # without a slot it is 0
                for row, left in zip(rows, rests, strict=True)
            ]
            return torch.stack([*values, x.logits.sum() * 0])[:-1]

        learned.append(
            learn(
                x, None, of_outcomes,
                lambda: [
                    test_topk.of_one_row(*row, tail, options, left) if _usual(row[2]) else (nothing, nothing)
                    for row, left in zip(rows, rests, strict=True)
                ],
                log_probs, kept_labels, options, options.kd_weight * square, options.ce_weight, always=tail == "bucket",
            )
        )  # fmt: skip
    else:
        z = side_of(call, "teacher", keep)
        sides.append(z)
        constant = z.logits.detach()
        learned.append(
            learn(
                x, z, lambda: oracle.divergence(x.logits, oracle.target_logits(x.logits, constant, options.t), options),
                lambda: _outcomes(x.logits, constant, options),
                constant, kept_labels, options, options.kd_weight * square, options.ce_weight,
            )
        )  # fmt: skip
        if call.function == "linear_okd_loss":
            alpha = float(given.get("teacher_alpha", 0.5))
            swapped = Options(temperature=options.temperature)
            learned.append(
                learn(
                    z, x, lambda: oracle.divergence(z.logits, x.logits.detach(), swapped), lambda: [],
                    x.logits.detach(), kept_labels, swapped, alpha * square, 1.0 - alpha,
                )
            )  # fmt: skip
    return _reduced(call, sides, learned, weights, keep, counted, upstream, known)


def _factor(call: Call, weights: Tensor, counted: Tensor) -> float:
    reduction, normalizer = call.arguments.get("reduction", "mean"), call.arguments.get("normalizer")
    if reduction != "mean":
        return 1.0
    total = float(weights[counted].sum()) if normalizer is None else float(normalizer)
    return 0.0 if total == 0.0 else 1.0 / total


def _reduced(
    call: Call, sides: list[Side], learned: list[Learned], weights: Tensor, keep: Tensor, counted: Tensor, upstream: list[Tensor],
    known: bool,
) -> Expected:  # fmt: skip
    found = Expected(tokens=int(keep.sum()))
    none = call.arguments.get("reduction", "mean") == "none"
    factor = _factor(call, weights, counted)
    kept = weights[keep]
    for side, learner, up in zip(sides, learned, upstream, strict=False):
        if factor == 0.0 and (learner.spoilt.any() or not (learner.losses * kept).isfinite().all()):
            found.unsaid = True  # 0 or NaN: nobody divides by 0 or infinity and wants to know
        rows = torch.where(learner.spoilt, NAN, learner.losses.detach()) * kept
        off = learner.off * kept.abs()
        # The largest number on the way must be one that the dtypes hold.
        most = (learner.off / 1e-7).nan_to_num(0.0).amax() if len(rows) else rows.sum()
        found.unsaid |= bool(most > min(3e38, sides[0].largest * 1e-3 if sides[0].eps > 1e-4 else 3e38))
        if none:
            each = torch.zeros(len(keep), dtype=torch.float64)
            found.losses.append(each.index_put((keep,), rows).reshape(lead_of(call)))
            found.off.append(each.index_put((keep,), off).reshape(lead_of(call)))
            pull = up.double().reshape(-1)[keep]
        else:
            found.losses.append(rows.sum() * factor)
            found.off.append(off.sum() * abs(factor))
            pull = up.double().expand(len(rows)) * factor
        if math.isfinite(factor):
            _gradients(call, found, side, learner, kept * pull, keep)
    # Where the sum is divided by 0 or by infinity no row counts, and none is looked at.
    if call.arguments.get("return_metrics") and not known and factor != 0.0:
        _metrics(call, found, sides, learned[0], keep)
    return found


def _gradients(call: Call, found: Expected, side: Side, learner: Learned, pull: Tensor, keep: Tensor) -> None:
    usable = ~learner.spoilt
    total = (torch.where(usable, learner.losses, 0.0) * torch.where(usable, pull, 0.0)).sum()
    if not total.requires_grad:
        total = total + sum(leaf.sum() * 0 for leaf in side.leaves.values())
    names = [name for name in side.leaves if get(call, name).requires_grad]
    if not names or call.mode != "grad":
        return
    grads = torch.autograd.grad(total, [side.raw, *(side.leaves[name] for name in names)], allow_unused=True)
    dx = torch.zeros_like(side.raw) if grads[0] is None else grads[0]
    # Per row: of an entry of dx before it is multiplied.
    fixed = side.tiny + (6e-8 if side.eps > 9e-4 and side.eps < 2e-3 else 0.0)
    size = dx.abs().nan_to_num(0.0, 0.0, 0.0).amax(1) if dx.shape[0] else dx.sum(1)
    off = (learner.gradient_off * side.scale * pull.abs() + ROUNDINGS * side.eps * size + fixed * (1 + pull.abs())).nan_to_num(0.0)
    spoilt = learner.spoilt | ~pull.isfinite()
    for name, grad in zip(names, grads[1:], strict=True):
        leaf = side.leaves[name]
        grad = torch.zeros_like(leaf) if grad is None else grad
        rounding = ROUNDINGS * side.eps * grad.abs().nan_to_num(0.0, 0.0, 0.0) + fixed
        if name.endswith("logits"):
            bound, unsaid = off[:, None] + rounding, spoilt[:, None].expand_as(grad)
        elif name.endswith("hidden"):
            weights = _finite(side.leaves[name.replace("hidden", "weight")].detach()).sum(0)
            bound, unsaid = off[:, None] * weights + rounding, spoilt[:, None].expand_as(grad)
        else:
            by = (
                _finite(side.leaves[name.replace("weight", "hidden")].detach())
                if name.endswith("weight")
                else torch.ones(len(off), 1)
            )
            bound = (off[:, None] * by).sum(0)
            bound = (bound if name.endswith("weight") else bound.sum()) + rounding
            unsaid = torch.full(grad.shape, bool(spoilt.any()))
        if side.tainted and not spoilt.any():
            continue
        if side.tainted:
            unsaid = torch.ones_like(unsaid)
        whole = get(call, name).shape
        if name.endswith(("logits", "hidden")):
            grad, bound, unsaid = (
                torch.zeros(len(keep), grad.shape[1], dtype=part.dtype).index_put((keep,), part.expand_as(grad)).reshape(whole)
                for part in (grad, bound, unsaid)
            )
        else:
            rest = (whole[0] - len(grad), *grad.shape[1:])
            grad, bound, unsaid = (
                torch.cat([part.expand_as(grad), torch.zeros(rest, dtype=part.dtype)]) for part in (grad, bound, unsaid)
            )
        found.grads[name] = (grad, bound, unsaid)


def _metrics(call: Call, found: Expected, sides: list[Side], learner: Learned, keep: Tensor) -> None:
    if any(not (side.logits < INF).all() for side in sides) or any((side.logits == -INF).all(1).any() for side in sides):
        return
    labels = call.arguments.get("labels")
    kept_labels = None if labels is None else labels.detach().clone().to(torch.int64).reshape(-1)[keep]
    options = options_of(call)
    right = oracle.metrics(
        sides[0].logits.detach(),
        sides[1].logits.detach(),
        kept_labels,
        None,
        Options(**{**vars(options), "ignore_index": -(2**63)}),
    )
    x, z = (side.logits.detach() for side in sides[:2])
    reach = 1.0 + 2.0 * (_finite(x).amax() + _finite(z).amax() if x.numel() else 0.0) / options.temperature + math.log(x.shape[1])
    eps = max(side.eps for side in sides)
    least = 2.3e-16 if eps < 1e-15 else 1.2e-7
    logits_off = sum((side.off.amax() if len(side.off) else torch.zeros(())) for side in sides)
    off = ROUNDINGS * reach**2 * (logits_off / options.temperature + least)
    for name in ("kd", "target_entropy", "student_entropy", "overlap", "ce"):
        if name in right:
            more = logits_off * ROUNDINGS + ROUNDINGS * least * reach * options.temperature if name == "ce" else 0.0
            found.metrics[name] = (float(right[name]), float(off + more))


# Running --------------------------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """What a case shows to be wrong."""


def _bits(value: Tensor) -> Tensor:
    return value.detach().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def inputs(call: Call) -> dict[str, Tensor]:
    found = {name: get(call, name) for name in tensors(call)}
    return {
        name: value
        for name, value in found.items()
        if value.device.type == "cpu" and value.layout == torch.strided and value.numel() and not value.is_complex()
    }


def run(call: Call) -> tuple[Any, list[Tensor]]:
    """What the function returns, and upstream gradients for its losses."""
    arguments = dict(call.arguments)
    if call.function == "LinearKDLoss":
        options = {name: arguments.pop(name) for name in list(arguments) if takes("linear_kd_loss", name)}
        made = kd.LinearKDLoss(**options)(**arguments)
    else:
        made = getattr(kd, call.function)(**arguments)
    values = list(made) if isinstance(made, tuple) else [made]
    losses = [value for value in values if isinstance(value, Tensor)]
    return values, [normal(call.rng, *loss.shape).to(loss.dtype) for loss in losses]


def check(call: Call) -> str:
    """Raises Wrong; returns "refused" or "right"."""
    if call.function not in LOSSES:
        return _check_small(call)
    before = {name: _bits(value).clone() for name, value in inputs(call).items()}
    with ExitStack() as stack:
        if call.mode == "no_grad":
            stack.enter_context(torch.no_grad())
        if call.mode == "inference":
            stack.enter_context(torch.inference_mode())
        if call.variant == "reference":
            stack.enter_context(backends.use("reference"))
        else:
            stack.enter_context(native.instruction_set(call.variant))
        try:
            values, upstream = run(call)
        except Exception as error:
            _refused(call, error)
            _unchanged(call, before)
            return "refused"
        if call.bad:
            raise Wrong("it was accepted")
        losses = [value for value in values if isinstance(value, Tensor)]
        leaves = [name for name in (*call.arguments, *_parts()) if _asks(call, name)] if call.mode == "grad" else []
        leaves = [name for name in leaves if name in _learners(call)]
        grads: tuple[Any, ...] = ()
        if leaves:
            total = sum(((loss * up).sum() for loss, up in zip(losses, upstream, strict=True)), torch.zeros(()))
            grads = torch.autograd.grad(total, [get(call, name) for name in leaves], allow_unused=True)
    with torch.enable_grad():
        expected = expect(call, upstream)
    _unchanged(call, before)
    _compare(call, expected, values, dict(zip(leaves, grads, strict=True)))
    return "right"


def _parts() -> tuple[str, ...]:
    return tuple(f"{model}_{part}" for model in ("student", "teacher") for part in ("weight", "bias"))


def _asks(call: Call, name: str) -> bool:
    value = get(call, name)
    return isinstance(value, Tensor) and value.requires_grad


def _learners(call: Call) -> tuple[str, ...]:
    student = ("student_logits", "student_hidden", "student_weight", "student_bias")
    return (*student, "teacher_hidden", "teacher_weight", "teacher_bias") if call.function == "linear_okd_loss" else student


def _refused(call: Call, error: Exception) -> None:
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if not call.bad:
        raise Wrong(f"it is well formed, but was refused: {type(error).__name__}: {error}") from error
    if type(error) not in (ValueError, TypeError):
        raise Wrong(f"refused by {type(error).__name__}, not by a ValueError or TypeError: {error}") from error
    if not where.startswith(PACKAGE):
        raise Wrong(f"refused in {where}, not by a check of the package: {error}") from error
    names = frozenset().union(*call.bad)
    if not any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", str(error)) for name in names):
        raise Wrong(f"the error names none of {', '.join(sorted(names))}: {error}") from error


def _unchanged(call: Call, before: dict[str, Tensor]) -> None:
    for name, value in inputs(call).items():
        if name in before and not torch.equal(_bits(value), before[name]):
            raise Wrong(f"{name} was modified")


def _differs(found: Tensor, right: Tensor, off: Tensor) -> Tensor:
    """Where a value is not the right one; what is not finite has to be the same."""
    same = (found == right) | (found.isnan() & right.isnan())
    return ~(same | ((found - right).abs() <= off.expand_as(right)))


def _compare(call: Call, expected: Expected, values: list[Any], grads: dict[str, Any]) -> None:
    metrics = values.pop() if isinstance(values[-1], dict) else {}
    if bool(metrics) != bool(call.arguments.get("return_metrics", False)):
        raise Wrong(f"metrics: {metrics}")
    for loss, right, off in zip(values, expected.losses, expected.off, strict=True):
        if loss.shape != right.shape:
            raise Wrong(f"loss of shape {tuple(loss.shape)}, not {tuple(right.shape)}")
        rounding = ROUNDINGS * _eps(loss.dtype) * right.abs().nan_to_num(0.0, 0.0, 0.0) + torch.finfo(loss.dtype).tiny
        wrong = _differs(loss.detach().double(), right, off.nan_to_num(0.0) + rounding)
        if wrong.any() and not expected.unsaid:
            raise Wrong(f"losses {loss.detach()[wrong].tolist()}, not {right[wrong].tolist()} within {off[wrong].tolist()}")
    for name, grad in grads.items():
        if name not in expected.grads:
            continue
        right, off, unsaid = expected.grads[name]
        if grad is None or grad.shape != right.shape or grad.dtype != get(call, name).dtype:
            raise Wrong(f"gradient of {name} is {_shown(grad)}; it has shape {tuple(right.shape)}")
        if expected.unsaid:
            continue
        wrong = _differs(grad.double(), right, off.nan_to_num(0.0)) & ~unsaid
        if wrong.any():
            some = [part.expand_as(right)[wrong][:5].tolist() for part in (grad, right, off)]
            raise Wrong(f"gradient of {name} is {some[0]}, not {some[1]} within {some[2]}")
        if unsaid.any() and not name.endswith("bias") and grad[unsaid].isfinite().all() and grad[unsaid].any():
            raise Wrong(f"gradient of {name} hides what is not a number")
    if metrics:
        if int(metrics["tokens"]) != expected.tokens:
            raise Wrong(f"tokens is {metrics['tokens']}, not {expected.tokens}")
        for name, (right_value, off_value) in expected.metrics.items():
            if not abs(float(metrics[name]) - right_value) <= off_value + 1e-6 and float(metrics[name]) != right_value:
                raise Wrong(f"metric {name} is {float(metrics[name])}, not {right_value} within {off_value}")


# Functions that take no hidden states ---------------------------------------------------------------------------------------------

# Values that are right, and values that are wrong, of each argument.
SIZES = ((1, 3, 1000, 2**40), COUNTS)
SHARE = ((0.1, 0.5, 1e-300, np.float64(0.3)), (*INSIDE[:-2], 0, 1, 0.0, 1.0, NAN))
SMALL: dict[str, dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "plan": {
        "tokens": SIZES,
        "vocab": SIZES,
        "student_dim": SIZES,
        "teacher_dim": SIZES,
        "dtype": (DTYPES, ("float32", None, 3, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, np.float32)),
        "teacher_dtype": ((*DTYPES, None), ("float32", 3, torch.int64, torch.complex64)),
        "device": (("cpu", torch.device("cpu"), "H100", "a100-80"), ("nowhere", "", None, 1.5, b"cpu", ["cpu"], "cpu:x", True)),
        "memory_budget": ((None, 1, 2**20, 2**63, 2**80), COUNTS),
        "train_head": ((True, False), FLAGS),
        "online_teacher": ((True,), FLAGS),
        "strategy": (("auto", "tokens", "vocab"), NAMES),
        "divergence": ((*kd.divergences(), kd.jsd(0.2)), (*NAMES, kd.jsd)),
    },
    "backend": {
        "device": (("cpu", torch.device("cpu"), "cuda", "meta"), ("nowhere", "", None, 1.5, b"cpu", ["cpu"], "cpu:x", True)),
        "dtype": (DTYPES, ("float32", None, 3, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)),
    },
    "jsd": {"beta": SHARE},
    "skew_forward_kl": {"alpha": SHARE},
    "skew_reverse_kl": {"alpha": SHARE},
    "TAIDSchedule": {
        "t_start": ((0.0, 0.2, 0), INSIDE),
        "t_end": ((1.0, 0.9, 1), INSIDE),
        "alpha": ((0.0, 0.1, 5e-4), (*NUMBERS, -1.0, INF)),
        "beta": ((0.0, 0.5, 0.99), (*INSIDE, 1.0)),
        "adaptive": ((True, False), FLAGS),
        "loss": (
            (1.0, 2, torch.tensor(0.5), torch.tensor(3.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.bfloat16), NAN, INF),
            ("1", None, [1.0], True, 1j, torch.ones(2), torch.ones(1), torch.tensor(1j), torch.tensor(True),
             torch.ones((), device="meta"), np.ones(2), 10**400),
        ),
        "progress": ((0.0, 0.5, 1, np.float32(0.75)), INSIDE),
    },
}  # fmt: skip
REQUIRED = {"plan": ("tokens", "vocab", "student_dim", "teacher_dim"), "TAIDSchedule": ("loss", "progress")}


def _draw_small(rng: random.Random) -> Call:
    call = Call(rng.choice(tuple(SMALL)), {}, rng)
    of = SMALL[call.function]
    wrong = rng.sample(tuple(of), min(len(of), rng.choice((0, 1, 1, 2))))
    for name, (good, bad) in of.items():
        if name in wrong:
            call.arguments[name] = rng.choice(bad)
            call.spoil(f"{name}={call.arguments[name]!r}", name)
        elif name in REQUIRED.get(call.function, ()) or rng.random() < 0.5:
            call.arguments[name] = rng.choice(good)
    return call


def _check_small(call: Call) -> str:
    try:
        function = _schedule if call.function == "TAIDSchedule" else getattr(kd, call.function)
        found = function(**call.arguments)
    except Exception as error:
        _refused(call, error)
        return "refused"
    if call.bad:
        raise Wrong(f"it was accepted: {found}")
    {"plan": _check_plan, "backend": _check_backend, "TAIDSchedule": lambda *_: None}.get(call.function, _check_divergence)(
        call, found
    )
    return "right"


def _schedule(loss: Any, progress: Any, **own: Any) -> list[float]:
    """t of a schedule over a few updates, checked against the recurrence in float64."""
    schedule, first = kd.TAIDSchedule(**own), loss
    start, end, alpha, beta, adaptive = (
        own.get(name, default)
        for name, default in {"t_start": 0.4, "t_end": 1.0, "alpha": 5e-4, "beta": 0.99, "adaptive": True}.items()
    )
    t, momentum, previous = float(start), 0.0, NAN
    found = []
    for loss in (2.0, first, first, 1.5):
        found.append(float(schedule.update(loss, progress)))
        current, line = float(loss), start + (end - start) * progress
        if not adaptive:
            t = line
        elif math.isfinite(current):
            if not math.isnan(previous):
                change = (previous - current) / (previous + 1e-15)
                momentum = beta * momentum + (1 - beta) * change
                t = min(end, max(line, t + alpha / (1 + math.exp(-momentum)) * (1 - t)))
            previous = current
        if not math.isclose(found[-1], t, rel_tol=1e-5, abs_tol=1e-6):
            raise Wrong(f"t is {found[-1]} after loss {loss}, not {t}")
    return found


def _check_plan(call: Call, plan: kd.Plan) -> None:
    tokens, vocab, student, teacher = (call.arguments[name] for name in REQUIRED["plan"])
    cuts = (plan.chunks - 1) * plan.chunk_rows < tokens <= plan.chunks * plan.chunk_rows
    cuts &= (plan.blocks - 1) * plan.block_columns < vocab <= plan.blocks * plan.block_columns
    if not cuts or min(plan.chunk_rows, plan.block_columns) < 1:
        raise Wrong(f"the cuts do not make up {tokens} x {vocab}: {plan}")
    if not 0 < plan.logits_bytes <= plan.scratch_bytes <= plan.peak_bytes:
        raise Wrong(f"bytes are not part of each other: {plan}")
    least = 2 * tokens * vocab * (2 * student + teacher)
    if plan.flops < least or plan.eager_flops < least:
        raise Wrong(f"fewer operations than the products take, {least}: {plan}")


def _check_backend(call: Call, name: str) -> None:
    if name not in backends.NAMES or (call.arguments.get("dtype") == torch.float64 and name != "reference"):
        raise Wrong(f"backend is {name}")


def _check_divergence(call: Call, made: kd.Divergence) -> None:
    given = next(iter(call.arguments.values()), oracle.DEFAULTS[call.function])
    if made.name != call.function or made.a != given:
        raise Wrong(f"made {made}")


def fails(seed: int) -> str | None:
    """What is wrong in the case of that seed, and how to repeat it; None if nothing is."""
    call = draw(seed)
    shown = call.show()  # before anything is modified
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check(call)
    except Exception as error:
        text = str(error) if isinstance(error, Wrong) else "".join(traceback.format_exception(error))
        return f"case {seed}: {text}\n{shown}\nrepeat it: python -m tests.fuzz.check {seed}"
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[1:]:
        print(draw(int(argument)).show())
        print(fails(int(argument)) or "nothing is wrong")
