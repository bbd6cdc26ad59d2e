"""Logits in 16 bits, straight out of their products: how far each one lies from the largest in its tile's row.

A tile of a product is [BLOCK_N tokens, BLOCK_V columns]. Instead of float32 logits its epilogue stores, of each of the tile's rows:

- codes, logit - (largest - 1) in float16: the largest itself is exact, and what lies up to 2 below it, which carries the
  probability, is within 2^-12 (benchmarks/offsets.py has what that does to gradients);
- the largest, and the sum of exp(logit - largest) over the logits as they are stored, so that no sweep is needed for normalisers,
  and what comes out is the loss of logits that are off by no more than that. A minus before the sum, of a model that learns at
  least, (before a 0 too) says that a code there is -inf.

A logit is here what the softmax takes: after its head's bias, scale and softcap, and over the temperature. The second product is
the target's: where that is not the teacher alone (t < 1) its epilogue reads the student's codes of the same tile and mixes. (With
metrics, which look at the teacher too, it is the teacher's; then the row kernel mixes, and makes the target's normaliser.) After
that the row kernel reads codes once for the sums and once for the gradient, which lies over the learner's codes; for forward KL
once for both, as rows.py says, and before that for what is lost if the learner bans an entry of the row. For a plain head
backends/cuda/product.cu may make the product (KDKERNELS_LOGITS=offsets-cuda).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kdkernels.backends.base import Model, Step
from kdkernels.backends.columns import ROW_COLUMNS
from kdkernels.backends.cuda import product as cuda_product
from kdkernels.backends.head import apply_head
from kdkernels.backends.triton import arch, blocks, device, launch, rows
from kdkernels.backends.triton.functions import exp
from kdkernels.backends.triton.vocabulary import place, product


@triton.jit
def _decoded(codes, largest):
    """Logits. largest: in each code's row of its tile."""
    return codes.to(tl.float32) + (largest - 1.0)


