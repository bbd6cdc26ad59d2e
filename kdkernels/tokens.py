"""The ``tokens`` strategy: a chunk of tokens at full vocabulary width at a time.

For each chunk both logit tiles come from two library products into a reused scratch, one row operation overwrites the student's
tile by its gradient, and two more products carry that to the hidden states and the head. These are the fewest products there
are, 3 Us + Ut (U = 2 N V D), for every divergence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import backends
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.plan import chunk_rows, logit_bytes
from kdkernels.products import HeadProducts, add_head_grad, block_size, product_dtype
from kdkernels.scratch import borrowed

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
    lift: Tensor | None,
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
    """Loss of each row (0 where dropped), gradients of grad_scale * sum of losses (empty where not needed), and metrics.

    lift: a factor on top that only the gradient of the hidden states keeps.
    """
    tokens, device = student_hidden.shape[0], student_hidden.device
    x_dtype, z_dtype = (product_dtype(dtype, device) for dtype in dtypes)
    sum_dtype = accumulate_dtype(x_dtype)
    rows = kept_rows(labels, token_weight, ignore_index, vocab)
    count = tokens if rows is None else rows.shape[0]
    weights = torch.ones(tokens, dtype=sum_dtype, device=device) if token_weight is None else token_weight.to(sum_dtype)
    scale = grad_scale if lift is None else grad_scale * lift
    per_logit = logit_bytes(*dtypes, device)
    size = chunk_rows(count, vocab, per_logit, budget)

    # Where the loss does not look at the teacher, its logits are not computed: the student stands in for it.
    alone = terms.kd_scale == 0.0 and not metrics
    x_bias = _bias(student_bias, vocab, sum_dtype)
    z_bias = x_bias if alone else _bias(teacher_bias, vocab, sum_dtype)
    head = terms.head[:2] * 2 if alone else terms.head
    backend = backends.operators(backends.select(device, x_dtype, z_dtype))

    split = tokens > chunk_rows(tokens, vocab, per_logit, budget)
    grads = _Gradients(student_hidden, student_weight, student_bias, needs, vocab, sum_dtype, lift, split)
    losses = torch.zeros(tokens, dtype=sum_dtype, device=device)
    metric_sums = torch.zeros(len(METRICS) - 1, dtype=torch.float64, device=device)
    block = max(block_size(vocab, weight.shape[1]) for weight in (student_weight, teacher_weight))
    shapes = [((1, block), torch.float32), ((size, vocab), x_dtype), *([] if alone else [((size, vocab), z_dtype)])]
    with borrowed(shapes, budget + 4 * block, device) as scratch:
        buffer = scratch[0][0]
        student = HeadProducts(student_weight[:vocab], x_dtype, buffer)
        teacher = student if alone else HeadProducts(teacher_weight[:vocab], z_dtype, buffer)
        for begin in range(0, count, size):
            here = slice(begin, min(begin + size, count))
            index: slice | Tensor = here if rows is None else rows[here]
            x, z = scratch[1][: here.stop - begin], scratch[-1][: here.stop - begin]
            hidden = student_hidden[index].to(x_dtype)
            student.logits(hidden, x)
            if not alone:
                teacher.logits(teacher_hidden[index].to(z_dtype), z)
            chunk_weights = weights[index]
            columns = backend.row_loss(
                *(x, z, x_bias, z_bias),
                None if labels is None else labels[index].contiguous(),
                chunk_weights * scale,
                *(t, terms.divergence, terms.a, terms.temperature, terms.kd_scale, terms.ce_scale, head),
                any(needs),
                metrics,
            )
            losses[index] = chunk_weights * weighted(columns, terms)
            if metrics:
                metric_sums += columns.sum(0, dtype=torch.float64)
            grads.add(student, x, hidden, index, buffer, first=begin == 0)

    summary = _summary(metric_sums, count).to(sum_dtype) if metrics else losses.new_empty(0)
    return losses, *grads.finished(empty=count == 0), summary


def _bias(bias: Tensor | None, vocab: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[:vocab].to(dtype).contiguous()


class _Gradients:
    """The student's gradients, as they are added up over the chunks; what is not needed is neither computed nor allocated."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        vocab: int,
        sum_dtype: torch.dtype,
        lift: Tensor | None,
        split: bool,
    ) -> None:
        """split: whether there are several chunks; a 16-bit head's gradient is then added up in float32."""
        self.vocab, self.lift = vocab, lift
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
        self.weight_sum = None if self.weight is None else self.weight[:vocab]
        if self.weight_sum is not None and split and weight.dtype.itemsize == 2:
            self.weight_sum = torch.empty_like(self.weight_sum, dtype=sum_dtype)
        self.bias = torch.zeros_like(bias, dtype=sum_dtype) if needs[2] and bias is not None else None
        self.sums = hidden.new_empty(0, dtype=sum_dtype)
        self.bias_dtype = None if bias is None else bias.dtype

    def add(self, head: HeadProducts, dx: Tensor, hidden: Tensor, index: slice | Tensor, buffer: Tensor, first: bool) -> None:
        """A chunk's logit gradients dx [C, V] and hidden states [C, D], which are the rows ``index`` of all."""
        if self.bias is not None:
            self.bias[: self.vocab] += dx.sum(0, dtype=self.bias.dtype)
        if self.hidden is not None:
            if self.hidden.dtype == hidden.dtype and isinstance(index, slice):
                head.hidden_grad(dx, self.hidden[index])
            else:
                part = torch.empty_like(hidden)
                head.hidden_grad(dx, part)
                self.hidden[index] = part.to(self.hidden.dtype)
        if self.weight_sum is not None:
            hidden = hidden if self.lift is None else (hidden / self.lift).to(hidden.dtype)
            add_head_grad(dx, hidden, self.weight_sum, first, buffer)

    def finished(self, empty: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias in their dtypes; ``empty``: no chunk was added."""
        if self.weight is not None and self.weight_sum is not None:
            if empty:
                self.weight.zero_()
            elif self.weight_sum.dtype != self.weight.dtype:
                self.weight[: self.vocab] = self.weight_sum
            self.weight[self.vocab :] = 0
        bias = self.bias
        if bias is not None:
            bias = (bias if self.lift is None else bias / self.lift).to(self.bias_dtype)
        # An operator may not return one tensor twice, so each absent gradient is an empty tensor of its own.
        made = [self.sums.new_empty(0) if grad is None else grad for grad in (self.hidden, self.weight, bias)]
        return made[0], made[1], made[2]


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
    lift: Tensor | None,
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
    scale = grad_scale if lift is None else grad_scale * lift
    name = backends.select(device, student_logits.dtype, teacher_logits.dtype)
    out = torch.empty_like(student_logits, memory_format=torch.contiguous_format) if need else None
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
                weights[here] * scale,
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
    losses = (weights * weighted(columns, terms)).masked_fill_(weights == 0, 0.0).to(sum_dtype)
    summary = _summary(columns.sum(0, dtype=torch.float64), count).to(sum_dtype) if metrics else losses.new_empty(0)
    return losses, losses.new_empty(0) if out is None else out, summary
