"""The row operation over logits in memory: one program for each row, one launch for each chunk.

A program reads its row of x and z once for the statistics, again for the sums, and once more for the gradient, which it writes over
x. There is no sweep for the sums where running sums give them (one-sweep divergences without metrics), nor for forward KL with a
gradient, whose slope sums to what is known before (sums_beside_gradient): value and metrics are summed beside the gradient.

Its row is to it a tile of LANES parts, each one thread's, which adds up what is its own; the parts are merged once, after the
sweep. So no sweep has a barrier or a shuffle in it, and where rows start at multiples of 16 entries, as those of the scratch do,
every access is as wide as the hardware has them (``make static`` sees to both).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.backends import cuda
from kdkernels.backends.columns import ROW_COLUMNS, WEIGH
from kdkernels.backends.triton import arch, blocks, device, launch
from kdkernels.divergences import flat, resolve

# Parts of a row that a thread adds up at the same time; more run out of registers, and metrics beside the gradient with the second.
MOST_PARTS = 4


@triton.jit
def of_logits(sides, t, temperature, v0, end, AT_ONE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """x, y and z [LANES, WIDTH] over the temperature, and their columns. sides: (x_row_ptr, z_row_ptr, x_head, z_head)."""
    x_row_ptr, z_row_ptr, x_head, z_head = sides
    columns = v0 + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = columns < end
    reach = device.reach(columns, end, WIDTH)
    x = tl.load(x_row_ptr + columns, mask=reach, other=0.0).to(tl.float32)
    z = tl.load(z_row_ptr + columns, mask=reach, other=0.0).to(tl.float32)
    x = device.after_head(x, x_head, temperature, columns, inside)
    z = device.after_head(z, z_head, temperature, columns, inside)
    return x, z if AT_ONE else device.mixed(x, z, t), z, columns


@triton.jit
def statistics_of_logits(
    sides, t, temperature, end, WEIGH: tl.constexpr, CE: tl.constexpr, METRICS: tl.constexpr,
    AT_ONE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of the row, scalars."""
    state = device.no_statistics(LANES)
    first = tl.arange(0, LANES) * WIDTH
    for v0 in range(0, end, LANES * WIDTH):
        x, y, z, columns = of_logits(sides, t, temperature, v0, end, AT_ONE, LANES, WIDTH)
        state = device.add_statistics(state, x, y, z, None, v0 + first, columns, temperature, WEIGH, CE, METRICS)
    return device.merged(state, WEIGH)


