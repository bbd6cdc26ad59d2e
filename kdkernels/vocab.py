"""The ``vocab`` strategy: a block of vocabulary columns at a time, for all tokens.

A first sweep over the blocks keeps statistics of each row only; where the divergence's value is no running sum (or metrics are
wanted) a second one adds up value and slope; a last one makes the gradient tile [N, Vb] of each block, from which the gradient of
that part of the head is written once and that of the hidden states added up. Each sweep multiplies anew, so this takes
4 Us + 2 Ut products (5 Us + 3 Ut with two forward sweeps) instead of 3 Us + Ut, and the least memory: no float32 copy of a 16-bit
head's gradient, and a scratch that is free to be a thin slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.operators import STATS_COLUMNS, SUMS_COLUMNS, row_columns
from kdkernels.divergences import Divergence
from kdkernels.gradients import Gradients
from kdkernels.plan import block_columns, column_bytes
from kdkernels.products import HeadProducts, block_size
from kdkernels.scratch import borrowed
from kdkernels.step import Outcome, Step, empty_sums, weighted

_AT = {name: column for column, name in enumerate(STATS_COLUMNS)}


def merged(parts: Tensor, weigh: str) -> Tensor:
    """Statistics [N, STATS_COLUMNS] of whole rows from those of their blocks, parts [B, N, STATS_COLUMNS], in block order.

    Sums of exponentials are counted from a block's own largest entry, and here from the row's. Of equal largest entries the first
    wins. argmax columns hold places in the row already.
    """
    whole = torch.empty_like(parts[0])
    shifts = {}
    for side in ("x_T", "y_T", "x", "z_T"):
        largest, log_sum = parts[..., _AT[f"max_{side}"]], parts[..., _AT[f"log_sum_{side}"]]
        top = largest.amax(0)
        # A block or a row that is banned whole has no largest entry to count from: exp(-inf - 0) = 0.
        shifts[side] = largest - top.masked_fill(top == -torch.inf, 0.0)
        whole[:, _AT[f"max_{side}"]] = top
        whole[:, _AT[f"log_sum_{side}"]] = torch.logsumexp(shifts[side] + log_sum, 0)
        if (place := f"argmax_{side[0]}") in _AT and side in ("x_T", "z_T"):
            whole[:, _AT[place]] = parts[..., _AT[place]].gather(0, largest.argmax(0)[None])[0]
    whole[:, _AT["label_logit"]] = parts[..., _AT["label_logit"]].sum(0)
    mass, moment = parts[..., _AT["mass"]], parts[..., _AT["moment"]]
    if weigh:
        u, v = (shifts["y_T"], shifts["x_T"]) if weigh == "target" else (shifts["x_T"], shifts["y_T"])
        empty = mass == 0  # shifts may be infinite there
        factor = u.exp().masked_fill(empty, 0.0)
        moment = factor * (moment + (mass * (u - v)).masked_fill(empty, 0.0))
        mass = factor * mass
    whole[:, _AT["mass"]], whole[:, _AT["moment"]] = mass.sum(0), moment.sum(0)
    return whole


def sums_of_one_sweep(stats: Tensor, divergence: Divergence) -> Tensor:
    """SUMS_COLUMNS (value and slope; the rest 0) of a divergence whose ``one_sweep`` names the weighing side."""
    own, other = ("y_T", "x_T") if divergence.one_sweep == "target" else ("x_T", "y_T")
    log_sum = stats[:, _AT[f"log_sum_{own}"]]
    mass, moment = (stats[:, _AT[name]] * (-log_sum).exp() for name in ("mass", "moment"))
    # lw - lo = (u - v) + (log sum of the other - log sum of the weighing side)
    moment = moment + mass * (stats[:, _AT[f"log_sum_{other}"]] - log_sum)
    value, slope = (c0 * mass + c1 * moment for c0, c1 in divergence.linear())
    nothing = torch.zeros_like(value)
    return torch.stack([value, torch.where(value.isnan(), value, slope), *[nothing] * (len(SUMS_COLUMNS) - 2)], 1)


class Sweeps(Protocol):
    """The sweeps over the vocabulary of one step's counted rows; statistics and sums in float64."""

    def statistics(self, weigh: str, ce: bool) -> Tensor: ...

    def sums(self, stats: Tensor) -> Tensor: ...

    def gradients(self, stats: Tensor, sums: Tensor) -> Iterator[tuple[slice, HeadProducts, Tensor]]:
        """Blocks of columns, the student's head there, and the gradient tile [count, Vb], valid until the next one."""


