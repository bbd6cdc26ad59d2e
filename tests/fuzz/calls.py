"""A call of a public function: its arguments, what is wrong with them, and how it is shown and changed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Integers for which torch itself has few operations.
BARELY = (torch.uint16, torch.uint32, torch.uint64)
LINEAR = ("linear_kd_loss", "LinearKDLoss", "linear_okd_loss")
LOSSES = (*LINEAR, "linear_topk_kd_loss", "kd_loss")


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
        return "\n".join([*lines, *(f"  {name} = {shown(value)}" for name, value in self.arguments.items())])


def shown(value: Any) -> str:
    if isinstance(value, kd.LMHead):
        parts = (value.weight, value.bias, value.logit_scale, value.softcap)
        return f"LMHead({', '.join(shown(part) for part in parts)})"
    if not isinstance(value, Tensor):
        return repr(value)
    kind = f"{type(value).__name__}{tuple(value.shape)} {value.dtype} {value.device} requires_grad={value.requires_grad}"
    if value.device.type == "meta" or value.layout != torch.strided:
        return kind
    values = value.detach().flatten().tolist() if value.numel() <= 12 else f"{value.numel()} values"
    return f"{kind} stride={value.stride()} {values}"


def normal(rng: random.Random, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def lead_of(call: Call) -> tuple[int, ...]:
    first = next(iter(call.arguments.values()))
    return tuple(first.shape[:-1])


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


def tensors(call: Call) -> list[str]:
    """Names of all tensor arguments, and of the parts of heads."""
    names = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    parts = [f"{model}_{part}" for model in ("student", "teacher") for part in ("weight", "bias")]
    return names + [part for part in parts if isinstance(get(call, part), Tensor)]


def vocab_of(call: Call) -> int:
    if call.function == "kd_loss":
        return int(call.arguments["student_logits"].shape[-1])
    return int(call.arguments.get("vocab_size") or call.arguments["student_head"].weight.shape[0])


def takes(function: str, name: str) -> bool:
    of = kd.linear_kd_loss if function == "LinearKDLoss" else getattr(kd, function)
    return name in (of.__kwdefaults__ or {})


class Wrong(AssertionError):
    """What a case shows to be wrong."""
