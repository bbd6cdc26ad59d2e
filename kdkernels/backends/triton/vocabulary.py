"""Kernels of the ``vocab`` strategy: they multiply hidden states and heads themselves, and no logits reach memory.

A program holds one tile of both models' logits [BLOCK_N tokens, BLOCK_V columns] in registers at a time.

- statistics and sums: a grid of token blocks x splits of the vocabulary. Each program goes over its split and writes what it
  added up, [splits, N, columns]; the caller merges the splits in order, so two runs agree bit for bit.
- gradient: a grid of token blocks x tiles of a block of columns; it stores the gradient of the logits, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.backends.base import Model, Step
from kdkernels.backends.columns import STATS_COLUMNS, SUMS_COLUMNS, WEIGH, Sums
from kdkernels.backends.merge import merged
from kdkernels.backends.products import HeadProducts
from kdkernels.backends.triton import arch, autotune, blocks, device, launch

# Programs in flight that fill every GPU of the table a few times over, so that the vocabulary is split where tokens are few. Each
# split keeps statistics of its own, so that more of them take memory.
PROGRAMS = 512


@triton.jit
def place(at, blocks, others, GROUP: tl.constexpr):
    """Token block and place in the other dimension of the ``at``-th of blocks x others. Those that run at the same time share GROUP
    token blocks, whose hidden states then stay in the cache while the heads stream past them once for each group; in another order
    all hidden states would stream past every tile of a head."""
    first = at // (GROUP * others) * GROUP
    inside = at - first * others
    size = min(blocks - first, GROUP)
    return first + inside % size, inside // size


@triton.jit
def _place(GROUP: tl.constexpr):
    """The same, for this program in its grid."""
    blocks = tl.num_programs(0)
    return place(tl.program_id(1) * blocks + tl.program_id(0), blocks, tl.num_programs(1), GROUP)


@triton.jit
def product(
    hidden, weight, layout, n0, v0, tokens, vocab, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden[n0 :] weight[v0 :]ᵀ, a tile [BLOCK_N, BLOCK_V] in float32; 0 outside.

    hidden: [tokens, D], weight: [vocab, D], as descriptors or pointers. layout: their row strides (None for descriptors), and D.

    float32 operands are multiplied as they are; not by NVIDIA's matrix units, which would take them as three products of TF32 parts
    and cut off where they add: simulated, a logit's error is then 1.9 times that of float32 products at D = 16, 6 times at D = 160
    and more beyond, where a loss may have twice eager's.
    """
    hidden_stride, weight_stride, width = layout
    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if hidden_stride is None:
        for d0 in range(0, width, BLOCK_D):
            logits = tl.dot(hidden.load([n0, d0]), weight.load([v0, d0]).T, logits, input_precision="ieee")
    else:
        rows = n0 + tl.arange(0, BLOCK_N)
        columns = v0 + tl.arange(0, BLOCK_V)
        inner = tl.arange(0, BLOCK_D)
        hidden_ptrs = hidden + rows[:, None].to(tl.int64) * hidden_stride + inner[None, :]
        weight_ptrs = weight + columns[None, :].to(tl.int64) * weight_stride + inner[:, None]
        for d0 in range(0, width, BLOCK_D):
            left = width - d0
            h = tl.load(hidden_ptrs + d0, mask=(rows[:, None] < tokens) & (inner[None, :] < left), other=0.0)
            w = tl.load(weight_ptrs + d0, mask=(columns[None, :] < vocab) & (inner[:, None] < left), other=0.0)
            logits = tl.dot(h, w, logits, input_precision="ieee")
    return logits


