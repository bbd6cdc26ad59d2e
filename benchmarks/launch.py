"""``make launch``: every Triton kernel started at every setting of the GPU checks, without a GPU.

    python -m benchmarks.launch [--quick] [--only ARCHITECTURE] [--dtype ...] [--strategy ...] [--divergence ...] [--setting ...]

The library runs on CPU tensors as it would on a GPU's, and Triton's own compiler, launcher and tensor-map encoder start its
kernels on a driver that runs nothing (stub_driver.c), but refuses what a driver and the hardware would: misaligned operands, boxes,
grids and blocks that are too large, too much shared memory, too many registers. Then the heads of Qwen2.5, Llama-3 and Gemma-3 at
their real sizes, in memory that is never touched; and a training run, in which no kernel may be compiled anew at every token count.

Per architecture and kernel: how often it was started and compiled, the tensor maps made for it, its largest grid and shared memory,
and the seconds that it took. Results are garbage and not looked at. Compiled kernels are kept in build/launch.

--quick is what CI runs: the quick GPU checks on sm_90, one divergence that has its value in one sweep and one that needs two.

Exit status 1 if anything is refused, named with kernel and setting; 2 if nothing could be launched.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import gpu_checks, static
from benchmarks.cases import DTYPES, HEADS, MIB, Head
from benchmarks.compiled import TARGETS
from benchmarks.gpu_device import offset_logits
from benchmarks.static_launches import KERNELS, jit_function
from benchmarks.stub_driver import CompilerMissingError, Stub, as_on_a_gpu, built
from tests.support.cases import Case

ARCHITECTURES = tuple(name for name, limits in TARGETS.items() if limits.backend == "cuda")
OFFSETS = "offsets"  # ``tokens`` with logits of 16 bits
STRATEGIES = ("tokens", "vocab", OFFSETS)
FULL = "sm_90"  # the others launch what --quick does: compiling takes the time
QUICK_DIVERGENCES = ("forward_kl", "jsd")
# Kept tokens of a run's steps, and how often a kernel may be compiled for them: for those that 16 divides, and for those that it
# does not. The product of offsets does not care, and is one kernel each for the student, the teacher and both mixed.
RUN_TOKENS = (300, 301, 304, 305, 1023, 1024)
RUN_COMPILATIONS, OFFSETS_COMPILATIONS = 2, 3
# A vocabulary that 16 does not divide, so that its last block has another width than the others; the smaller budget makes several.
RUN_VOCAB, RUN_BUDGETS = 5003, (None, 4 * MIB)
REAL_BUDGET = 4096 * MIB


@dataclass
class Kernel:
    """What became of one kernel. keys: of what it was compiled for, by which Triton knows them."""

    launches: int = 0
    keys: set[str] = field(default_factory=set)
    tensor_maps: int = 0
    grid: tuple[int, ...] = (0, 0, 0)
    shared: int = 0
    seconds: float = 0.0

    def add(self, other: Kernel) -> None:
        self.launches += other.launches
        self.keys |= other.keys
        self.tensor_maps += other.tensor_maps
        self.grid = tuple(map(max, self.grid, other.grid))
        self.shared = max(self.shared, other.shared)
        self.seconds += other.seconds


@dataclass
class Report:
    kernels: dict[str, Kernel] = field(default_factory=lambda: {name: Kernel() for name in KERNELS})
    problems: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name, kernel in other.kernels.items():
            self.kernels[name].add(kernel)
        self.problems += other.problems
        self.faults += other.faults


def _innermost(error: BaseException) -> str:
    """One line of what an error comes from: the compiler wraps it once for each function on the way there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"


def jit_functions() -> dict[str, Any]:
    return {name: jit_function(name) for name in KERNELS}


