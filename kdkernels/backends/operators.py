"""Schemas and fake implementations of the low-level operators: what every backend implements over a block of logits.

Arguments, alike in all four:

- x, z: student and teacher logits, [rows, V], as their matrix products left them.
- x_bias, z_bias: [V] or None. head: student scale, student softcap, teacher scale, teacher softcap (a softcap of 0 is none).
- labels: int64 [rows] or None; outside [0, V) the label lies in another block. weight: [rows], factors of the gradient.
- t: 0-dim, the teacher's share in the target. a: the divergence's parameter. kd_scale, ce_scale: factors of both loss terms.
- weigh: "target", "student" or "": by whose exponentials the moments of the statistics are weighed, if any (divergences.py).

``row_loss`` does whole rows: it returns ROW_COLUMNS for each row and, if ``grad``, writes the gradient over x (or to ``out``).
Rows of weight 0 are not computed. ``block_stats``, ``block_reduce`` and ``block_grad`` are its three sweeps, for a block of the
vocabulary: they return STATS_COLUMNS and SUMS_COLUMNS (columns.py) of that block, and take those of the whole row.
"""

from __future__ import annotations

from typing import Any

import torch

from kdkernels.backends.columns import ROW_COLUMNS, STATS_COLUMNS, SUMS_COLUMNS, Row, Stats, Sums
from kdkernels.backends.dtypes import accumulate_dtype

library = torch.library.Library("kdkernels", "DEF")

_LOGITS = "Tensor z, Tensor? x_bias, Tensor? z_bias"
_LOSS = "Tensor weight, Tensor t, str divergence, float a, float temperature, float kd_scale, float ce_scale, float[] head"

library.define(
    f"row_loss(Tensor(a!) x, {_LOGITS}, Tensor? labels, {_LOSS}, bool grad, bool metrics, Tensor(b!)? out=None) -> Tensor"
)
library.define(
    f"block_stats(Tensor x, {_LOGITS}, Tensor? labels, Tensor t, float temperature, float[] head, str weigh, bool ce, "
    "bool metrics) -> Tensor"
)
library.define(
    f"block_reduce(Tensor x, {_LOGITS}, Tensor t, str divergence, float a, float temperature, float[] head, Tensor stats, "
    "bool metrics) -> Tensor"
)
library.define(f"block_grad(Tensor(a!) x, {_LOGITS}, Tensor? labels, {_LOSS}, Tensor stats, Tensor sums) -> ()")


def row_columns(stats: torch.Tensor, sums: torch.Tensor, ce: bool, metrics: bool) -> torch.Tensor:
    """ROW_COLUMNS from the statistics and sums of whole rows; what was not asked for is 0."""
    of, summed = Stats(*stats.unbind(1)), Sums(*sums.unbind(1))
    nothing = torch.zeros_like(summed.value)
    row = Row(
        kd=summed.value,
        ce=of.log_sum_x - (of.label_logit - of.max_x) if ce else nothing,
        target_entropy=summed.target_entropy,
        student_entropy=summed.student_entropy,
        agreement=of.argmax_x == of.argmax_z if metrics else nothing,
        overlap=summed.overlap,
    )
    return torch.stack([column.to(sums.dtype) for column in row], 1)


def _columns(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor:
    return x.new_empty((x.shape[0], len(columns)), dtype=accumulate_dtype(x.dtype))


def _row_loss(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return _columns(x, ROW_COLUMNS)


def _block_stats(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return _columns(x, STATS_COLUMNS)


def _block_reduce(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return _columns(x, SUMS_COLUMNS)


def _block_grad(*_: Any) -> None:
    return None


for _name, _fake in {
    "row_loss": _row_loss,
    "block_stats": _block_stats,
    "block_reduce": _block_reduce,
    "block_grad": _block_grad,
}.items():
    torch.library.register_fake(f"kdkernels::{_name}", _fake, lib=library)  # type: ignore[arg-type]
