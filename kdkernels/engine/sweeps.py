"""A chunk of rows in sweeps over blocks of the vocabulary: all tokens in one chunk is the ``vocab`` strategy.

A first sweep over the blocks keeps statistics of each row only; where the divergence's value is no running sum (or metrics are
wanted) a second one adds up value and slope; a last one makes the gradient tile [N, Vb] of each block, from which the gradient of
that part of the head is written once and that of the hidden states added up. Each sweep multiplies anew, so this takes
4 Us + 2 Ut products (5 Us + 3 Ut with two forward sweeps) instead of 3 Us + Ut, and the least memory: no float32 copy of a 16-bit
head's gradient, and a scratch that is free to be a thin slice of the vocabulary. A teacher that learns too adds the products of its
own gradients; kernels that multiply themselves go over the vocabulary for each of the two.

Where ranks share the vocabulary, a row's statistics span them, and there is no row operation: with one block of all that a rank
holds its logits stay in the scratch between the sweeps. Each sweeps over its own columns, statistics and sums are merged over the
ranks after their sweep, and the gradient needs nothing more of the others, except for the sum of the hidden states' in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Step, Sweeps
from kdkernels.backends.columns import SUMS_COLUMNS
from kdkernels.backends.merge import PLACES, merged, nothing, sums_of_one_sweep
from kdkernels.backends.operators import row_columns
from kdkernels.backends.products import HeadProducts
from kdkernels.divergences import flat
from kdkernels.engine.tiles import Block, Tiles


class BlockSweeps:
    """The block operations of a backend over tiles of both models' logits."""

    def __init__(self, steps: Sequence[Step], tiles: Tiles) -> None:
        self.steps, self.tiles = steps, tiles
        step = steps[0]
        self.operators = backends.operators_of_loss(step.backend, step.device, step.student.logits, step.teacher.logits)
        index = step.index(0, step.count)
        self.labels = step.labels_at(index)
        self.weights = [one.weights[index] * one.scale for one in steps]

    def blocks(self) -> Iterator[tuple[Block, list[tuple[Any, ...]], Tensor | None]]:
        """Blocks, each learner's (own, other, own bias, other bias) there, and labels counted from the first column."""
        for block in self.tiles.blocks():
            biases = [None if model.bias is None else model.bias[block.columns] for model in self.tiles.models]
            (x, x_bias), (z, z_bias) = (block.logits[0], biases[0]), (block.logits[-1], biases[-1])
            logits = [(x, z, x_bias, z_bias), (z, x, z_bias, x_bias)][: len(self.steps)]
            yield block, logits, None if self.labels is None else self.labels - block.columns.start

    def statistics(self, wanted: Sequence[tuple[str, bool]]) -> list[Tensor]:
        step = self.steps[0]
        # Of each learner the blocks so far and the next one.
        pairs = [torch.stack([nothing(step.count, step.device)] * 2) for _ in self.steps]
        for block, logits, labels in self.blocks():
            for pair, step, own, (weigh, ce) in zip(pairs, self.steps, logits, wanted, strict=True):
                so_far, here = pair
                here.copy_(
                    self.operators.block_stats(
                        *own, labels, step.t, step.terms.temperature, step.terms.head, weigh, ce, step.metrics
                    )
                )
                here[:, PLACES] += block.columns.start
                so_far.copy_(here if block.columns.start == 0 else merged(pair, weigh))
        return [pair[0] for pair in pairs]

    def sums(self, stats: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = [None if one is None else one.new_zeros((len(one), len(SUMS_COLUMNS))) for one in stats]
        rounded = [None if one is None else one.to(self.steps[0].sum_dtype) for one in stats]
        for _, logits, _ in self.blocks():
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
        for block, logits, labels in self.blocks():
            self.tiles.overwritten()
            again = self.tiles.tile("again", block.columns)
            if again is not None:
                logits[1] = (logits[1][0], again.copy_(logits[0][0]), *logits[1][2:])
            for at, (step, own, weights) in enumerate(zip(self.steps, logits, self.weights, strict=True)):
                self.operators.block_grad(*own, labels, weights, step.t, *step.terms.loss, step.terms.head, *rounded[at])
                yield at, block.columns, block.heads[at], own[0].to(step.student.dtype)


class Swept:
    """Statistics and sums of the counted rows over the whole vocabulary, for each learner, and the gradients that they lead to."""

    def __init__(self, steps: tuple[Step, ...], tiles: Tiles) -> None:
        """steps: of the rows that the tiles were given."""
        step = steps[0]
        self.steps, self.sweeps = steps, _sweeps(steps, tiles)
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
        return self.sweeps.gradients(self.stats, self.sums) if any(any(one.needs) for one in self.steps) else iter(())

    def columns(self, at: int) -> Tensor:
        """ROW_COLUMNS of a learner's counted rows."""
        return row_columns(self.stats[at], self.sums[at], self.kinds[at].ce, self.steps[at].metrics)


def _sweeps(steps: tuple[Step, ...], tiles: Tiles) -> Sweeps:
    size = tiles.cut.size
    if not size.fused:
        return BlockSweeps(steps, tiles)
    tile = tiles.tile("dx", slice(0, tiles.cut.columns))
    assert tile is not None
    assert size.backend.sweeps is not None
    return size.backend.sweeps(steps, (tiles.hidden[0], tiles.hidden[-1]), tile, tiles.buffer)


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
