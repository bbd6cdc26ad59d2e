"""Bytes that the GPU's kernels load and store, in closed form. Triton's interpreter counts them in tests/planning/test_traffic.py.

All of it is as the programs issue it: a second load of the same address counts again, and so does every program's own copy. For
logits that is what main memory delivers, since a vocabulary's row is larger than what a processor keeps. Of the operands of the
kernels that multiply most comes from the last-level cache instead: each block of tokens goes over the heads, each tile of the
vocabulary over the hidden states. What memory has to deliver at least is the same form with one block that holds everything
(:meth:`Tiling.whole`); that is what the roofline counts.

Rows here are those that count: of rows of weight 0 the row kernel loads less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kdkernels.backends.columns import GRADIENT_READ, ROW_COLUMNS, STATS_COLUMNS, SUMS_COLUMNS, SUMS_READ
from kdkernels.divergences import resolve

FLOAT, LABEL = 4, 8  # bytes of a statistic, weight, bias or t; of a label


@dataclass(frozen=True)
class Traffic:
    """Bytes loaded and stored. operands: how many of those loaded are of hidden states and heads."""

    loaded: int
    stored: int
    operands: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.loaded + other.loaded, self.stored + other.stored, self.operands + other.operands)


def sweeps(divergence: str, *, kd: bool = True, metrics: bool = False, beside: bool = False) -> int:
    """How often the logits are gone over before the gradient: once where running sums give the value, or there is none.

    beside: whether the gradient's sweep sums too where it can, as the row kernel's does.
    """
    of = resolve(divergence)
    return 1 if (beside and kd and of.slope_by_target) or (not metrics and (not kd or of.one_sweep)) else 2


def row_loss(
    rows: int,
    vocab: int,
    logit_bytes: tuple[int, int],
    grad_bytes: int = 0,
    *,
    sweeps: int,
    labels: bool = False,
    biases: int = 0,
    reach: int = 1,
) -> Traffic:
    """row_loss_kernel. logit_bytes: of an entry of x and of z; grad_bytes: of dx, 0 for none. biases: how many models have one.
    reach: entries that are loaded and stored together, the last ones past the vocabulary too.

    Each sweep, and that of the gradient, loads x, z and the biases again.
    """
    passes, reached = sweeps + (grad_bytes > 0), math.ceil(vocab / reach) * reach
    entries = passes * (reached * sum(logit_bytes) + vocab * biases * FLOAT)
    of_label = LABEL + logit_bytes[0] + (FLOAT if biases else 0)  # and its logit
    row = 2 * FLOAT + (of_label if labels else 0)  # weight, t
    return Traffic(rows * (entries + row), rows * (len(ROW_COLUMNS) * FLOAT + reached * grad_bytes))


def offsets_row(
    rows: int,
    vocab: int,
    block_v: int,
    grad_bytes: int = 0,
    *,
    sweeps: int,
    reach: int = 8,
    labels: bool = False,
    tempered: bool = False,
    metrics: bool = False,
) -> Traffic:
    """offsets_row_kernel: normalisers from the tiles', and sweeps over both models' codes, ``reach`` at a time, and the largest of
    their tiles. sweeps: before that of the gradient; 0 where that one sums too, of rows in which the learner bans nothing, else 1.
    tempered: of labels at another temperature than 1, whose sums are others. metrics: at t = 1; both models' largest entries are
    looked for in the tile that has them, and t is read.
    """
    tiles, reached = math.ceil(vocab / block_v), math.ceil(vocab / reach) * reach
    entries = (sweeps + (grad_bytes > 0)) * 2 * (reached * 2 + tiles * FLOAT)
    parts = (3 if labels and tempered else 2) * tiles * 2 * FLOAT
    row = FLOAT + (LABEL + FLOAT if labels else 0)  # weight; label and its logit
    if metrics:
        row += 2 * (tiles * FLOAT + block_v * 2) + FLOAT
    return Traffic(rows * (entries + parts + row), rows * (len(ROW_COLUMNS) * FLOAT + reached * grad_bytes))


@dataclass(frozen=True)
class Tiling:
    """How a kernel that multiplies tiles the logits [tokens, vocab]: block_n x block_v a tile, ``splits`` of the vocabulary."""

    block_n: int
    block_v: int
    splits: int = 1

    @classmethod
    def whole(cls, tokens: int, vocab: int) -> Tiling:
        """One tile: every operand is loaded once."""
        return cls(tokens, vocab)


@dataclass(frozen=True)
class Products:
    """The two products inside a kernel: hidden [tokens, dim] and head [vocab, dim] of each model, and bytes of their entries.

    models: (dim, bytes) of student and teacher; the student alone where the loss does not look at the teacher. biases: how many
    of the models have one.
    """

    tokens: int
    vocab: int
    models: tuple[tuple[int, int], ...]
    biases: int = 0

    def token_blocks(self, tiling: Tiling) -> int:
        return math.ceil(self.tokens / tiling.block_n)

    def operands(self, tiling: Tiling, tiles: int, columns: int) -> int:
        """Bytes of hidden states, again for each of ``tiles``, and of ``columns`` of the heads, for each block of tokens."""
        return (self.tokens * tiles + columns * self.token_blocks(tiling)) * sum(dim * size for dim, size in self.models)

    def bias_bytes(self, tiling: Tiling, columns: int) -> int:
        return self.token_blocks(tiling) * columns * self.biases * FLOAT

    def over_splits(self, tiling: Tiling, row_read: int, row_written: int) -> Traffic:
        """A kernel that goes over the whole vocabulary, each split reading and writing so many bytes of each row, and t."""
        operands = self.operands(tiling, math.ceil(self.vocab / tiling.block_v), self.vocab)
        scalars = self.token_blocks(tiling) * tiling.splits * FLOAT
        others = self.bias_bytes(tiling, self.vocab) + scalars + self.tokens * tiling.splits * row_read
        return Traffic(operands + others, self.tokens * tiling.splits * row_written, operands)


def statistics(of: Products, tiling: Tiling, *, labels: bool = False) -> Traffic:
    """statistics_kernel: writes [splits, tokens, STATS_COLUMNS]."""
    return of.over_splits(tiling, LABEL if labels else 0, len(STATS_COLUMNS) * FLOAT)


def sums(of: Products, tiling: Tiling) -> Traffic:
    """sums_kernel: reads the statistics, writes [splits, tokens, SUMS_COLUMNS]."""
    return of.over_splits(tiling, SUMS_READ * FLOAT, len(SUMS_COLUMNS) * FLOAT)


def offsets_product(of: Products, tiling: Tiling, *, programs: int, tempered: bool = False) -> Traffic:
    """offsets_product_kernel at t = 1, of both models: stores codes, and of each row of a tile the largest and its sums. tempered:
    of labels at another temperature. Each program of the target's two launches, one of which does nothing, reads t."""
    tiles = math.ceil(of.vocab / tiling.block_v)
    operands = of.operands(tiling, tiles, of.vocab)
    parts = of.tokens * tiles * FLOAT * (2 * len(of.models) + tempered)
    read = operands + of.bias_bytes(tiling, of.vocab) + 2 * programs * FLOAT
    return Traffic(read, len(of.models) * of.tokens * of.vocab * 2 + parts, operands)


def gradient(
    of: Products, tiling: Tiling, begin: int, end: int, grad_bytes: int, *, labels: bool = False, reach: int = 1
) -> Traffic:
    """gradient_kernel over the columns ``begin`` to ``end``: writes their gradient [tokens, end - begin], ``reach``
    entries together.

    Its last tile multiplies columns that lie behind the end, as far as there are any. Each tile reads statistics, slope sum and
    weight of its rows.
    """
    tiles = math.ceil((end - begin) / tiling.block_v)
    columns = min(of.vocab, begin + tiles * tiling.block_v) - begin
    operands = of.operands(tiling, tiles, columns)
    row = (GRADIENT_READ + 2) * FLOAT + (LABEL if labels else 0)
    others = of.bias_bytes(tiling, columns) + tiles * (of.tokens * row + of.token_blocks(tiling) * FLOAT)
    written = min(math.ceil((end - begin) / reach) * reach, tiles * tiling.block_v)
    return Traffic(operands + others, of.tokens * written * grad_bytes, operands)
