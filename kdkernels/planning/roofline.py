"""How long a loss step should take on a device that is not at hand: a stated roofline, not a measurement.

A step is a sequence of passes. A pass does some matrix work, issues some instructions and moves some bytes; it takes the longest of
the three, and each of its kernels costs a launch:

    seconds = Σ max(flops / (rate · MATRIX_EFFICIENCY · efficiency · filled),
                    instructions / (issue rate · ISSUE_EFFICIENCY),
                    bytes / (bandwidth · MEMORY_EFFICIENCY)) + launches · overhead

``filled`` is what a library product loses to tiles that hang over its result and to waves that do not fill the device; and EXPOSED
of the shorter of its first and last part it does not hide behind the longer one.

On a processor a product takes both, one after the other: a matrix library copies its operands into its own order before it
multiplies, and the same cores do both. (A chunk of ``tokens`` took a time for the heads and one for each of its rows, from 4 rows
to 256.) The bytes of a product go at their own rate there, a quarter to a half of what a copy reaches.

The passes of a strategy are plain functions of its sizes. Everything that comes out is a prediction, and is called one wherever it
is printed; ``python -m benchmarks.roofline`` holds the model against published measurements.

Notation: N tokens, V vocabulary, D_s and D_t hidden sizes, U = 2·N·V·D one head product. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from kdkernels.divergences import resolve
from kdkernels.engine.cut import OFFSETS_COLUMNS
from kdkernels.planning import traffic
from kdkernels.planning.devices import Device

# What large products reach of the dense rate where their tiles fill the device and nothing else holds them up, and how much of
# moving operands and results they leave exposed: logits of a small hidden size take as long to write as to multiply. Both were
# fitted to the steps of both strategies on an H100 (benchmarks/results/gpu-h100.jsonl), of which docs/memory-planning.md has the
# errors. The clock falls under a full matrix load, so no library reaches the datasheet's rate.
MATRIX_EFFICIENCY, EXPOSED = 0.78, 0.5
# Tiles that matrix libraries cut results into, and what the small one reaches of the rate: it waits for its operands. Where there
# are fewer tiles than multiprocessors the inner size is split, into parts of at least SPLIT_INNER, and the parts are added up. The
# two shares are estimates.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.88))
SPLIT_INNER, SPLIT_EFFICIENCY = 512, 0.93
# Instructions that kernels issue, of those that the multiprocessors could at the datasheet's clock: 1.7 of 1.98 GHz under load, and
# three of four slots filled. An estimate, not a measurement.
ISSUE_EFFICIENCY = 0.64
# Instructions of the row kernel for each logit: statistics, sums, gradient. Read off the machine code for sm_90 by ``make static``,
# which holds these to it: float32 logits, bfloat16 gradient, t < 1 (at t = 1 each sweep takes ten fewer), no bias, softcap, T or
# labels. A divergence that is not listed is counted at the most in each sweep that it makes.
ROW_INSTRUCTIONS: dict[str, tuple[int, int, int]] = {
    "forward_kl": (31, 0, 41),
    "reverse_kl": (41, 0, 36),
    "jsd": (28, 64, 63),
    "skew_forward_kl": (28, 65, 66),
    "skew_reverse_kl": (28, 66, 66),
    "total_variation": (28, 37, 41),
}
# The same of the row kernel over 16-bit offsets, which has no statistics to make: sums (0 where they are the gradient's), gradient.
OFFSETS_INSTRUCTIONS: dict[str, tuple[int, int]] = {
    "forward_kl": (0, 34),
    "reverse_kl": (29, 29),
    "jsd": (56, 56),
    "skew_forward_kl": (58, 59),
    "skew_reverse_kl": (58, 58),
    "total_variation": (29, 35),
}
# And of the epilogue that makes them, which nothing overlaps: a program has one tile at a time (instructions of the kernel for
# sm_90 but its loop's, over the logits of a tile: 17.5 for the student, of whom it says what is banned, and 15 for the teacher).
OFFSETS_EPILOGUE = 16
# Tokens that the bare products are made for at a time (benchmarks/contenders.py).
PRODUCTS_BLOCK = 4096
# What kernels that stream large tensors reach of the datasheet's bandwidth: 0.92 to 0.95 in the forward rows of Liger's table for
# H100s (benchmarks/published.csv); the rest goes to refresh and to turns between reads and writes.
MEMORY_EFFICIENCY = 0.92


@dataclass(frozen=True)
class Pass:
    """flops: of matrix products. bytes: read and written in main memory. dtype: of the products. launches: kernels.

    times: how often the pass is made; the other figures are of one of them. shape: rows, columns and inner size of a library's
    product, whose tiles count. fused: whether a kernel of this library multiplies. instructions: of all threads.
    """

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32
    launches: int = 1
    times: int = 1
    shape: tuple[int, int, int] | None = None
    fused: bool = False
    instructions: float = 0.0


def seconds(passes: Sequence[Pass], on: Device) -> float:
    """Predicted time of the passes one after the other."""
    return sum(step.times * ((_on_cpu if on.measured else _on_gpu)(step, on) + step.launches * on.overhead) for step in passes)


def _on_cpu(step: Pass, on: Device) -> float:
    multiplying = step.flops / on.rate(step.dtype) if step.flops else 0.0
    operands = on.operand_bandwidth.get(step.dtype) if step.flops else None
    arriving = step.bytes / (operands or on.bandwidth)
    return multiplying + arriving if operands else max(multiplying, arriving)


def _on_gpu(step: Pass, on: Device) -> float:
    multiplying = 0.0
    if step.flops:
        share = on.fused_efficiency if step.fused else filled(step.shape, on.units) if step.shape else 1.0
        reached = MATRIX_EFFICIENCY * share
        multiplying = step.flops / (on.rate(step.dtype) * reached)
    issuing = step.instructions / (on.issue * ISSUE_EFFICIENCY)
    moving = step.bytes / (on.bandwidth * MEMORY_EFFICIENCY)
    exposed = EXPOSED * min(multiplying, moving) if step.shape else 0.0
    return max(multiplying, issuing, moving) + exposed


def filled(shape: tuple[int, int, int], units: int) -> float:
    """What a product [rows, inner] x [inner, columns] keeps of the rate on so many multiprocessors, by the best of TILES.

    A tile that hangs over the edge takes as long as a whole one, and so does the last wave of tiles, however few they are.
    """
    rows, columns, inner = shape
    best = 0.0
    for height, width, reached in TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        busy = tiles / (math.ceil(tiles / units) * units)
        if tiles < units:
            parts = min(inner / SPLIT_INNER, units // tiles)
            busy = max(busy, parts * tiles / units * SPLIT_EFFICIENCY)
        best = max(best, reached * busy * rows * columns / (tiles * height * width))
    return best


def total_flops(passes: Sequence[Pass]) -> float:
    """Of all matrix products."""
    return sum(step.times * step.flops for step in passes)


def total_bytes(passes: Sequence[Pass]) -> float:
    """Read and written in main memory."""
    return sum(step.times * step.bytes for step in passes)


def parts(total: int, size: int | None) -> list[tuple[int, int]]:
    """Sizes of the parts of ``size`` (None: one part), and how many there are of each: the last one may be smaller."""
    size = min(size or total, total)
    count, rest = divmod(total, size)
    return [(size, count), *([(rest, 1)] if rest else [])]


def repeated(count: int, passes: Sequence[Pass]) -> list[Pass]:
    return [replace(step, times=count * step.times) for step in passes]


def product(rows: int, inner: int, columns: int, dtype: torch.dtype, out_bytes: float | None = None) -> Pass:
    """A library product [rows, inner] x [inner, columns]: operands read once, the result (or out_bytes) written."""
    moved = (rows * inner + inner * columns) * dtype.itemsize
    written = rows * columns * dtype.itemsize if out_bytes is None else out_bytes
    return Pass(2.0 * rows * inner * columns, moved + written, dtype, shape=(rows, columns, inner))


# How often eager PyTorch goes over a float32 [N, V] tensor in the plain formula of each divergence, given both log-softmaxes: reads
# and writes of the forward, its kernels, reads and writes of the backward down to the gradient of the student's log-softmax, its
# kernels. exp and log are 2, a - b and a * b are 3, a sum is 1; where the upstream gradient is one number it is not read.
# Counted, as it is the expression that one writes and not the pair function: tests/planning/test_roofline.py counts them again.
# A divergence that is not listed takes the longest.
EAGER_TRAFFIC: dict[str, tuple[int, int, int, int]] = {
    "forward_kl": (9, 4, 4, 2),
    "reverse_kl": (9, 4, 10, 4),
    "jsd": (29, 13, 33, 13),
    "skew_forward_kl": (18, 8, 12, 5),
    "skew_reverse_kl": (18, 8, 23, 9),
    "total_variation": (10, 5, 7, 3),
}


class Learns(TypedDict):
    """Who takes a gradient beside the student's hidden states.

    online_teacher: the teacher learns too, by forward KL to the student; train_teacher_head: and so does its head.
    """

    train_head: bool
    online_teacher: bool
    train_teacher_head: bool


class Loss(Learns):
    """What the passes of every strategy depend on beside the sizes."""

    divergence: str


def check_divergence(name: str) -> str:
    """The name itself; ValueError for one that ``kd.divergences()`` does not list."""
    return resolve(name).name


def eager_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    divergence: str = "forward_kl",
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
    cached_row: int = 0,
) -> tuple[Pass, ...]:
    """Loss and gradients in plain PyTorch: logits of both models, a float32 copy of each, its log-softmax, the formula, back.

    Products: 3·Us + Ut. cached_row: float32 rows of at most so many bytes are read once by a softmax (``Device.cached_row``),
    longer ones once for each of its sweeps: maximum, sum, result; in the backward sum, result. An online teacher goes through the
    formula of forward KL and back from the same log-softmaxes, and through a cross-entropy, whose gradient is made and added.
    """
    logits, single = tokens * vocab * dtype.itemsize, tokens * vocab * 4
    resident = vocab * 4 <= cached_row
    longest = max(EAGER_TRAFFIC.values(), key=sum)
    forward, forward_launches, backward, backward_launches = EAGER_TRAFFIC.get(check_divergence(divergence), longest)
    cast = [Pass(0.0, logits + single)] if dtype.itemsize < 4 else []
    softmax, softmax_back = Pass(0.0, (2 if resident else 4) * single), Pass(0.0, (3 if resident else 4) * single)
    passes = [product(tokens, student_dim, vocab, dtype), product(tokens, teacher_dim, vocab, dtype)]
    passes += [*cast, *cast, softmax, softmax]
    passes += [Pass(0.0, (forward + backward) * single, launches=forward_launches + backward_launches)]
    passes += [softmax_back, *cast, *_gradients(tokens, vocab, student_dim, dtype, train_head)]
    if online_teacher:
        forward, forward_launches, backward, backward_launches = EAGER_TRAFFIC["forward_kl"]
        passes += [Pass(0.0, (forward + backward) * single, launches=forward_launches + backward_launches)]
        passes += [Pass(0.0, 4 * single, launches=2), softmax_back, *cast]
        passes += _gradients(tokens, vocab, teacher_dim, dtype, train_teacher_head)
    return tuple(passes)


def _gradients(
    tokens: int,
    vocab: int,
    dim: int,
    dtype: torch.dtype,
    head: bool,
    out_bytes: float | None = None,
    head_bytes: float | None = None,
) -> list[Pass]:
    """Products of the logits' gradient: dH, and dW if the ``head`` is trained. out_bytes, head_bytes: as for ``product``."""
    made = [product(tokens, vocab, dim, dtype, out_bytes)]
    return [*made, product(vocab, tokens, dim, dtype, head_bytes)] if head else made


