"""How much memory, how many matrix products and how long a loss step takes, before it runs. The strategies run what the plan says.

Bytes are counted from what the code allocates; tests hold them to what a process takes. Seconds are a prediction (roofline.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdkernels import backends
from kdkernels.backends.dtypes import product_dtype
from kdkernels.divergences import Divergence, DivergenceName, resolve
from kdkernels.engine.cut import CUTS, STRATEGIES, Size, Strategy, by_tokens
from kdkernels.planning import devices, roofline
from kdkernels.scalars import flag, one_of, whole

DEFAULT_BUDGET = {"cpu": 512 * 2**20}
OTHER_BUDGET = 2**30
GPU_SHARE = 16  # of a GPU's memory
# Live [tokens, V] tensors in the working dtype of the eager computation. In the formula: both log-softmaxes and three terms, and
# what the student's loss keeps for its backward while that of a teacher that learns too is made. When the gradients are made: both
# log-softmaxes and the gradient of the student's logits.
EAGER_COPIES = {1: 5, 2: 6}
EAGER_COPIES_WITH_GRADIENTS = 3


@dataclass(frozen=True)
class Plan:
    """One loss step with gradients; bytes are above the inputs and the returned gradients, unless said otherwise.

    strategy: "tokens" or "vocab". chunk_rows: tokens per chunk, of ``chunks`` in all. block_columns: vocabulary columns per block,
        of ``blocks`` in all. The one that the strategy does not cut is whole.
    offsets: whether the logits of "tokens" are kept as 16-bit offsets (KDKERNELS_LOGITS, docs/gpus.md).
    logits_bytes: the reused scratch for logits and their gradients, and what pads its rows on a GPU: the memory budget bounds it.
    accumulator_bytes: float32 sums of a 16-bit gradient that several chunks or blocks add to: the head's, or the hidden states'.
    scratch_bytes: all of the step's own memory, at its peak. peak_bytes: scratch, inputs and returned gradients together.
    flops: of the matrix products. seconds: predicted time; None for a dtype or device whose rates are not known.
    products_seconds: of the bare products, which no loss with these gradients can do without, predicted as seconds are.
    eager_*: the same for plain PyTorch.
    """

    strategy: str
    chunk_rows: int
    chunks: int
    block_columns: int
    blocks: int
    offsets: bool
    logits_bytes: int
    accumulator_bytes: int
    scratch_bytes: int
    peak_bytes: int
    flops: int
    seconds: float | None
    products_seconds: float | None
    eager_scratch_bytes: int
    eager_peak_bytes: int
    eager_flops: int
    eager_seconds: float | None

    def __repr__(self) -> str:
        """What is chosen, and what it takes, in units that can be read."""
        cut = f"{self.chunks:,} x {self.chunk_rows:,} tokens"
        if self.strategy == "vocab":
            cut = f"{self.blocks:,} x {self.block_columns:,} columns"
        ours = _taken(self.scratch_bytes, self.peak_bytes, self.flops, self.seconds)
        eager = _taken(self.eager_scratch_bytes, self.eager_peak_bytes, self.eager_flops, self.eager_seconds)
        return f"Plan({self.strategy!r}, {cut}: {ours}; eager: {eager})"


def _taken(scratch: int, peak: int, flops: int, seconds: float | None) -> str:
    def short(number: float, unit: str) -> str:
        return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"

    time = [] if seconds is None else [short(seconds * 1e3, "ms")]
    return ", ".join(
        (f"peak {short(peak / 2**20, 'MiB')}", f"scratch {short(scratch / 2**20, 'MiB')}", short(flops / 1e9, "GFLOP"), *time)
    )


def default_budget(device: torch.device, on: devices.Device | None = None) -> int:
    """Bytes of logits scratch where the caller names none: 512 MiB on a CPU, a sixteenth of a GPU's memory, 1 GiB elsewhere.

    on: what the device is, where it is planned for by its name; otherwise the GPU that is here.
    """
    if device.type != "cuda":
        return DEFAULT_BUDGET.get(device.type, OTHER_BUDGET)
    return (devices.gpu_memory(device) if on is None else on.memory) // GPU_SHARE


def _passes(way: str, size: Size, on: devices.Device) -> tuple[roofline.Pass, ...]:
    """way: "products", "eager", or one of CUTS, whose passes follow from its Cut."""
    of_tokens = (size.vocab, size.student_dim, size.teacher_dim, product_dtype(size.dtype, size.device))
    learns = roofline.Learns(
        train_head=size.train_head, online_teacher=size.learners == 2, train_teacher_head=size.train_teacher_head
    )
    if way == "products":
        return roofline.products_passes(size.tokens, *of_tokens, **learns)
    loss = roofline.Loss(divergence=size.divergence, **learns)
    if way == "eager":
        return roofline.eager_passes(size.tokens, *of_tokens, **loss, cached_row=on.cached_row)
    cut = CUTS[way](size)
    if cut.whole_rows:
        return roofline.tokens_passes(size.tokens, *of_tokens, **loss, chunk_rows=cut.rows, offsets=size.offsets)
    passes: list[roofline.Pass] = []
    for rows, count in roofline.parts(size.tokens, cut.rows):
        chunk = roofline.vocab_passes(rows, *of_tokens, **loss, block_columns=cut.columns, shared=not size.fused)
        passes += roofline.repeated(count, chunk)
    return tuple(passes)


def choose(strategy: str, size: Size, on: devices.Device | None = None) -> str:
    """The strategy that "auto" stands for: the one predicted to be faster, from rates that are the same in every run.

    on: the GPU that is planned for by its name; otherwise the device's nominal rates.
    """
    if strategy != "auto":
        return strategy
    on = on or devices.nominal(size.device)
    # Every rank decides alike, by the most columns that one holds; what is known of a teacher makes no difference here.
    # (What keeps offsets from being made goes on doing so.)
    columns = max(size.vocab, size.widest)
    size = replace(size, vocab=columns, shared=False, alone=False, known=False, no_offsets=not size.offsets)
    # One chunk is the fewest products, and no head is read twice.
    if size.tokens <= by_tokens(size).rows or product_dtype(size.dtype, size.device) not in on.rates:
        return "tokens"
    return min(CUTS, key=lambda name: roofline.seconds(_passes(name, size, on), on))


def _at_least_1(name: str, value: Any, accepted: str) -> int:
    found = whole(name, value, accepted)
    if found < 1:
        raise ValueError(f"{name} is {accepted}, at least 1, got {value}")
    return found


def plan(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    memory_budget: int | None = None,
    train_head: bool = True,
    teacher_dtype: torch.dtype | None = None,
    strategy: Strategy = "auto",
    divergence: Divergence | DivergenceName = "forward_kl",
    online_teacher: bool = False,
    train_teacher_head: bool = False,
) -> Plan:
    """What one step of ``linear_kd_loss``, or of ``linear_okd_loss`` with an ``online_teacher``, will take: losses and gradients.

    tokens: kept rows N. vocab: V. student_dim, teacher_dim: hidden sizes. dtype: of hidden states and heads (teacher_dtype: of the
    teacher's, if different): float32, bfloat16, float16 or float64. device: "cpu" or "cuda", or a GPU of ``devices.DEVICES`` such
    as "H100", which need not be here.
    memory_budget: bytes for logits scratch (default: as for the loss there; a sixteenth of the named GPU's memory). train_head:
    whether the student's head takes a gradient. strategy, divergence: as for the loss. online_teacher: the teacher's hidden states
    take a gradient too; train_teacher_head: and so does its head. Raises ValueError for sizes below 1, a budget below 1 byte, names
    that are not known, and a teacher's head that is trained alone, and TypeError for what is of another type.
    """
    sizes = {"tokens": tokens, "vocab": vocab, "student_dim": student_dim, "teacher_dim": teacher_dim}
    tokens, vocab, student_dim, teacher_dim = (_at_least_1(name, value, "an integer") for name, value in sizes.items())
    if memory_budget is not None:
        memory_budget = _at_least_1("memory_budget", memory_budget, "a number of bytes")
    for name, of in {"dtype": dtype, "teacher_dtype": dtype if teacher_dtype is None else teacher_dtype}.items():
        backends.check_dtype(name, of)
    flags = {"train_head": train_head, "online_teacher": online_teacher, "train_teacher_head": train_teacher_head}
    train_head, online_teacher, train_teacher_head = (flag(name, value) for name, value in flags.items())
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device is a name or a torch.device, got {type(device).__name__}")
    one_of("strategy", strategy, STRATEGIES)
    if train_teacher_head and not online_teacher:
        raise ValueError("train_teacher_head is True; accepted only with online_teacher=True")
    runs_on, on = devices.resolve_device(device)
    named = on if on is not None and not on.measured and on.name.lower() == str(device).lower() else None
    absent = devices.nominal(runs_on) if named is None and runs_on.type == "cuda" and not torch.cuda.is_available() else named
    size = Size(
        tokens=tokens,
        vocab=vocab,
        student_dim=student_dim,
        teacher_dim=teacher_dim,
        dtype=dtype,
        teacher_dtype=dtype if teacher_dtype is None else teacher_dtype,
        divergence=resolve(divergence).name,
        train_head=train_head,
        device=runs_on,
        budget=default_budget(runs_on, named) if memory_budget is None else memory_budget,
        learners=2 if online_teacher else 1,
        train_teacher_head=train_teacher_head,
        architecture="" if absent is None else absent.architecture,
    )
    return _planned(choose(strategy, size, named), size, on)


def _planned(strategy: str, size: Size, on: devices.Device | None) -> Plan:
    """on: whose rates the times are predicted from, if they are known."""
    tokens, vocab, student_dim, teacher_dim = size.tokens, size.vocab, size.student_dim, size.teacher_dim
    student_bytes, teacher_bytes = size.dtype.itemsize, size.teacher_dtype.itemsize
    cut = CUTS[strategy](size)
    inputs = (tokens + vocab) * (student_dim * student_bytes + teacher_dim * teacher_bytes)
    gradients = (tokens + (vocab if size.train_head else 0)) * student_dim * student_bytes
    student_product, teacher_product = 2 * tokens * vocab * student_dim, 2 * tokens * vocab * teacher_dim
    gradient_products = (2 if size.train_head else 1) * student_product
    if size.learners == 2:
        gradients += (tokens + (vocab if size.train_teacher_head else 0)) * teacher_dim * teacher_bytes
        gradient_products += (2 if size.train_teacher_head else 1) * teacher_product
    both = student_product + teacher_product
    copy = tokens * vocab * max(4, student_bytes)
    eager = max(EAGER_COPIES[size.learners] * copy, EAGER_COPIES_WITH_GRADIENTS * copy + gradients)
    predict = functools.partial(_predicted, size=size, on=on)
    return Plan(
        strategy=strategy,
        chunk_rows=cut.rows,
        chunks=cut.chunks,
        block_columns=cut.columns,
        blocks=cut.blocks,
        offsets=cut.whole_rows and size.offsets,
        logits_bytes=cut.logits_bytes,
        accumulator_bytes=cut.accumulator_bytes,
        scratch_bytes=cut.scratch_bytes,
        peak_bytes=cut.scratch_bytes + inputs + gradients,
        flops=cut.products * both + gradient_products,
        seconds=predict(strategy),
        products_seconds=predict("products"),
        eager_scratch_bytes=eager - gradients,
        eager_peak_bytes=eager + inputs,
        eager_flops=both + gradient_products,
        eager_seconds=predict("eager"),
    )


def _predicted(way: str, size: Size, on: devices.Device | None) -> float | None:
    if on is None or product_dtype(size.dtype, size.device) not in on.rates:
        return None
    return roofline.seconds(_passes(way, size, on), on)
