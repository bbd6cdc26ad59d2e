"""The row operation over logits in memory: one program for each row, one launch for each chunk.

A program reads its row of x and z once for the statistics, again for the sums unless running sums gave them already (one-sweep
divergences without metrics), and once more for the gradient, which it writes over x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.backends.operators import ROW_COLUMNS
from kdkernels.backends.triton import blocks, device, launch
from kdkernels.divergences import resolve


@triton.jit
def _tile(x_row_ptr, z_row_ptr, x_head, z_head, t, temperature, columns, vocab):
    """x, y and z [1, COLUMNS] over the temperature."""
    inside = columns < vocab
    x = tl.load(x_row_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    z = tl.load(z_row_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    x = device.after_head(x, x_head, temperature, columns, inside)
    z = device.after_head(z, z_head, temperature, columns, inside)
    return x, device.mixed(x, z, t), z


@triton.jit(do_not_specialize=["vocab"])
def row_loss_kernel(
    logits,  # x_ptr, z_ptr, dx_ptr or None: [rows, vocab]
    strides,  # of their rows, in elements
    rows_ptr,  # [rows, ROW_COLUMNS]
    labels_ptr,  # [rows] or None
    weight_ptr,  # [rows]
    t_ptr,
    x_head,
    z_head,
    terms,
    vocab,
    PAIR: tl.constexpr,
    WEIGH: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    x_ptr, z_ptr, dx_ptr = logits
    a, temperature, kd, _ = terms
    CE: tl.constexpr = labels_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    at = row + tl.arange(0, 1)
    x_row_ptr = x_ptr + row * strides[0]
    z_row_ptr = z_ptr + row * strides[1]
    weight = tl.load(weight_ptr + at)
    t = tl.load(t_ptr)
    labels = None
    if CE:
        labels = tl.load(labels_ptr + at)
    nothing = tl.zeros([1], tl.float32)
    # A row of weight 0 is not computed: its sweeps are empty.
    end = tl.where(tl.sum(tl.abs(weight), 0) == 0.0, 0, vocab)

    state = device.no_statistics(1)
    for v0 in range(0, end, BLOCK_V):
        columns = v0 + tl.arange(0, BLOCK_V)
        x, y, z = _tile(x_row_ptr, z_row_ptr, x_head, z_head, t, temperature, columns, vocab)
        state = device.add_statistics(state, x, y, z, labels, v0, columns, temperature, WEIGH, CE, METRICS)
    stats = device.finished(state, temperature, CE)

    sums = device.no_sums(1)
    if WEIGH != device.NOTHING:
        value, slope = device.sums_of_one_sweep(stats, a, PAIR, WEIGH)
    else:
        if kd is not None or METRICS:
            for v0 in range(0, end, BLOCK_V):
                columns = v0 + tl.arange(0, BLOCK_V)
                x, y, z = _tile(x_row_ptr, z_row_ptr, x_head, z_head, t, temperature, columns, vocab)
                sums = device.add_sums(sums, x, y, z, stats, a, PAIR, METRICS)
        value = sums[0]
        slope = device.shown(value, sums[1])

    live = weight != 0.0
    row_ptr = rows_ptr + at * 6
    tl.store(row_ptr, tl.where(live, value, 0.0))
    cross_entropy = nothing
    if CE:
        cross_entropy = stats[5] - (stats[10] - stats[4])
    tl.store(row_ptr + 1, tl.where(live, cross_entropy, 0.0))
    tl.store(row_ptr + 2, sums[2])
    tl.store(row_ptr + 3, sums[3])
    agreement = nothing
    if METRICS:
        agreement = tl.where(live & (stats[8] == stats[9]), 1.0, 0.0)
    tl.store(row_ptr + 4, agreement)
    tl.store(row_ptr + 5, sums[4])

    if dx_ptr is not None:
        dx_row_ptr = dx_ptr + row * strides[2]
        for v0 in range(0, vocab, BLOCK_V):
            columns = v0 + tl.arange(0, BLOCK_V)
            x, y, z = _tile(x_row_ptr, z_row_ptr, x_head, z_head, t, temperature, columns, end)
            dx = device.gradient(x, y, stats, slope, labels, weight, x_head, terms, columns, PAIR)
            tl.store(dx_row_ptr + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=(columns < vocab)[None, :])


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
    """As backends/operators.py says. ``out`` may have another dtype than x."""
    rows, vocab = x.shape
    columns = torch.empty((rows, len(ROW_COLUMNS)), dtype=torch.float32, device=x.device)
    if rows == 0:
        return columns
    dx = None if not grad else x if out is None else out
    wanted = labels is not None and (ce_scale != 0.0 or metrics)
    weigh = "" if metrics or kd_scale == 0.0 else resolve(divergence).one_sweep
    entry = blocks.row_entry(x.device)
    arguments: tuple[Any, ...] = (
        (x, z, dx),
        (x.stride(0), z.stride(0), 0 if dx is None else dx.stride(0)),
        columns,
        labels if wanted else None,
        weight.to(torch.float32),
        t.to(torch.float32),
        launch.head_arguments(x_bias, head[0], head[1]),
        launch.head_arguments(z_bias, head[2], head[3]),
        launch.term_arguments(a, temperature, kd_scale, ce_scale if wanted else 0.0),
        vocab,
    )
    row_loss_kernel[(rows,)](
        *arguments,
        PAIR=launch.pair_function(divergence),
        WEIGH=device.WEIGH[weigh],
        METRICS=metrics,
        BLOCK_V=entry.block_v,
        **entry.options(x.device),
    )
    return columns