def tokens_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    chunk_rows: int | None = None,
    divergence: str = "forward_kl",
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
    offsets: bool = False,
) -> tuple[Pass, ...]:
    """Loss and gradients of the ``tokens`` strategy in chunks of ``chunk_rows`` tokens (None: all in one), a row kernel each.

    Products: 3·Us + Ut. Each chunk reads both heads for its logits, which are kept in at least float32 as on a GPU, and the
    student's again for dH. The row kernel's bytes are those of ``traffic.row_loss``, its instructions those of
    ``row_instructions``; the products read dx back. With several chunks the head's gradient is summed in float32, inside the
    product: read and written by each of them. An online teacher is another row kernel over the same logits, and its own products:
    Ut, or 2·Ut with its head.

    offsets: logits are kept in 16 bits, by products of this library at the rate of others', and an epilogue on top of that.
    """
    logit = 2 if offsets else max(4, dtype.itemsize)
    learners = _learners(student_dim, teacher_dim, divergence, train_head, online_teacher, train_teacher_head)
    summed = chunk_rows is not None and chunk_rows < tokens
    passes: list[Pass] = []
    for rows, count in parts(tokens, chunk_rows):
        one = [product(rows, dim, vocab, dtype, logit * rows * vocab) for dim in (student_dim, teacher_dim)]
        if offsets:
            one += [Pass(0.0, 0.0, instructions=rows * vocab * OFFSETS_EPILOGUE, launches=0)] * 2
        for dim, learned, head in learners:
            if offsets:
                swept = 0 if resolve(learned).slope_by_target else 1
                row = traffic.offsets_row(rows, vocab, OFFSETS_COLUMNS, dtype.itemsize, sweeps=swept)
            else:
                row = traffic.row_loss(rows, vocab, (logit, logit), dtype.itemsize, sweeps=traffic.sweeps(learned))
            one += [Pass(0.0, row.total, instructions=rows * vocab * sum(row_instructions(learned, offsets)))]
            one += _gradients(rows, vocab, dim, dtype, head, head_bytes=8 * vocab * dim if summed else None)
        passes += repeated(count, one)
    if summed and dtype.itemsize < 4:
        passes += [Pass(0.0, vocab * dim * (4 + dtype.itemsize)) for dim, _, head in learners if head]
    return tuple(passes)


