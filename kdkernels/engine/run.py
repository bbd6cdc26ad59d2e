"""The one loop that carries out a Cut: chunk by chunk, each learner's losses and gradients are worked out and added up.

With chunks at full width both logit tiles come from two library products, one row operation overwrites a learner's tile by its
gradient, and two more products carry that to the hidden states and the head. These are the fewest products there are, 3 Us + Ut
(U = 2 N V D) for a student alone, for every divergence, and Ut or 2 Ut more for a teacher that learns too. sweeps.py says what
blocks of the vocabulary take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.base import Step
from kdkernels.engine.cut import Cut
from kdkernels.engine.gradients import Gradients
from kdkernels.engine.scratch import borrowed
from kdkernels.engine.step import Inputs, Outcome, empty_sums, weighted
from kdkernels.engine.target import Chunk, Target
from kdkernels.engine.tiles import Tiles, cast


class _Learner:
    """One model's loss and gradients, as they are added up over the chunks."""

    def __init__(self, step: Step, inputs: Inputs, cut: Cut) -> None:
        self.step = step
        self.grads = Gradients(step, inputs, cut)
        self.losses = torch.zeros(inputs[0].shape[0], dtype=step.sum_dtype, device=step.device)
        self.metric_sums = empty_sums(step.device)

    def add(self, columns: Tensor, weights: Tensor, index: slice | Tensor) -> None:
        """columns: ROW_COLUMNS of the rows ``index`` of all, whose token weights are ``weights``."""
        uncounted = self.step.uncounted_at(index)
        if uncounted is not None:
            columns = columns.masked_fill(uncounted, 0.0)
        self.losses[index] = (weights * weighted(columns, self.step.terms)).to(self.losses.dtype)
        if self.step.metrics:
            self.metric_sums += columns.sum(0, dtype=torch.float64)

    def done(self) -> Outcome:
        return Outcome(self.losses, self.metric_sums, self.grads.finished())


def run(cut: Cut, steps: tuple[Step, ...], inputs: tuple[Inputs, ...], target: Target) -> list[Outcome]:
    """steps: the student's, and that of a teacher that learns too, with the roles swapped. inputs: hidden states, weight and bias
    of each learner, not cut to the vocabulary, which its gradients are shaped like."""
    step = steps[0]
    learners = [_Learner(*pair, cut) for pair in zip(steps, inputs, strict=True)]
    if step.count:
        # A head in another dtype than its products is cast once, and not for each chunk; block by block in a single one.
        steps = cast(steps) if cut.chunks > 1 or cut.blocks == 1 else steps
        shapes = [(tile.shape, tile.dtype) for tile in cut.tiles]
        with borrowed(cut.buffer, shapes, step.budget, step.device) as (buffer, scratch):
            tiles = Tiles(cut, steps, scratch, buffer)
            for counted in cut.chunk_slices():
                index = step.index(counted.start, counted.stop)
                chunk = Chunk(counted, index, [one.weights[index] for one in steps])
                tiles.take(index)
                work = target(steps, tiles, chunk)
                for at, columns, head, dx in work.gradients():
                    learners[at].grads.add(head, dx, tiles.hidden[at], counted, columns, buffer)
                for at, learner in enumerate(learners):
                    learner.add(work.columns(at), chunk.weights[at], index)
    return [learner.done() for learner in learners]
