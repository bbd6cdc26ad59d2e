"""Eager PyTorch and the library's strategies side by side, predicted: what ``python -m kdkernels plan`` prints."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kdkernels.divergences import resolve
from kdkernels.planning.devices import FUSED_EFFICIENCY, Device
from kdkernels.planning.plan import plan
from kdkernels.planning.roofline import row_instructions


@dataclass(frozen=True)
class Predicted:
    """One way to compute the step. peak_bytes: with inputs and returned gradients. seconds, flops: of loss and gradients.

    over_products: seconds over those of the bare products. cut: into how many pieces, in words. note: what to know about the
    figures, or nothing. auto: whether strategy="auto" of the loss takes it.
    """

    name: str
    peak_bytes: int
    seconds: float
    over_products: float
    flops: float
    cut: str
    note: str = ""
    auto: bool = False

    def figures(self, on: Device) -> dict[str, Any]:
        """Plain values, ready for JSON. fits: in the device's memory; None where that is not known."""
        return {
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "seconds_over_products": self.over_products,
            "flops": self.flops,
            "cut": self.cut,
            "fits": self.peak_bytes <= on.memory if on.memory else None,
        }


def compare(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    on: Device,
    divergence: str = "forward_kl",
    memory_budget: int | None = None,
    train_head: bool = True,
    online_teacher: bool = False,
) -> tuple[Predicted, ...]:
    """Eager PyTorch and the library's strategies side by side, all of it predicted.

    All figures are those of ``kd.plan``. Raises ValueError as it does, and for a dtype whose rate on the device is not known.
    """
    on.rate(dtype)
    make = functools.partial(
        plan,
        tokens,
        vocab,
        student_dim,
        teacher_dim,
        dtype,
        device=on.name,
        divergence=resolve(divergence),
        memory_budget=memory_budget,
        train_head=train_head,
        online_teacher=online_teacher,
    )
    chunked, streamed = make(strategy="tokens"), make(strategy="vocab")
    products, auto = chunked.products_seconds, make(strategy="auto").strategy

    def predicted(name: str, peak: int, seconds: float | None, flops: int, cut: str, note: str = "") -> Predicted:
        assert seconds is not None
        assert products is not None
        return Predicted(name, peak, seconds, seconds / products, flops, cut, "" if on.measured else note, name == auto)

    row_note = f"its row kernel is counted at {_instructions(divergence, chunked.offsets)}"
    if online_teacher:
        row_note += f"; the teacher's at {_instructions('forward_kl', chunked.offsets)}"
    if chunked.offsets:
        row_note += "; logits are kept in 16 bits"
    source = "an estimate" if on.fused_efficiency == FUSED_EFFICIENCY else "as fitted to an H100"
    vocab_note = f"its kernels are counted at {on.fused_efficiency} of the rate of library products, {source}"
    return (
        predicted("eager", chunked.eager_peak_bytes, chunked.eager_seconds, chunked.eager_flops, "whole"),
        predicted("tokens", chunked.peak_bytes, chunked.seconds, chunked.flops, _count(chunked.chunks, "chunk"), row_note),
        predicted("vocab", streamed.peak_bytes, streamed.seconds, streamed.flops, _count(streamed.blocks, "block"), vocab_note),
    )


def _instructions(divergence: str, offsets: bool) -> str:
    counts = dict(zip(("statistics", "sums", "gradient"), row_instructions(divergence, offsets), strict=True))
    listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return f"{sum(counts.values())} instructions a logit: {listed}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(count: float) -> str:
    """Bytes in the unit that shows a few digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} B"


def table(ways: Sequence[Predicted], on: Device) -> str:
    """The comparison in plain text; the columns say that their figures are predicted."""
    columns = {"peak memory, predicted": 24, "time, predicted": 17, "over products, predicted": 26, "matrix Tflop, predicted": 25}
    lines = [f"{'':8}{''.join(f'{title:>{width}}' for title, width in columns.items())}  cut"]
    notes = []
    for way in ways:
        time = f"{way.seconds * 1e3:,.2f} ms"
        cells = _size(way.peak_bytes), time, f"{way.over_products:,.2f}", f"{way.flops / 1e12:,.3f}"
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, columns.values(), strict=True))
        lines.append(f"{way.name:8}{row}  {way.cut}{'  <- auto' if way.auto else ''}")
        if way.note:
            notes.append(f"{way.name}: {way.note}.")
        if 0 < on.memory < way.peak_bytes:
            notes.append(f"{way.name}: more than the {_size(on.memory)} of {on.name}.")
    source = "rates measured here" if on.measured else "the datasheet's rates"
    lines += [
        "",
        f"Peak memory holds inputs and returned gradients. Time is a roofline from {source}: nothing was run.",
        "Over products: the time over that of the matrix products alone, which no loss with these gradients can do without.",
        *notes,
    ]
    return "\n".join(lines)
