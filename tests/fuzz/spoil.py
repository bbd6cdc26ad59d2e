"""What is done to a call so that it has to be refused, and the values that no argument may have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kdkernels as kd
from tests.fuzz.calls import BARELY, INF, NAN, Call, get, put, takes, vocab_of

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
