"""What is done to a tile of logits [ROWS, COLUMNS] in registers: heads, target, statistics, sums, gradient.

Shapes: x, y, z a tile [ROWS, COLUMNS] float32, over the temperature once loaded; what is added up over tiles [ROWS]. columns,
inside: the entries' columns, and which of them the vocabulary has, [1, COLUMNS], or [ROWS, COLUMNS] where the tile's rows are parts
of one row. Per-row values that enter a tile (statistics, labels, weights): [ROWS, 1], or scalars where the tile is of one row.
Groups of arguments that travel together are tuples; None in one compiles the part away:

- head: (bias_ptr or None, scale, softcap or None).
- terms: (shares, temperature, kd, ce): what pair functions take of the divergence's parameter (divergences.py); T, or None for 1;
  kd_scale / T and ce_scale, or None for 0.

Entries outside the vocabulary are -inf, which contributes nothing anywhere. What NaN and +inf do is as in csrc/rows.h.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from kdkernels.backends import columns as table
from kdkernels.backends.triton.functions import TANH, exp, polynomial

NOTHING, TARGET, STUDENT = (tl.constexpr(table.WEIGH[side]) for side in ("", "target", "student"))
# Mass is then the target's sum of e^u over what the student alone bans (rows.sums_beside_gradient).
LOST = tl.constexpr(len(table.WEIGH))


def _places(columns: tuple[str, ...], *names: str) -> Iterator[tl.constexpr]:
    return (tl.constexpr(columns.index(name)) for name in names)


# The places of columns in what is read and written for each row, and how many there are.
MAX_X_T, LOG_SUM_X_T, MAX_Y_T, LOG_SUM_Y_T = _places(table.STATS_COLUMNS, "max_x_T", "log_sum_x_T", "max_y_T", "log_sum_y_T")
MAX_X, LOG_SUM_X, MAX_Z_T, LOG_SUM_Z_T = _places(table.STATS_COLUMNS, "max_x", "log_sum_x", "max_z_T", "log_sum_z_T")
ARGMAX_X, ARGMAX_Z, MASS, MOMENT = _places(table.STATS_COLUMNS, "argmax_x", "argmax_z", "mass", "moment")
VALUE, SLOPE = _places(table.SUMS_COLUMNS, "value", "slope")
TARGET_ENTROPY, STUDENT_ENTROPY, OVERLAP = _places(table.SUMS_COLUMNS, "target_entropy", "student_entropy", "overlap")
ROW_KD, ROW_CE, ROW_AGREEMENT = _places(table.ROW_COLUMNS, "kd", "ce", "agreement")
ROW_TARGET_ENTROPY, ROW_STUDENT_ENTROPY, ROW_OVERLAP = _places(table.ROW_COLUMNS, "target_entropy", "student_entropy", "overlap")
STATS_COUNT, SUMS_COUNT, ROW_COUNT = (
    tl.constexpr(len(columns)) for columns in (table.STATS_COLUMNS, table.SUMS_COLUMNS, table.ROW_COLUMNS)
)
SUMS_READ, GRADIENT_READ = tl.constexpr(table.SUMS_READ), tl.constexpr(table.GRADIENT_READ)


@triton.jit
def tanh(v):
    """Odd polynomial near 0, where 1 - e^-2v would lose digits."""
    e = exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    square = v * v
    return tl.where(square < 0.4, v + v * square * polynomial(square, TANH), tl.where(v < 0.0, -far, far))


@triton.jit
def reach(columns, end, REACH: tl.constexpr):
    """Which entries of a row to load or store: REACH adjacent ones together or not at all, so that an access stays wide at every
    ``end``. The row needs room up to a multiple of REACH."""
    return columns // REACH * REACH < end


@triton.jit
def after_head(v, head, temperature, columns, inside):
    """Logits over T from what the product left: T^-1 softcap tanh(scale (v + bias) / softcap); -inf outside."""
    bias_ptr, scale, softcap = head
    if bias_ptr is not None:
        v += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    v *= scale
    if softcap is not None:
        v = softcap * tanh(v / softcap)
    if temperature is not None:
        v /= temperature
    return tl.where(inside, v, float("-inf"))


@triton.jit
def mixed(x, z, t):
    """y = (1 - t) x + t z from the nearer end; banned where a model with a share bans. NaN and +inf of the teacher make it NaN or
    +inf at every t, and +inf makes the row's sums NaN."""
    from_x = t < 0.5
    share = tl.where(from_x, t, t - 1.0)
    base = tl.where(from_x, x, z)
    other = tl.where(from_x, z, x)
    # A model without a share neither bans nor hides: 0 times its entry, from 0 up.
    floor = tl.where(share == 0.0, 0.0, float("-inf"))
    counts = tl.where(share == 0.0, 0.0, 1.0)
    banned = (x == float("-inf")) | (z == float("-inf"))
    both = base + counts * tl.maximum(other, floor, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(banned, both, base + share * (z - x))


@triton.jit
def at_one(x, temperature):
    """The student's logits at temperature 1."""
    return x if temperature is None else x * temperature


@triton.jit
def add_log_sum(state, v):
    """Largest entry m and sum s of exp(entry - m), with the entries of one more tile; and their exponentials."""
    m, s = state
    seen = tl.maximum(m, tl.max(v, 1))
    shift = tl.where(seen == float("-inf"), 0.0, seen)  # all banned so far: exp(-inf - 0) = 0
    e = exp(v - shift[:, None])
    return (seen, s * exp(m - shift) + tl.sum(e, 1)), e


@triton.jit
def add_top(state, v, column):
    """Largest entry and its column; the first of equals. column: of the tile's first entry."""
    m, at = state
    seen, place = tl.max(v, 1, return_indices=True)
    return tl.maximum(m, seen), tl.where(seen > m, (column + place).to(tl.float32), at)


@triton.jit
def mass_from(mass, u):
    """Mass counted from a largest entry that is ``u`` higher."""
    return tl.where(mass == 0.0, 0.0, mass * exp(-u))  # u may be infinite then


@triton.jit
def moments_from(state, u, v):
    """Mass and moment counted from largest entries that are ``u`` (of the weighing side) and ``v`` higher."""
    mass, moment = state
    empty = mass == 0.0  # the shifts may be infinite then
    factor = tl.where(empty, 0.0, exp(-u))
    mass *= factor  # first: u of a mask such as finfo.min, times a mass that is not 0 yet, would be infinite
    return mass, tl.where(empty, 0.0, factor * moment - mass * (u - v))


@triton.jit
def add_moments(state, w_old, w_new, o_old, o_new, w, o, e):
    """Sums of e^u and e^u (u - v), u and v the weighing and the other side's entries less their largest so far (old: before).
    e: the e^u of this tile."""
    mass, moment = moments_from(state, w_new - w_old, o_new - o_old)
    banned = (w == float("-inf")) | (o == float("-inf"))
    far = (w - w_new[:, None]) - (o - o_new[:, None])
    return mass + tl.sum(tl.where(banned, 0.0, e), 1), moment + tl.sum(tl.where(banned, 0.0, e * far), 1)


@triton.jit
def no_statistics(ROWS: tl.constexpr):
    """Running statistics before the first tile: log-sum-exps of x, y, x at T = 1 and z; tops of x and z; label logit; moments."""
    zero = tl.zeros([ROWS], tl.float32)
    none = (zero - float("inf"), zero)
    return none, none, none, none, none, none, zero, (zero, zero)


@triton.jit
def add_statistics(
    state, x, y, z, labels, column, columns, temperature, WEIGH: tl.constexpr, CE: tl.constexpr, METRICS: tl.constexpr
):
    """One more tile. labels: None where the caller knows their logits. column: of the tile's first entries, [ROWS] or a scalar."""
    x_T, y_T, x_1, z_T, top_x, top_z, label_logit, moments = state
    x_before = x_T[0]
    y_before = y_T[0]
    x_T, e_x = add_log_sum(x_T, x)
    y_T, e_y = add_log_sum(y_T, y)
    if CE:
        if temperature is not None:
            x_1, _ = add_log_sum(x_1, x * temperature)
        if labels is not None:
            label_logit += tl.sum(tl.where(columns == labels, at_one(x, temperature), 0.0), 1)
    if METRICS:
        z_T, _ = add_log_sum(z_T, z)
        top_x = add_top(top_x, x, column)
        top_z = add_top(top_z, z, column)
    if WEIGH == TARGET:
        moments = add_moments(moments, y_before, y_T[0], x_before, x_T[0], y, x, e_y)
    if WEIGH == STUDENT:
        moments = add_moments(moments, x_before, x_T[0], y_before, y_T[0], x, y, e_x)
    if WEIGH == LOST:
        lost = mass_from(moments[0], y_T[0] - y_before)
        moments = (lost + tl.sum(tl.where(x == float("-inf"), e_y, 0.0), 1), moments[1])
    return x_T, y_T, x_1, z_T, top_x, top_z, label_logit, moments


@triton.jit
def merged_log_sum(state):
    """Of the parts of one row, [ROWS], a scalar each."""
    m, s = state
    whole = tl.max(m, 0)
    shift = tl.where(whole == float("-inf"), 0.0, whole)
    return whole, tl.sum(s * exp(m - shift), 0)


@triton.jit
def merged_top(state):
    m, at = state
    whole = tl.max(m, 0)
    return whole, tl.min(tl.where(m == whole, at, float("inf")), 0)


@triton.jit
def merged(state, WEIGH: tl.constexpr):
    """The statistics of one row, scalars, from those of its parts, [ROWS]. A NaN entry makes its sums NaN, not its maxima."""
    x_T, y_T, x_1, z_T, top_x, top_z, label_logit, moments = state
    x = merged_log_sum(x_T)
    y = merged_log_sum(y_T)
    if WEIGH == TARGET:
        moments = moments_from(moments, y[0] - y_T[0], x[0] - x_T[0])
    if WEIGH == STUDENT:
        moments = moments_from(moments, x[0] - x_T[0], y[0] - y_T[0])
    if WEIGH == LOST:
        moments = (mass_from(moments[0], y[0] - y_T[0]), moments[1])
    mass, moment = moments
    return (
        x,
        y,
        merged_log_sum(x_1),
        merged_log_sum(z_T),
        merged_top(top_x),
        merged_top(top_z),
        tl.sum(label_logit, 0),
        (tl.sum(mass, 0), tl.sum(moment, 0)),
    )


@triton.jit
def finished(state, temperature, CE: tl.constexpr):
    """STATS_COLUMNS, each [ROWS] or a scalar."""
    x_T, y_T, x_1, z_T, top_x, top_z, label_logit, moments = state
    if not CE:
        x_1 = x_T
    else:
        if temperature is None:
            x_1 = x_T
    return (
        x_T[0],
        tl.log(x_T[1]),
        y_T[0],
        tl.log(y_T[1]),
        x_1[0],
        tl.log(x_1[1]),
        z_T[0],
        tl.log(z_T[1]),
        top_x[1],
        top_z[1],
        label_logit,
        moments[0],
        moments[1],
    )


@triton.jit
def log_probabilities(x, y, stats):
    """lp, lq and lq - lp. stats: STATS_COLUMNS, as far as LOG_SUM_Y_T at least."""
    above_x = x - stats[MAX_X_T]
    above_y = y - stats[MAX_Y_T]
    return (
        above_y - stats[LOG_SUM_Y_T],
        above_x - stats[LOG_SUM_X_T],
        (above_x - above_y) - (stats[LOG_SUM_X_T] - stats[LOG_SUM_Y_T]),
    )


@triton.jit
def value_and_slope(lp, lq, d, shares, PAIR: tl.constexpr):
    """With the c (q - p) and c q in them that sum to nothing over a row (divergences.py)."""
    value, slope, c = PAIR(lp, lq, d, shares)
    q = exp(lq)
    banned = (lp == float("-inf")) | (lq == float("-inf"))
    return tl.where(banned, c * (q - exp(lp)), value), tl.where(banned, c * q, slope)


@triton.jit
def entropy_term(probability, log_probability):
    """0 log 0 = 0"""
    return tl.where(log_probability == float("-inf"), 0.0, probability * log_probability)


@triton.jit
def no_sums(ROWS: tl.constexpr):
    """SUMS_COLUMNS before the first tile, each [ROWS]."""
    zero = tl.zeros([ROWS], tl.float32)
    return zero, zero, zero, zero, zero


@triton.jit
def add_sums(state, x, y, z, stats, shares, PAIR: tl.constexpr, METRICS: tl.constexpr):
    """One more tile. stats: the first SUMS_READ of STATS_COLUMNS of the whole row."""
    value, slope, entropy_y, entropy_x, overlap = state
    lp, lq, d = log_probabilities(x, y, stats)
    values, slopes = value_and_slope(lp, lq, d, shares, PAIR)
    value += tl.sum(values, 1)
    slope += tl.sum(slopes, 1)
    if METRICS:
        q = exp(lq)
        entropy_y -= tl.sum(entropy_term(exp(lp), lp), 1)
        entropy_x -= tl.sum(entropy_term(q, lq), 1)
        p = exp((z - stats[MAX_Z_T]) - stats[LOG_SUM_Z_T])
        overlap += tl.sum(tl.minimum(q, p, propagate_nan=tl.PropagateNan.ALL), 1)
    return value, slope, entropy_y, entropy_x, overlap


@triton.jit
def merged_sums(state):
    """Of the parts of one row, [ROWS], a scalar each."""
    value, slope, entropy_y, entropy_x, overlap = state
    return tl.sum(value, 0), tl.sum(slope, 0), tl.sum(entropy_y, 0), tl.sum(entropy_x, 0), tl.sum(overlap, 0)


@triton.jit
def slope_of_lost(stats, shares, PAIR: tl.constexpr):
    """The slope's sum where the textbook's is a constant times p (Divergence.slope_by_target), of all p but the mass that is lost:
    exactly what it is at p = q where nothing is. stats: all STATS_COLUMNS."""
    zero = stats[LOG_SUM_Y_T] * 0.0
    _, slope, c = PAIR(zero, zero, zero, shares)
    return slope - (slope - c) * (stats[MASS] * exp(-stats[LOG_SUM_Y_T]))


@triton.jit
def shown(value, slope):
    """A slope that compares (total variation) can hide a NaN that the value shows."""
    return tl.where(value == value, slope, value)


@triton.jit
def sums_of_one_sweep(stats, shares, PAIR: tl.constexpr, WEIGH: tl.constexpr):
    """Value and slope from the moments: the textbook's are linear in log p - log q (Divergence.linear says how). stats: all
    STATS_COLUMNS."""
    x_log, y_log, mass, moment = stats[LOG_SUM_X_T], stats[LOG_SUM_Y_T], stats[MASS], stats[MOMENT]
    zero = x_log * 0.0
    value_0, slope_0, c = PAIR(zero, zero, zero, shares)
    slope_0 = slope_0 - c
    # What a pair function has more than the textbook comes off again.
    less = exp(zero - 1.0)
    if WEIGH == TARGET:
        own, other = y_log, x_log
        value_1, slope_1, _ = PAIR(zero, zero - 1.0, zero - 1.0, shares)
        value_1 = value_1 - c * (less - 1.0)
        slope_1 = slope_1 - c * less
    else:
        own, other = x_log, y_log
        value_1, slope_1, _ = PAIR(zero - 1.0, zero, zero + 1.0, shares)
        value_1 = value_1 - c * (1.0 - less)
        slope_1 = slope_1 - c
    mass = mass * exp(-own)
    moment = moment * exp(-own) + mass * (other - own)
    value = value_0 * mass + (value_1 - value_0) * moment
    # A moment past the largest number takes no part where its factor is 0, or a rounding of it: else 0 times infinity is NaN.
    rise = slope_1 - slope_0
    risen = tl.where(tl.abs(rise) < 1e-6, 0.0, rise * moment)
    return value, shown(value, slope_0 * mass + risen + c)


@triton.jit
def gradient(x, y, stats, slope_sum, labels, weight, head, terms, columns, PAIR: tl.constexpr):
    """dx = kd (slope - q sum slope) + ce (softmax(x) - e_label), times the row's weight, through the head's chain rule.

    stats: the first GRADIENT_READ of STATS_COLUMNS.
    """
    shares, temperature, kd, ce = terms
    _, scale, softcap = head
    lp, lq, d = log_probabilities(x, y, stats)
    q = exp(lq)
    dx = tl.zeros_like(x)
    if kd is not None:
        _, slope = value_and_slope(lp, lq, d, shares, PAIR)
        dx += kd * (slope - q * slope_sum)
    if ce is not None:
        if temperature is not None:
            q = exp((x * temperature - stats[MAX_X]) - stats[LOG_SUM_X])
        dx += ce * (q - tl.where(columns == labels, 1.0, 0.0))
    if softcap is not None:
        over_cap = at_one(x, temperature) / softcap
        dx *= 1.0 - over_cap * over_cap
    return tl.where(weight == 0.0, 0.0, dx * (weight * scale))


@triton.jit
def store_gradient(ptrs, dx, columns, end, REACH: tl.constexpr, rows=None):
    """Zeros past ``end``, as far as REACH goes there. rows: [ROWS, 1], which rows of the tile there are; None for all."""
    dx = tl.where(columns < end, dx, 0.0)
    mask = reach(columns, end, REACH)
    if rows is not None:
        mask = mask & rows
    tl.store(ptrs, dx.to(ptrs.dtype.element_ty), mask=mask)