class Watch:
    """What the library starts, and what arrives at the driver."""

    def __init__(self, architecture: str) -> None:
        self.architecture, self.stub = architecture, Stub(architecture)
        self.started: list[str] = []
        self.report = Report()
        for name, kernel in jit_functions().items():
            kernel.add_pre_run_hook(lambda *_, name=name, **__: self.started.append(name))
            kernel._do_compile = self._compiling(name, kernel._do_compile)

    def _compiling(self, name: str, compile: Callable[..., Any]) -> Callable[..., Any]:
        # Triton 3.6 has a hook for this too, but cannot serialise for it a kernel that takes a function as its argument.
        def timed(key: str, *rest: Any) -> Any:
            begin = time.perf_counter()
            made = compile(key, *rest)
            self.report.kernels[name].seconds += time.perf_counter() - begin
            self.report.kernels[name].keys.add(key)
            return made

        return timed

    def run(self, setting: str, problem: Callable[[], object]) -> None:
        self.started.clear()
        self.report.problems += 1
        fault = None
        try:
            problem()
        except Exception as error:  # of the driver, of Triton or of the library: each would stop a training run
            fault = _innermost(error)
        launches, maps = self.stub.taken()
        for at, launch in enumerate(launches):
            kernel = self.report.kernels[launch.kernel.decode().removesuffix("_kernel")]
            kernel.add(Kernel(1, set(), sum(one.launches == at for one in maps), tuple(launch.grid), launch.shared))
        if fault is None and len(launches) != len(self.started):
            # Triton's launcher passes over a grid whose product is 0, or past 2^31.
            fault = f"of {len(self.started)} launches {len(launches)} reached the driver"
        if fault is not None:
            kernel_name = self.started[-1] if self.started else "no kernel"
            self.report.faults.append(f"{self.architecture}, {kernel_name}, {setting}: {fault}")

    def run_anew(self, setting: str, problem: Callable[[], object]) -> None:
        """Also counts what is compiled for it, as if by a process that launches nothing else."""
        before = self.taken()
        for kernel in jit_functions().values():
            kernel.device_caches.clear()
        self.run(setting, problem)
        for name, kernel in self.report.kernels.items():
            most = OFFSETS_COMPILATIONS if name == "offsets_product" else RUN_COMPILATIONS
            if len(kernel.keys) > most:
                fault = f"compiled {len(kernel.keys)} times over steps of {RUN_TOKENS} tokens, at most {most}"
                self.report.faults.append(f"{self.architecture}, {name}, {setting}: {fault}")
        self.report.add(before)

    def taken(self) -> Report:
        """What there was since the last time."""
        found, self.report = self.report, Report()
        return found


def cut(case: Case) -> Case:
    """The same with every operand cut out of a larger tensor, one element after a multiple of 16 bytes."""

    def moved(tensor: Tensor) -> Tensor:
        flat = tensor.new_empty(tensor.numel() + 1)[1:]
        return flat.view(tensor.shape).copy_(tensor)

    parts: dict[str, Any] = {name: moved(part) for name, part in vars(case).items() if isinstance(part, Tensor)}
    return replace(case, **parts)


def transposed(case: Case) -> Case:
    """The same with heads [V, D] that lie in memory as [D, V]."""
    student, teacher = (weight.t().contiguous().t() for weight in (case.student_weight, case.teacher_weight))
    return replace(case, student_weight=student, teacher_weight=teacher)


Problem = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Job:
    """What one process starts at a time. variant: one of STRATEGIES. size: of the GPU checks; setting: if not all."""

    part: str
    variant: str
    dtype: str
    divergence: Any
    size: str
    setting: str | None = None

    @property
    def strategy(self) -> str:
        return "tokens" if self.variant == OFFSETS else self.variant


