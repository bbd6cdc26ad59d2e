"""The loss against a target that knows k tokens of each row (an offline teacher's top-k), by either strategy.

The vocabulary of a row falls into its k tokens and the rest. The target has k outcomes, or one more for all of the rest together
(``tail="bucket"``), so value and slope of any divergence are sums over those few, in float64. Of the rest a row needs three things
only: its log-sum-exp, its slope, and its gradient, which is a multiple of the softmax over the rest alone. Entries of the k tokens
are banned (-inf) from the rest before either is computed and never subtracted from the whole: where the student is sure of one of
them, a difference would have no digits left. Nor can anything underflow that should not: exp(x - log-sum-exp of the rest) is a
probability given that the outcome is the rest, however unlikely that is.

Passes over logits are plain torch, over pieces of rows that stay in a cache, on every device: one for the statistics and one for
the gradient, for every divergence. Products are 3 Us by chunks of tokens, and 4 Us by blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.gradients import Gradients
from kdkernels.plan import block_columns, chunk_rows
from kdkernels.products import HeadProducts, block_size
from kdkernels.scratch import borrowed
from kdkernels.step import Inputs, Known, Outcome, Step, empty_sums, weighted

TAILS = ("renormalize", "bucket")
# Bytes of a piece of logits that is worked on at a time; at most six tensors of this size live at once.
PIECE_BYTES = {"cpu": 2**20}
OTHER_PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Part:
    """What is known of some entries of each row, [rows] each, in float64.

    log_sum: of exp(x / T), log_sum_1: of exp(x). entropy: of the softmax of x / T over these entries. top: the largest x / T, best:
    its token.
    """

    log_sum: Tensor
    log_sum_1: Tensor
    entropy: Tensor
    top: Tensor
    best: Tensor

    def merged(self, other: Part) -> Part:
        """Of both parts' entries together; of equal largest ones this part's wins."""
        log_sum = torch.logaddexp(self.log_sum, other.log_sum)
        shares = [_difference(part.log_sum, log_sum).exp() for part in (self, other)]
        inside = shares[0] * self.entropy + shares[1] * other.entropy
        return Part(
            log_sum,
            torch.logaddexp(self.log_sum_1, other.log_sum_1),
            inside + torch.special.entr(shares[0]) + torch.special.entr(shares[1]),
            torch.maximum(self.top, other.top),
            torch.where(other.top > self.top, other.best, self.best),
        )


def _difference(log_part: Tensor, log_whole: Tensor) -> Tensor:
    """log of a part's share; nothing (-inf) of nothing is -inf."""
    return torch.where(log_whole == -torch.inf, log_whole, log_part - log_whole)


