"""What is done to a tile of logits [ROWS, COLUMNS] in registers: heads, target, statistics, sums, gradient.

Shapes: x, y, z, inside a tile [ROWS, COLUMNS] float32; a statistic or sum [ROWS]. x, y and z are over the temperature once
loaded. Groups of arguments that travel together are tuples; None in one compiles the part away:

- head: (bias_ptr or None, scale, softcap or None).
- terms: (a, temperature, kd, ce): the divergence's parameter; T, or None for 1; kd_scale / T and ce_scale, or None for 0.

Entries outside the vocabulary are -inf, which contributes nothing anywhere. What NaN and +inf do is as in csrc/rows.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(0)
TARGET = tl.constexpr(1)
STUDENT = tl.constexpr(2)
WEIGH = {"": 0, "target": 1, "student": 2}


@triton.jit
def tanh(v):
    """Odd polynomial near 0, where 1 - e^-2v would lose digits (minimax fit, as in csrc/vec.h)."""
    e = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    square = v * v
    p = square * 0.00211801799 - 0.00815069769
    p = p * square + 0.0216901544
    p = p * square - 0.0539448895
    p = p * square + 0.13333191
    p = p * square - 0.333333313
    return tl.where(square < 0.4, v + v * square * p, tl.where(v < 0.0, -far, far))


@triton.jit
def after_head(v, head, temperature, columns, inside):
    """Logits over T from what the product left: T^-1 softcap tanh(scale (v + bias) / softcap); -inf outside. columns: [COLUMNS]."""
    bias_ptr, scale, softcap = head
    if bias_ptr is not None:
        v += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    v *= scale
    if softcap is not None:
        v = softcap * tanh(v / softcap)
    if temperature is not None:
        v /= temperature
    return tl.where(inside[None, :], v, float("-inf"))


@triton.jit
def mixed(x, z, t):
    """y = (1 - t) x + t z from the nearer end; banned where a model with a share bans, NaN where the teacher is NaN or +inf."""
    from_x = t < 0.5
    share = tl.where(from_x, t, t - 1.0)
    base = tl.where(from_x, x, z)
    banned = (x == float("-inf")) | (z == float("-inf"))
    y = tl.where(banned, tl.where(share == 0.0, base, x + z), base + share * (z - x))
    return tl.where(z < float("inf"), y, float("nan"))


@triton.jit
def at_one(x, temperature):
    """The student's logits at temperature 1."""
    return x if temperature is None else x * temperature


@triton.jit
def add_log_sum(state, v):
    """Largest entry m and sum s of exp(entry - m), with the entries of one more tile."""
    m, s = state
    seen = tl.maximum(m, tl.max(v, 1))
    shift = tl.where(seen == float("-inf"), 0.0, seen)  # all banned so far: exp(-inf - 0) = 0
    return seen, s * tl.exp(m - shift) + tl.sum(tl.exp(v - shift[:, None]), 1)


@triton.jit
def add_top(state, v, column):
    """Largest entry and its column; the first of equals. column: of the tile's first entry."""
    m, at = state
    seen, place = tl.max(v, 1, return_indices=True)
    return tl.maximum(m, seen), tl.where(seen > m, (column + place).to(tl.float32), at)


@triton.jit
def add_moments(state, w_old, w_new, o_old, o_new, w, o):
    """Sums of e^u and e^u (u - v), u and v the weighing and the other side's entries less their largest so far (old: before)."""
    mass, moment = state
    empty = mass == 0.0  # the shifts may be infinite then
    factor = tl.where(empty, 0.0, tl.exp(w_old - w_new))
    moment = tl.where(empty, 0.0, factor * (moment + mass * ((w_old - w_new) - (o_old - o_new))))
    banned = (w == float("-inf")) | (o == float("-inf"))
    u = w - w_new[:, None]
    e = tl.where(banned, 0.0, tl.exp(u))
    return factor * mass + tl.sum(e, 1), moment + tl.sum(tl.where(banned, 0.0, e * (u - (o - o_new[:, None]))), 1)


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
    """One more tile. labels: [ROWS] or None. column: the tile's first column; columns: [COLUMNS]."""
    x_T, y_T, x_1, z_T, top_x, top_z, label_logit, moments = state
    x_before = x_T[0]
    y_before = y_T[0]
    x_T = add_log_sum(x_T, x)
    y_T = add_log_sum(y_T, y)
    if CE:
        if temperature is not None:
            x_1 = add_log_sum(x_1, x * temperature)
        label_logit += tl.sum(tl.where(columns[None, :] == labels[:, None], at_one(x, temperature), 0.0), 1)
    if METRICS:
        z_T = add_log_sum(z_T, z)
        top_x = add_top(top_x, x, column)
        top_z = add_top(top_z, z, column)
    if WEIGH == TARGET:
        moments = add_moments(moments, y_before, y_T[0], x_before, x_T[0], y, x)
    if WEIGH == STUDENT:
        moments = add_moments(moments, x_before, x_T[0], y_before, y_T[0], x, y)
    return x_T, y_T, x_1, z_T, top_x, top_z, label_logit, moments