class BlockSweeps:
    """Tiles of both models' logits by library products, and the block operations of a backend over them."""

    def __init__(self, step: Step, hidden: tuple[Tensor, Tensor], tiles: list[Tensor], buffer: Tensor) -> None:
        """hidden: both models' counted rows. tiles: scratch [count, Vb] for x and, unless alone, z."""
        self.step, self.hidden, self.tiles, self.buffer = step, hidden, tiles, buffer
        self.operators = backends.operators(step.backend)
        index = step.index(0, step.count)
        self.labels, self.weights = step.labels_at(index), step.weights[index] * step.scale
        self.multiplied: slice | None = None

    def blocks(self) -> Iterator[tuple[slice, HeadProducts, tuple[Tensor | None, ...], Tensor | None]]:
        """Columns, the student's head there, (x, z, x_bias, z_bias) of the block, and the labels counted from its first column."""
        step, width = self.step, self.tiles[0].shape[1]
        for begin in range(0, step.vocab, width):
            block = slice(begin, min(begin + width, step.vocab))
            models = (step.student,) if step.alone else (step.student, step.teacher)
            heads = [HeadProducts(model.weight[block], model.dtype, self.buffer) for model in models]
            tiles = [tile[:, : block.stop - begin] for tile in self.tiles]
            if block != self.multiplied:
                for head, hidden, tile in zip(heads, self.hidden, tiles, strict=False):
                    head.logits(hidden, tile)
                self.multiplied = block
            biases = [None if model.bias is None else model.bias[block] for model in (step.student, step.teacher)]
            yield block, heads[0], (tiles[0], tiles[-1], *biases), None if self.labels is None else self.labels - begin

    def statistics(self, weigh: str, ce: bool) -> Tensor:
        step = self.step
        stats: Tensor | None = None
        for block, _, logits, labels in self.blocks():
            part = self.operators.block_stats(
                *logits, labels, step.t, step.terms.temperature, step.terms.head, weigh, ce, step.metrics
            ).double()
            for place in ("argmax_x", "argmax_z"):
                part[:, _AT[place]] += block.start
            stats = part if stats is None else merged(torch.stack([stats, part]), weigh)
        assert stats is not None
        return stats

    def sums(self, stats: Tensor) -> Tensor:
        step, rounded = self.step, stats.to(self.step.sum_dtype)
        total = stats.new_zeros((step.count, len(SUMS_COLUMNS)))
        divergence, a, temperature, *_ = step.terms.loss
        for _, _, logits, _ in self.blocks():
            total += self.operators.block_reduce(
                *logits, step.t, divergence, a, temperature, step.terms.head, rounded, step.metrics
            )
        return total

    def gradients(self, stats: Tensor, sums: Tensor) -> Iterator[tuple[slice, HeadProducts, Tensor]]:
        step, stats, sums = self.step, stats.to(self.step.sum_dtype), sums.to(self.step.sum_dtype)
        for block, head, logits, labels in self.blocks():
            self.multiplied = None  # the gradient overwrites x
            self.operators.block_grad(*logits, labels, self.weights, step.t, *step.terms.loss, step.terms.head, stats, sums)
            assert logits[0] is not None
            yield block, head, logits[0].to(step.student.dtype)


def run(step: Step, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Outcome:
    """hidden, weight, bias: the student's, not cut to the vocabulary, which the gradients are shaped like."""
    count, vocab = step.count, step.vocab
    losses = torch.zeros(hidden.shape[0], dtype=step.sum_dtype, device=step.device)
    width = block_columns(count, vocab, column_bytes(step.student.dtype, step.teacher.dtype, step.device), step.budget)
    grads = Gradients(step, hidden, weight, bias, hidden_parts=-(-vocab // width))
    if count == 0:
        return Outcome(losses, empty_sums(step.device), grads.finished())
    index = step.index(0, count)
    rows = step.student.rows(index), step.teacher.rows(index)
    block = max(block_size(vocab, model.weight.shape[1], step.device) for model in (step.student, step.teacher))
    fused = step.backend == "triton"
    tiles = [step.student.dtype] if fused else [step.student.logits, *([] if step.alone else [step.teacher.logits])]
    shapes = [((1, block), torch.float32), *(((count, width), dtype) for dtype in tiles)]
    with borrowed(shapes, step.budget + 4 * block, step.device) as (blocks, *scratch):
        sweeps: Sweeps
        if fused:
            from kdkernels.backends.triton.vocabulary import FusedSweeps

            sweeps = FusedSweeps(step, rows, scratch[0], blocks[0])
        else:
            sweeps = BlockSweeps(step, rows, scratch, blocks[0])
        divergence = step.terms.resolved()
        one_sweep = not step.metrics and divergence.one_sweep != ""
        ce = step.labels is not None and (step.terms.ce_scale != 0.0 or step.metrics)
        stats = sweeps.statistics(divergence.one_sweep if one_sweep and not step.alone else "", ce)
        if step.alone:
            sums = stats.new_zeros((count, len(SUMS_COLUMNS)))
        else:
            sums = sums_of_one_sweep(stats, divergence) if one_sweep else sweeps.sums(stats)
        if any(step.needs):
            for columns, head, dx in sweeps.gradients(stats, sums):
                grads.add_columns(head, dx, rows[0], columns, blocks[0])
    of_rows = row_columns(stats, sums, ce, step.metrics)
    losses[index] = (step.weights[index] * weighted(of_rows, step.terms)).to(step.sum_dtype)
    return Outcome(losses, of_rows.sum(0) if step.metrics else empty_sums(step.device), grads.finished())