def stepped(case: Case, **more: Any) -> None:
    """Loss and gradients."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    loss = case.loss(leaves, **more)
    torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, list(leaves.values()))


def both_learn(case: Case, **more: Any) -> None:
    """Loss and gradients of both models."""
    assert case.labels is not None
    parts = (case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight)
    leaves = hidden, head, teacher_hidden, teacher_head = [part.detach().requires_grad_() for part in parts]
    more["divergence"] = case.options.divergence
    loss = kd.linear_okd_loss(hidden, head, teacher_hidden, teacher_head, case.labels, **more)
    torch.autograd.grad(loss.student + loss.teacher, leaves)


def checks(job: Job) -> Iterator[Problem]:
    """What the GPU checks start, and the ways to call for other launches than theirs.

    Draws of one setting differ in their values alone, so the first one stands for all.
    """
    dtype = DTYPES[job.dtype]
    for name, setting in gpu_checks.settings_of(job.size).items():
        case = gpu_checks.cases(setting, job.divergence, dtype, 3.0)[0]
        yield name, partial(case.run, strategy=job.strategy, memory_budget=gpu_checks.budget(case, setting.chunks))
    case = gpu_checks.repeated(job.divergence, dtype, job.size, "cpu")
    options: dict[str, Any] = {"strategy": job.strategy, "memory_budget": gpu_checks.budget(case, 3)}
    yield "repeated", partial(stepped, case, **options)
    yield "metrics", partial(stepped, case, return_metrics=True, **options)
    yield "both models learn", partial(both_learn, case, **options)
    yield "cut from larger tensors", partial(stepped, cut(case), **options)
    yield "transposed heads", partial(stepped, transposed(case), **options)
    assert case.labels is not None
    yield "every token masked", partial(stepped, replace(case, labels=torch.full_like(case.labels, -100)), **options)


def step_of(head: Head, tokens: int, job: Job) -> None:
    def empty(rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=DTYPES[job.dtype])

    hidden, weight = (empty(rows, head.student_dim).requires_grad_() for rows in (tokens, head.vocab))
    teacher_hidden, teacher_weight = (empty(rows, head.teacher_dim) for rows in (tokens, head.teacher_vocab))
    options: dict[str, Any] = {"vocab_size": head.vocab, "strategy": job.strategy, "memory_budget": REAL_BUDGET}
    loss = kd.linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, divergence=job.divergence, **options)
    torch.autograd.grad(loss, (hidden, weight))


def real_sizes(job: Job) -> Iterator[Problem]:
    """Real heads, and the most tokens and columns at once; what large tensors hold is neither written nor read."""
    for name, head in HEADS.items():
        yield f"{name}, 8192 tokens", partial(step_of, head, 8192, job)
    yield "gemma3, 32768 tokens", partial(step_of, HEADS["gemma3"], 32_768, job)


def steps(job: Job, budget: int | None) -> None:
    """Of one batch shape, of which the labels keep another number of tokens each time, and a t that changes."""
    tokens, dims, dtype = max(RUN_TOKENS), (64, 96), DTYPES[job.dtype]
    hidden, head = (torch.zeros(rows, dims[0], dtype=dtype, requires_grad=True) for rows in (tokens, RUN_VOCAB))
    teacher = torch.zeros(tokens, dims[1], dtype=dtype), torch.zeros(RUN_VOCAB, dims[1], dtype=dtype)
    options: dict[str, Any] = {"divergence": job.divergence, "ce_weight": 0.5, "strategy": job.strategy, "memory_budget": budget}
    for step, kept in enumerate(RUN_TOKENS):
        labels = torch.where(torch.arange(tokens) < kept, 1, -100)
        loss = kd.linear_kd_loss(hidden, head, *teacher, labels, t=torch.tensor(0.4 + step / 10), **options)
        torch.autograd.grad(loss, (hidden, head))


def training_runs(job: Job) -> Iterator[Problem]:
    for budget in RUN_BUDGETS:
        yield "training run" if budget is None else f"training run in {budget} bytes", partial(steps, job, budget)


PARTS: dict[str, Callable[[Job], Iterator[Problem]]] = {"checks": checks, "real sizes": real_sizes, "training run": training_runs}


def jobs(
    architecture: str,
    size: str,
    divergences: Sequence[str],
    dtypes: Sequence[str],
    strategies: Sequence[str],
    setting: str | None = None,
) -> list[Job]:
    """The longest first. Sizes and token counts are launched alike for every dtype and divergence: those parts take a few only."""
    return [
        Job(part, strategy, dtype, divergence, size, setting)
        for strategy in sorted(strategies, reverse=True)
        for part in PARTS
        for dtype in dtypes
        for divergence in divergences
        if part == "checks" or (dtype == "bf16" and divergence in QUICK_DIVERGENCES)
        if strategy != OFFSETS or (architecture, dtype) == (FULL, "bf16")
    ]


_watch: Watch | None = None


def _prepare(architecture: str) -> None:
    """Once in a process: Triton has one driver there, and kernels that were compiled for it."""
    global _watch
    torch.set_num_threads(1)
    _watch = Watch(architecture)


def _done(job: Job) -> Report:
    assert _watch is not None
    run = _watch.run_anew if job.part == "training run" else _watch.run
    with as_on_a_gpu(_watch.architecture), offset_logits() if job.variant == OFFSETS else nullcontext():
        for setting, problem in PARTS[job.part](job):
            if job.setting in (None, setting):
                run(f"{job.variant}, {job.dtype}, {job.divergence}, {setting}", problem)
    return _watch.taken()


def launched(architecture: str, wanted: Sequence[Job]) -> Report:
    """The jobs side by side, as many as there are processors."""
    report = Report()
    processes = min(len(wanted), len(os.sched_getaffinity(0)))
    # an executor, and not a pool, which would wait for ever for a process that the launcher's C code has brought down
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _prepare, (architecture,)) as pool:
        for at, part in enumerate(pool.map(_done, wanted)):
            report.add(part)
            print(f"{architecture}: {at + 1} of {len(wanted)} jobs done", file=sys.stderr)
    return report


HEADER = ("architecture", "kernel", "launches", "compiled", "tensor maps", "largest grid", "shared", "seconds")


def table(found: dict[str, Report]) -> str:
    lines = [HEADER] + [
        (
            *(architecture, name, str(kernel.launches), str(len(kernel.keys)), str(kernel.tensor_maps)),
            *(" x ".join(map(str, kernel.grid[:2])), str(kernel.shared), f"{kernel.seconds:.0f}"),
        )
        for architecture, report in found.items()
        for name, kernel in report.kernels.items()
    ]
    return static.aligned(lines, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"what CI runs: {FULL} alone, fewer settings and divergences")
    parser.add_argument("--only", choices=ARCHITECTURES, help="one architecture (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the models (default: all)")
    parser.add_argument("--strategy", choices=STRATEGIES, help="one strategy (default: both)")
    parser.add_argument("--divergence", choices=kd.divergences(), help="one divergence (default: all)")
    parser.add_argument("--setting", help="one problem, by the name that a fault ends with (default: all)")
    chosen = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 is set, so nothing would be launched; unset it", file=sys.stderr)
        return 2
    try:
        built()
    except CompilerMissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {}
    for architecture in (chosen.only,) if chosen.only else (FULL,) if chosen.quick else ARCHITECTURES:
        thorough = architecture == FULL and not chosen.quick
        divergences = (chosen.divergence,) if chosen.divergence else kd.divergences() if thorough else QUICK_DIVERGENCES
        wanted = jobs(
            architecture,
            "full" if thorough else "quick",
            divergences,
            (chosen.dtype,) if chosen.dtype else tuple(DTYPES),
            (chosen.strategy,) if chosen.strategy else STRATEGIES,
            chosen.setting,
        )
        found[architecture] = launched(architecture, wanted)
    faults = [fault for report in found.values() for fault in report.faults]
    problems = sum(report.problems for report in found.values())
    if problems == 0:
        print(f"error: --setting is {chosen.setting!r}, which none of these has", file=sys.stderr)
        return 2
    print(table(found))
    print(f"\n{problems} problems launched, {len(faults)} faults" + "".join(f"\n  {fault}" for fault in faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