def row_instructions(divergence: str, offsets: bool = False) -> tuple[int, int, int]:
    """Of the row kernel for each logit: statistics, sums (0 where the value needs none), gradient."""
    if offsets:
        return 0, *OFFSETS_INSTRUCTIONS.get(check_divergence(divergence), max(OFFSETS_INSTRUCTIONS.values(), key=sum))
    most = tuple(max(counts) for counts in zip(*ROW_INSTRUCTIONS.values(), strict=True))
    statistics, sums, gradient = ROW_INSTRUCTIONS.get(check_divergence(divergence), most)
    return statistics, sums if traffic.sweeps(divergence) == 2 else 0, gradient


def _learners(
    student_dim: int, teacher_dim: int, divergence: str, train_head: bool, online_teacher: bool, train_teacher_head: bool
) -> tuple[tuple[int, str, bool], ...]:
    """Of each model that learns: hidden size, divergence to the other, whether its head is trained."""
    student, teacher = (student_dim, divergence, train_head), (teacher_dim, "forward_kl", train_teacher_head)
    return (student, teacher) if online_teacher else (student,)


def vocab_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    block_columns: int | None = None,
    divergence: str = "forward_kl",
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
    shared: bool = False,
) -> tuple[Pass, ...]:
    """Loss and gradients of the ``vocab`` strategy in blocks of ``block_columns`` columns (None: all in one).

    The forward takes statistics only, Us + Ut with no logits in main memory: once, or twice for a divergence whose value needs the
    log-sum-exps first. The backward recomputes both tiles of a block, writes the gradient tile, and multiplies it: dH is summed in
    float32, dW_b is written once. Products: 4·Us + 2·Ut with one sweep, 5·Us + 3·Ut with two.

    Kernels that multiply are counted at the device's ``fused_efficiency``, and their bytes (``traffic.statistics``,
    ``sums`` and ``gradient``) as if they read every operand from main memory once in each launch: what their other tiles read again
    is taken to come from the cache, as in library products.

    shared: where library products make the tiles instead, at their rate and for both learners. Otherwise an online teacher goes
    over the vocabulary by itself, 2·Us + 2·Ut; its own gradients are Ut, or 2·Ut with its head.
    """
    of = traffic.Products(tokens, vocab, ((student_dim, dtype.itemsize), (teacher_dim, dtype.itemsize)))
    whole = traffic.Tiling.whole(tokens, vocab)
    learners = _learners(student_dim, teacher_dim, divergence, train_head, online_teacher, train_teacher_head)
    products = 2.0 * tokens * (student_dim + teacher_dim)

    def multiplying(learner: int, columns: int, kernel: traffic.Traffic) -> Pass:
        flops = 0.0 if shared and learner else products * columns
        return Pass(flops, kernel.total, dtype, fused=not shared)

    passes: list[Pass] = []
    for at, (_, learned, _) in enumerate(learners):
        kernels = [traffic.statistics(of, whole), traffic.sums(of, whole)][: traffic.sweeps(learned)]
        passes += [multiplying(at, vocab, kernel) for kernel in kernels]
    for columns, count in parts(vocab, block_columns):
        kernel = traffic.gradient(of, traffic.Tiling.whole(tokens, columns), 0, columns, dtype.itemsize)
        one: list[Pass] = []
        for at, (dim, _, head) in enumerate(learners):
            one += [multiplying(at, columns, kernel)]
            one += _gradients(tokens, columns, dim, dtype, head, out_bytes=8 * tokens * dim)
        passes += repeated(count, one)
    if dtype.itemsize < 4:
        passes += [Pass(0.0, tokens * dim * (4 + dtype.itemsize)) for dim, _, _ in learners]
    return tuple(passes)


def products_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
) -> tuple[Pass, ...]:
    """The bare products, which no loss with these gradients can do without: x, z, dH and dW of PRODUCTS_BLOCK tokens at a time.

    Logits in ``dtype``, one gradient of the head, added to in ``dtype``: benchmarks/contenders.py times these beside the losses. Of
    an online teacher dH too, and dW with its head.
    """
    learners = _learners(student_dim, teacher_dim, "forward_kl", train_head, online_teacher, train_teacher_head)
    passes: list[Pass] = []
    for rows, count in parts(tokens, PRODUCTS_BLOCK):
        one = [product(rows, dim, vocab, dtype) for dim in (student_dim, teacher_dim)]
        for dim, _, head in learners:
            added = 2 * vocab * dim * dtype.itemsize if tokens > PRODUCTS_BLOCK else None
            one += _gradients(rows, vocab, dim, dtype, head, head_bytes=added)
        passes += repeated(count, one)
    return tuple(passes)
