"""``draw(seed)`` makes a call that is well formed, perhaps dressed, and perhaps spoilt."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import native
from tests.fuzz.calls import DTYPES, INF, LOSSES, Call, get, lead_of, normal, put
from tests.fuzz.dress import dress
from tests.fuzz.small import draw_small
from tests.fuzz.spoil import spoil

LEADS = ((5,), (5,), (4,), (2, 3), (1,), (), (0,), (2, 0))
VOCABULARIES = (1, 2, 5, 17, 37, 37, 300)
DIMS = (1, 3, 8)


def integers(rng: random.Random, high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))


def variants() -> tuple[str, ...]:
    return (*native.instruction_sets(), "reference")


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    kind = rng.choices(("loss", "small"), (85, 15))[0]
    if kind == "small":
        return draw_small(rng)
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


def _token_weight(call: Call) -> Tensor:
    weight = normal(call.rng, *lead_of(call)).abs() + 0.1
    if weight.numel() > 2:
        weight.view(-1)[0] = 0.0
    return weight.to(call.rng.choice((torch.float32, torch.float64, torch.bfloat16)))


def require_grad(call: Call, name: str) -> None:
    if (value := get(call, name)) is not None:
        put(call, name, value.detach().requires_grad_())
