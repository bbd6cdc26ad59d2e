"""One loss step (loss, and the gradients of the student's hidden states and head) by kdkernels and by eager PyTorch, side by side.

Time: both in one process, taking turns, the median. Peak memory: each in a fresh process, ``python -m kdkernels.demo.loss_step``,
because what one method leaves behind in the allocator would be free to the other.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.console import files
from kdkernels.errors import CommandError

Inputs = dict[str, Tensor]
WARM_UP_ROWS = 64


@dataclass(frozen=True)
class Measured:
    """seconds: median of the turns. peak_bytes: above the inputs, gradients included; None where it cannot be measured."""

    seconds: float
    peak_bytes: int | None
    loss: float


def kdkernels_step(inputs: Inputs, t: float, budget: int) -> Tensor:
    loss: Tensor = kd.linear_kd_loss(
        inputs["student_hidden"],
        inputs["student_head"],
        inputs["teacher_hidden"],
        inputs["teacher_head"],
        t=t,
        memory_budget=budget,
    )
    loss.backward()
    return loss.detach()


def eager_step(inputs: Inputs, t: float, budget: int) -> Tensor:
    """The formula of TAID as it is usually written: KL(softmax((1 - t) x + t z) || softmax(x)), x held constant in the target."""
    x = inputs["student_hidden"] @ inputs["student_head"].T
    with torch.no_grad():
        z = inputs["teacher_hidden"] @ inputs["teacher_head"].T
        lp = torch.log_softmax((1.0 - t) * x + t * z, dim=-1)
    lq = torch.log_softmax(x, dim=-1)
    loss = (lp.exp() * (lp - lq)).sum(-1).mean()
    loss.backward()
    return loss.detach()


STEPS: dict[str, Callable[[Inputs, float, int], Tensor]] = {"kdkernels": kdkernels_step, "eager PyTorch": eager_step}


def compare(inputs: Inputs, t: float, budget: int, repeats: int, scratch: Path) -> tuple[dict[str, Measured], float]:
    """Both methods measured on the same tensors, and the largest gradient difference relative to the largest gradient.

    inputs: student_hidden (N, D_s), student_head (V, D_s), teacher_hidden (N, D_t), teacher_head (V, D_t). scratch: a file to hand
    them to the fresh processes with.
    """
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    losses: dict[str, float] = {}
    gradients: dict[str, Tensor] = {}
    for turn in range(repeats + 1):
        for name, step in STEPS.items():
            leaves = _leaves(inputs)
            begun = time.perf_counter()
            loss = step(leaves, t, budget)
            if turn > 0:  # the first turn warms up
                seconds[name].append(time.perf_counter() - begun)
            losses[name] = float(loss)
            gradients[name] = torch.cat([leaf.grad.flatten() for leaf in leaves.values() if leaf.grad is not None])
    ours, theirs = gradients.values()
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    files.save(scratch, inputs, {"t": t, "budget": budget})
    try:
        peaks = {name: _peak_in_fresh_process(name, scratch) for name in STEPS}
    finally:
        scratch.unlink()
    return {name: Measured(statistics.median(seconds[name]), peaks[name], losses[name]) for name in STEPS}, difference


def _leaves(inputs: Inputs) -> Inputs:
    return {name: tensor.detach().requires_grad_(name.startswith("student")) for name, tensor in inputs.items()}


def _peak_in_fresh_process(name: str, scratch: Path) -> int | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "kdkernels.demo.loss_step", str(scratch), name, str(torch.get_num_threads())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise CommandError(f"measuring the memory of {name} failed: {ran.stderr.strip().splitlines()[-1:]}")
    peak: int | None = json.loads(ran.stdout)
    return peak


def _measure_peak(scratch: Path, name: str) -> int | None:
    """Bytes that the resident set of this process rises to during the step, above what it has before it."""
    inputs, about = files.load(scratch)
    step = STEPS[name]
    # A small step first: what the libraries allocate once and keep is no part of a step's peak.
    step(
        _leaves({key: value[:WARM_UP_ROWS] if "hidden" in key else value for key, value in inputs.items()}),
        about["t"],
        about["budget"],
    )
    leaves = _leaves(inputs)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, so that the step has to ask for it again
        Path("/proc/self/clear_refs").write_text("5")  # makes the high-water mark start again from here (Linux)
    except (AttributeError, OSError):
        return None
    before = _status_bytes("VmRSS")
    step(leaves, about["t"], about["budget"])
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(_measure_peak(Path(sys.argv[1]), sys.argv[2])))
