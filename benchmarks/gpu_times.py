"""Times and peak memory of the contenders on one head, each interleaved with the bare matrix products.

A step is the loss and the gradients of the hidden states and of the head. Before and after each timed step the bare products run
(``contenders.products``), so that a clock that drifts moves both; a ratio is step / mean of the products around it, and what is
reported is the median over the repeats. On a GPU the clock is a pair of CUDA events around the step, the launches included; the
device is idle before each. The first step, in which a contender may compile, is timed by itself: ``first_s``.

Units: milliseconds, bytes, operations per second. Bytes are what the allocator handed out at the peak of one step, above what it
had handed out before: ``peak_bytes`` with the returned gradients in it, ``scratch_bytes`` without them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.cases import DTYPES, HEADS, LOSSES, Case, Head, Problem, problem
from benchmarks.contenders import BUDGETED, CLUSTERED, OFFSETS, OFFSETS_CUDA, loss_of, products
from benchmarks.gpu_device import device_of
from benchmarks.measure import interleaved, stepped
from benchmarks.peers import Loss
from benchmarks.runner import Result, freed, told

SPREAD = 1.0  # of the logits: where they are rounded to 16 bits, the contenders' losses then agree to about two digits
OURS = ("tokens", BUDGETED, CLUSTERED, OFFSETS, OFFSETS_CUDA, "vocab", "eager")
PEERS = ("liger", "liger triton", "liger kl_div", "trl", "fla", "torchtune")
# What a machine that has PyTorch and transformers lacks for a contender.
WHEELS = {
    "liger": "liger-kernel",
    "liger compiled": "liger-kernel",
    "liger triton": "liger-kernel",
    "liger kl_div": "liger-kernel",
    "trl": "trl, datasets, dill and multiprocess",
    "fla": "fla-core and einops",
    "torchtune": "torchtune",
}


@dataclass(frozen=True)
class Extent:
    """How much is measured. others: what is timed beside ours, on ``other_heads``, in order of worth.

    block: tokens per block of the bare products, enough of them for the full rate of the device.
    """

    heads: dict[str, Head]
    tokens: tuple[int, ...]
    losses: tuple[str, ...]
    others: tuple[str, ...]
    other_heads: tuple[str, ...]
    repeats: int
    warmups: int
    dtype: str = "bf16"
    block: int = 4096


_ALL = (*PEERS, "checkpointed", "liger compiled", "compiled")
EXTENTS = {
    "short": Extent(HEADS, (8192,), ("forward_kl", "jsd"), (*PEERS, "compiled"), ("qwen2.5",), repeats=5, warmups=1),
    "full": Extent(HEADS, (2048, 4096, 8192, 16_384, 32_768), LOSSES, _ALL, tuple(HEADS), repeats=20, warmups=3),
    # float32, so that the losses of all contenders agree to more than two digits
    "toy": Extent(
        {"toy": Head("toy", "toy", "toy", 150, 160, 16, 24)}, (6,), ("forward_kl", "jsd"), _ALL, ("toy",), 2, 0, "fp32", block=8
    ),
}


def milliseconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that a CUDA device's allocator hands out at the peak of ``run``, above what it had handed out before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def spread(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_ms": statistics.median(times), "p20_ms": cuts[0], "p80_ms": cuts[-1]}


def measured(loss: Loss, given: Problem, extent: Extent, device: str) -> Result:
    """What a row says about one contender that runs."""
    step, yardstick = stepped(loss, given), products(given, extent.block)
    start = time.perf_counter()
    value = float(step())
    result: Result = {"first_s": time.perf_counter() - start, "loss_value": value, "peak_bytes": None, "scratch_bytes": None}
    grads = [leaf.grad for leaf in (given.hidden, given.head)]
    returned = sum(grad.nbytes for grad in grads if grad is not None)
    if any(grad is None or not bool(grad.isfinite().all()) for grad in grads):
        raise ArithmeticError("a gradient of the student is missing or not finite")
    del grads
    yardstick()
    for _ in range(extent.warmups):
        step()
        yardstick()
    if device == "cuda":
        given.forget()
        result["peak_bytes"] = peak_bytes(step)
        result["scratch_bytes"] = result["peak_bytes"] - returned
    timed = interleaved(step, yardstick, extent.repeats, clock=lambda run: milliseconds(run, device))
    bare = statistics.median(timed.yardsticks)
    tokens, student_dim = given.hidden.shape
    operations = 2 * tokens * given.vocab * (3 * student_dim + given.teacher_hidden.shape[1])
    return {
        **result,
        **spread(timed.steps),
        "ratio": statistics.median(timed.ratios),
        "ratios": timed.ratios,
        "products_ms": bare,
        "products_per_second": operations / bare * 1e3,
        # the operations that the loss needs, over the time that it takes, as a share of the rate of the bare products
        "share_of_product_rate": bare / statistics.median(timed.steps),
    }


def opened(size: str, head_name: str) -> Callable[[int, str, str], Iterator[Result]]:
    """The row of a token count, loss and contender at one head; a contender that fails has a row that says why."""
    extent, device = EXTENTS[size], device_of(size)
    head = extent.heads[head_name]
    made: dict[int, Problem] = {}

    def run(tokens: int, loss: str, contender: str) -> Iterator[Result]:
        case = Case("times", head, tokens, extent.dtype, contender, loss)
        if tokens not in made:
            made.clear()
            freed()

        def measure() -> Result:
            of_case = loss_of(case)
            if tokens not in made:
                made[tokens] = problem(case, device, SPREAD)
            return measured(of_case, made[tokens], extent, device)

        facts: Result = {
            **{"head": head_name, "student": head.student, "teacher": head.teacher, "loss": loss, "tokens": tokens},
            **{"vocab": head.vocab, "student_dim": head.student_dim, "teacher_dim": head.teacher_dim},
            **{"dtype": str(DTYPES[extent.dtype]).removeprefix("torch."), "contender": contender},
        }
        row = told(facts, measure)
        if row.get("failed", "").startswith("ModuleNotFoundError") and contender in WHEELS:
            row["failed"] += f"; the wheels that bring it: {WHEELS[contender]}"
        for given in made.values():
            given.forget()
        yield row

    return run
