"""The ``tokens`` strategy: a chunk of tokens at full vocabulary width at a time.

For each chunk both logit tiles come from two library products into a reused scratch, one row operation overwrites the student's
tile by its gradient, and two more products carry that to the hidden states and the head. These are the fewest products there
are, 3 Us + Ut (U = 2 N V D), for every divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends import native
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.plan import chunk_rows, logit_bytes
from kdkernels.products import HeadProducts, add_head_grad, product_dtype

METRICS = ("kd", "ce", "target_entropy", "student_entropy", "agreement", "overlap", "tokens")


@dataclass(frozen=True)
class Terms:
    """The loss of a row, apart from the logits: kd_scale * D(T) + ce_scale * CE, and what its heads do to their logits."""

    divergence: str
    a: float
    temperature: float
    kd_scale: float
    ce_scale: float
    head: list[float]


def kept_rows(labels: Tensor | None, weight: Tensor | None, ignore_index: int, vocab: int) -> Tensor | None:
    """Indices of the rows that count, None for all of them; raises ValueError if a label of theirs is out of range.

    On a GPU this is the call's one host sync.
    """
    if labels is None and weight is None:
        return None
    keep = torch.ones_like(weight, dtype=torch.bool) if weight is not None else None
    if weight is not None:
        keep = weight != 0
    if labels is not None:
        labelled = labels != ignore_index
        keep = labelled if keep is None else keep & labelled
    assert keep is not None
    if keep.numel() == 0:
        return None
    facts = [keep.sum()]
    if labels is not None:
        counted = labels.where(labelled, 0)
        facts += [counted.max(), counted.min()]
    count, *extremes = torch.stack(facts).tolist()
    if extremes and (extremes[0] >= vocab or extremes[1] < 0):
        wrong = extremes[0] if extremes[0] >= vocab else extremes[1]
        raise ValueError(f"labels holds {wrong}; accepted: 0 to {vocab - 1}, or ignore_index={ignore_index}")
    if count == keep.numel():
        return None
    return torch.nonzero_static(keep, size=count)[:, 0]


def _summary(sums: Tensor, count: int) -> Tensor:
    """The metrics of METRICS: means over the kept tokens, and their number."""
    return torch.cat([sums / max(count, 1), sums.new_tensor([count])])


def linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    token_weight: Tensor | None,
    grad_scale: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    t: Tensor,
    terms: Terms,
    ignore_index: int,
    vocab: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
    metrics: bool,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row (0 where dropped), gradients of grad_scale * sum of losses (empty where not needed), and metrics."""
    tokens, device = student_hidden.shape[0], student_hidden.device
    x_dtype, z_dtype = (product_dtype(dtype, device) for dtype in dtypes)
    sum_dtype = accumulate_dtype(x_dtype)
    rows = kept_rows(labels, token_weight, ignore_index, vocab)
    count = tokens if rows is None else rows.shape[0]
    weights = torch.ones(tokens, dtype=sum_dtype, device=device) if token_weight is None else token_weight.to(sum_dtype)

    need_hidden, need_weight, need_bias = needs
    losses = torch.zeros(tokens, dtype=sum_dtype, device=device)
    hidden_grad = torch.zeros_like(student_hidden, memory_format=torch.contiguous_format) if need_hidden else losses.new_empty(0)
    size = chunk_rows(tokens, vocab, logit_bytes(*dtypes, device), budget)
    if need_weight:
        weight_grad = native.empty(tuple(student_weight.shape), student_weight.dtype, device)
        weight_grad[0 if count == 0 else vocab :] = 0
        split = tokens > size and weight_grad.dtype.itemsize == 2
        weight_sum = native.empty((vocab, weight_grad.shape[1]), sum_dtype, device) if split else weight_grad[:vocab]
    else:
        weight_grad = losses.new_empty(0)
    bias_sum = losses.new_zeros(0 if student_bias is None else student_bias.shape[0])
    metric_sums = torch.zeros(len(METRICS) - 1, dtype=torch.float64, device=device)

    chunks = math.ceil(count / size)
    size = math.ceil(count / chunks) if chunks else 0
    # Where the loss does not look at the teacher, its logits are not computed: the student stands in for it.
    alone = terms.kd_scale == 0.0 and not metrics
    backend = backends.operators(backends.select(device, x_dtype, z_dtype))
    student = HeadProducts(student_weight[:vocab], x_dtype)
    x_bias = None if student_bias is None else student_bias[:vocab].to(sum_dtype).contiguous()
    if alone:
        z_bias, head = x_bias, terms.head[:2] * 2
    else:
        teacher = HeadProducts(teacher_weight[:vocab], z_dtype)
        z_bias = None if teacher_bias is None else teacher_bias[:vocab].to(sum_dtype).contiguous()
        head = terms.head
    x_scratch = native.empty((size, vocab), x_dtype, device)
    z_scratch = x_scratch if alone else native.empty((size, vocab), z_dtype, device)

    for chunk in range(chunks):
        here = slice(chunk * size, min((chunk + 1) * size, count))
        index: slice | Tensor = here if rows is None else rows[here]
        x, z = x_scratch[: here.stop - here.start], z_scratch[: here.stop - here.start]
        hidden = student_hidden[index].to(x_dtype)
        student.logits(hidden, x)
        if not alone:
            teacher.logits(teacher_hidden[index].to(z_dtype), z)
        chunk_weights = weights[index]
        columns = backend.row_loss(
            x,
            z,
            x_bias,
            z_bias,
            None if labels is None else labels[index].contiguous(),
            chunk_weights * grad_scale,
            t,
            terms.divergence,
            terms.a,
            terms.temperature,
            terms.kd_scale,
            terms.ce_scale,
            head,
            any(needs),
            metrics,
        )
        losses[index] = chunk_weights * weighted(columns, terms)
        if metrics:
            metric_sums += columns.sum(0, dtype=torch.float64)
        if need_bias:
            bias_sum[:vocab] += x.sum(0, dtype=sum_dtype)
        if need_hidden:
            if student_hidden.dtype == x_dtype and rows is None:
                student.hidden_grad(x, hidden_grad[here])
            else:
                part = torch.empty_like(hidden)
                student.hidden_grad(x, part)
                hidden_grad[index] = part.to(hidden_grad.dtype)
        if need_weight:
            add_head_grad(x, hidden, weight_sum, first=chunk == 0)

    if need_weight and split and count:
        weight_grad[:vocab] = weight_sum
    bias_grad = bias_sum.to(student_bias.dtype) if need_bias and student_bias is not None else losses.new_empty(0)
    summary = _summary(metric_sums, count).to(sum_dtype) if metrics else losses.new_empty(0)
    return losses, hidden_grad, weight_grad, bias_grad, summary


