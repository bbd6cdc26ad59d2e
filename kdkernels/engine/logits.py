"""The loss from logits that exist: the row operation over all of them, and no product."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.base import Terms
from kdkernels.backends.columns import ROW_COLUMNS
from kdkernels.backends.dtypes import accumulate_dtype
from kdkernels.engine.keep import kept_rows
from kdkernels.engine.step import summary, weighted


def run(
    student_logits: Tensor,
    token_weight: Tensor | None,
    grad_scale: Tensor,
    lift: Tensor | None,
    teacher_logits: Tensor,
    labels: Tensor | None,
    t: Tensor,
    terms: Terms,
    ignore_index: int,
    check_labels: bool,
    need: bool,
    metrics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row (0 where dropped), gradient of the student's logits (empty if not needed), metrics."""
    tokens, vocab = student_logits.shape
    device, sum_dtype = student_logits.device, accumulate_dtype(student_logits.dtype)
    kept = kept_rows(labels, token_weight, ignore_index, vocab, check=check_labels)
    weights = kept.weights(token_weight, tokens, sum_dtype, device)
    if kept.rows is not None:
        weights = torch.zeros_like(weights).index_copy_(0, kept.rows, weights[kept.rows])
    counted: int | Tensor = tokens if kept.rows is None else kept.rows.shape[0]
    if kept.counts is not None:
        counted = kept.counts.sum()
    scale = grad_scale if lift is None else grad_scale * lift
    dtypes = student_logits.dtype, teacher_logits.dtype
    backend = backends.select(device, *dtypes)
    row_loss = backends.operators_of_loss(backend, device, *dtypes).row_loss
    out = torch.empty_like(student_logits, memory_format=torch.contiguous_format) if need else None
    size = backend.most_rows or max(1, tokens)
    parts = [weights.new_empty((0, len(ROW_COLUMNS)))]
    for begin in range(0, tokens, size):
        here = slice(begin, begin + size)
        parts.append(
            row_loss(
                student_logits[here],
                teacher_logits[here],
                None,
                None,
                None if labels is None else labels[here].contiguous(),
                weights[here] * scale,
                t,
                *terms.loss,
                terms.head,
                need,
                metrics,
                None if out is None else out[here],
            )
        )
    columns = torch.cat(parts)
    losses = (weights * weighted(columns, terms)).masked_fill_(weights == 0, 0.0).to(sum_dtype)
    means = summary(columns.sum(0, dtype=torch.float64), counted, sum_dtype) if metrics else losses.new_empty(0)
    return losses, losses.new_empty(0) if out is None else out, means
