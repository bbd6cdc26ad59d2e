"""The ``tokens`` strategy: a chunk of tokens at full vocabulary width at a time.

For each chunk both logit tiles come from two library products into a reused scratch, one row operation overwrites the student's
tile by its gradient, and two more products carry that to the hidden states and the head. These are the fewest products there
are, 3 Us + Ut (U = 2 N V D), for every divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.gradients import Gradients
from kdkernels.plan import chunk_rows, logit_bytes
from kdkernels.products import HeadProducts, block_size
from kdkernels.scratch import borrowed
from kdkernels.step import Outcome, Step, empty_sums, weighted


def run(step: Step, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Outcome:
    """hidden, weight, bias: the student's, not cut to the vocabulary, which the gradients are shaped like."""
    tokens, vocab, count = hidden.shape[0], step.vocab, step.count
    per_logit = logit_bytes(step.student.dtype, step.teacher.dtype, step.device)
    size = chunk_rows(count, vocab, per_logit, step.budget)
    row_loss = backends.operators(step.backend).row_loss
    # Kept rows may all fit one chunk where all rows would not; the plan, which does not know them, counts the latter.
    grads = Gradients(step, hidden, weight, bias, weight_parts=-(-tokens // chunk_rows(tokens, vocab, per_logit, step.budget)))
    losses = torch.zeros(tokens, dtype=step.sum_dtype, device=step.device)
    metric_sums = empty_sums(step.device)
    block = max(block_size(vocab, model.weight.shape[1], step.device) for model in (step.student, step.teacher))
    # A gradient in the products' dtype lies over the logits where those have that dtype, beside them otherwise.
    apart = step.student.dtype != step.student.logits
    tiles = [step.student.logits, *([] if step.alone else [step.teacher.logits]), *([step.student.dtype] if apart else [])]
    shapes = [((1, block), torch.float32), *(((size, vocab), dtype) for dtype in tiles)]
    with borrowed(shapes, step.budget + 4 * block, step.device) as (blocks, *scratch):
        buffer = blocks[0]
        student = HeadProducts(step.student.weight, step.student.dtype, buffer)
        teacher = student if step.alone else HeadProducts(step.teacher.weight, step.teacher.dtype, buffer)
        for begin in range(0, count, size):
            index = step.index(begin, min(begin + size, count))
            chunk = step.student.rows(index)
            x, *others = (tile[: len(chunk)] for tile in scratch)
            out = others.pop() if apart else None
            z = x if step.alone else others[0]
            student.logits(chunk, x)
            if not step.alone:
                teacher.logits(step.teacher.rows(index), z)
            chunk_weights = step.weights[index]
            columns = row_loss(
                *(x, z, step.student.bias, step.teacher.bias, step.labels_at(index)),
                *(chunk_weights * step.scale, step.t, *step.terms.loss, step.terms.head),
                *(any(step.needs), step.metrics, out),
            )
            losses[index] = chunk_weights * weighted(columns, step.terms)
            if step.metrics:
                metric_sums += columns.sum(0, dtype=torch.float64)
            grads.add_rows(student, x if out is None else out, chunk, index, buffer, first=begin == 0)
    return Outcome(losses, metric_sums, grads.finished())
