"""The low-level operators in plain torch: any dtype, any device. It runs where nothing faster does, and for float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkernels.backends.base import Backend
from kdkernels.backends.dtypes import DTYPES, accumulate_dtype
from kdkernels.backends.head import apply_head, cap_slope
from kdkernels.backends.operators import library, row_columns
from kdkernels.divergences import Divergence, resolve

# temporaries: live at the peak of row_loss with metrics.
BACKEND = Backend(
    name="reference", operators=lambda: sys.modules[__name__], device=None, dtypes=DTYPES, temporaries=12, most_rows=256
)
# Entries that a formula is worked out for at a time.
PIECE = 2**20


@dataclass
class _Rows:
    """A block of logits after head and temperature: student x, target y, teacher z, all [rows, V] over T."""

    x: Tensor
    y: Tensor
    z: Tensor
    temperature: float
    student_softcap: float

    def like(self, stats: Tensor) -> _Rows:
        """In the dtype of statistics that were rounded since: a largest entry and what it is the largest of must round alike."""
        return replace(self, **{name: getattr(self, name).to(stats.dtype) for name in ("x", "y", "z")})

    def own_x(self) -> Tensor:
        """The student's logits at temperature 1."""
        return self.x if self.temperature == 1.0 else self.x * self.temperature


def _over_temperature(logits: Tensor, bias: Tensor | None, scale: float, softcap: float, temperature: float) -> Tensor:
    v = apply_head(logits.to(accumulate_dtype(logits.dtype)), bias, scale, softcap)
    return v if temperature == 1.0 else v / temperature