@triton.jit
def finished(state, temperature, CE: tl.constexpr):
    """STATS_COLUMNS, each [ROWS]."""
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
def value_and_slope(lp, lq, a, PAIR: tl.constexpr):
    value, slope = PAIR(lp, lq, a)
    banned = (lp == float("-inf")) | (lq == float("-inf"))
    return tl.where(banned, 0.0, value), tl.where(banned, 0.0, slope)


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
def add_sums(state, x, y, z, stats, a, PAIR: tl.constexpr, METRICS: tl.constexpr):
    """One more tile. stats: the first eight of STATS_COLUMNS of the whole row, each [ROWS]."""
    value, slope, entropy_y, entropy_x, overlap = state
    lq = (x - stats[0][:, None]) - stats[1][:, None]
    lp = (y - stats[2][:, None]) - stats[3][:, None]
    values, slopes = value_and_slope(lp, lq, a, PAIR)
    value += tl.sum(values, 1)
    slope += tl.sum(slopes, 1)
    if METRICS:
        q = tl.exp(lq)
        entropy_y -= tl.sum(entropy_term(tl.exp(lp), lp), 1)
        entropy_x -= tl.sum(entropy_term(q, lq), 1)
        overlap += tl.sum(tl.minimum(q, tl.exp((z - stats[6][:, None]) - stats[7][:, None])), 1)
    return value, slope, entropy_y, entropy_x, overlap


@triton.jit
def shown(value, slope):
    """A slope that compares (total variation) can hide a NaN that the value shows."""
    return tl.where(value == value, slope, value)


@triton.jit
def sums_of_one_sweep(stats, a, PAIR: tl.constexpr, WEIGH: tl.constexpr):
    """Value and slope from the moments, linear in log p - log q (Divergence.linear says how). stats: all STATS_COLUMNS."""
    x_log, y_log, mass, moment = stats[1], stats[3], stats[11], stats[12]
    zero = x_log * 0.0
    if WEIGH == TARGET:
        own, other = y_log, x_log
        value_0, slope_0 = PAIR(zero, zero, a)
        value_1, slope_1 = PAIR(zero, zero - 1.0, a)
    else:
        own, other = x_log, y_log
        value_0, slope_0 = PAIR(zero, zero, a)
        value_1, slope_1 = PAIR(zero - 1.0, zero, a)
    mass = mass * tl.exp(-own)
    moment = moment * tl.exp(-own) + mass * (other - own)
    value = value_0 * mass + (value_1 - value_0) * moment
    return value, shown(value, slope_0 * mass + (slope_1 - slope_0) * moment)


@triton.jit
def gradient(x, y, stats, slope_sum, labels, weight, head, terms, columns, PAIR: tl.constexpr):
    """dx = kd (slope - q sum slope) + ce (softmax(x) - e_label), times the row's weight, through the head's chain rule.

    stats: the first six of STATS_COLUMNS; slope_sum, weight: [ROWS].
    """
    a, temperature, kd, ce = terms
    _, scale, softcap = head
    lq = (x - stats[0][:, None]) - stats[1][:, None]
    q = tl.exp(lq)
    dx = tl.zeros_like(x)
    if kd is not None:
        lp = (y - stats[2][:, None]) - stats[3][:, None]
        _, slope = value_and_slope(lp, lq, a, PAIR)
        dx += kd * (slope - q * slope_sum[:, None])
    if ce is not None:
        if temperature is not None:
            q = tl.exp((x * temperature - stats[4][:, None]) - stats[5][:, None])
        dx += ce * (q - tl.where(columns[None, :] == labels[:, None], 1.0, 0.0))
    if softcap is not None:
        over_cap = at_one(x, temperature) / softcap
        dx *= 1.0 - over_cap * over_cap
    return tl.where(weight[:, None] == 0.0, 0.0, dx * (weight * scale)[:, None])