def weighted(columns: Tensor, terms: Terms) -> Tensor:
    """Both terms of the loss of each row; a term of factor 0 is left out, whatever it came to."""
    loss = columns.new_zeros(columns.shape[0])
    if terms.kd_scale != 0.0:
        loss += terms.kd_scale * columns[:, 0]
    if terms.ce_scale != 0.0:
        loss += terms.ce_scale * columns[:, 1]
    return loss


def logits_kd(
    student_logits: Tensor,
    token_weight: Tensor | None,
    grad_scale: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    t: Tensor,
    terms: Terms,
    ignore_index: int,
    need: bool,
    metrics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from logits [N, V] that exist: loss of each row, gradient of the student's logits, metrics."""
    tokens, vocab = student_logits.shape
    device, sum_dtype = student_logits.device, accumulate_dtype(student_logits.dtype)
    rows = kept_rows(labels, token_weight, ignore_index, vocab)
    count = tokens if rows is None else rows.shape[0]
    weights = torch.ones(tokens, dtype=sum_dtype, device=device) if token_weight is None else token_weight.to(sum_dtype)
    if rows is not None:
        weights = torch.zeros_like(weights).index_copy_(0, rows, weights[rows])
    name = backends.select(device, student_logits.dtype, teacher_logits.dtype)
    out = native.empty(tuple(student_logits.shape), student_logits.dtype, device) if need else None
    # The native backend needs no scratch beyond a row per thread; the reference's temporaries are bounded by chunks.
    size = tokens if name == "native" else 256
    columns = losses = weights.new_empty((0, 6))
    parts = []
    for begin in range(0, tokens, max(1, size)):
        here = slice(begin, begin + size)
        parts.append(
            backends.operators(name).row_loss(
                student_logits[here],
                teacher_logits[here],
                None,
                None,
                None if labels is None else labels[here].contiguous(),
                weights[here] * grad_scale,
                t,
                terms.divergence,
                terms.a,
                terms.temperature,
                terms.kd_scale,
                terms.ce_scale,
                terms.head,
                need,
                metrics,
                None if out is None else out[here],
            )
        )
    columns = torch.cat(parts) if parts else columns
    losses = (weights * weighted(columns, terms)).masked_fill_(weights == 0, 0.0)
    summary = _summary(columns.sum(0, dtype=torch.float64), count).to(sum_dtype) if metrics else losses.new_empty(0)
    return losses, losses.new_empty(0) if out is None else out, summary
