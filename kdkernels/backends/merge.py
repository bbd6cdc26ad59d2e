"""Statistics of whole rows from those of blocks of their columns, and sums from statistics where one sweep is enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.backends.columns import STATS_COLUMNS, Stats, Sums
from kdkernels.divergences import Divergence
from kdkernels.parallel.ranks import ALONE, Ranks

_AT = {name: column for column, name in enumerate(STATS_COLUMNS)}
_SIDES = ("x_T", "y_T", "x", "z_T")


def _evenly(places: Sequence[int]) -> slice:
    """Places that lie equally far apart, as a slice: a list would be copied to a GPU, and the host would wait for it."""
    found = slice(places[0], places[-1] + 1, places[1] - places[0])
    assert [*range(found.stop)[found]] == [*places]
    return found


_LARGEST, _LOG_SUMS = (_evenly([_AT[f"{kind}_{side}"] for side in _SIDES]) for kind in ("max", "log_sum"))
PLACES, _OFPLACES = _evenly([_AT["argmax_x"], _AT["argmax_z"]]), _evenly([_SIDES.index("x_T"), _SIDES.index("z_T")])
_ADDED = _evenly([_AT["label_logit"], _AT["mass"], _AT["moment"]])


def merged(parts: Tensor, weigh: str, ranks: Ranks = ALONE, places: bool = True) -> Tensor:
    """Statistics [N, STATS_COLUMNS] of whole rows from those of their blocks, parts [B, N, STATS_COLUMNS], on every rank.

    Sums of exponentials are counted from a block's own largest entry, and here from the row's. argmax columns hold places in the
    row already; of equal largest entries the first wins. places: whether other ranks' are asked for.
    """
    # NaN equals nothing, and the largest over ranks may lose it. As +inf it makes the sums NaN just the same.
    largest = parts[..., _LARGEST]
    largest = torch.where(largest.isnan(), torch.inf, largest)
    top = ranks.max(largest.amax(0))
    # A block or a row that is banned whole has no largest entry to count from: exp(-inf - 0) = 0.
    shifts = largest - top.masked_fill(top == -torch.inf, 0.0)
    label_logit, mass, moment = parts[..., _ADDED].unbind(-1)
    if weigh:
        own, other = ("y_T", "x_T") if weigh == "target" else ("x_T", "y_T")
        u, v = shifts[..., _SIDES.index(own)], shifts[..., _SIDES.index(other)]
        empty = mass == 0  # shifts may be infinite there
        factor = u.exp().masked_fill(empty, 0.0)
        moment = factor * (moment + (mass * (u - v)).masked_fill(empty, 0.0))
        mass = factor * mass
    exponentials = (shifts + parts[..., _LOG_SUMS]).exp_().sum(0)
    added = ranks.sum(torch.cat([exponentials, torch.stack([label_logit, mass, moment], -1).sum(0)], 1))
    found = torch.where(largest[..., _OFPLACES] == top[:, _OFPLACES], parts[..., PLACES], torch.inf).amin(0)
    whole = torch.empty_like(parts[0])
    whole[:, _LARGEST], whole[:, _LOG_SUMS], whole[:, _ADDED] = top, added[:, : len(_SIDES)].log(), added[:, len(_SIDES) :]
    whole[:, PLACES] = ranks.min(found) if places else found
    return whole


def nothing(count: int, device: torch.device) -> Tensor:
    """Statistics of no columns: they add nothing to others."""
    stats = torch.zeros((count, len(STATS_COLUMNS)), dtype=torch.float64, device=device)
    stats[:, _LARGEST] = stats[:, _LOG_SUMS] = -torch.inf
    stats[:, PLACES] = torch.inf
    return stats


def sums_of_one_sweep(stats: Tensor, divergence: Divergence) -> Tensor:
    """SUMS_COLUMNS (value and slope; the rest 0) of a divergence whose ``one_sweep`` names the weighing side."""
    of = Stats(*stats.unbind(1))
    own, other = of.log_sum_x_T, of.log_sum_y_T
    if divergence.one_sweep == "target":
        own, other = other, own
    mass, moment = (part * (-own).exp() for part in (of.mass, of.moment))
    # lw - lo = (u - v) + (log sum of the other - log sum of the weighing side)
    moment = moment + mass * (other - own)
    # A moment past the largest number takes no part where its factor is 0: 0 times infinity would be NaN.
    value, slope = (c0 * mass + (c1 * moment if c1 else 0.0) for c0, c1 in divergence.linear())
    slope = slope + divergence.balance()
    nothing = torch.zeros_like(value)
    slope = torch.where(value.isnan(), value, slope)
    return torch.stack(Sums(value, slope, target_entropy=nothing, student_entropy=nothing, overlap=nothing), 1)
