"""The three sweeps over blocks of the vocabulary add up to the row operation over whole rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends.columns import STATS_COLUMNS
from kdkernels.backends.merge import merged, sums_of_one_sweep
from kdkernels.backends.operators import row_columns
from kdkernels.divergences import resolve
from tests.support.cases import BLOCK_CHOICES, BLOCK_VARIANTS, parameters, running

# Ragged: one entry, less than a vector, more than one block of the native row loops, and what is left.
EDGES = (0, 1, 6, 1500, 2100)
VOCAB, ROWS = EDGES[-1], 5


@dataclass
class Rows:
    x: Tensor
    z: Tensor
    x_bias: Tensor | None
    z_bias: Tensor | None
    labels: Tensor
    weight: Tensor
    t: Tensor
    head: list[float]
    temperature: float = 2.0
    kd_scale: float = 1.5
    ce_scale: float = 0.5
    a: float = 0.3

    def block(self, begin: int, end: int) -> Rows:
        cut = {name: getattr(self, name)[:, begin:end].clone() for name in ("x", "z")}
        biases = {name: bias[begin:end] for name in ("x_bias", "z_bias") if (bias := getattr(self, name)) is not None}
        return replace(self, **cut, **biases, labels=self.labels - begin)

    def logits(self) -> tuple[Any, ...]:
        return self.x, self.z, self.x_bias, self.z_bias


def draw_rows(dtype: torch.dtype, seed: int = 0) -> Rows:
    """Labels lie in every block; one row has weight 0, and one entry of each model is banned."""
    generator = torch.Generator().manual_seed(seed)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    x, z = (torch.randn(2, ROWS, VOCAB, generator=generator, dtype=torch.float64) * 4).to(dtype)
    x[0, 3], z[1, 1700] = -torch.inf, -torch.inf
    biases = torch.randn(2, VOCAB, generator=generator).to(sums)
    weight = torch.tensor([1.0, 0.5, 0.0, -2.0, 1e-3], dtype=sums)
    labels = torch.tensor([0, 4, 7, 1499, 2099])
    return Rows(x, z, *biases, labels, weight, torch.tensor(0.7, dtype=sums), [0.75, 30.0, 1.25, 0.0])


def statistics(operators: Any, rows: Rows, weigh: str, metrics: bool) -> Tensor:
    """Of whole rows, from those of the blocks."""
    parts = []
    for begin, end in itertools.pairwise(EDGES):
        part = rows.block(begin, end)
        stats = operators.block_stats(
            *part.logits(), part.labels, rows.t, rows.temperature, rows.head, weigh, True, metrics
        ).double()
        stats[:, [STATS_COLUMNS.index("argmax_x"), STATS_COLUMNS.index("argmax_z")]] += begin
        parts.append(stats)
    return merged(torch.stack(parts), weigh)


def by_blocks(operators: Any, rows: Rows, name: str, metrics: bool) -> tuple[Tensor, Tensor]:
    """ROW_COLUMNS and the gradient, from three sweeps over blocks."""
    parts = [rows.block(begin, end) for begin, end in itertools.pairwise(EDGES)]
    stats = statistics(operators, rows, "", metrics).to(rows.weight.dtype)
    loss = (name, rows.a, rows.temperature)
    sums = torch.stack([operators.block_reduce(*part.logits(), rows.t, *loss, rows.head, stats, metrics) for part in parts]).sum(0)
    for part in parts:
        scales = (rows.kd_scale, rows.ce_scale, rows.head)
        operators.block_grad(*part.logits(), part.labels, rows.weight, rows.t, *loss, *scales, stats, sums)
    whole = row_columns(stats, sums, True, metrics)
    return whole.masked_fill(rows.weight[:, None] == 0, 0.0), torch.cat([part.x for part in parts], 1)


def at_once(operators: Any, rows: Rows, name: str, metrics: bool) -> tuple[Tensor, Tensor]:
    dx = rows.x.clone()
    loss = (name, rows.a, rows.temperature, rows.kd_scale, rows.ce_scale, rows.head)
    columns = operators.row_loss(dx, *rows.logits()[1:], rows.labels, rows.weight, rows.t, *loss, True, metrics)
    return columns, dx


@pytest.mark.parametrize("name", [name for name in kd.divergences() if resolve(name).one_sweep])
@pytest.mark.parametrize(("variant", "dtype"), parameters(BLOCK_CHOICES))
def test_one_sweep_is_enough_where_the_divergence_says_so(variant: str, dtype: torch.dtype, name: str) -> None:
    rows = draw_rows(dtype)
    rows.x[3, 1600:] += 300.0  # the largest entries grow late, and by more than any exponential holds
    rows.head = [0.75, 0.0, 1.25, 0.0]
    divergence = resolve(name)
    with running(variant):
        operators = backends.select(rows.x.device, dtype).operators()
        ends = (rows.t, name, rows.a, rows.temperature, rows.head)
        stats = statistics(operators, rows, divergence.one_sweep, False)
        two = operators.block_reduce(*rows.logits(), *ends, stats.to(rows.weight.dtype), False).double()
    one = sums_of_one_sweep(stats, divergence)
    # The first of both is regrouped: linear in log p - log q, whose rounding is that of the logits.
    tolerance = 20 * torch.finfo(rows.weight.dtype).eps * rows.x.double().abs().amax().item()
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("name", kd.divergences())
@pytest.mark.parametrize(("variant", "dtype"), parameters(BLOCK_CHOICES))
def test_blocks_add_up_to_whole_rows(variant: str, dtype: torch.dtype, name: str, metrics: bool) -> None:
    rows = draw_rows(dtype)
    with running(variant):
        operators = backends.select(rows.x.device, dtype).operators()
        whole, dx = at_once(operators, rows, name, metrics)
        columns, blocks_dx = by_blocks(operators, rows, name, metrics)
    # Sums are regrouped, so they differ by roundings of the working precision; the gradient is also rounded to the dtype of x.
    eps = torch.finfo(whole.dtype).eps
    torch.testing.assert_close(columns, whole, rtol=50 * eps, atol=50 * eps)
    torch.testing.assert_close(
        blocks_dx, dx, rtol=max(100 * eps, torch.finfo(dtype).eps), atol=100 * eps * dx.abs().max().item() + torch.finfo(dtype).tiny
    )
    assert (dx[2] == 0).all()


@pytest.mark.parametrize("variant", parameters(BLOCK_VARIANTS))
def test_gradients_can_go_to_another_tensor(variant: str) -> None:
    rows = draw_rows(torch.float32)
    with running(variant):
        operators = backends.select(rows.x.device, torch.float32).operators()
        columns, dx = at_once(operators, rows, "forward_kl", True)
        before, out = rows.x.clone(), torch.empty_like(rows.x)
        loss = ("forward_kl", rows.a, rows.temperature, rows.kd_scale, rows.ce_scale, rows.head)
        other = operators.row_loss(*rows.logits(), rows.labels, rows.weight, rows.t, *loss, True, True, out)
        torch.testing.assert_close(other, columns, rtol=0, atol=0)
        torch.testing.assert_close(out, dx, rtol=0, atol=0)
        torch.testing.assert_close(rows.x, before, rtol=0, atol=0)
        operators.row_loss(*rows.logits(), rows.labels, rows.weight, rows.t, *loss, False, True)
        torch.testing.assert_close(rows.x, before, rtol=0, atol=0)


@pytest.mark.parametrize("variant", parameters(BLOCK_VARIANTS))
def test_a_block_that_is_banned_whole_changes_nothing(variant: str) -> None:
    rows = draw_rows(torch.float32)
    rows.head, rows.x_bias, rows.z_bias = [1.0, 0.0, 1.0, 0.0], None, None
    rows.x[:, 1:6] = -torch.inf
    rows.z[:, 1:6] = -torch.inf
    rows.labels[1] = 9
    with running(variant):
        operators = backends.select(rows.x.device, torch.float32).operators()
        whole, dx = at_once(operators, rows, "jsd", True)
        columns, blocks_dx = by_blocks(operators, rows, "jsd", True)
    assert whole.isfinite().all()
    torch.testing.assert_close(columns, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blocks_dx, dx, rtol=1e-5, atol=1e-6)
    assert (dx[:, 1:6] == 0).all()
