"""Times and peak memory of the contenders on one head and one loss, each interleaved with the bare matrix products.

A step is the loss and the gradients of the hidden states and of the head. Before and after each timed step the bare products run
(``contenders.products``), so that a clock that drifts moves both; a ratio is step / mean of the products around it, and what is
reported is the median over the repeats. On a GPU the clock is a pair of CUDA events around the step, the launches included; the
device is idle before each.

Units: milliseconds, bytes, operations per second. Bytes are what the allocator handed out at the peak of one step, above what it
had handed out before: ``peak_bytes`` with the returned gradients in it, ``scratch_bytes`` without them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import CONTENDERS, HEADS, Head, Loss, Problem, problem, products
from benchmarks.measure import why


@dataclass(frozen=True)
class Extent:
    """How much is measured. block: tokens per block of the bare products, enough of them for the full rate of the device."""

    heads: dict[str, Head]
    tokens: tuple[int, ...]
    repeats: int
    warmups: int
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    block: int = 4096


EXTENTS = {
    "full": Extent(HEADS, (2048, 4096, 8192, 16_384, 32_768), repeats=20, warmups=3),
    "quick": Extent({"qwen2.5": HEADS["qwen2.5"]}, (2048, 8192), repeats=5, warmups=2),
    # float32, so that the losses of all contenders agree to more than two digits
    "toy": Extent({"toy": Head("toy", "toy", 150, 160, 16, 24)}, (6, 12), 2, 1, device="cpu", dtype=torch.float32, block=8),
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


def measured(loss: Loss, given: Problem, extent: Extent) -> dict[str, Any]:
    """What a row says about one contender that runs."""
    value = torch.empty(0)

    def step() -> None:
        nonlocal value
        given.hidden.grad = given.head.grad = None
        result = loss(given)
        result.backward()
        value = result.detach()

    yardstick = products(given, extent.block)
    for _ in range(extent.warmups):
        step()
        yardstick()
    result: dict[str, Any] = {"loss_value": float(value), "peak_bytes": None, "scratch_bytes": None}
    grads = [leaf.grad for leaf in (given.hidden, given.head)]
    returned = sum(grad.nbytes for grad in grads if grad is not None)
    if any(grad is None or not bool(grad.isfinite().all()) for grad in grads):
        raise ArithmeticError("a gradient of the student is missing or not finite")
    del grads
    if extent.device == "cuda":
        given.hidden.grad = given.head.grad = None
        result["peak_bytes"] = peak_bytes(step)
        result["scratch_bytes"] = result["peak_bytes"] - returned
    times, bare, ratios = [], [milliseconds(yardstick, extent.device)], []
    for _ in range(extent.repeats):
        times.append(milliseconds(step, extent.device))
        bare.append(milliseconds(yardstick, extent.device))
        ratios.append(2 * times[-1] / (bare[-2] + bare[-1]))
    tokens, student_dim = given.hidden.shape
    operations = 2 * tokens * given.vocab * (3 * student_dim + given.teacher_hidden.shape[1])
    rate = operations / statistics.median(bare) * 1e3
    return {
        **result,
        **spread(times),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "products_ms": statistics.median(bare),
        "products_per_second": rate,
        # the operations that the loss needs, over the time that it takes, as a share of the rate of the bare products
        "share_of_product_rate": operations / statistics.median(times) * 1e3 / rate,
    }


def freed(device: str) -> None:
    """Gives back what was left behind; raises if the device no longer answers."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def run(size: str, head_name: str, loss: str) -> Iterator[dict[str, Any]]:
    """The rows of one head and loss, over all token counts and contenders; a contender that fails is a row that says why."""
    extent = EXTENTS[size]
    head = extent.heads[head_name]
    for tokens in extent.tokens:
        given: Problem | None = None
        for name, make in CONTENDERS.items():
            row: dict[str, Any] = {
                **{"head": head_name, "student": head.student, "teacher": head.teacher, "loss": loss, "tokens": tokens},
                **{"vocab": head.vocab, "student_dim": head.student_dim, "teacher_dim": head.teacher_dim},
                **{"dtype": str(extent.dtype).removeprefix("torch."), "contender": name},
            }
            freed(extent.device)
            try:
                made = make(loss)
                given = given or problem(head, tokens, extent.dtype, extent.device)
                row |= measured(made, given, extent)
            except Exception as error:  # whatever another library raises is what its row has to say
                row["failed"] = why(error)
            if given is not None:
                given.hidden.grad = given.head.grad = None
            yield row
