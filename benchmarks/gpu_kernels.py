"""Where the time of a step goes, kernel by kernel, and what other block sizes than the table's would make of it.

- profile: the kernels of one step under torch.profiler, and how much of the step is none of them; and the step's time replayed from
  a CUDA graph, in which the host has no part.
- rows: the row kernel alone, and the rate at which it moves the bytes that kdkernels/planning/traffic.py counts.
- blocks: the kernels of ``vocab``, with the same blocks for all three: of a plain loss, of one with temperature and labels
  ("dressed"), and of that under a softcap ("capped").

A winner goes into kdkernels/backends/triton/blocks.py by hand.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.cases import Case, problem
from benchmarks.contenders import CLUSTERED, CONTENDERS, OFFSETS, ours, products
from benchmarks.gpu_device import cluster_rows, device_of
from benchmarks.gpu_times import EXTENTS, SPREAD, milliseconds, spread
from benchmarks.measure import interleaved, stepped
from benchmarks.runner import Result, told, why
from kdkernels.divergences import resolve
from kdkernels.planning import traffic

PROFILED = ("tokens", CLUSTERED, OFFSETS, "vocab")
PROFILED_HEADS = ("qwen2.5", "gemma3")
SHOWN = 14  # kernels of a profile
# How the row operation is done: by Triton's kernel; by the cluster kernel as it cuts rows by itself; by it with other clusters
# (blocks that share a row, warps of a block, blocks of a multiprocessor).
TRITON, CLUSTER = "Triton", "cluster"
CLUSTERS = ((4, 8, 2), (8, 8, 2), (8, 8, 3), (16, 8, 2), (16, 8, 3), (4, 16, 1), (8, 16, 1), (16, 16, 1))
ROW_TOKENS, ROW_VOCABULARIES = 2048, (151_936, 262_144)
# block_n, block_v, block_d, num_warps, num_stages, group. Around the table's blocks, and around its roomy ones.
WIDE = (
    (128, 128, 64, 8, 4, 8),
    (128, 128, 64, 8, 4, 4),
    (128, 128, 64, 8, 5, 8),
    (128, 128, 64, 8, 6, 8),
    (128, 128, 128, 8, 2, 8),
    (128, 128, 128, 8, 3, 8),
)
ROOMY = (
    (128, 64, 64, 8, 4, 8),
    (128, 64, 64, 8, 6, 8),
    (128, 64, 128, 8, 3, 8),
    (128, 64, 128, 8, 4, 8),
    (64, 128, 64, 8, 6, 8),
    (64, 128, 128, 8, 3, 8),
)
# What of the loss is switched on, and the blocks that are tried for it. A softcap is where the table leaves its wide blocks.
DRESSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dressed": {"temperature": 2.0, "ce_weight": 0.5},
    "capped": {"temperature": 2.0, "ce_weight": 0.5, "softcap": 30.0},
}
BLOCK_CANDIDATES = {"plain": (*WIDE, (64, 256, 64, 8, 4, 8)), "dressed": (*WIDE, ROOMY[0]), "capped": (*ROOMY, WIDE[0])}
TOY_BLOCKS = dict.fromkeys(DRESSES, ((16, 32, 16, 4, 1, 2),))
BLOCK_HEAD = "qwen2.5"
# As many columns as a compiler needs to see the same divisible sizes that the measured problem has.
COMPILED_TOKENS, COMPILED_VOCAB = 256, 4096


def profiled(step: Callable[[], object], device: str) -> list[Result]:
    """Name, calls and milliseconds of each kernel of a step, the longest first; on a CPU of each operator."""
    activity = getattr(torch.profiler.ProfilerActivity, device.upper())
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    times = [
        (event, getattr(event, f"self_{'device' if device == 'cuda' else 'cpu'}_time_total")) for event in profile.key_averages()
    ]
    times.sort(key=lambda pair: -pair[1])
    return [{"name": event.key[:100], "calls": event.count, "ms": time_us / 1e3} for event, time_us in times if time_us > 0]


def replayed(step: Callable[[], object], yardstick: Callable[[], object], repeats: int) -> Result:
    """Milliseconds of the step captured in a CUDA graph, and over the bare products before and after each replay."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception as error:  # the profile is there already
        return {"not_replayed": why(error)}
    graph.replay()
    yardstick()  # untimed: a capture empties the allocator's cache
    timed = interleaved(graph.replay, yardstick, repeats, clock=lambda run: milliseconds(run, "cuda"))
    return {"replayed_ms": statistics.median(timed.steps), "replayed_ratio": statistics.median(timed.ratios)}


def opened_profile(size: str, head_name: str) -> Callable[[str, str], Iterator[Result]]:
    extent, device = EXTENTS[size], device_of(size)
    tokens = 8192 if size != "toy" else extent.tokens[0]
    given = problem(Case("profile", extent.heads[head_name], tokens, extent.dtype), device, SPREAD)

    def measure(loss: str, contender: str) -> Result:
        step = stepped(CONTENDERS[contender](loss), given)
        step()
        step_ms = statistics.median(milliseconds(step, device) for _ in range(3))
        kernels = profiled(step, device)
        kernel_ms = sum(kernel["ms"] for kernel in kernels)
        # the profiler slows the launches down, and not the kernels
        gaps = 1 - kernel_ms / step_ms if device == "cuda" else None
        found = {"step_ms": step_ms, "kernel_ms": kernel_ms, "share_without_kernel": gaps, "kernels": kernels[:SHOWN]}
        return found | (replayed(step, products(given, extent.block), extent.repeats) if device == "cuda" else {})

    def run(loss: str, contender: str) -> Iterator[Result]:
        yield told({"head": head_name, "loss": loss, "tokens": tokens, "contender": contender}, lambda: measure(loss, contender))
        given.forget()

    return run