@triton.jit(do_not_specialize=["tokens"])
def offsets_product_kernel(
    hidden,
    weight,
    codes,  # descriptor [tokens, vocab]
    student_codes,  # descriptor, where the target mixes them in; else None
    model,  # layout and head, as in vocabulary._tile
    parts,  # pointers: largest, sums, and sums at T = 1 or None, each [tokens, tiles]
    student_parts,  # pointers: largest and sums; or None, as student_codes
    t_ptr,  # None for the student's product
    temperature,  # or None for 1
    tokens,
    vocab,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    LEARNS: tl.constexpr,  # whether the model does, so that somebody asks what it bans
):
    """Programs take turns at the tiles. A launch for the teacher alone does nothing at t < 1, one that mixes nothing at t = 1."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    tiles = tl.cdiv(vocab, BLOCK_V)
    count = blocks * tiles
    t = 1.0
    if t_ptr is not None:
        t = tl.load(t_ptr)
        count = tl.where((t == 1.0) == (student_codes is None), count, 0)
    largest_ptr, sums_ptr, sums_1_ptr = parts
    for number in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        block, tile = place(number, blocks, tiles, GROUP)
        n0 = block * BLOCK_N
        v0 = tile * BLOCK_V
        v = product(hidden, weight, model[0], n0, v0, tokens, vocab, BLOCK_N, BLOCK_V, BLOCK_D)
        columns = (v0 + tl.arange(0, BLOCK_V))[None, :]
        v = device.after_head(v, model[1], temperature, columns, columns < vocab)
        rows = n0 + tl.arange(0, BLOCK_N)
        there = rows < tokens
        at = rows.to(tl.int64) * tiles + tile
        if student_codes is not None:
            x_largest = tl.load(student_parts[0] + at, mask=there, other=0.0)
            x = _decoded(student_codes.load([n0, v0]), x_largest[:, None])
            v = tl.where(columns < vocab, device.mixed(x, v, t), float("-inf"))
        largest = tl.max(v, 1)
        if student_codes is not None:  # at t = 0 the target is the student to the last bit
            largest = tl.where(t == 0.0, x_largest, largest)
        above = v - tl.where(largest == float("-inf"), 0.0, largest)[:, None]
        rounded = (above + 1.0).to(tl.float16)
        codes.store([n0, v0], rounded)
        above = rounded.to(tl.float32) - 1.0
        tl.store(largest_ptr + at, largest, mask=there)
        sums = tl.sum(exp(above), 1)
        if LEARNS:
            banned = tl.min(tl.where(columns < vocab, above, 0.0), 1) == float("-inf")
            sums = tl.where(banned, sums * -1.0, sums)  # -sums would be 0 - sums, which has no -0
        if student_codes is not None:  # which other code may have added up, in another order
            of_student = tl.load(student_parts[1] + at, mask=there, other=0.0)
            sums = tl.where(tl.where(sums < float("inf"), t, 1.0) == 0.0, of_student, sums)  # NaN and +inf of the teacher show
        tl.store(sums_ptr + at, sums, mask=there)
        if sums_1_ptr is not None:
            tl.store(sums_1_ptr + at, tl.sum(exp(above * temperature), 1), mask=there)


@triton.jit
def _of_codes(sides, t, temperature, v0, end, AT_ONE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """As rows.of_logits. sides: codes of a row for x and z; the first of their parts, and its place in them; tiles, BLOCK_V."""
    x_codes, z_codes, x_parts, z_parts, part, _, BLOCK_V = sides
    first = v0 + tl.arange(0, LANES)[:, None] * WIDTH
    columns = first + tl.arange(0, WIDTH)[None, :]
    inside = columns < end
    reach = device.reach(columns, end, WIDTH)
    x = tl.load(x_codes + columns, mask=reach, other=0.0)
    z = tl.load(z_codes + columns, mask=reach, other=0.0)
    x = _decoded(x, tl.load(x_parts[0] + part + first // BLOCK_V, mask=first < end, other=0.0))
    z = _decoded(z, tl.load(z_parts[0] + part + first // BLOCK_V, mask=first < end, other=0.0))
    x = tl.where(inside, x, float("-inf"))
    z = tl.where(inside, z, float("-inf"))
    return x, z if AT_ONE else device.mixed(x, z, t), z, columns


@triton.jit
def _log_sum(largest_ptr, sums_ptr, factor, end, tiles, LANES: tl.constexpr):
    """Largest of a row's entries times ``factor``, and the sum of exp(entry - largest), from those of its tiles; and whether an
    entry is banned."""
    signs = tl.zeros([LANES], tl.int32)
    state = (tl.zeros([LANES], tl.float32) - float("inf"), tl.zeros([LANES], tl.float32))
    for at in range(0, tl.where(end > 0, tiles, 0), LANES):
        places = at + tl.arange(0, LANES)
        largest = tl.load(largest_ptr + places, mask=places < tiles, other=float("-inf")) * factor
        sums = tl.load(sums_ptr + places, mask=places < tiles, other=0.0)
        signs = tl.minimum(signs, sums.to(tl.int32, bitcast=True))
        sums = tl.abs(sums)
        m, s = state
        seen = tl.maximum(m, largest)
        shift = tl.where(seen == float("-inf"), 0.0, seen)
        state = (seen, s * exp(m - shift) + sums * exp(largest - shift))
    return device.merged_log_sum(state), tl.min(signs, 0) < 0


@triton.jit
def _log_sum_of_mixed(sides, t, temperature, end, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The same of y, which no tile's were made of."""
    zero = tl.zeros([LANES], tl.float32)
    state = (zero - float("inf"), zero)
    for v0 in range(0, end, LANES * WIDTH):
        _, y, _, _ = _of_codes(sides, t, temperature, v0, end, False, LANES, WIDTH)
        state, _ = device.add_log_sum(state, y)
    return device.merged_log_sum(state)