@triton.jit
def one_row(
    sides, dx_row_ptr, row_ptr, label, label_logit, weight, t, x_head, terms, vocab, TILE: tl.constexpr, STATISTICS: tl.constexpr,
    PAIR: tl.constexpr, WEIGH: tl.constexpr, METRICS: tl.constexpr, AT_ONE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: its sweeps, its ROW_COLUMNS, its gradient.

    label: None where nobody asks for the cross-entropy; its logit is at T = 1. TILE, STATISTICS: what reads ``sides``, as
    ``of_logits`` and ``statistics_of_logits`` do.
    """
    shares, temperature, kd = terms[0], terms[1], terms[2]
    CE: tl.constexpr = label is not None
    # A row of weight 0 is not computed: its sweeps are empty.
    live = weight != 0.0
    end = tl.where(live, vocab, 0)
    stats = device.finished(STATISTICS(sides, t, temperature, end, WEIGH, CE, METRICS, AT_ONE, LANES, WIDTH), temperature, CE)

    sums = (0.0, 0.0, 0.0, 0.0, 0.0)
    if WEIGH == device.LOST:
        slope = device.slope_of_lost(stats, shares, PAIR)
    elif WEIGH != device.NOTHING:
        value, slope = device.sums_of_one_sweep(stats, shares, PAIR, WEIGH)
    else:
        if kd is not None or METRICS:
            state = device.no_sums(LANES)
            for v0 in range(0, end, LANES * WIDTH):
                x, y, z, _ = TILE(sides, t, temperature, v0, end, AT_ONE, LANES, WIDTH)
                state = device.add_sums(state, x, y, z, stats, shares, PAIR, METRICS)
            sums = device.merged_sums(state)
        value = sums[device.VALUE]
        slope = device.shown(value, sums[device.SLOPE])

    if dx_row_ptr is not None:
        state = device.no_sums(LANES)
        for v0 in range(0, vocab, LANES * WIDTH):
            x, y, z, columns = TILE(sides, t, temperature, v0, end, AT_ONE, LANES, WIDTH)
            if WEIGH == device.LOST:
                state = device.add_sums(state, x, y, z, stats, shares, PAIR, METRICS)
            dx = device.gradient(x, y, stats, slope, label, weight, x_head, terms, columns, PAIR)
            device.store_gradient(dx_row_ptr + columns, dx, columns, vocab, WIDTH)
        if WEIGH == device.LOST:
            sums = device.merged_sums(state)
            value = sums[device.VALUE]

    tl.store(row_ptr + device.ROW_KD, tl.where(live, value, 0.0))
    cross_entropy = 0.0
    if CE:
        cross_entropy = tl.where(live, stats[device.LOG_SUM_X] - (label_logit - stats[device.MAX_X]), 0.0)
    tl.store(row_ptr + device.ROW_CE, cross_entropy)
    tl.store(row_ptr + device.ROW_TARGET_ENTROPY, tl.where(live, sums[device.TARGET_ENTROPY], 0.0))
    tl.store(row_ptr + device.ROW_STUDENT_ENTROPY, tl.where(live, sums[device.STUDENT_ENTROPY], 0.0))
    agreement = 0.0
    if METRICS:
        agreement = tl.where(live & (stats[device.ARGMAX_X] == stats[device.ARGMAX_Z]), 1.0, 0.0)
    tl.store(row_ptr + device.ROW_AGREEMENT, agreement)
    tl.store(row_ptr + device.ROW_OVERLAP, tl.where(live, sums[device.OVERLAP], 0.0))


@triton.jit
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
    # see device.reach
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    x_ptr, z_ptr, dx_ptr = logits
    row = tl.program_id(0).to(tl.int64)
    sides = (x_ptr + row * strides[0], z_ptr + row * strides[1], x_head, z_head)
    dx_row_ptr = None
    if dx_ptr is not None:
        dx_row_ptr = dx_ptr + row * strides[2]
    row_ptr = rows_ptr + row * device.ROW_COUNT
    weight = tl.load(weight_ptr + row)
    t = tl.load(t_ptr)
    label, label_logit = None, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        # Before any sweep: dx may lie over x, and other threads do not wait for this one before they write theirs.
        in_row = (weight != 0.0) & (label >= 0) & (label < vocab)
        own = tl.load(sides[0] + label, mask=in_row, other=0.0).to(tl.float32)
        own = device.at_one(device.after_head(own, x_head, terms[1], label, in_row), terms[1])
        label_logit = tl.where(in_row, own, 0.0)
    # Both are there from the first launch on: a target that moves to t = 1 compiles nothing on its way.
    if t == 1.0:
        one_row(
            sides, dx_row_ptr, row_ptr, label, label_logit, weight, t, x_head, terms, vocab, of_logits, statistics_of_logits,
            PAIR, WEIGH, METRICS, True, LANES, WIDTH,
        )  # fmt: skip
    else:
        one_row(
            sides, dx_row_ptr, row_ptr, label, label_logit, weight, t, x_head, terms, vocab, of_logits, statistics_of_logits,
            PAIR, WEIGH, METRICS, False, LANES, WIDTH,
        )  # fmt: skip


def sums_beside_gradient(divergence: str, temperature: float, kd_scale: float, gradient: bool) -> bool:
    """Whether one sweep makes both: where the slope's sum is known before. Then what one_row weighs is device.LOST.

    In flat distributions slopes are about as small as the roundings of log-sum-exps that all of a row share; the sum of the slopes
    as they were computed takes those off again.
    """
    return gradient and kd_scale != 0.0 and not flat(temperature) and resolve(divergence).slope_by_target


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
    dx = None if not grad else x if out is None else out
    if rows and x.device.type == "cuda":
        found = cuda.row_loss(
            x, z, x_bias, z_bias, labels, weight, t, divergence, a, temperature, kd_scale, ce_scale, head, dx, metrics
        )
        if found is not None:
            return found
    columns = torch.empty((rows, len(ROW_COLUMNS)), dtype=torch.float32, device=x.device)
    if rows == 0:
        return columns
    wanted = labels is not None and (ce_scale != 0.0 or metrics)
    # Running sums cancel where p is close to q, and in flat distributions to nothing.
    weigh = "" if metrics or kd_scale == 0.0 or flat(temperature) else resolve(divergence).one_sweep
    beside = sums_beside_gradient(divergence, temperature, kd_scale, dx is not None)
    entry = blocks.row_entry(x.device)
    width = _together([side for side in (x, z, dx) if side is not None], entry.entries)
    parts = 1 if beside and metrics else min(entry.entries // width, MOST_PARTS)
    arguments: tuple[Any, ...] = (
        (x, z, dx),
        (x.stride(0), z.stride(0), 0 if dx is None else dx.stride(0)),
        columns,
        labels if wanted else None,
        weight.to(torch.float32),
        t.to(torch.float32),
        launch.head_arguments(x_bias, head[0], head[1]),
        launch.head_arguments(z_bias, head[2], head[3]),
        launch.term_arguments(replace(resolve(divergence), a=a), temperature, kd_scale, ce_scale if wanted else 0.0),
        vocab,
    )
    with arch.on(x.device):
        row_loss_kernel[(rows,)](
            *arguments,
            PAIR=launch.pair_function(divergence, temperature),
            WEIGH=device.LOST.value if beside else WEIGH[weigh],
            METRICS=metrics,
            LANES=entry.num_warps * arch.warp(x.device) * parts,
            WIDTH=width,
            **entry.options(x.device),
        )
    return columns


def _together(sides: list[Tensor], most: int) -> int:
    """Entries that a thread takes of a row at a time: what Triton gives it, which is 16 bytes of the narrowest of the sides, or one
    entry where rows do not lie so. A longer part would be several threads'."""
    width = min(16 // min(side.itemsize for side in sides), most)
    return width if all(_has_room(side, width) for side in sides) else 1


def _has_room(rows: Tensor, entries: int) -> bool:
    """Whether the memory behind each row reaches to a multiple of ``entries``, and rows lie a multiple of 16 apart, by which Triton
    knows that they are aligned."""
    count, vocab = rows.shape
    overhang = -vocab % entries
    return (
        rows.stride(0) % 16 == 0
        and rows.stride(0) >= vocab + overhang
        and (rows.storage_offset() + (count - 1) * rows.stride(0) + vocab + overhang) * rows.itemsize
        <= rows.untyped_storage().nbytes()
    )