@triton.jit
def _tile(
    student_hidden, student_weight, teacher_hidden, teacher_weight, models, n0, v0, tokens, vocab, t, temperature,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x, y and z [BLOCK_N, BLOCK_V] over the temperature. models: (layout, head) of student and teacher. Teacher's hidden states of
    None: y and z are x."""
    columns = (v0 + tl.arange(0, BLOCK_V))[None, :]
    x = product(student_hidden, student_weight, models[0][0], n0, v0, tokens, vocab, BLOCK_N, BLOCK_V, BLOCK_D)
    x = device.after_head(x, models[0][1], temperature, columns, columns < vocab)
    if teacher_hidden is None:  # Triton 3.6 cannot compare a tuple with None
        return x, x, x
    z = product(teacher_hidden, teacher_weight, models[1][0], n0, v0, tokens, vocab, BLOCK_N, BLOCK_V, BLOCK_D)
    z = device.after_head(z, models[1][1], temperature, columns, columns < vocab)
    return x, device.mixed(x, z, t), z


@triton.jit
def _read(ptr, rows, tokens, COLUMNS: tl.constexpr, FIRST: tl.constexpr):
    """The first FIRST columns of a [tokens, COLUMNS] float32 matrix, each [BLOCK_N, 1]."""
    found = ()
    for column in tl.static_range(FIRST):
        read = tl.load(ptr + rows * COLUMNS + column, mask=rows < tokens, other=0.0)
        found = found + (read[:, None],)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def _write(ptr, split, rows, tokens, found, COLUMNS: tl.constexpr):
    """Columns, each [BLOCK_N], of a [splits, tokens, COLUMNS] float32 matrix."""
    at = (split.to(tl.int64) * tokens + rows) * COLUMNS
    for column in tl.static_range(COLUMNS):
        tl.store(ptr + at + column, found[column], mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens", "share"])
def statistics_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    models,
    parts_ptr,  # [splits, tokens, STATS_COLUMNS]
    labels_ptr,  # [tokens] or None
    t_ptr,
    temperature,  # or None for 1
    tokens,
    vocab,
    share,  # columns of a split, a multiple of BLOCK_V
    WEIGH: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    CE: tl.constexpr = labels_ptr is not None
    block, split = _place(GROUP)
    n0 = block * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)
    t = tl.load(t_ptr)
    labels = None
    if CE:
        labels = tl.load(labels_ptr + rows, mask=rows < tokens, other=-1)[:, None]
    state = device.no_statistics(BLOCK_N)
    for v0 in range(split * share, min(split * share + share, vocab), BLOCK_V):
        x, y, z = _tile(
            student_hidden, student_weight, teacher_hidden, teacher_weight, models,
            n0, v0, tokens, vocab, t, temperature, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        columns = (v0 + tl.arange(0, BLOCK_V))[None, :]
        state = device.add_statistics(state, x, y, z, labels, v0, columns, temperature, WEIGH, CE, METRICS)
    _write(parts_ptr, split, rows, tokens, device.finished(state, temperature, CE), device.STATS_COUNT)


@triton.jit(do_not_specialize=["tokens", "share"])
def sums_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    models,
    parts_ptr,  # [splits, tokens, SUMS_COLUMNS]
    stats_ptr,  # [tokens, STATS_COLUMNS]
    target,  # t_ptr, shares as pair functions take them, temperature or None for 1
    tokens,
    vocab,
    share,
    PAIR: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, split = _place(GROUP)
    n0 = block * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)
    t_ptr, shares, temperature = target
    t = tl.load(t_ptr)
    stats = _read(stats_ptr, rows, tokens, device.STATS_COUNT, device.SUMS_READ)
    state = device.no_sums(BLOCK_N)
    for v0 in range(split * share, min(split * share + share, vocab), BLOCK_V):
        x, y, z = _tile(
            student_hidden, student_weight, teacher_hidden, teacher_weight, models,
            n0, v0, tokens, vocab, t, temperature, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        state = device.add_sums(state, x, y, z, stats, shares, PAIR, METRICS)
    _write(parts_ptr, split, rows, tokens, state, device.SUMS_COUNT)


@triton.jit(do_not_specialize=["tokens", "end"])
def gradient_kernel(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight,
    models,
    dx,  # its pointer, [tokens, at least end - begin], and from one row to the next
    of_rows,  # pointers: statistics [tokens, STATS_COLUMNS]; slope sum, weight [2, tokens]; labels [tokens] or None; t, one for all
    terms,
    tokens,
    vocab,
    begin,  # columns of this block
    end,
    PAIR: tl.constexpr,
    REACH: tl.constexpr,  # see device.reach; ``begin`` is a multiple of it
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    block, place = _place(GROUP)
    n0 = block * BLOCK_N
    v0 = begin + place * BLOCK_V
    rows = n0 + tl.arange(0, BLOCK_N)
    columns = (v0 + tl.arange(0, BLOCK_V))[None, :]
    dx_ptr, dx_stride = dx
    stats_ptr, rows_ptr, labels_ptr, t_ptr = of_rows
    t = tl.load(t_ptr)
    x, y, _ = _tile(
        student_hidden, student_weight, teacher_hidden, teacher_weight, models,
        n0, v0, tokens, vocab, t, terms[1], BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    labels = None
    if labels_ptr is not None:
        labels = tl.load(labels_ptr + rows, mask=rows < tokens, other=-1)[:, None]
    stats = _read(stats_ptr, rows, tokens, device.STATS_COUNT, device.GRADIENT_READ)
    slope_sum = tl.load(rows_ptr + rows, mask=rows < tokens, other=0.0)[:, None]
    weight = tl.load(rows_ptr + tokens + rows, mask=rows < tokens, other=0.0)[:, None]
    made = device.gradient(x, y, stats, slope_sum, labels, weight, models[0][1], terms, columns, PAIR)
    dx_ptrs = dx_ptr + rows[:, None].to(tl.int64) * dx_stride + (columns - begin)
    device.store_gradient(dx_ptrs, made, columns, end, REACH, (rows < tokens)[:, None])


def shares(tokens: int, vocab: int, matrix: blocks.Matrix) -> tuple[int, int]:
    """Columns of a split of the vocabulary, and how many splits: enough for PROGRAMS programs."""
    tiles = triton.cdiv(vocab, matrix.block_v)
    wanted = min(tiles, triton.cdiv(PROGRAMS, triton.cdiv(tokens, matrix.block_n)))
    share = triton.cdiv(tiles, wanted) * matrix.block_v
    return share, triton.cdiv(vocab, share)


class LearnerSweeps:
    """The sweeps of one learner with the products inside the kernels."""

    def __init__(self, step: Step, hidden: tuple[Tensor, Tensor], tile: Tensor, buffer: Tensor) -> None:
        """hidden: both models' counted rows, in their products' dtype. tile: scratch [count, Vb] of the student's."""
        self.step, self.tile, self.buffer = step, tile, buffer
        self.models = [
            (rows.contiguous(), model.weight.to(model.dtype), model.bias, scale, softcap)
            for rows, model, scale, softcap in zip(
                hidden, (step.student, step.teacher), step.terms.head[::2], step.terms.head[1::2], strict=True
            )
        ][: 1 if step.alone else 2]
        index = step.index(0, step.count)
        self.labels, self.weights = step.labels_at(index), step.weights[index] * step.scale
        self.t = step.t.to(torch.float32)
        _, _, self.temperature, self.kd, self.ce = step.terms.loss
        ce = self.ce if self.labels is not None else 0.0
        self.terms = launch.term_arguments(step.terms.resolved(), self.temperature, self.kd, ce)
        self.widest = max((step.student.dtype, step.teacher.dtype), key=lambda dtype: dtype.itemsize)
        self.table = blocks.entry(step.device, self.widest)
        self.pair = launch.pair_function(step.terms.divergence, self.temperature)
        self.dressed = any(bias is not None or softcap for _, _, bias, _, softcap in self.models)
        self.lean = step.terms.divergence in blocks.LEAN

    def matrix(self, kernel: str) -> blocks.Matrix:
        """The table's blocks; the roomy ones for heads with a bias or a softcap, for metrics, and for long formulas."""
        crowded = {
            "statistics": self.step.metrics,
            "sums": not self.lean,
            "gradient": not self.lean,
        }
        if kernel == "sums" and self.step.metrics and self.table.measured:
            return self.table.measured
        roomy = self.table.roomy if self.dressed or crowded[kernel] else None
        return roomy or getattr(self.table, kernel)

    def _operands(self, matrix: blocks.Matrix) -> list[Any]:
        """Hidden states and weight of student and teacher, then both's (layout, head); None for a teacher that is not looked at.

        Triton's launcher looks for descriptors among the arguments themselves, and not inside tuples.
        """
        operands: list[Any] = [None] * 4
        models: list[Any] = [None] * 2
        for at, (hidden, weight, bias, scale, softcap) in enumerate(self.models):
            *operands[2 * at : 2 * at + 2], layout = launch.operands(hidden, weight, matrix, self.step.device)
            models[at] = layout, launch.head_arguments(bias, scale, softcap)
        return [*operands, tuple(models)]

    def _run(self, kernel: Any, matrix: blocks.Matrix, grid: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        """grid: from a Matrix. Starts the kernel with the table's blocks, or with those that a search finds to be faster."""

        def start(chosen: blocks.Matrix) -> None:
            kernel[grid(chosen)](*self._operands(chosen), *arguments, **constants, **chosen.blocks(), **chosen.options())

        with arch.on(self.step.device):
            start(autotune.chosen(kernel, matrix, self.step.device, self.widest, start))

    def _over_splits(self, kernel: Any, matrix: blocks.Matrix, columns: int, arguments: Any, **constants: Any) -> Tensor:
        """Partial results [splits, count, columns] of a kernel that goes over the vocabulary in splits."""
        count, vocab = self.step.count, self.step.vocab
        share, splits = shares(count, vocab, matrix)
        parts = self.t.new_empty((splits, count, columns))

        def grid(chosen: blocks.Matrix) -> tuple[int, int]:
            return triton.cdiv(count, chosen.block_n), splits

        self._run(kernel, matrix, grid, (parts, *arguments, count, vocab, share), **constants)
        return parts

    def statistics(self, weigh: str, ce: bool) -> Tensor:
        arguments = (self.labels if ce else None, self.t, self.terms[1])
        constants = {"WEIGH": WEIGH[weigh], "METRICS": self.step.metrics}
        parts = self._over_splits(statistics_kernel, self.matrix("statistics"), len(STATS_COLUMNS), arguments, **constants)
        return merged(parts.double(), weigh)

    def sums(self, stats: Tensor) -> Tensor:
        arguments = (stats.float(), (self.t, self.terms[0], self.terms[1]))
        constants = {"PAIR": self.pair, "METRICS": self.step.metrics}
        parts = self._over_splits(sums_kernel, self.matrix("sums"), len(SUMS_COLUMNS), arguments, **constants)
        sums = parts.sum(0, dtype=torch.float64)
        # A slope that compares (total variation) can hide a NaN that the value shows.
        value, slope = Sums(*sums.unbind(1))[:2]
        slope.copy_(torch.where(value.isnan(), value, slope))
        return sums

    def gradients(self, stats: Tensor, sums: Tensor) -> Iterator[tuple[slice, HeadProducts, Tensor]]:
        student: Model = self.step.student
        count, vocab, width = self.step.count, self.step.vocab, self.tile.shape[1]
        rows = torch.stack([Sums(*sums.unbind(1)).slope.float(), self.weights.float()])
        labels = None if self.terms[3] is None else self.labels
        for begin in range(0, vocab, width):
            block = slice(begin, min(begin + width, vocab))
            tile = self.tile[:, : block.stop - begin]

            def grid(chosen: blocks.Matrix, columns: int = tile.shape[1]) -> tuple[int, int]:
                return triton.cdiv(count, chosen.block_n), triton.cdiv(columns, chosen.block_v)

            self._run(
                gradient_kernel,
                self.matrix("gradient"),
                grid,
                ((tile, tile.stride(0)), (stats.float(), rows, labels, self.t), self.terms, count, vocab, block.start, block.stop),
                PAIR=self.pair,
                REACH=1 if tile.stride(0) % arch.ENTRIES or block.start % arch.ENTRIES else arch.ENTRIES,
            )
            yield block, HeadProducts(student.weight[block], student.dtype, self.buffer), tile


class FusedSweeps:
    """base.Sweeps; each learner goes over the vocabulary by itself."""

    def __init__(self, steps: Sequence[Step], hidden: tuple[Tensor, Tensor], tile: Tensor, buffer: Tensor) -> None:
        """hidden: both models' counted rows, in their products' dtype. tile: scratch [count, Vb] of the widest learner's."""
        width = tile.shape[1]
        self.learners = []
        for step, rows in zip(steps, (hidden, hidden[::-1]), strict=False):
            dtype = step.student.dtype
            own = tile.view(dtype)[:, :width]
            self.learners.append(LearnerSweeps(step, rows, own, buffer))

    def statistics(self, wanted: Sequence[tuple[str, bool]]) -> list[Tensor]:
        return [one.statistics(*asked) for one, asked in zip(self.learners, wanted, strict=True)]

    def sums(self, stats: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if rows is None else one.sums(rows) for one, rows in zip(self.learners, stats, strict=True)]

    def gradients(self, stats: Sequence[Tensor], sums: Sequence[Tensor]) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        for at, (one, *of_rows) in enumerate(zip(self.learners, stats, sums, strict=True)):
            if any(one.step.needs):
                for made in one.gradients(*of_rows):
                    yield at, *made
