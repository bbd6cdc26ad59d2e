"""Calls of the functions that take no hidden states, and what each has to give."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch

import kdkernels as kd
from kdkernels import backends
from tests.fuzz.calls import DTYPES, INF, NAN, Call, Wrong
from tests.fuzz.spoil import COUNTS, FLAGS, INSIDE, NAMES, NUMBERS
from tests.support import oracle

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


def draw_small(rng: random.Random) -> Call:
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


def hold(call: Call, found: Any) -> None:
    """Raises Wrong if a function gave what it must not; ``schedule`` does so itself."""
    holds = {"plan": _check_plan, "backend": _check_backend, "TAIDSchedule": lambda *_: None}
    holds.get(call.function, _check_divergence)(call, found)


def schedule(loss: Any, progress: Any, **own: Any) -> list[float]:
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
