"""Where the target comes from, and how a chunk of rows is worked out against it: a ``Target`` gives the work of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Step
from kdkernels.backends.products import HeadProducts
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


@dataclass(frozen=True)
class Chunk:
    """Rows that are worked out together. counted: their places among the rows that count; index: among all. weights: their token
    weights, of each learner."""

    counted: slice
    index: slice | Tensor
    weights: list[Tensor]


Target: TypeAlias = Callable[[tuple[Step, ...], Tiles, Chunk], Work]


def of_teacher(steps: tuple[Step, ...], tiles: Tiles, chunk: Chunk) -> Work:
    """A teacher's hidden states and head."""
    if tiles.cut.whole_rows:
        return (RowsOfOffsets if tiles.cut.size.offsets else WholeRows)(steps, tiles, chunk)
    begin, end = chunk.counted.start, chunk.counted.stop
    return Swept(steps if tiles.cut.chunks == 1 else tuple(one.chunk(begin, end) for one in steps), tiles)


def of_known(known: Known, tail: str) -> Target:
    """Tokens [N, k] of an offline teacher, their log-probabilities, and that of the rest [N] or None. tail: one of TAILS."""

    def target(steps: tuple[Step, ...], tiles: Tiles, chunk: Chunk) -> Work:
        return KnownRows(steps[0], known, tail, tiles, chunk.index)

    return target


class WholeRows:
    """A backend's row operation, for each learner, on logits of the full width."""

    def __init__(self, steps: tuple[Step, ...], tiles: Tiles, chunk: Chunk) -> None:
        self.steps, self.tiles, self.chunk = steps, tiles, chunk
        self.found: list[Tensor] = []

    def gradients(self) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        (block,) = self.tiles.blocks()
        x, z = block.logits[0], block.logits[-1]
        for at, (step, own, other, out) in enumerate(zip(self.steps, (x, z), (z, x), ("dx", "dz"), strict=False)):
            operators = backends.operators_of_loss(step.backend, step.device, step.student.logits, step.teacher.logits)
            dx = self.tiles.tile(out, block.columns)
            weights = self.chunk.weights[at] * step.scale
            columns = operators.row_loss(
                own, other, step.student.bias, step.teacher.bias, step.labels_at(self.chunk.index), weights, step.t,
                *step.terms.loss, step.terms.head, any(step.needs), step.metrics, dx,
            )  # fmt: skip
            self.found.append(columns)
            yield at, block.columns, block.heads[at], own if dx is None else dx

    def columns(self, at: int) -> Tensor:
        return self.found[at]


class RowsOfOffsets(WholeRows):
    """The same on logits that a backend multiplies itself and keeps in 16 bits."""

    def gradients(self) -> Iterator[tuple[int, slice, HeadProducts, Tensor]]:
        step, columns = self.steps[0], slice(0, self.steps[0].vocab)
        codes = [tile for name in ("x", "z") if (tile := self.tiles.tile(name, columns)) is not None]
        assert step.backend.offsets is not None
        rows = step.backend.offsets(self.steps, self.tiles.hidden, codes, step.labels_at(self.chunk.index))
        heads = self.tiles.heads(columns)
        for at, (one, own, out) in enumerate(zip(self.steps, codes, ("dx", "dz"), strict=False)):
            beside = self.tiles.tile(out, columns)
            dx = own.view(one.student.dtype) if beside is None else beside
            self.found.append(rows.row_loss(at, self.chunk.weights[at] * one.scale, dx if any(one.needs) else None))
            yield at, columns, heads[at], dx


class KnownRows:
    """Rows against k log-probabilities each."""

    def __init__(self, step: Step, known: Known, tail: str, tiles: Tiles, index: slice | Tensor) -> None:
        self.needs, self.tiles = any(step.needs), tiles
        self.rows = Outcomes(step, known, tail, index)
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
