"""A chunk's logits in the scratch, block by block of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kdkernels.backends.base import Model, Step
from kdkernels.backends.products import HeadProducts
from kdkernels.engine.cut import Cut


def cast(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """With heads of a dtype in which their products run, or one that is widened block by block."""
    found: dict[int, Model] = {}
    for one in steps:
        for model in (one.student, one.teacher):
            if id(model) not in found:
                found[id(model)] = replace(model, weight=HeadProducts(model.weight, model.dtype, model.weight).weight)
    return tuple(replace(one, student=found[id(one.student)], teacher=found[id(one.teacher)]) for one in steps)


@dataclass(frozen=True)
class Block:
    """columns: of the vocabulary. heads: of the models, there. logits: [C, Vb] of each."""

    columns: slice
    heads: list[HeadProducts]
    logits: list[Tensor]


class Tiles:
    """The scratch of a cut, and what multiplies into it: one chunk of rows after the other."""

    def __init__(self, cut: Cut, steps: tuple[Step, ...], scratch: Sequence[Tensor], buffer: Tensor) -> None:
        step = steps[0]
        self.cut, self.buffer = cut, buffer
        self.scratch = {tile.name: found for tile, found in zip(cut.tiles, scratch, strict=True)}
        self.step, self.models = step, (step.student,) if step.alone else (step.student, step.teacher)
        self.hidden: list[Tensor] = []
        self.multiplied: slice | None = None

    def take(self, index: slice | Tensor) -> None:
        """The rows ``index`` of all are what is multiplied from now on."""
        self.hidden = [model.rows(index) for model in self.models]
        uncounted = self.step.uncounted_at(index)
        if uncounted is not None:  # as zeros: a factor of 0 would not keep a NaN of theirs out of the sums
            self.hidden = [hidden.masked_fill(uncounted, 0.0) for hidden in self.hidden]
        self.multiplied = None

    def tile(self, name: str, columns: slice) -> Tensor | None:
        """[C, Vb], uninitialised; None where the cut has no such tile."""
        found = self.scratch.get(name)
        return None if found is None else found[: len(self.hidden[0]), : columns.stop - columns.start]

    def heads(self, columns: slice) -> list[HeadProducts]:
        """Of the models, there."""
        return [HeadProducts(model.weight[columns], model.dtype, self.buffer) for model in self.models]

    def blocks(self) -> Iterator[Block]:
        """Blocks with their logits; those that are still there from the last time are not multiplied again."""
        for columns in self.cut.block_slices():
            heads = self.heads(columns)
            logits = [tile for name in ("x", "z") if (tile := self.tile(name, columns)) is not None]
            if columns != self.multiplied:
                for head, hidden, out in zip(heads, self.hidden, logits, strict=True):
                    head.logits(hidden, out)
                self.multiplied = columns
            yield Block(columns, heads, logits)

    def overwritten(self) -> None:
        """The logits are no longer there."""
        self.multiplied = None
