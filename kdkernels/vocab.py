"""The ``vocab`` strategy: a block of vocabulary columns at a time, for all tokens.

A first sweep over the blocks keeps statistics of each row only; where the divergence's value is no running sum (or metrics are
wanted) a second one adds up value and slope; a last one makes the gradient tile [N, Vb] of each block, from which the gradient of
that part of the head is written once and that of the hidden states added up. Each sweep multiplies anew, so this takes
4 Us + 2 Ut products (5 Us + 3 Ut with two forward sweeps) instead of 3 Us + Ut, and the least memory: no float32 copy of a 16-bit
head's gradient, and a scratch that is free to be a thin slice of the vocabulary. A teacher that learns too adds the products of its
own gradients; kernels that multiply themselves go over the vocabulary for each of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.operators import STATS_COLUMNS, SUMS_COLUMNS, row_columns
from kdkernels.divergences import Divergence
from kdkernels.gradients import Gradients
from kdkernels.plan import block_columns, column_bytes
from kdkernels.products import HeadProducts, block_size
from kdkernels.scratch import borrowed
from kdkernels.step import Inputs, Outcome, Step, empty_sums, weighted

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
        self.operators = backends.operators(step.backend)
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
        found: list[Tensor] = []
        for block, _, logits, labels in self.blocks():
            for at, (step, own, (weigh, ce)) in enumerate(zip(self.steps, logits, wanted, strict=True)):
                part = self.operators.block_stats(
                    *own, labels, step.t, step.terms.temperature, step.terms.head, weigh, ce, step.metrics
                ).double()
                for place in ("argmax_x", "argmax_z"):
                    part[:, _AT[place]] += block.start
                if block.start == 0:
                    found.append(part)
                else:
                    found[at] = merged(torch.stack([found[at], part]), weigh)
        return found

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
    count, vocab, learners = step.count, step.vocab, len(steps)
    dtypes = step.student.dtype, step.teacher.dtype
    width = block_columns(count, vocab, column_bytes(*dtypes, step.device, learners), step.budget)
    grads = [Gradients(one, *source, hidden_parts=-(-vocab // width)) for one, source in zip(steps, inputs, strict=True)]
    losses = [torch.zeros(step.weights.shape[0], dtype=step.sum_dtype, device=step.device) for _ in steps]
    if count == 0:
        return [Outcome(loss, empty_sums(step.device), grad.finished()) for loss, grad in zip(losses, grads, strict=True)]
    index = step.index(0, count)
    rows = step.student.rows(index), step.teacher.rows(index)
    models = (step.student,) if step.alone else (step.student, step.teacher)
    block = max(block_size(vocab, model.weight.shape[1], step.device) for model in models)
    fused = step.backend == "triton"
    # One gradient at a time where the kernels multiply themselves; else both logits, and the student's again for a second learner.
    again = [step.student.logits] if learners == 2 else []
    tiles = [max(dtypes[:learners], key=lambda dtype: dtype.itemsize)] if fused else [*(model.logits for model in models), *again]
    shapes = [((1, block), torch.float32), *(((count, width), dtype) for dtype in tiles)]
    with borrowed(shapes, step.budget + 4 * block, step.device) as (blocks, *scratch):
        sweeps: Sweeps
        if fused:
            from kdkernels.backends.triton.vocabulary import FusedSweeps

            sweeps = FusedSweeps(steps, rows, scratch[0], blocks[0])
        else:
            sweeps = BlockSweeps(steps, rows[: len(models)], scratch, blocks[0])
        of = [_Kind.of(one) for one in steps]
        stats = sweeps.statistics([(kind.weigh, kind.ce) for kind in of])
        swept: list[Tensor | None] = [None] * learners
        if any(kind.two_sweeps for kind in of):
            swept = sweeps.sums([one if kind.two_sweeps else None for kind, one in zip(of, stats, strict=True)])
        sums = [
            sums_of_one_sweep(one, learner.terms.resolved()) if kind.weigh else stats[0].new_zeros((count, len(SUMS_COLUMNS)))
            if total is None else total
            for kind, learner, one, total in zip(of, steps, stats, swept, strict=True)
        ]  # fmt: skip
        if any(any(one.needs) for one in steps):
            for at, columns, head, dx in sweeps.gradients(stats, sums):
                grads[at].add_columns(head, dx, rows[at], columns, blocks[0])
    done = []
    for learner, kind, loss, one, total, grad in zip(steps, of, losses, stats, sums, grads, strict=True):
        of_rows = row_columns(one, total, kind.ce, learner.metrics)
        loss[index] = (learner.weights[index] * weighted(of_rows, learner.terms)).to(step.sum_dtype)
        done.append(Outcome(loss, of_rows.sum(0) if learner.metrics else empty_sums(step.device), grad.finished()))
    return done


@dataclass(frozen=True)
class _Kind:
    """How a learner's sums come about: weighed moments of the first sweep, a second sweep, or neither where it is alone."""

    weigh: str
    two_sweeps: bool
    ce: bool

    @staticmethod
    def of(step: Step) -> _Kind:
        one_sweep = "" if step.metrics or step.alone else step.terms.resolved().one_sweep
        ce = step.labels is not None and (step.terms.ce_scale != 0.0 or step.metrics)
        return _Kind(one_sweep, not step.alone and not one_sweep, ce)