def _exponentials(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(v - its row's largest), their sums, log-sum-exp of v, largest; sums and log-sum-exps in float64."""
    top = v.amax(1)
    shift = top.masked_fill(top == -torch.inf, 0.0)  # of nothing the sum is exp(-inf - 0) = 0
    e = (v - shift[:, None]).exp_()
    total = e.sum(1).double()
    return e, total, shift.double() + total.log(), top


def part_of(v: Tensor, temperature: float, ce: bool, metrics: bool, first: int = 0) -> Part:
    """Of logits v [rows, columns], the first of which is the token ``first``. ce: whether log_sum_1 is wanted."""
    e, total, log_sum, top = _exponentials(v if temperature == 1.0 else v / temperature)
    entropy, best = torch.zeros_like(total), torch.full_like(total, -1, dtype=torch.int64)
    if metrics:
        entropy = (total.log() - torch.special.xlogy(e, e).sum(1).double() / total).masked_fill(total == 0.0, 0.0)
        best = v.argmax(1) + first
    log_sum_1 = _exponentials(v)[2] if ce and temperature != 1.0 else log_sum
    return Part(log_sum, log_sum_1, entropy, top.double(), best)


def _below(v: Tensor, log_sum: Tensor) -> Tensor:
    """exp(v - log_sum) for v [rows, columns] and log_sum [rows] in float64, which need not be representable in v's dtype."""
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0.0)  # nothing is there to be divided
    near = log_sum.to(v.dtype)
    return (v - near[:, None]).sub_((log_sum - near).to(v.dtype)[:, None]).exp_()


class Outcomes:
    """Some rows of a step against their targets: statistics of columns as they come, then the loss, then gradients of columns."""

    def __init__(self, step: Step, known: Known, tail: str, index: slice | Tensor) -> None:
        self.step, self.terms, self.bucket = step, step.terms, tail == "bucket"
        self.scale, self.softcap = step.terms.head[:2]
        self.log_probs = known[1][index].double()
        self.used = self.log_probs != -torch.inf  # NaN is used: it is not to be hidden
        self.ids = known[0][index].where(self.used, 0)
        self.labels = step.labels_at(index)
        self.ce = self.labels is not None and (self.terms.ce_scale != 0.0 or step.metrics)
        self.weights = step.weights[index].double()
        rows = len(self.ids)
        nothing = self.weights.new_full((rows,), -torch.inf)
        self.rest = Part(nothing, nothing, torch.zeros_like(nothing), nothing, self.ids.new_full((rows,), -1))
        self.logits = self.log_probs.new_full(self.ids.shape, -torch.inf)  # of the k tokens, after the head
        self.label_logit = torch.zeros_like(nothing)

    def _pieces(self, x: Tensor) -> Iterator[slice]:
        piece = PIECE_BYTES.get(x.device.type, OTHER_PIECE_BYTES)
        rows = max(1, piece // (x.shape[1] * self.step.sum_dtype.itemsize))
        return (slice(begin, begin + rows) for begin in range(0, len(x), rows))

    def _after_head(self, x: Tensor, columns: slice) -> Tensor:
        v = x.to(self.step.sum_dtype, copy=True)
        if self.step.student.bias is not None:
            v += self.step.student.bias[columns]
        if self.scale != 1.0:
            v *= self.scale
        if self.softcap != 0.0:
            v.div_(self.softcap).tanh_().mul_(self.softcap)
        return v

    def _through_head(self, v: Tensor) -> Tensor | float:
        """d (logit after the head) / d (logit before it)."""
        return self.scale if self.softcap == 0.0 else (v / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def _here(self, ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Which tokens are among these columns, and where there (0 for the others)."""
        here = (ids >= columns.start) & (ids < columns.stop)
        return here, (ids - columns.start).where(here, 0)

    def _ban(self, v: Tensor, at: Tensor, here: Tensor) -> None:
        # Added rather than written: slots that are not used change nothing, whatever they point at, and NaN and +inf become NaN.
        v.scatter_add_(1, at, torch.zeros_like(at, dtype=v.dtype).masked_fill_(here, -torch.inf))

    def add(self, x: Tensor, columns: slice) -> None:
        """Statistics of logits x [rows, columns], as their product left them."""
        here, at = self._here(self.ids, columns)
        here &= self.used
        parts = []
        for piece in self._pieces(x):
            v = self._after_head(x[piece], columns)
            self.logits[piece] = torch.where(here[piece], v.gather(1, at[piece]).double(), self.logits[piece])
            if self.ce and self.labels is not None:
                labelled, label_at = self._here(self.labels[piece, None], columns)
                found = v.gather(1, label_at).double()[:, 0]
                self.label_logit[piece] = torch.where(labelled[:, 0], found, self.label_logit[piece])
            self._ban(v, at[piece], here[piece])
            parts.append(part_of(v, self.terms.temperature, self.ce, self.step.metrics, columns.start))
        of_rows = Part(*(torch.cat(statistic) for statistic in zip(*(vars(part).values() for part in parts), strict=True)))
        self.rest = self.rest.merged(of_rows)

    def columns(self) -> Tensor:
        """ROW_COLUMNS of the rows, in float64, once all columns were added; from here on gradients can be made."""
        temperature, metrics = self.terms.temperature, self.step.metrics
        chosen = part_of(self.logits, temperature, self.ce, metrics)
        whole = self.rest.merged(chosen)
        own, given, is_outcome, log_sum = self.logits / temperature, self.log_probs, self.used, whole.log_sum
        if self.bucket:
            own = torch.cat([own, self.rest.log_sum[:, None]], 1)
            given = torch.cat([given, _log_of_rest(given)[:, None]], 1)
            is_outcome = torch.cat([is_outcome, torch.ones_like(is_outcome[:, :1])], 1)
            log_sum = _exponentials(own)[2]
        # At t = 0 both come from the same numbers by the same steps, so that a student at its target is there to the last bit.
        lq = own - log_sum[:, None]
        target = self._target(own, given).masked_fill(~is_outcome, -torch.inf)
        log_mass = _exponentials(target)[2][:, None]
        lp = target - log_mass.masked_fill(log_mass == -torch.inf, 0.0)
        divergence = self.terms.resolved()
        banned = (lp == -torch.inf) | (lq == -torch.inf)
        value, slope = (part.masked_fill(banned, 0.0) for part in divergence.pair(lp, lq, divergence.a))
        kd = value.sum(1)
        # A slope that compares (total variation) can hide a NaN that the value shows.
        self._set_gradient(whole, lq, slope, torch.where(kd.isnan(), kd, slope.sum(1)))
        nothing = torch.zeros_like(kd)
        columns = [kd, whole.log_sum_1 - self.label_logit if self.ce else nothing, *[nothing] * 4]
        if metrics:
            teachers = self.ids.gather(1, self.log_probs.argmax(1, keepdim=True))[:, 0]
            students = torch.where(chosen.top > self.rest.top, self.ids.gather(1, chosen.best[:, None])[:, 0], self.rest.best)
            columns[2:] = [
                torch.special.entr(lp.exp()).sum(1),
                whole.entropy,
                ((teachers == students) & self.used.any(1)).double(),
                torch.minimum(lq[:, : self.ids.shape[1]].exp(), self.log_probs.exp()).where(self.used, 0.0).sum(1),
            ]
        return torch.stack(columns, 1)

    def _target(self, own: Tensor, given: Tensor) -> Tensor:
        """(1 - t) own + t given, at both ends one alone; what is NaN or +inf of the teacher's comes through there too."""
        t = self.step.t.double()
        mixed = torch.where(t == 0.0, own, torch.where(t == 1.0, given, (1.0 - t) * own + t * given))
        return torch.where(given < torch.inf, mixed, torch.nan)

    def _set_gradient(self, whole: Part, lq: Tensor, slope: Tensor, slope_sum: Tensor) -> None:
        """The gradient at the k tokens and at the label, and what the softmax over the rest is multiplied by, weights included."""
        count, factor = self.ids.shape[1], self.weights * self.step.scale
        at_chosen, over_rest = torch.zeros_like(self.logits), torch.zeros_like(slope_sum)
        if self.terms.kd_scale != 0.0:  # a divergence of factor 0 is left out, whatever it came to: 0 * NaN is not 0
            kd = self.terms.kd_scale / self.terms.temperature
            # dx = slope - q sum slope, over outcomes. The tokens of the rest share its slope as they share its probability.
            at_chosen += kd * (slope[:, :count] - lq[:, :count].exp() * slope_sum[:, None])
            share = (self.rest.log_sum - whole.log_sum).exp()
            over_rest += kd * ((slope[:, count] if self.bucket else 0.0) - share * slope_sum)
        over_rest_1 = at_label = torch.zeros_like(slope_sum)
        if self.ce and self.terms.ce_scale != 0.0:
            at_chosen += self.terms.ce_scale * (self.logits - whole.log_sum_1[:, None]).exp()
            over_rest_1 = factor * self.terms.ce_scale * (self.rest.log_sum_1 - whole.log_sum_1).exp()
            at_label = -factor * self.terms.ce_scale * self._through_head(self.label_logit)
        through = self._through_head(self.logits.masked_fill(~self.used, 0.0))
        self.at_chosen = (at_chosen * factor[:, None] * through).where(self.used, 0.0)
        self.over_rest, self.over_rest_1, self.at_label = factor * over_rest, over_rest_1, at_label
        if self.terms.temperature == 1.0:
            self.over_rest, self.over_rest_1 = self.over_rest + over_rest_1, torch.zeros_like(over_rest_1)

    def write_gradient(self, x: Tensor, columns: slice, out: Tensor) -> None:
        """out [rows, columns]: the gradient of x, which is as for ``add``; may be x itself."""
        temperature = self.terms.temperature
        here, at = self._here(self.ids, columns)
        here &= self.used
        own_x = self.ce and self.terms.ce_scale != 0.0 and temperature != 1.0
        for piece in self._pieces(x):
            v = self._after_head(x[piece], columns)
            through = self._through_head(v)
            self._ban(v, at[piece], here[piece])
            dx = _below(v if temperature == 1.0 else v / temperature, self.rest.log_sum[piece])
            dx *= self.over_rest[piece, None].to(dx.dtype)
            if own_x:
                dx += _below(v, self.rest.log_sum_1[piece]).mul_(self.over_rest_1[piece, None].to(dx.dtype))
            dx *= through
            # Where the k tokens are banned dx is 0 so far.
            dx.scatter_add_(1, at[piece], self.at_chosen[piece].where(here[piece], 0.0).to(dx.dtype))
            if self.ce and self.labels is not None:
                labelled, label_at = self._here(self.labels[piece, None], columns)
                dx.scatter_add_(1, label_at, self.at_label[piece, None].where(labelled, 0.0).to(dx.dtype))
            out[piece] = dx


def _log_of_rest(log_probs: Tensor) -> Tensor:
    """log(1 - sum of exp(log_probs)), [rows]; -inf where the k tokens hold everything, or by rounding more.

    What the most likely token leaves is known to all of its digits, however little it is; the others are taken from that.
    """
    largest, at = log_probs.max(1, keepdim=True)
    others = log_probs.scatter(1, at, -torch.inf).exp().sum(1)
    return (-torch.expm1(largest[:, 0]) - others).clamp(min=0.0).log()


class _Run:
    """A step's losses and gradients, as both strategies add them up."""

    def __init__(self, step: Step, inputs: Inputs, known: Known, tail: str, hidden_parts: int = 1, weight_parts: int = 1) -> None:
        self.step, self.known, self.tail = step, known, tail
        self.grads = Gradients(step, *inputs, hidden_parts=hidden_parts, weight_parts=weight_parts)
        self.losses = torch.zeros(inputs[0].shape[0], dtype=step.sum_dtype, device=step.device)
        self.metric_sums = empty_sums(step.device)

    def outcomes(self, index: slice | Tensor) -> Outcomes:
        return Outcomes(self.step, self.known, self.tail, index)

    def finish(self, rows: Outcomes, index: slice | Tensor) -> None:
        columns = rows.columns()
        self.losses[index] = (rows.weights * weighted(columns, self.step.terms)).to(self.losses.dtype)
        if self.step.metrics:
            self.metric_sums += columns.sum(0)

    def done(self) -> Outcome:
        return Outcome(self.losses, self.metric_sums, self.grads.finished())


def _tiles(step: Step) -> list[torch.dtype]:
    """Of the logits, and of their gradient where its dtype is another: it lies over them otherwise."""
    model = step.student
    return [model.logits] if model.dtype == model.logits else [model.logits, model.dtype]


def _by_tokens(step: Step, inputs: Inputs, known: Known, tail: str) -> Outcome:
    model, tiles, everything = step.student, _tiles(step), slice(0, step.vocab)
    per_logit = sum(dtype.itemsize for dtype in tiles)
    size = chunk_rows(step.count, step.vocab, per_logit, step.budget)
    run = _Run(step, inputs, known, tail, weight_parts=-(-step.count // size))
    block = block_size(step.vocab, model.weight.shape[1], step.device)
    shapes = [((1, block), torch.float32), *(((size, step.vocab), dtype) for dtype in tiles)]
    with borrowed(shapes, step.budget + 4 * block, step.device) as (blocks, *scratch):
        head = HeadProducts(model.weight, model.dtype, blocks[0])
        for begin in range(0, step.count, size):
            index = step.index(begin, min(begin + size, step.count))
            hidden = model.rows(index)
            x, dx = (scratch[at][: len(hidden)] for at in (0, -1))
            head.logits(hidden, x)
            rows = run.outcomes(index)
            rows.add(x, everything)
            run.finish(rows, index)
            if any(step.needs):
                rows.write_gradient(x, everything, dx)
                run.grads.add_rows(head, dx, hidden, index, blocks[0], first=begin == 0)
    return run.done()


def _by_columns(step: Step, inputs: Inputs, known: Known, tail: str) -> Outcome:
    model, tiles = step.student, _tiles(step)
    width = block_columns(step.count, step.vocab, sum(dtype.itemsize for dtype in tiles), step.budget)
    blocks = [slice(begin, min(begin + width, step.vocab)) for begin in range(0, step.vocab, width)]
    run = _Run(step, inputs, known, tail, hidden_parts=len(blocks))
    if step.count == 0:
        return run.done()
    index = step.index(0, step.count)
    hidden, rows = model.rows(index), run.outcomes(index)
    size = block_size(step.vocab, model.weight.shape[1], step.device)
    shapes = [((1, size), torch.float32), *(((step.count, width), dtype) for dtype in tiles)]
    with borrowed(shapes, step.budget + 4 * size, step.device) as (buffer, *scratch):

        def multiplied(columns: slice) -> tuple[HeadProducts, Tensor, Tensor]:
            head = HeadProducts(model.weight[columns], model.dtype, buffer[0])
            x, dx = (scratch[at][:, : columns.stop - columns.start] for at in (0, -1))
            return head, x, dx

        for columns in blocks:
            head, x, _ = multiplied(columns)
            head.logits(hidden, x)
            rows.add(x, columns)
        run.finish(rows, index)
        if any(step.needs):
            for columns in blocks:
                head, x, dx = multiplied(columns)
                if len(blocks) > 1:  # a whole vocabulary's logits are still there
                    head.logits(hidden, x)
                rows.write_gradient(x, columns, dx)
                run.grads.add_columns(head, dx, hidden, columns, buffer[0])
    return run.done()


def run(strategy: str, step: Step, inputs: Inputs, known: Known, tail: str) -> Outcome:
    """strategy: "tokens" or "vocab". inputs: hidden states, weight and bias, not cut to the vocabulary, which the gradients are
    shaped like. known: tokens [N, k] and log-probabilities. tail: one of TAILS."""
    return (_by_tokens if strategy == "tokens" else _by_columns)(step, inputs, known, tail)
