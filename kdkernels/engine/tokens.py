"""The ``tokens`` strategy: a chunk of tokens at full vocabulary width at a time.

For each chunk both logit tiles come from two library products into a reused scratch, one row operation overwrites a learner's tile
by its gradient, and two more products carry that to the hidden states and the head. These are the fewest products there are,
3 Us + Ut (U = 2 N V D) for a student alone, for every divergence, and Ut or 2 Ut more for a teacher that learns too.

Where ranks share the vocabulary, a row's statistics span them. The row operation is then taken apart into the sweeps of vocab.py,
whose one block is what this rank holds: its logits stay in the scratch between them, so that the products are the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Step
from kdkernels.backends.products import HeadProducts, block_size
from kdkernels.engine import vocab
from kdkernels.engine.cut import chunk_rows, column_bytes, logit_bytes
from kdkernels.engine.gradients import Gradients
from kdkernels.engine.scratch import borrowed
from kdkernels.engine.step import Inputs, Outcome, empty_sums, weighted


class _Learner:
    """One model's loss and gradients, as they are added up over the chunks."""

    def __init__(self, step: Step, inputs: Inputs, chunks: int) -> None:
        self.step = step
        self.grads = Gradients(step, *inputs, weight_parts=chunks)
        self.losses = torch.zeros(inputs[0].shape[0], dtype=step.sum_dtype, device=step.device)
        self.metric_sums = empty_sums(step.device)
        self.row_loss = backends.operators_of_loss(step.backend, step.device, step.student.logits, step.teacher.logits).row_loss

    def add(
        self,
        own: Tensor,
        other: Tensor,
        out: Tensor | None,
        head: HeadProducts,
        hidden: Tensor,
        index: slice | Tensor,
        buffer: Tensor,
        first: bool,
    ) -> None:
        """own, other: logits [C, V] of this model and of its constant target; own is overwritten unless there is an ``out``."""
        step = self.step
        weights = step.weights[index]
        columns = self.row_loss(
            *(own, other, step.student.bias, step.teacher.bias, step.labels_at(index)),
            *(weights * step.scale, step.t, *step.terms.loss, step.terms.head),
            *(any(step.needs), step.metrics, out),
        )
        self.losses[index] = weights * weighted(columns, step.terms)
        if step.metrics:
            self.metric_sums += columns.sum(0, dtype=torch.float64)
        self.grads.add_rows(head, own if out is None else out, hidden, index, buffer, first)


def run(steps: tuple[Step, ...], inputs: tuple[Inputs, ...]) -> list[Outcome]:
    """steps: the student's, and that of a teacher that learns too, with the roles swapped. inputs: hidden states, weight and bias
    of each learner, not cut to the vocabulary, which its gradients are shaped like."""
    step, both = steps[0], len(steps) == 2
    if not step.ranks.alone:
        return _on_ranks(steps, inputs)
    tokens, width, count = inputs[0][0].shape[0], step.vocab, step.count
    per_logit = logit_bytes(step.student.dtype, step.teacher.dtype, step.device, learners=len(steps))
    size = chunk_rows(count, width, per_logit, step.budget, step.device)
    # Kept rows may all fit one chunk where all rows would not; the plan, which does not know them, counts the latter.
    chunks = -(-tokens // chunk_rows(tokens, width, per_logit, step.budget, step.device))
    learners = [_Learner(*pair, chunks) for pair in zip(steps, inputs, strict=True)]
    models = (step.student,) if step.alone else (step.student, step.teacher)
    block = max(block_size(width, model.weight.shape[1], step.device) for model in models)
    tiles = {"x": step.student.logits}
    if not step.alone:
        tiles["z"] = step.teacher.logits
    # A gradient in the products' dtype lies over the logits where those have that dtype, beside them otherwise. The student's lies
    # beside them too where the teacher learns after it, from the same logits.
    tiles |= {
        name: model.dtype
        for name, model in zip(("dx", "dz"), models[: len(steps)], strict=False)
        if model.dtype != model.logits or (both and name == "dx")
    }
    shapes = [((size, width), dtype) for dtype in tiles.values()]
    with borrowed(block, shapes, step.budget, step.device) as (buffer, scratch):
        heads = [HeadProducts(model.weight, model.dtype, buffer) for model in models]
        for begin in range(0, count, size):
            index = step.index(begin, min(begin + size, count))
            hidden = [model.rows(index) for model in models]
            tile = {name: rows[: len(hidden[0])] for name, rows in zip(tiles, scratch, strict=True)}
            for head, rows, name in zip(heads, hidden, ("x", "z"), strict=False):
                head.logits(rows, tile[name])
            pairs = ("x", "x" if step.alone else "z", "dx"), ("z", "x", "dz")
            for learner, (own, other, out), head, rows in zip(learners, pairs, heads, hidden, strict=False):
                learner.add(tile[own], tile[other], tile.get(out), head, rows, index, buffer, begin == 0)
    return [Outcome(learner.losses, learner.metric_sums, learner.grads.finished()) for learner in learners]


def _on_ranks(steps: tuple[Step, ...], inputs: tuple[Inputs, ...]) -> list[Outcome]:
    step, count = steps[0], steps[0].count
    student, teacher = step.student, step.teacher
    # By what all ranks know, so that each has as many chunks as the others.
    per_logit = column_bytes(student.dtype, teacher.dtype, step.device, len(steps))
    size = chunk_rows(count, step.ranks.widest, per_logit, step.budget, step.device)
    grads = [Gradients(one, *source, weight_parts=-(-count // size)) for one, source in zip(steps, inputs, strict=True)]
    losses = [torch.zeros(len(one.weights), dtype=one.sum_dtype, device=one.device) for one in steps]
    metric_sums = [empty_sums(step.device) for _ in steps]
    # A head in another dtype than its products is cast once, and not in each sweep of each chunk.
    cast = {
        id(model): replace(model, weight=HeadProducts(model.weight, model.dtype, model.weight).weight)
        for model in (student, teacher)
    }
    steps = tuple(replace(one, student=cast[id(one.student)], teacher=cast[id(one.teacher)]) for one in steps)
    with vocab.scratch(steps, size, max(1, step.vocab)) as (tiles, buffer):
        for begin in range(0, count, size):
            counted = slice(begin, min(begin + size, count))
            index = step.index(counted.start, counted.stop)
            rows = student.rows(index), teacher.rows(index)
            part = tuple(one.chunk(counted.start, counted.stop) for one in steps)
            swept = vocab.Swept(part, rows, [tile[: len(rows[0])] for tile in tiles], buffer)
            if any(any(one.needs) for one in steps):
                for at, _, head, dx in swept.gradients():
                    grads[at].add_rows(head, dx, rows[at], index, buffer, begin == 0, counted)
            for at, learner in enumerate(steps):
                columns = swept.columns(at)
                losses[at][index] = (learner.weights[index] * weighted(columns, learner.terms)).to(step.sum_dtype)
                if learner.metrics:
                    metric_sums[at] += columns.sum(0)
    return [Outcome(loss, sums, grad.finished()) for loss, sums, grad in zip(losses, metric_sums, grads, strict=True)]
