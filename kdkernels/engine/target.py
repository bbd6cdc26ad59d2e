"""Where the target comes from, and how a chunk of rows is worked out against it: a ``Target`` gives the work of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Step
from kdkernels.backends.products import HeadProducts
from kdkernels.engine.cut import Cut
from kdkernels.engine.keep import Known
from kdkernels.engine.outcomes import Outcomes
from kdkernels.engine.sweeps import Swept
from kdkernels.engine.tiles import Tiles


class Work(Protocol):
    """One chunk of rows."""

    def gradients(self) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        """Learner, columns, its head there, and the gradient of its logits [C, Vb], valid until the next one."""

    def columns(self, at: int) -> Tensor:
        """ROW_COLUMNS of a learner's rows, once the gradients were gone through."""


Target: TypeAlias = Callable[[Cut, tuple[Step, ...], Tiles, slice], Work]


def of_teacher(cut: Cut, steps: tuple[Step, ...], tiles: Tiles, counted: slice) -> Work:
    """A teacher's hidden states and head. counted: the chunk, among the rows that count."""
    if cut.whole_rows:
        return WholeRows(steps, tiles, counted)
    return Swept(steps if cut.chunks == 1 else tuple(one.chunk(counted.start, counted.stop) for one in steps), tiles)


def of_known(known: Known, tail: str) -> Target:
    """Tokens [N, k] of an offline teacher, their log-probabilities, and that of the rest [N] or None. tail: one of TAILS."""

    def target(cut: Cut, steps: tuple[Step, ...], tiles: Tiles, counted: slice) -> Work:
        return KnownRows(steps[0], known, tail, tiles, counted)

    return target


class WholeRows:
    """A backend's row operation, for each learner, on logits of the full width."""

    def __init__(self, steps: tuple[Step, ...], tiles: Tiles, counted: slice) -> None:
        self.steps, self.tiles, self.index = steps, tiles, steps[0].index(counted.start, counted.stop)
        self.found: list[Tensor] = []

    def gradients(self) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        (block,) = self.tiles.blocks()
        x, z = block.logits[0], block.logits[-1]
        for at, (step, own, other, out) in enumerate(zip(self.steps, (x, z), (z, x), ("dx", "dz"), strict=False)):
            operators = backends.operators_of_loss(step.backend, step.device, step.student.logits, step.teacher.logits)
            dx = self.tiles.tile(out, block.columns)
            weights = step.weights[self.index] * step.scale
            columns = operators.row_loss(
                own, other, step.student.bias, step.teacher.bias, step.labels_at(self.index), weights, step.t, *step.terms.loss,
                step.terms.head, any(step.needs), step.metrics, dx,
            )  # fmt: skip
            self.found.append(columns)
            yield at, block.columns, block.heads[at], own if dx is None else dx

    def columns(self, at: int) -> Tensor:
        return self.found[at]


class KnownRows:
    """Rows against k log-probabilities each."""

    def __init__(self, step: Step, known: Known, tail: str, tiles: Tiles, counted: slice) -> None:
        self.needs, self.tiles = any(step.needs), tiles
        self.rows = Outcomes(step, known, tail, step.index(counted.start, counted.stop))
        for block in tiles.blocks():
            self.rows.add(block.logits[0], block.columns)
        self.found = self.rows.finished()

    def gradients(self) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        for block in self.tiles.blocks() if self.needs else ():
            (x,) = block.logits
            beside = self.tiles.tile("dx", block.columns)
            dx = x if beside is None else beside
            self.rows.write_gradient(x, block.columns, dx)
            self.tiles.overwritten()
            yield 0, block.columns, block.heads[0], dx

    def columns(self, at: int) -> Tensor:
        return self.found
