"""The low-level operators in plain torch: any dtype, any device. It runs where nothing faster does, and for float64."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdkernels.backends.base import Backend
from kdkernels.backends.columns import Stats, Sums
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


def _beside(stats: Tensor) -> Stats:
    """By name, each [rows, 1]."""
    return Stats(*stats[..., None].unbind(1))


def _log_probability(v: Tensor, largest: Tensor, log_sum: Tensor) -> Tensor:
    return (v - largest).sub_(log_sum)


def _moments(weighing: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of e^u and e^u (u - v), where u and v are both models' entries less their row's largest; banned entries are left out."""
    u, v = ((side - side.amax(1, keepdim=True)) for side in (weighing, other))
    banned = (weighing == -torch.inf) | (other == -torch.inf)
    e = u.exp()
    return e.masked_fill(banned, 0.0).sum(1), (e * (u - v)).masked_fill(banned, 0.0).sum(1)


def _stats(rows: _Rows, labels: Tensor | None, weigh: str, ce: bool, metrics: bool) -> Tensor:
    max_x_T, log_sum_x_T = _log_sum_exp(rows.x)
    max_y_T, log_sum_y_T = _log_sum_exp(rows.y)
    nothing = torch.zeros_like(max_x_T)
    max_x, log_sum_x = _log_sum_exp(rows.own_x()) if ce and rows.temperature != 1.0 else (max_x_T, log_sum_x_T)
    max_z_T, log_sum_z_T = _log_sum_exp(rows.z) if metrics else (nothing, nothing)
    label_logit = nothing
    if labels is not None:
        here = (labels >= 0) & (labels < rows.x.shape[1])
        label_logit = rows.own_x().gather(1, labels.where(here, 0)[:, None]).squeeze(1).where(here, nothing)
    sides = {"target": (rows.y, rows.x), "student": (rows.x, rows.y)}
    mass, moment = _moments(*sides[weigh]) if weigh else (nothing, nothing)
    stats = Stats(
        max_x_T=max_x_T,
        log_sum_x_T=log_sum_x_T,
        max_y_T=max_y_T,
        log_sum_y_T=log_sum_y_T,
        max_x=max_x,
        log_sum_x=log_sum_x,
        max_z_T=max_z_T,
        log_sum_z_T=log_sum_z_T,
        argmax_x=rows.x.argmax(1) if metrics else nothing,
        argmax_z=rows.z.argmax(1) if metrics else nothing,
        label_logit=label_logit,
        mass=mass,
        moment=moment,
    )
    return torch.stack([column.to(rows.x.dtype) for column in stats], 1)


def _value_and_slope(rows: _Rows, stats: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """With the c (q - p) and c q in them that sum to nothing over a row (divergences.py)."""
    value, slope = torch.empty_like(rows.x), torch.empty_like(rows.x)
    # A formula holds a dozen tensors, some in float64: of some rows at a time.
    pieces = zip(
        *(part.split(max(1, PIECE // max(1, rows.x.shape[1]))) for part in (rows.x, rows.y, stats, value, slope)), strict=True
    )
    for x, y, of_rows, to_value, to_slope in pieces:
        of = _beside(of_rows)
        lq, lp = _log_probability(x, of.max_x_T, of.log_sum_x_T), _log_probability(y, of.max_y_T, of.log_sum_y_T)
        d = (x - of.max_x_T).sub_(y - of.max_y_T).sub_(of.log_sum_x_T - of.log_sum_y_T)
        for to, part in zip((to_value, to_slope), divergence.balanced(lp, lq, d, rows.temperature), strict=True):
            to.copy_(part)
    return value, slope


def _reduce(rows: _Rows, stats: Tensor, value: Tensor, slope: Tensor, metrics: bool) -> Tensor:
    total = value.sum(1)
    target_entropy = student_entropy = overlap = torch.zeros_like(total)
    if metrics:
        of = _beside(stats)
        lq, lp = _log_probability(rows.x, of.max_x_T, of.log_sum_x_T), _log_probability(rows.y, of.max_y_T, of.log_sum_y_T)
        p, q = lp.exp(), lq.exp()
        overlap = torch.minimum(q, _log_probability(rows.z, of.max_z_T, of.log_sum_z_T).exp_()).sum(1)
        target_entropy, student_entropy = (-(m * lm).masked_fill(lm == -torch.inf, 0.0).sum(1) for m, lm in ((p, lp), (q, lq)))
    sums = Sums(
        value=total,
        slope=torch.where(total.isnan(), total, slope.sum(1)),  # one that compares (total variation) can hide a NaN
        target_entropy=target_entropy,
        student_entropy=student_entropy,
        overlap=overlap,
    )
    return torch.stack(sums, 1)


def _grad(
    rows: _Rows,
    labels: Tensor | None,
    weight: Tensor,
    kd_scale: float,
    ce_scale: float,
    head: list[float],
    stats: Tensor,
    sums: Tensor,
    slope: Tensor,
    out: Tensor,
) -> None:
    of, slope_sum = _beside(stats), Sums(*sums.unbind(1)).slope
    q = _log_probability(rows.x, of.max_x_T, of.log_sum_x_T).exp_()
    # A divergence of factor 0 is left out, whatever it came to: 0 * NaN is not 0.
    dx = torch.zeros_like(q) if kd_scale == 0.0 else (slope - q * slope_sum[:, None]).mul_(kd_scale / rows.temperature)
    if ce_scale != 0.0 and labels is not None:
        own_q = q if rows.temperature == 1.0 else _log_probability(rows.own_x(), of.max_x, of.log_sum_x).exp_()
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
        _grad(rows, labels, weight, kd_scale, ce_scale, head, stats, sums, slope, target)
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
    _grad(rows, labels, weight, kd_scale, ce_scale, head, stats, sums, slope, x)


for _operator in (row_loss, block_stats, block_reduce, block_grad):
    library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
