"""The loss of rows against a target that knows k tokens of each (an offline teacher's top-k).

The vocabulary of a row falls into its k tokens and the rest. The target has k outcomes, or one more for all of the rest together
(``tail="bucket"``), so value and slope of any divergence are sums over those few, in float64. Of the student's rest a row needs
three things only: its log-sum-exp, its slope, and its gradient, which is a multiple of the softmax over the rest alone. Entries
of the k tokens are banned (-inf) from the rest before either is computed and never subtracted from the whole: where the student
is sure of one of them, a difference would have no digits left. Nor can anything underflow that should not: exp(x - log-sum-exp of
the rest) is a probability given that the outcome is the rest, however unlikely that is.

Passes over logits are plain torch, over pieces of rows that stay in a cache, on every device: one for the statistics and one for
the gradient, for every divergence. Products are 3 Us by chunks of tokens, and 4 Us by blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.backends.base import Step
from kdkernels.backends.columns import Row
from kdkernels.backends.head import apply_head, cap_slope
from kdkernels.engine.keep import Known

TAILS = ("renormalize", "bucket")
# The least mass that the target's rest is taken to have where it is only what the k leave of 1. Rounded to float32 that is noise
# below this, and often 0; an outcome without mass would be dropped from the divergence, which is then none.
LEAST_REST = 2.0**-23
# Bytes of a piece of logits, or of what is known of the k tokens, that is worked on at a time; some six such tensors live at once.
PIECE_BYTES = {"cpu": 2 * 2**20}
OTHER_PIECE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Part:
    """What is known of some entries of each row, [rows] each, in float64.

    log_sum: of exp(x / T), log_sum_1: of exp(x). entropy: of the softmax of x / T over these entries. top: the largest x / T.
    """

    log_sum: Tensor
    log_sum_1: Tensor
    entropy: Tensor
    top: Tensor

    def rows(self, index: slice) -> Part:
        return Part(*(statistic[index] for statistic in vars(self).values()))

    def merged(self, other: Part) -> Part:
        """Of both parts' entries together."""
        log_sum = torch.logaddexp(self.log_sum, other.log_sum)
        shares = [_difference(part.log_sum, log_sum).exp() for part in (self, other)]
        inside = shares[0] * self.entropy + shares[1] * other.entropy
        return Part(
            log_sum,
            torch.logaddexp(self.log_sum_1, other.log_sum_1),
            inside + torch.special.entr(shares[0]) + torch.special.entr(shares[1]),
            torch.maximum(self.top, other.top),
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


def part_of(v: Tensor, temperature: float, ce: bool, metrics: bool) -> Part:
    """Of logits v [rows, columns]. ce, metrics: whether log_sum_1 and the entropy are wanted."""
    e, total, log_sum, top = _exponentials(v if temperature == 1.0 else v / temperature)
    entropy = torch.zeros_like(total)
    if metrics:
        entropy = (total.log() - torch.special.xlogy(e, e).sum(1).double() / total).masked_fill(total == 0.0, 0.0)
    log_sum_1 = _exponentials(v)[2] if ce and temperature != 1.0 else log_sum
    return Part(log_sum, log_sum_1, entropy, top.double())


def _softmax(v: Tensor, log_sum: Tensor) -> Tensor:
    """exp(v - log_sum) for v [rows, columns] and log_sum [rows] in float64, of which v's dtype may hold less; 0 of nothing."""
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
    near = log_sum.to(v.dtype)
    return (v - near[:, None]).sub_((log_sum - near).to(v.dtype)[:, None]).exp_()


class Outcomes:
    """Some rows of a step against their targets: statistics of columns as they come, then the loss, then gradients of columns."""

    def __init__(self, step: Step, known: Known, tail: str, index: slice | Tensor) -> None:
        self.step, self.terms, self.bucket = step, step.terms, tail == "bucket"
        self.scale, self.softcap = step.terms.head[:2]
        self.log_probs = known[1][index]
        self.log_rest = None if known[2] is None else known[2][index]
        self.used = self.log_probs != -torch.inf  # NaN is used: it is not to be hidden
        self.ids = known[0][index].where(self.used, 0)
        self.labels = step.labels_at(index)
        self.ce = self.labels is not None and (self.terms.ce_scale != 0.0 or step.metrics)
        self.weights = step.weights[index].double()
        nothing = torch.full_like(self.weights, -torch.inf)
        self.rest = Part(nothing, nothing, torch.zeros_like(nothing), nothing)
        # Of the k tokens: logits after the head, and the gradient before it; both [rows, K].
        self.logits = torch.full_like(self.ids, -torch.inf, dtype=step.sum_dtype)
        self.at_chosen = torch.zeros_like(self.logits)
        # The label's logit, and what the gradient gets there on top; what the softmaxes of the rest, over T and at 1, are
        # multiplied by; all [rows].
        self.label_logit, self.at_label, self.over_rest, self.over_rest_1 = torch.zeros_like(self.weights).repeat(4, 1).unbind()

    def _pieces(self, width: int, itemsize: int) -> Iterator[slice]:
        """The rows in pieces of PIECE_BYTES."""
        rows = max(1, PIECE_BYTES.get(self.ids.device.type, OTHER_PIECE_BYTES) // (width * itemsize))
        return (slice(begin, begin + rows) for begin in range(0, len(self.ids), rows))

    def _after_head(self, x: Tensor, columns: slice) -> Tensor:
        bias = self.step.student.bias
        v = x.to(self.step.sum_dtype, copy=True)
        return apply_head(v, None if bias is None else bias[columns], self.scale, self.softcap, in_place=True)

    def _through_head(self, v: Tensor) -> Tensor | float:
        """d (logit after the head) / d (logit before it)."""
        return self.scale if self.softcap == 0.0 else cap_slope(v, self.softcap).mul_(self.scale)

    def _chosen_here(self, piece: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Which of the k tokens are among these columns, and where there (0 for the others)."""
        here, at = _here(self.ids[piece], columns)
        return here & self.used[piece], at

    def _rest(self, v: Tensor, here: Tensor, at: Tensor) -> Tensor:
        """v [rows, columns] itself, with the k tokens banned."""
        # Added rather than written: slots that are not used change nothing, whatever they point at, and +inf becomes NaN.
        return v.scatter_add_(1, at, torch.zeros_like(at, dtype=v.dtype).masked_fill_(here, -torch.inf))

    def add(self, x: Tensor, columns: slice) -> None:
        """Statistics of logits x [rows, columns], as their product left them."""
        parts = []
        for piece in self._pieces(x.shape[1], self.step.sum_dtype.itemsize):
            v = self._after_head(x[piece], columns)
            here, at = self._chosen_here(piece, columns)
            self.logits[piece] = torch.where(here, v.gather(1, at), self.logits[piece])
            if self.ce and self.labels is not None:
                labelled, label_at = _here(self.labels[piece], columns)
                found = v.gather(1, label_at[:, None])[:, 0]
                self.label_logit[piece] = torch.where(labelled, found.double(), self.label_logit[piece])
            rest = self._rest(v, here, at)
            parts.append(part_of(rest, self.terms.temperature, self.ce, self.step.metrics))
        of_rows = Part(*(torch.cat(statistic) for statistic in zip(*(vars(part).values() for part in parts), strict=True)))
        self.rest = self.rest.merged(of_rows)

    def finished(self) -> Tensor:
        """ROW_COLUMNS of the rows, in float64, once all columns were added; from here on gradients can be made."""
        return torch.cat([self._finished(piece) for piece in self._pieces(self.ids.shape[1] + 1, 8)])

    def _finished(self, piece: slice) -> Tensor:
        temperature, metrics, rest = self.terms.temperature, self.step.metrics, self.rest.rows(piece)
        used, logits, log_probs = self.used[piece], self.logits[piece].double(), self.log_probs[piece].double()
        chosen = part_of(logits, temperature, self.ce, metrics)
        whole = rest.merged(chosen)
        own, given, is_outcome, log_sum = logits / temperature, log_probs, used, whole.log_sum
        if self.bucket:
            own = torch.cat([own, rest.log_sum[:, None]], 1)
            # Where the k tokens are all that the student has, there is no rest to be given a least mass.
            least = torch.where(rest.log_sum == -torch.inf, 0.0, LEAST_REST)
            log_rest = log_of_rest(given, least) if self.log_rest is None else self.log_rest[piece].double()
            given = torch.cat([given, log_rest[:, None]], 1)
            is_outcome = torch.cat([used, torch.ones_like(used[:, :1])], 1)
            log_sum = _exponentials(own)[2]
        # At t = 0 both come from the same numbers by the same steps, so that a student at its target is there to the last bit.
        lq = own - log_sum[:, None]
        target = self._target(own, given).masked_fill(~is_outcome, -torch.inf)
        log_mass = _exponentials(target)[2][:, None]
        lp = target - log_mass.masked_fill(log_mass == -torch.inf, 0.0)
        divergence = self.terms.resolved()
        value, slope = divergence.textbook(lp, lq)  # as the outcomes need not sum to 1
        # Where the student leaves the target no outcome, each is banned, and it would not be seen that its logits hold NaN or +inf,
        # or nothing but -inf.
        unseen = ~(whole.log_sum > -torch.inf) & used.any(1)
        kd = value.sum(1).masked_fill(unseen, torch.nan)
        # A slope that compares (total variation) can hide a NaN that the value shows.
        self._set_gradient(piece, logits, rest, whole, lq, slope, torch.where(kd.isnan(), kd, slope.sum(1)))
        nothing = torch.zeros_like(kd)
        ce = whole.log_sum_1 - self.label_logit[piece] if self.ce else nothing
        row = Row(kd=kd, ce=ce, target_entropy=nothing, student_entropy=nothing, agreement=nothing, overlap=nothing)
        if metrics:
            # The teacher's most likely token is one of the k, so the student's has to be too.
            agreement = (chosen.top >= rest.top) & (logits.argmax(1) == log_probs.argmax(1))
            row = row._replace(
                target_entropy=torch.special.entr(lp.exp()).sum(1),
                student_entropy=whole.entropy,
                agreement=agreement.double(),
                overlap=torch.minimum(lq[:, : logits.shape[1]].exp(), log_probs.exp()).sum(1),
            )
        return torch.stack(row, 1)

    def _target(self, own: Tensor, given: Tensor) -> Tensor:
        """(1 - t) own + t given, at both ends one alone; what is NaN or +inf of the teacher's comes through there too."""
        t = self.step.t.double()
        mixed = torch.where(t == 0.0, own, torch.where(t == 1.0, given, (1.0 - t) * own + t * given))
        return torch.where(given < torch.inf, mixed, torch.nan)

    def _set_gradient(
        self, piece: slice, logits: Tensor, rest: Part, whole: Part, lq: Tensor, slope: Tensor, slope_sum: Tensor
    ) -> None:
        """The gradient at the k tokens and at the label, and the factors of the rest's softmaxes, weights included."""
        factor, count, ce = self.weights[piece] * self.step.scale, logits.shape[1], self.terms.ce_scale
        at_chosen, over_rest = torch.zeros_like(logits), torch.zeros_like(slope_sum)
        if self.terms.kd_scale != 0.0:  # a divergence of factor 0 is left out, whatever it came to: 0 * NaN is not 0
            kd = self.terms.kd_scale / self.terms.temperature
            # dx = slope - q sum slope, over outcomes. The tokens of the rest share its slope as they share its probability.
            at_chosen += kd * (slope[:, :count] - lq[:, :count].exp() * slope_sum[:, None])
            share = (rest.log_sum - whole.log_sum).exp()
            over_rest += kd * ((slope[:, count] if self.bucket else 0.0) - share * slope_sum)
        if self.ce and ce != 0.0:
            at_chosen += ce * (logits - whole.log_sum_1[:, None]).exp()
            over_rest_1 = ce * (rest.log_sum_1 - whole.log_sum_1).exp()
            if self.terms.temperature == 1.0:  # both softmaxes are one
                over_rest += over_rest_1
            else:
                self.over_rest_1[piece] = factor * over_rest_1
            self.at_label[piece] = -ce * factor * self._through_head(self.label_logit[piece])
        self.over_rest[piece] = factor * over_rest
        used = self.used[piece]
        at_chosen *= factor[:, None] * self._through_head(logits.masked_fill(~used, 0.0))
        self.at_chosen[piece] = at_chosen.where(used, 0.0).to(self.at_chosen.dtype)

    def write_gradient(self, x: Tensor, columns: slice, out: Tensor) -> None:
        """out [rows, columns]: the gradient of x, which is as for ``add``; may be x itself."""
        temperature, dtype = self.terms.temperature, self.step.sum_dtype
        with_ce = self.ce and self.terms.ce_scale != 0.0
        for piece in self._pieces(x.shape[1], dtype.itemsize):
            v = self._after_head(x[piece], columns)
            through = self._through_head(v)
            here, at = self._chosen_here(piece, columns)
            rest = self._rest(v, here, at)
            dx = _softmax(rest if temperature == 1.0 else rest / temperature, self.rest.log_sum[piece])
            dx *= self.over_rest[piece, None].to(dtype)
            if with_ce and temperature != 1.0:
                dx += _softmax(rest, self.rest.log_sum_1[piece]).mul_(self.over_rest_1[piece, None].to(dtype))
            dx *= through
            dx.scatter_add_(1, at, self.at_chosen[piece].where(here, 0.0))  # banned from the rest, they are 0 so far
            if with_ce and self.labels is not None:
                labelled, label_at = _here(self.labels[piece], columns)
                dx.scatter_add_(1, label_at[:, None], self.at_label[piece].where(labelled, 0.0).to(dtype)[:, None])
            out[piece] = dx


def _here(ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which tokens are among these columns, and where there (0 for the others)."""
    here = (ids >= columns.start) & (ids < columns.stop)
    return here, (ids - columns.start).where(here, 0)


def log_of_rest(log_probs: Tensor, least: Tensor) -> Tensor:
    """log(1 - sum of exp(log_probs)) of log_probs [rows, k], where that is more than ``least``, else log(least): [rows].

    What the most likely token leaves is known to all of its digits, however little it is; the others are taken from that.
    """
    largest, at = log_probs.max(1, keepdim=True)
    others = log_probs.scatter(1, at, -torch.inf).exp().sum(1)
    return torch.maximum(-torch.expm1(largest[:, 0]) - others, least).log()