def _mix(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """(1 - t) x + t z, from the nearer end, so that t = 0, t = 1 and x = z are exact.

    An entry banned (-inf) in a model whose share is positive is banned; NaN and +inf of the teacher come through at t = 0.
    """
    from_x = t < 0.5
    share = torch.where(from_x, t, t - 1.0)
    base = torch.where(from_x, x, z)
    banned = (x == -torch.inf) | (z == -torch.inf)
    y = torch.where(banned, torch.where(share == 0.0, base, x + z), base + share * (z - x))
    return torch.where(z < torch.inf, y, torch.nan)


def _load(
    x: Tensor, z: Tensor, x_bias: Tensor | None, z_bias: Tensor | None, t: Tensor, temperature: float, head: list[float]
) -> _Rows:
    dtype = accumulate_dtype(x.dtype, z.dtype)
    student = _over_temperature(x, x_bias, head[0], head[1], temperature).to(dtype)
    teacher = _over_temperature(z, z_bias, head[2], head[3], temperature).to(dtype)
    return _Rows(student, _mix(student, teacher, t), teacher, temperature, head[1])


def _log_sum_exp(v: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of each row, and the log of the sum of exp(entry - largest)."""
    m = v.amax(1)
    shift = m.masked_fill(m == -torch.inf, 0.0)  # an all-banned block: exp(-inf - 0) = 0
    return m, (v - shift[:, None]).exp_().sum(1).log_()


def _log_probability(v: Tensor, stats: Tensor, column: int) -> Tensor:
    return (v - stats[:, column : column + 1]).sub_(stats[:, column + 1 : column + 2])


def _moments(weighing: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of e^u and e^u (u - v), where u and v are both models' entries less their row's largest; banned entries are left out."""
    u, v = ((side - side.amax(1, keepdim=True)) for side in (weighing, other))
    banned = (weighing == -torch.inf) | (other == -torch.inf)
    e = u.exp()
    return e.masked_fill(banned, 0.0).sum(1), (e * (u - v)).masked_fill(banned, 0.0).sum(1)


def _stats(rows: _Rows, labels: Tensor | None, weigh: str, ce: bool, metrics: bool) -> Tensor:
    x_t = _log_sum_exp(rows.x)
    nothing = torch.zeros_like(x_t[0])
    columns = [*x_t, *_log_sum_exp(rows.y)]
    columns += _log_sum_exp(rows.own_x()) if ce and rows.temperature != 1.0 else x_t
    columns += [*_log_sum_exp(rows.z), rows.x.argmax(1), rows.z.argmax(1)] if metrics else [nothing] * 4
    if labels is None:
        columns.append(nothing)
    else:
        here = (labels >= 0) & (labels < rows.x.shape[1])
        columns.append(rows.own_x().gather(1, labels.where(here, 0)[:, None])[:, 0].where(here, nothing))
    sides = {"target": (rows.y, rows.x), "student": (rows.x, rows.y)}
    columns += _moments(*sides[weigh]) if weigh else [nothing] * 2
    return torch.stack([column.to(rows.x.dtype) for column in columns], 1)


def _value_and_slope(rows: _Rows, stats: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """With the c (q - p) and c q in them that sum to nothing over a row (divergences.py)."""
    value, slope = torch.empty_like(rows.x), torch.empty_like(rows.x)
    # A formula holds a dozen tensors, some in float64: of some rows at a time.
    pieces = zip(
        *(part.split(max(1, PIECE // max(1, rows.x.shape[1]))) for part in (rows.x, rows.y, stats, value, slope)), strict=True
    )
    for x, y, of_rows, to_value, to_slope in pieces:
        lq, lp = _log_probability(x, of_rows, 0), _log_probability(y, of_rows, 2)
        d = (x - of_rows[:, 0:1]).sub_(y - of_rows[:, 2:3]).sub_(of_rows[:, 1:2] - of_rows[:, 3:4])
        for to, part in zip((to_value, to_slope), divergence.balanced(lp, lq, d, rows.temperature), strict=True):
            to.copy_(part)
    return value, slope


def _reduce(rows: _Rows, stats: Tensor, value: Tensor, slope: Tensor, metrics: bool) -> Tensor:
    total = value.sum(1)
    # A slope that compares (total variation) can hide a NaN that the value shows.
    columns = [total, torch.where(total.isnan(), total, slope.sum(1))]
    if metrics:
        lq, lp = _log_probability(rows.x, stats, 0), _log_probability(rows.y, stats, 2)
        p, q = lp.exp(), lq.exp()
        overlap = torch.minimum(q, _log_probability(rows.z, stats, 6).exp_()).sum(1)
        entropies = [-(m * lm).masked_fill(lm == -torch.inf, 0.0).sum(1) for m, lm in ((p, lp), (q, lq))]
        columns += [*entropies, overlap]
    else:
        columns += [torch.zeros_like(total)] * 3
    return torch.stack(columns, 1)


def _grad(
    rows: _Rows,
    labels: Tensor | None,
    weight: Tensor,
    kd_scale: float,
    ce_scale: float,
    head: list[float],
    stats: Tensor,
    slope_sum: Tensor,
    slope: Tensor,
    out: Tensor,
) -> None:
    q = _log_probability(rows.x, stats, 0).exp_()
    # A divergence of factor 0 is left out, whatever it came to: 0 * NaN is not 0.
    dx = torch.zeros_like(q) if kd_scale == 0.0 else (slope - q * slope_sum[:, None]).mul_(kd_scale / rows.temperature)
    if ce_scale != 0.0 and labels is not None:
        own_q = q if rows.temperature == 1.0 else _log_probability(rows.own_x(), stats, 4).exp_()
        dx += ce_scale * own_q
        here = (labels >= 0) & (labels < dx.shape[1])
        dx.scatter_add_(1, labels.where(here, 0)[:, None], -ce_scale * here[:, None].to(dx.dtype))
    if rows.student_softcap != 0.0:
        dx *= cap_slope(rows.own_x(), rows.student_softcap)
    dx *= (weight * head[0])[:, None]
    out.copy_(dx.masked_fill_((weight == 0.0)[:, None], 0.0))


def _divergence(name: str, a: float) -> Divergence:
    default = resolve(name)
    return Divergence(name, default.pair, a, default.one_sweep)


def row_loss(
    x: Tensor,
    z: Tensor,
    x_bias: Tensor | None,
    z_bias: Tensor | None,
    labels: Tensor | None,
    weight: Tensor,
    t: Tensor,
    divergence: str,
    a: float,
    temperature: float,
    kd_scale: float,
    ce_scale: float,
    head: list[float],
    grad: bool,
    metrics: bool,
    out: Tensor | None = None,
) -> Tensor:
    rows = _load(x, z, x_bias, z_bias, t, temperature, head)
    ce = labels is not None and (ce_scale != 0.0 or metrics)
    stats = _stats(rows, labels, "", ce, metrics)
    value, slope = _value_and_slope(rows, stats, _divergence(divergence, a))
    sums = _reduce(rows, stats, value, slope, metrics)
    if grad:
        target = x if out is None else out
        _grad(rows, labels, weight, kd_scale, ce_scale, head, stats, sums[:, 1], slope, target)
    columns = row_columns(stats, sums, ce, metrics).masked_fill((weight == 0.0)[:, None], 0.0)
    return columns.to(accumulate_dtype(x.dtype))  # a teacher of more digits does not change the dtype of a student's loss


def block_stats(
    x: Tensor,
    z: Tensor,
    x_bias: Tensor | None,
    z_bias: Tensor | None,
    labels: Tensor | None,
    t: Tensor,
    temperature: float,
    head: list[float],
    weigh: str,
    ce: bool,
    metrics: bool,
) -> Tensor:
    return _stats(_load(x, z, x_bias, z_bias, t, temperature, head), labels, weigh, ce, metrics)


def block_reduce(
    x: Tensor,
    z: Tensor,
    x_bias: Tensor | None,
    z_bias: Tensor | None,
    t: Tensor,
    divergence: str,
    a: float,
    temperature: float,
    head: list[float],
    stats: Tensor,
    metrics: bool,
) -> Tensor:
    rows = _load(x, z, x_bias, z_bias, t, temperature, head).like(stats)
    value, slope = _value_and_slope(rows, stats, _divergence(divergence, a))
    return _reduce(rows, stats, value, slope, metrics)


def block_grad(
    x: Tensor,
    z: Tensor,
    x_bias: Tensor | None,
    z_bias: Tensor | None,
    labels: Tensor | None,
    weight: Tensor,
    t: Tensor,
    divergence: str,
    a: float,
    temperature: float,
    kd_scale: float,
    ce_scale: float,
    head: list[float],
    stats: Tensor,
    sums: Tensor,
) -> None:
    rows = _load(x, z, x_bias, z_bias, t, temperature, head).like(stats)
    _, slope = _value_and_slope(rows, stats, _divergence(divergence, a))
    _grad(rows, labels, weight, kd_scale, ce_scale, head, stats, sums[:, 1], slope, x)


for _operator in (row_loss, block_stats, block_reduce, block_grad):
    library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