def cluster_label(cluster: int, warps: int, blocks: int) -> str:
    return f"clusters of {cluster} x {warps} warps, {blocks} to a multiprocessor"


ROW_CANDIDATES = (TRITON, CLUSTER, *(cluster_label(*shape) for shape in CLUSTERS))


def opened_rows(size: str, compile_only: bool) -> Callable[[str, int, str], Iterator[Result]]:
    """The row operation's times over float32 logits, dx in bfloat16; or only its first start, which compiles it."""
    from kdkernels.backends.triton.rows import row_loss  # Triton may not be installed

    device = device_of(size)
    rows = 4 if size == "toy" else 16 if compile_only else ROW_TOKENS
    shapes = {cluster_label(*shape): shape for shape in CLUSTERS}
    made: dict[int, tuple[torch.Tensor, ...]] = {}

    def logits(vocab: int) -> tuple[torch.Tensor, ...]:
        if vocab not in made:
            made.clear()
            x, z = (torch.randn(rows, vocab, device=device).mul_(3) for _ in range(2))
            made[vocab] = x, z, torch.empty(rows, vocab, device=device, dtype=torch.bfloat16)
        return made[vocab]

    def measure(loss: str, vocab: int, candidate: str) -> Result:
        if candidate != TRITON and device != "cuda":
            return {"skipped": "the cluster kernel needs an NVIDIA GPU"}
        x, z, dx = logits(vocab)
        weight, t = torch.ones(rows, device=device), torch.ones((), device=device)
        head = [1.0, 0.0, 1.0, 0.0]  # scales and softcaps

        def start() -> None:
            row_loss(x, z, None, None, None, weight, t, loss, resolve(loss).a, 1.0, 1.0, 0.0, head, True, False, dx)

        with ExitStack() as stack:
            if candidate == TRITON:
                stack.enter_context(mock.patch.dict(os.environ, KDKERNELS_ROWS="triton"))
            else:
                started = stack.enter_context(cluster_rows(shapes.get(candidate)))
            begin = time.perf_counter()
            start()
            dx[0, 0].item()  # waits for the kernel
            found: Result = {"first_s": time.perf_counter() - begin}
            if candidate != TRITON and not started:
                return {"skipped": "the rows do not fit, or the device has no such clusters"}
            if compile_only:
                return found
            start()
            found |= spread([milliseconds(start, device) for _ in range(3 if size == "toy" else 9)])
        # Triton reads the logits in each sweep and for the gradient, a cluster once for all of them.
        swept = traffic.sweeps(loss) if candidate == TRITON else 0
        bytes_ = traffic.row_loss(rows, vocab, (x.itemsize, z.itemsize), dx.itemsize, sweeps=swept).total
        return {**found, "bytes": bytes_, "bytes_per_second": bytes_ / found["median_ms"] * 1e3}

    def run(loss: str, vocab: int, name: str) -> Iterator[Result]:
        yield told({"loss": loss, "vocab": vocab, "tokens": rows, "candidate": name}, lambda: measure(loss, vocab, name))

    return run


def opened_blocks(size: str, compile_only: bool) -> Callable[..., Iterator[Result]]:
    """The milliseconds of each kernel of a ``vocab`` step; or only that of a small problem, which compiles them."""
    from kdkernels.backends.triton import blocks, vocabulary  # Triton may not be installed

    extent, device = EXTENTS[size], device_of(size)
    name, tokens = (BLOCK_HEAD, 8192) if size != "toy" else ("toy", extent.tokens[0])
    head, table = extent.heads[name], blocks.entry
    if compile_only and size != "toy":
        head, tokens = head.cut(COMPILED_VOCAB), COMPILED_TOKENS
    given = problem(Case("blocks", head, tokens, extent.dtype), device, SPREAD)
    labelled = replace(given, labels=torch.arange(tokens, device=device) % given.vocab)

    def measure(loss: str, dress: str, candidate: tuple[int, ...]) -> Result:
        matrix = blocks.Matrix(*candidate)

        def entry(*of: Any) -> blocks.Entry:
            return replace(table(*of), statistics=matrix, sums=matrix, gradient=matrix, roomy=None, measured=None)

        with mock.patch.object(blocks, "entry", entry):
            step = stepped(ours(loss, "vocab", **DRESSES[dress]), labelled if DRESSES[dress] else given)
            begin = time.perf_counter()
            step().item()
            found: Result = {"first_s": time.perf_counter() - begin}
            if compile_only:
                return found
            kernels = {one["name"]: one["ms"] for one in profiled(step, device) if hasattr(vocabulary, one["name"])}
        if device != "cuda":
            return {**found, "skipped": "the interpreter's kernels are none of the profiler's"}
        return {**found, "kernels": kernels, "median_ms": sum(kernels.values())}

    def run(loss: str, dress: str, *candidate: int) -> Iterator[Result]:
        facts: Result = {
            "head": name,
            "loss": loss if dress == "plain" else f"{loss} {dress}",
            "tokens": tokens,
            "candidate": "{} x {} x {}, {} warps, {} stages, group {}".format(*candidate),
        }
        yield told(facts, lambda: measure(loss, dress, candidate))
        given.forget()

    return run