@triton.jit
def _top(codes_ptr, largest_ptr, largest, end, tiles, BLOCK_V, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """As device.merged_top: the first of the largest codes, in the first tile whose largest is the row's."""
    tile = tl.zeros([LANES], tl.int32) + tiles
    for at in range(0, tl.where(end > 0, tiles, 0), LANES):
        places = at + tl.arange(0, LANES)
        found = tl.load(largest_ptr + places, mask=places < tiles, other=float("-inf"))
        tile = tl.minimum(tile, tl.where(found == largest, places, tiles))
    inside = tl.arange(0, LANES * WIDTH)
    v0 = tl.min(tile, 0) * BLOCK_V
    codes = tl.load(codes_ptr + v0 + inside, mask=(inside < BLOCK_V) & (v0 + inside < end), other=float("-inf"))
    _, place = tl.max(codes, 0, return_indices=True)
    return largest, (v0 + place).to(tl.float32)


@triton.jit
def _lost(sides, largest, end, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of exp(y - largest) over what x alone bans."""
    lost = tl.zeros([LANES], tl.float32)
    for v0 in range(0, end, LANES * WIDTH):
        x, y, _, _ = _of_codes(sides, 1.0, None, v0, end, True, LANES, WIDTH)
        lost += tl.sum(tl.where((x == float("-inf")) & (y > x), exp(y - largest), 0.0), 1)
    return tl.sum(lost, 0)


@triton.jit
def _statistics_of_codes(
    sides, t, temperature, end, WEIGH: tl.constexpr, CE: tl.constexpr, METRICS: tl.constexpr, AT_ONE: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """As rows.statistics_of_logits."""
    x_codes, z_codes, x_parts, z_parts, part, tiles, BLOCK_V = sides
    x, banned = _log_sum(x_parts[0] + part, x_parts[1] + part, 1.0, end, tiles, LANES)
    z, _ = _log_sum(z_parts[0] + part, z_parts[1] + part, 1.0, end, tiles, LANES)
    top_x = x
    top_z = z
    if METRICS:  # before any other sweep, whose merging all threads wait for: dx may lie over codes that these look for
        top_x = _top(x_codes, x_parts[0] + part, x[0], end, tiles, BLOCK_V, LANES, WIDTH)
        top_z = _top(z_codes, z_parts[0] + part, z[0], end, tiles, BLOCK_V, LANES, WIDTH)
    y = z
    if not AT_ONE:
        y = _log_sum_of_mixed(sides, t, temperature, end, LANES, WIDTH)
        # At t = 0 the target is the student to the last bit.
        same = tl.where(y[1] < float("inf"), t, 1.0) == 0.0  # NaN and +inf of the teacher show
        y = (tl.where(same, x[0], y[0]), tl.where(same, x[1], y[1]))
    x_1 = x
    # Only where the cross-entropy is asked for at another temperature are these sums there.
    if x_parts[2] is not None:
        x_1, _ = _log_sum(x_parts[0] + part, x_parts[2] + part, temperature, end, tiles, LANES)
    lost = 0.0
    if WEIGH == device.LOST and AT_ONE:  # what x bans a mixed target bans too
        lost = _lost(sides, y[0], tl.where(banned, end, 0), LANES, WIDTH)
    return x, y, x_1, z, top_x, top_z, 0.0, (lost, 0.0)


@triton.jit
def offsets_row_kernel(
    logits,  # pointers: the learner's codes, the other's, dx or None, which may be the learner's: [rows, vocab]
    strides,  # of their rows, in elements
    own,  # pointers: largest, sums, and sums at T = 1 or None, each [rows, tiles]
    other,
    rows_ptr,  # [rows, ROW_COLUMNS]
    of_labels,  # pointers: labels, and their logits at T = 1, [rows]; or None
    weight_ptr,  # [rows]
    t_ptr,  # where the other's codes are the teacher's; None where they are the target's
    head,  # the learner's
    terms,
    tiles,
    vocab,
    PAIR: tl.constexpr,
    WEIGH: tl.constexpr,  # NOTHING or LOST
    METRICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tl.static_assert(not METRICS or LANES * WIDTH >= BLOCK_V)  # or _top does not see a whole tile
    row = tl.program_id(0).to(tl.int64)
    x_ptr, y_ptr, dx_ptr = logits
    sides = (x_ptr + row * strides[0], y_ptr + row * strides[1], own, other, row * tiles, tiles, BLOCK_V)
    dx_row_ptr = None
    if dx_ptr is not None:
        dx_row_ptr = dx_ptr + row * strides[2]
    labels_ptr, label_logits_ptr = of_labels
    label, label_logit = None, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        label_logit = tl.load(label_logits_ptr + row)
    weight = tl.load(weight_ptr + row)
    t = 1.0
    if t_ptr is not None:
        t = tl.load(t_ptr)
    if t_ptr is None or t == 1.0:
        rows.one_row(
            sides, dx_row_ptr, rows_ptr + row * device.ROW_COUNT, label, label_logit, weight, t, head, terms, vocab,
            _of_codes, _statistics_of_codes, PAIR, WEIGH, METRICS, True, LANES, WIDTH,
        )  # fmt: skip
    else:
        rows.one_row(
            sides, dx_row_ptr, rows_ptr + row * device.ROW_COUNT, label, label_logit, weight, t, head, terms, vocab,
            _of_codes, _statistics_of_codes, PAIR, WEIGH, METRICS, False, LANES, WIDTH,
        )  # fmt: skip


LABELS = 256  # whose logits are made together, so that no copy of all hidden states is


@dataclass(frozen=True)
class _Side:
    """A model's logits: codes [rows, vocab]; of each row's tiles the largest, and the sums at the temperature and at 1 (None where
    nobody asks for them), [rows, tiles]; labels and their logits at T = 1, which are not rounded, [rows], likewise."""

    codes: Tensor
    largest: Tensor
    sums: Tensor
    sums_1: Tensor | None
    labels: Tensor | None
    label_logits: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.largest, self.sums, self.sums_1


def matrix(step: Step) -> blocks.Matrix | None:
    """The blocks of a step's products; None where they are not made on this device."""
    entry = blocks.entry(step.device, step.student.dtype)
    dressed = any(model.bias is not None for model in (step.student, step.teacher)) or any(step.terms.head[1::2])
    return entry.dressed_offsets if dressed else entry.offsets


def _label_logits(hidden: Tensor, model: Model, head: Sequence[float], labels: Tensor | None) -> Tensor | None:
    """The labels' own logits at T = 1, [rows] float32, from products of their own. For a label out of range it is some other
    token's logit."""
    if labels is None:
        return None
    at = labels.clamp(0, len(model.weight) - 1)
    pieces = zip(hidden.split(LABELS), at.split(LABELS), strict=True)
    logits = torch.cat([(rows.float() * model.weight[of].float()).sum(-1) for rows, of in pieces])
    scale, softcap = head
    return apply_head(logits, None if model.bias is None else model.bias[at], scale, softcap)


class OffsetRows:
    """Both models' logits of a chunk's rows, and the row operation on them. As base.OffsetRows."""

    def __init__(self, steps: Sequence[Step], hidden: Sequence[Tensor], codes: Sequence[Tensor], labels: Tensor | None) -> None:
        self.steps = steps
        step = steps[0]
        found = matrix(step)
        assert found is not None
        self.matrix, self.t = found, step.t.to(torch.float32)
        self.temperature = None if step.terms.temperature == 1.0 else step.terms.temperature
        self.tiles = triton.cdiv(step.vocab, found.block_v)
        models = (step.student, step.terms.head[:2]), (step.teacher, step.terms.head[2:])
        labels_of = [labels if one.terms.ce_scale or one.metrics else None for one in steps] + [None]
        self.sides = [
            self._side(of, own, _label_logits(rows, *model, own))
            for of, own, rows, model in zip(codes, labels_of, hidden, models, strict=False)
        ]
        student, other = self.sides
        self._multiply(*models[0], hidden[0], student, True, None, None)
        if step.metrics:
            self._multiply(*models[1], hidden[1], other, len(steps) == 2, None, None)
            return
        # Which of the two does the work is known where t is: on the device.
        for mixed in (None, student):
            self._multiply(*models[1], hidden[1], other, len(steps) == 2 and mixed is None, self.t, mixed)

    def _side(self, codes: Tensor, labels: Tensor | None, label_logits: Tensor | None) -> _Side:
        tempered = labels is not None and self.temperature is not None
        largest, sums, *sums_1 = self.t.new_empty((3 if tempered else 2, len(codes), self.tiles))
        return _Side(codes, largest, sums, sums_1[0] if tempered else None, labels, label_logits)

    def _multiply(
        self,
        model: Model,
        head: Sequence[float],
        hidden: Tensor,
        side: _Side,
        learns: bool,
        t: Tensor | None,
        mixed: _Side | None,
    ) -> None:
        """The product of one model. learns: whether that model does. t: None for a product that is always made. mixed: the
        student's, where the target has a part of it."""
        device, found = hidden.device, self.matrix
        hidden, weight = hidden.contiguous(), model.weight.to(model.dtype)
        plain = mixed is None and side.sums_1 is None and model.bias is None and head[1] == 0.0
        if plain and arch.logits_asked_for() == "offsets-cuda":
            factor = head[0] / (self.temperature or 1.0)
            if cuda_product.stored(hidden, weight, factor, side.codes, side.largest, side.sums, t):
                return
        hidden, weight, layout = launch.operands(hidden, weight, found, device)
        codes = [
            None if one is None else TensorDescriptor.from_tensor(one.codes, [found.block_n, found.block_v])
            for one in (side, mixed)
        ]
        count = triton.cdiv(len(side.codes), found.block_n) * self.tiles
        with arch.on(device):
            offsets_product_kernel[(min(count, arch.multiprocessors(device)),)](
                hidden,
                weight,
                *codes,
                (layout, launch.head_arguments(model.bias, *head)),
                side.parts,
                None if mixed is None else (mixed.largest, mixed.sums),
                t,
                self.temperature,
                *side.codes.shape,
                LEARNS=learns,
                **found.blocks(),
                **found.options(),
            )

    def row_loss(self, at: int, weights: Tensor, dx: Tensor | None) -> Tensor:
        step, own, other = self.steps[at], self.sides[at], self.sides[1 - at]
        count, vocab = own.codes.shape
        columns = torch.empty((count, len(ROW_COLUMNS)), dtype=torch.float32, device=step.device)
        terms, entry = step.terms, blocks.row_entry(step.device)
        beside = rows.sums_beside_gradient(terms.divergence, terms.temperature, terms.kd_scale, dx is not None)
        logits = (own.codes, other.codes, dx)
        with arch.on(step.device):
            offsets_row_kernel[(count,)](
                logits,
                tuple(0 if one is None else one.stride(0) for one in logits),
                own.parts,
                other.parts,
                columns,
                (own.labels, own.label_logits),
                weights.to(torch.float32),
                self.t if step.metrics else None,
                launch.head_arguments(None, *terms.head[:2]),
                launch.term_arguments(
                    terms.resolved(), terms.temperature, terms.kd_scale, 0.0 if own.labels is None else terms.ce_scale
                ),
                self.tiles,
                vocab,
                PAIR=launch.pair_function(terms.divergence, terms.temperature),
                WEIGH=(device.LOST if beside else device.NOTHING).value,
                METRICS=step.metrics,
                BLOCK_V=self.matrix.block_v,
                LANES=entry.num_warps * arch.warp(step.device),
                WIDTH=entry.entries,
                **entry.options(step.device),
            )
        return columns
