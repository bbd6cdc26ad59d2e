"""How the benchmarks measure: time against a yardstick beside it, peak memory above a start, and the machine that it was on.

Time. A step is the loss and the gradients of hidden states and head. Before and after each step its yardstick runs, the bare
products unless another is named, so that a machine whose speed drifts moves both; a ratio is step / mean of the two around it, and
what is reported is the median, beside every ratio.

Memory (Linux). The high-water mark of the resident memory, reset before the first whole step, less what was resident then: above
inputs and libraries, the returned gradients included, and with whatever a library keeps for its next step. What the libraries keep
for good is paid by a small step before; compiled contenders are measured in their second step. ``process_bytes``: the mark itself.

Error. Value and gradients of that step against float64 (exact.py).
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import Case, Problem
from benchmarks.contenders import COMPILED, CROSS_ENTROPY, STRATEGIES, loss_of, products
from benchmarks.exact import Exact, errors
from benchmarks.peers import Loss
from kdkernels.backends import native
from kdkernels.console import info
from tests.support.memory import peak_above, status

PEERS = ("liger-kernel", "trl", "fla-core", "torchtune")
LIBRARIES = ("triton", "transformers", *PEERS)
Step = Callable[[], object]


def seconds(run: Step) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Timed(NamedTuple):
    """What the clock gave for the steps, and for the yardsticks around them: one more."""

    steps: list[float]
    yardsticks: list[float]

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.yardsticks, self.yardsticks[1:], strict=False)
        return [2 * step / (before + after) for step, (before, after) in zip(self.steps, pairs, strict=True)]


def interleaved(
    step: Step, yardstick: Step, repeats: int, patience: float = float("inf"), clock: Callable[[Step], float] = seconds
) -> Timed:
    """patience: seconds after which no further repeat is begun."""
    timed = Timed([], [clock(yardstick)])
    begin = time.perf_counter()
    for _ in range(repeats):
        timed.steps.append(clock(step))
        timed.yardsticks.append(clock(yardstick))
        if time.perf_counter() - begin > patience:
            break
    return timed


def stepped(loss: Loss, given: Problem) -> Callable[[], Tensor]:
    """The step: its gradients are the leaves', its value is returned."""

    def step() -> Tensor:
        given.forget()
        value = loss(given)
        value.backward()
        return value.detach()

    return step


def planned(case: Case) -> dict[str, Any]:
    """What ``kd.plan`` says of a step: peak above the inputs, and seconds. Nothing of a step that it does not plan."""
    ours = case.contender in STRATEGIES
    if case.masked or not (ours or case.contender == "eager"):
        return {}
    plan = case.plan(case.contender if ours else "auto")
    scratch, took = (plan.scratch_bytes, plan.seconds) if ours else (plan.eager_scratch_bytes, plan.eager_seconds)
    return {"planned_peak_bytes": scratch + case.returned_bytes, "planned_seconds": took}


def measured(
    case: Case,
    given: Problem,
    *,
    exact: Callable[[], Exact] | None = None,
    repeats: int = 0,
    yardstick: Step | None = None,
    slow: float = float("inf"),
    patience: float = float("inf"),
) -> dict[str, Any]:
    """What a row says about a contender that runs: its first step, and with ``repeats`` its time over the yardstick.

    exact: makes the float64 results to compare with. slow: seconds; a step that takes longer is timed once, the first time.
    yardstick: the bare products, if no other.
    """
    loss = loss_of(case)
    step = stepped(loss, given)
    if case.contender in COMPILED:
        step()
    else:
        stepped(loss, given.first(64, 1024))()
    given.forget()
    before = 0.0
    if repeats:
        yardstick = yardstick or products(given)
        before = seconds(yardstick)
        given.forget()  # it may be a step
    kd.free_scratch()
    values: list[Tensor] = []
    took: list[float] = []
    peak = peak_above(lambda: took.append(seconds(lambda: values.append(step()))))
    found = {"peak_bytes": peak, "process_bytes": status("VmHWM"), "returned_bytes": case.returned_bytes, "seconds": took[0]}
    if exact is not None:
        found |= errors(values[0], given, exact(), (case.contender, case.loss) in CROSS_ENTROPY)
    if yardstick is None or not repeats:
        return found
    quick = took[0] <= slow
    timed = interleaved(step, yardstick, repeats, patience) if quick else Timed(took, [before, seconds(yardstick)])
    medians = {"seconds": statistics.median(timed.steps), "yardstick_seconds": statistics.median(timed.yardsticks)}
    return found | {"ratio": statistics.median(timed.ratios), "ratios": timed.ratios, **medians}


def limit_memory(limit: int) -> None:
    """Let allocations fail once this process holds ``limit`` bytes of data, so that it cannot take the machine down (Linux).

    RLIMIT_DATA: heap, stacks and anonymous mappings, touched or not; code and files do not count.
    """
    import resource  # Unix only

    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def version(library: str) -> str | None:
    """Of an installed distribution, None if it is not there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Where and when something was measured, as the result files record it."""
    return {
        "processor": info.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{library: version(library) for library in LIBRARIES},
        "instruction_sets": list(native.instruction_sets()),
        "date": datetime.date.today().isoformat(),
    }
