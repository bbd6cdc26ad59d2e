"""The ``vocab`` strategy: a block of vocabulary columns at a time, for all tokens.

A first sweep over the blocks keeps statistics of each row only; where the divergence's value is no running sum (or metrics are
wanted) a second one adds up value and slope; a last one makes the gradient tile [N, Vb] of each block, from which the gradient of
that part of the head is written once and that of the hidden states added up. Each sweep multiplies anew, so this takes
4 Us + 2 Ut products (5 Us + 3 Ut with two forward sweeps) instead of 3 Us + Ut, and the least memory: no float32 copy of a 16-bit
head's gradient, and a scratch that is free to be a thin slice of the vocabulary. A teacher that learns too adds the products of its
own gradients; kernels that multiply themselves go over the vocabulary for each of the two.

Where ranks share the vocabulary, each sweeps over its own columns, statistics and sums are merged over the ranks after their sweep,
and the gradient needs nothing more of the others, except for the sum of the hidden states' in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Step
from kdkernels.backends.merge import PLACES, merged, nothing, sums_of_one_sweep
from kdkernels.backends.operators import SUMS_COLUMNS, row_columns
from kdkernels.backends.products import HeadProducts, block_size
from kdkernels.divergences import flat
from kdkernels.engine.cut import block_columns, column_bytes
from kdkernels.engine.gradients import Gradients
from kdkernels.engine.scratch import borrowed
from kdkernels.engine.step import Inputs, Outcome, empty_sums, weighted


class Sweeps(Protocol):
    """The sweeps over the vocabulary of one step's counted rows, for each learner; statistics and sums in float64."""

    def statistics(self, wanted: Sequence[tuple[str, bool]]) -> list[Tensor]:
        """wanted: by whose exponentials moments are weighed, and whether there is a cross-entropy."""

    def sums(self, stats: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of those learners whose statistics are given."""

    def gradients(self, stats: Sequence[Tensor], sums: Sequence[Tensor]) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        """Learner, block of columns, its head there, and the gradient tile [count, Vb], valid until the next one."""


class BlockSweeps:
    """Tiles of both models' logits by library products, and the block operations of a backend over them."""

    def __init__(self, steps: Sequence[Step], hidden: tuple[Tensor, ...], tiles: list[Tensor], buffer: Tensor) -> None:
        """hidden: the models' counted rows. tiles: scratch [count, Vb] for x, unless alone for z, with two learners for x again."""
        self.steps, self.hidden, self.tiles, self.buffer = steps, hidden, tiles, buffer
        step = steps[0]
        self.models = (step.student,) if step.alone else (step.student, step.teacher)
        self.operators = backends.operators_of_loss(step.backend, step.device, step.student.logits, step.teacher.logits)
        index = step.index(0, step.count)
        self.labels = step.labels_at(index)
        self.weights = [one.weights[index] * one.scale for one in steps]
        self.multiplied: slice | None = None

    def blocks(self) -> Iterator[tuple[slice, list[HeadProducts], list[tuple[Any, ...]], Tensor | None]]:
        """Columns, the models' heads there, each learner's (own, other, own bias, other bias), and labels counted from the first
        column."""
        step, width = self.steps[0], self.tiles[0].shape[1]
        for begin in range(0, step.vocab, width):
            block = slice(begin, min(begin + width, step.vocab))
            heads = [HeadProducts(model.weight[block], model.dtype, self.buffer) for model in self.models]
            tiles = [tile[:, : block.stop - begin] for tile in self.tiles[: len(self.models)]]
            if block != self.multiplied:
                for head, hidden, tile in zip(heads, self.hidden, tiles, strict=True):
                    head.logits(hidden, tile)
                self.multiplied = block
            sides = [
                (tile, None if model.bias is None else model.bias[block]) for tile, model in zip(tiles, self.models, strict=True)
            ]
            (x, x_bias), (z, z_bias) = sides[0], sides[-1]
            logits = [(x, z, x_bias, z_bias), (z, x, z_bias, x_bias)][: len(self.steps)]
            yield block, heads, logits, None if self.labels is None else self.labels - begin

    def statistics(self, wanted: Sequence[tuple[str, bool]]) -> list[Tensor]:
        step = self.steps[0]
        # Of each learner the blocks so far and the next one.
        pairs = [torch.stack([nothing(step.count, step.device)] * 2) for _ in self.steps]
        for block, _, logits, labels in self.blocks():
            for pair, step, own, (weigh, ce) in zip(pairs, self.steps, logits, wanted, strict=True):
                so_far, here = pair
                here.copy_(
                    self.operators.block_stats(
                        *own, labels, step.t, step.terms.temperature, step.terms.head, weigh, ce, step.metrics
                    )
                )
                here[:, PLACES] += block.start
                so_far.copy_(here if block.start == 0 else merged(pair, weigh))
        return [pair[0] for pair in pairs]

    def sums(self, stats: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = [None if one is None else one.new_zeros((len(one), len(SUMS_COLUMNS))) for one in stats]
        rounded = [None if one is None else one.to(self.steps[0].sum_dtype) for one in stats]
        for _, _, logits, _ in self.blocks():
            for step, own, of_rows, total in zip(self.steps, logits, rounded, found, strict=True):
                if total is not None:
                    divergence, a, temperature, *_ = step.terms.loss
                    total += self.operators.block_reduce(
                        *own, step.t, divergence, a, temperature, step.terms.head, of_rows, step.metrics
                    )
        return found

    def gradients(self, stats: Sequence[Tensor], sums: Sequence[Tensor]) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        dtype = self.steps[0].sum_dtype
        rounded = [(one.to(dtype), of_rows.to(dtype)) for one, of_rows in zip(stats, sums, strict=True)]
        for block, heads, logits, labels in self.blocks():
            self.multiplied = None  # the gradients overwrite the logits
            if len(self.steps) == 2:
                again = self.tiles[2][:, : block.stop - block.start].copy_(logits[0][0])
                logits[1] = (logits[1][0], again, *logits[1][2:])
            for at, (step, own, weights) in enumerate(zip(self.steps, logits, self.weights, strict=True)):
                self.operators.block_grad(*own, labels, weights, step.t, *step.terms.loss, step.terms.head, *rounded[at])
                yield at, block, heads[at], own[0].to(step.student.dtype)


def run(steps: tuple[Step, ...], inputs: tuple[Inputs, ...]) -> list[Outcome]:
    """steps: the student's, and that of a teacher that learns too, with the roles swapped. inputs: hidden states, weight and bias
    of each learner, not cut to the vocabulary, which its gradients are shaped like."""
    step = steps[0]
    count, vocab = step.count, step.vocab
    dtypes = step.student.dtype, step.teacher.dtype
    width = block_columns(count, vocab, column_bytes(*dtypes, step.device, len(steps)), step.budget, step.device)
    grads = [Gradients(one, *source, hidden_parts=-(-vocab // width)) for one, source in zip(steps, inputs, strict=True)]
    losses = [torch.zeros(step.weights.shape[0], dtype=step.sum_dtype, device=step.device) for _ in steps]
    if count == 0:
        return [Outcome(loss, empty_sums(step.device), grad.finished()) for loss, grad in zip(losses, grads, strict=True)]
    index = step.index(0, count)
    rows = step.student.rows(index), step.teacher.rows(index)
    with scratch(steps, count, width) as (tiles, buffer):
        swept = Swept(steps, rows, tiles, buffer)
        if any(any(one.needs) for one in steps):
            for at, columns, head, dx in swept.gradients():
                grads[at].add_columns(head, dx, rows[at], columns, buffer)
    done = []
    for at, (learner, loss, grad) in enumerate(zip(steps, losses, grads, strict=True)):
        of_rows = swept.columns(at)
        loss[index] = (learner.weights[index] * weighted(of_rows, learner.terms)).to(step.sum_dtype)
        done.append(Outcome(loss, of_rows.sum(0) if learner.metrics else empty_sums(step.device), grad.finished()))
    return done


def _fused(step: Step) -> bool:
    """Whether the kernels multiply themselves; they take no vocabulary without a column, which a rank may be left with."""
    return step.backend == "triton" and step.vocab > 0


@contextmanager
def scratch(steps: tuple[Step, ...], rows: int, width: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Tiles [rows, width] that the sweeps take, and the buffer of a head's block."""
    step = steps[0]
    models = (step.student,) if step.alone else (step.student, step.teacher)
    block = max(block_size(step.vocab, model.weight.shape[1], step.device) for model in models)
    # One gradient at a time where the kernels multiply themselves; else both logits, and the student's again for a second learner.
    again = [step.student.logits] if len(steps) == 2 else []
    widest = max((one.student.dtype for one in steps), key=lambda dtype: dtype.itemsize)
    tiles = [widest] if _fused(step) else [*(model.logits for model in models), *again]
    with borrowed(block, [((rows, width), dtype) for dtype in tiles], step.budget, step.device) as (buffer, found):
        yield found, buffer


class Swept:
    """Statistics and sums of the counted rows over the whole vocabulary, for each learner, and the gradients that they lead to."""

    def __init__(self, steps: tuple[Step, ...], rows: tuple[Tensor, Tensor], tiles: list[Tensor], buffer: Tensor) -> None:
        """rows: both models' counted rows, in their products' dtype. tiles, buffer: as ``scratch`` gives them."""
        step = steps[0]
        self.steps, self.sweeps = steps, _sweeps(steps, rows, tiles, buffer)
        self.kinds = [_Kind.of(one) for one in steps]
        parts = self.sweeps.statistics([(kind.weigh, kind.ce) for kind in self.kinds])
        self.stats = [
            part if step.ranks.alone else self._over_ranks(learner, part, kind)
            for learner, part, kind in zip(steps, parts, self.kinds, strict=True)
        ]
        swept: list[Tensor | None] = [None] * len(steps)
        if any(kind.two_sweeps for kind in self.kinds):
            asked = [one if kind.two_sweeps else None for kind, one in zip(self.kinds, self.stats, strict=True)]
            swept = [None if total is None else step.ranks.sum(total) for total in self.sweeps.sums(asked)]
        self.sums = [
            sums_of_one_sweep(one, learner.terms.resolved()) if kind.weigh
            else one.new_zeros((step.count, len(SUMS_COLUMNS))) if total is None
            else total
            for kind, learner, one, total in zip(self.kinds, steps, self.stats, swept, strict=True)
        ]  # fmt: skip

    @staticmethod
    def _over_ranks(step: Step, part: Tensor, kind: _Kind) -> Tensor:
        part[:, PLACES] += step.ranks.begin
        return merged(part[None], kind.weigh, step.ranks, places=step.metrics)

    def gradients(self) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        """As ``Sweeps`` says."""
        return self.sweeps.gradients(self.stats, self.sums)

    def columns(self, at: int) -> Tensor:
        """ROW_COLUMNS of a learner's counted rows."""
        return row_columns(self.stats[at], self.sums[at], self.kinds[at].ce, self.steps[at].metrics)


def _sweeps(steps: tuple[Step, ...], rows: tuple[Tensor, Tensor], tiles: list[Tensor], buffer: Tensor) -> Sweeps:
    if _fused(steps[0]):
        from kdkernels.backends.triton.vocabulary import FusedSweeps

        return FusedSweeps(steps, rows, tiles[0], buffer)
    return BlockSweeps(steps, rows[:1] if steps[0].alone else rows, tiles, buffer)


@dataclass(frozen=True)
class _Kind:
    """How a learner's sums come about: weighed moments of the first sweep, a second sweep, or neither where it is alone."""

    weigh: str
    two_sweeps: bool
    ce: bool

    @staticmethod
    def of(step: Step) -> _Kind:
        # Running sums cancel where p is close to q, and in flat distributions to nothing.
        two = step.metrics or step.alone or flat(step.terms.temperature)
        one_sweep = "" if two else step.terms.resolved().one_sweep
        ce = step.labels is not None and (step.terms.ce_scale != 0.0 or step.metrics)
        return _Kind(one_sweep, not step.alone and not one_sweep, ce)
