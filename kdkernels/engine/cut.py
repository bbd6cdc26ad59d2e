"""How a step is cut: chunks of tokens and blocks of columns, from the bytes that are there for logits, and what that takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from kdkernels import backends
from kdkernels.backends.base import Backend
from kdkernels.backends.columns import STATS_COLUMNS, SUMS_COLUMNS
from kdkernels.backends.dtypes import accumulate_dtype, logits_dtype, product_dtype
from kdkernels.backends.products import block_size
from kdkernels.divergences import resolve
from kdkernels.engine.scratch import ROW_ELEMENTS, row_stride

Strategy: TypeAlias = Literal["auto", "tokens", "vocab"]
STRATEGIES = get_args(Strategy)
# Multiples that the rows of a chunk and the columns of a block come in, the first with which they fit. On a GPU libraries cut
# results into tiles of 128 and 256: 129 rows take as long as 256. On a CPU 103 rows take a tenth longer each than 104.
CPU_ROWS, CPU_COLUMNS = (16, 8, 4), (128, 64, 16)
GPU_MULTIPLES = (128, 64, 32, 16, 8)
# Float64 copies of a row's statistics at the vocab strategy's peak: those of the blocks so far and of the next one, both
# merged, and about two of what merging takes. Those of another learner are kept beside them.
STATISTICS_COPIES = 5
# Columns of a tile of 16-bit offsets, of which two float32 numbers are kept for each row and model (backends/triton/offsets.py).
# Heads with a bias or a softcap have tiles of half that, and labels at another temperature a third number: not counted, as nobody
# knows of them before the step.
OFFSETS_COLUMNS = 256
# Offsets are of logits over the temperature: a rounding of theirs is so many times as large in the logits themselves, by which the
# cross-entropy goes, and beside differences that the temperature has made small.
OFFSETS_TEMPERATURE = 4.0


@dataclass(frozen=True)
class Size:
    """What a plan depends on: kept tokens N, vocabulary V, hidden sizes, dtypes of both models, the divergence's forward sweeps.

    learners: 2 where the teacher learns too (OKD), by forward KL to the student; train_teacher_head: whether its head does. alone:
    the loss does not look at a teacher's logits; known: but at some log-probabilities of its. shared: ranks share the vocabulary,
    of which one holds ``widest`` columns at most. temperature: of the softmaxes. no_offsets: whatever else, no logits are kept in
    16 bits. architecture: of a GPU that is planned for and need not be here.
    """

    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    divergence: str
    train_head: bool
    device: torch.device
    budget: int
    learners: int = 1
    train_teacher_head: bool = False
    alone: bool = False
    known: bool = False
    shared: bool = False
    widest: int = 0
    temperature: float = 1.0
    no_offsets: bool = False
    architecture: str = ""

    @functools.cached_property  # asked a dozen times in a step
    def backend(self) -> Backend:
        return backend_of(self.device, self.dtype, self.teacher_dtype)

    @property
    def fused(self) -> bool:
        """Whether the sweeps' kernels multiply themselves; they take no vocabulary without a column, which a rank may be left
        with."""
        return self.backend.sweeps is not None and self.vocab > 0 and not self.known

    @functools.cached_property
    def offsets(self) -> bool:
        """Whether the logits of whole rows are kept as 16-bit offsets (backends/triton/offsets.py). Their rows are described to the
        hardware, so that they have to be aligned."""
        both = not (self.alone or self.known or self.shared or self.no_offsets)
        cool = self.temperature <= OFFSETS_TEMPERATURE
        aligned = row_stride(self.vocab, self.device) % ROW_ELEMENTS == 0
        return (
            both and cool and aligned and self.backend.keeps_offsets(self.device, self.architecture, self.dtype, self.teacher_dtype)
        )

    @property
    def accumulators(self) -> tuple[tuple[int, bool], ...]:
        """Of each learner whose gradients have 16 bits: hidden size, and whether the head takes one."""
        models = (self.student_dim, self.train_head, self.dtype), (self.teacher_dim, self.train_teacher_head, self.teacher_dtype)
        return tuple((dim, head) for dim, head, dtype in models[: self.learners] if dtype.itemsize == 2)


def backend_of(device: torch.device, *dtypes: torch.dtype) -> Backend:
    """What runs there. A GPU that is not in this machine is planned with what would run on it."""
    absent = device.type == "cuda" and not torch.cuda.is_available()
    return (backends.made_for if absent else backends.select)(device, *dtypes)


def logit_bytes(student: torch.dtype, teacher: torch.dtype, device: torch.device, learners: int = 1) -> int:
    """Scratch bytes per token and vocabulary entry of a chunk: both models' logits, the gradient of each learner where it does not
    lie over them, and the backend's temporaries. Of two learners the student's gradient lies beside its logits."""
    both = logits_dtype(student, device).itemsize + logits_dtype(teacher, device).itemsize
    for dtype, beside in ((student, learners == 2), (teacher, False))[:learners]:
        if beside or logits_dtype(dtype, device) != product_dtype(dtype, device):
            both += product_dtype(dtype, device).itemsize
    return both + backend_of(device, student, teacher).temporaries * accumulate_dtype(student).itemsize


def column_bytes(student: torch.dtype, teacher: torch.dtype, device: torch.device, learners: int = 1) -> int:
    """Scratch bytes per token and column of a vocabulary block: as for a chunk, or one gradient alone where the kernels multiply
    themselves. For two learners a block's student logits are copied, and gradients of another dtype lie beside the copy."""
    if backend_of(device, student, teacher).sweeps is not None:
        return max(product_dtype(dtype, device).itemsize for dtype in (student, teacher)[:learners])
    logits = logits_dtype(student, device)
    copied = learners == 2 and logits != product_dtype(student, device)
    return logit_bytes(student, teacher, device, learners) + copied * logits.itemsize


def _share(total: int, most: int, multiples: tuple[int, ...]) -> int:
    """Sizes of parts of one size, at most ``most``, a multiple of the first with which that still holds."""
    if total <= most:
        return max(1, total)
    even = math.ceil(total / math.ceil(total / most))
    rounded = (math.ceil(even / multiple) * multiple for multiple in multiples)
    return next((size for size in rounded if size <= most), even)


def chunk_rows(tokens: int, vocab: int, bytes_per_logit: int, budget: int, device: torch.device) -> int:
    """Tokens per chunk: as many as the budget holds, in chunks of one size."""
    row = row_stride(vocab, device) * bytes_per_logit
    return _share(tokens, max(1, budget // max(1, row)), CPU_ROWS if device.type == "cpu" else GPU_MULTIPLES)


def block_columns(tokens: int, vocab: int, bytes_per_logit: int, budget: int, device: torch.device) -> int:
    """Vocabulary columns per block: as many as the budget holds, in blocks of one size."""
    most = max(1, budget // max(1, tokens * bytes_per_logit))
    if row_stride(most, device) > most:
        most -= most % ROW_ELEMENTS
    return _share(vocab, most, CPU_COLUMNS if device.type == "cpu" else GPU_MULTIPLES)


@dataclass(frozen=True)
class Tile:
    """A piece of the scratch [rows, columns]: "x" and "z" hold both models' logits, "dx" and "dz" gradients that do not lie over
    them, "again" the student's logits for a second learner."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How a step is carried out: chunks of ``rows`` tokens, each in blocks of ``columns`` columns of the vocabulary.

    whole_rows: a chunk's one block is worked out by a backend's row operation; otherwise by sweeps over its blocks, which keep
    statistics and sums of each row between them.
    """

    size: Size
    rows: int
    columns: int
    whole_rows: bool

    @property
    def chunks(self) -> int:
        return math.ceil(self.size.tokens / max(1, self.rows))

    @property
    def blocks(self) -> int:
        return math.ceil(self.size.vocab / self.columns)

    def chunk_slices(self) -> Iterator[slice]:
        """The chunks, among the rows that count."""
        tokens = self.size.tokens
        return (slice(begin, min(begin + self.rows, tokens)) for begin in range(0, tokens, max(1, self.rows)))

    def block_slices(self) -> Iterator[slice]:
        vocab = self.size.vocab
        return (slice(begin, min(begin + self.columns, vocab)) for begin in range(0, vocab, self.columns))

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The scratch that a chunk's block takes."""
        shape = self.rows, self.columns
        return tuple(Tile(name, dtype, shape) for name, dtype in _tiles(self.size, self.whole_rows).items())

    @property
    def buffer(self) -> int:
        """Float32 elements of a head's block."""
        size = self.size
        dims = (size.student_dim,) if size.alone else (size.student_dim, size.teacher_dim)
        return max(block_size(size.vocab, dim, size.device) for dim in dims)

    @property
    def products(self) -> int:
        """How often the logits of both models are multiplied."""
        fused = self.size.fused
        # A whole vocabulary's logits stay in the scratch from sweep to sweep, unless the kernels multiply themselves.
        if self.whole_rows or (self.blocks == 1 and not fused):
            return 1
        own = (1 if resolve(self.size.divergence).one_sweep else 2) + 1
        return own + (2 if self.size.learners == 2 and fused else 0)

    @property
    def logits_bytes(self) -> int:
        """Of the tiles, and of what lies beside them while they are worked on: the budget bounds it."""
        return self.rows * row_stride(self.columns, self.size.device) * _entry_bytes(self.size, self.whole_rows)

    @property
    def accumulator_bytes(self) -> int:
        """Float32 sums of 16-bit gradients: of heads that several chunks add to, of hidden states that several blocks add to."""
        size = self.size
        heads = sum(dim for dim, head in size.accumulators if head) if self.rows < size.tokens else 0
        hidden = sum(dim for dim, _ in size.accumulators) if self.columns < size.vocab else 0
        return 4 * (size.vocab * heads + size.tokens * hidden)

    @property
    def other_bytes(self) -> int:
        """Head blocks, copies in the products' dtype, what the backend's threads keep of a row, and rows' statistics."""
        size, rows = self.size, self.rows
        threads = torch.get_num_threads() * size.backend.row_copies * self.columns * 4
        computed = product_dtype(size.dtype, size.device), product_dtype(size.teacher_dtype, size.device)
        widened = 0
        if (size.dtype, size.teacher_dtype) != computed:
            # hidden states of both models, and a learner's gradient before it is rounded
            copies = [dim * dtype.itemsize for dim, dtype in zip((size.student_dim, size.teacher_dim), computed, strict=True)]
            widened = rows * (sum(copies) + max(copies[: size.learners]))
        statistics = 0
        if not self.whole_rows:
            copies_of = STATISTICS_COPIES + size.learners - 1
            statistics = rows * (copies_of * len(STATS_COLUMNS) + 2 * size.learners * len(SUMS_COLUMNS)) * 8
        elif size.offsets:
            statistics = rows * math.ceil(size.vocab / OFFSETS_COLUMNS) * 2 * 2 * 4
        return 4 * self.buffer + threads + widened + statistics

    @property
    def scratch_bytes(self) -> int:
        """All of the step's own memory, at its peak."""
        return self.logits_bytes + self.accumulator_bytes + self.other_bytes


def _tiles(size: Size, whole_rows: bool) -> dict[str, torch.dtype]:
    models = ((size.dtype, "x", "dx"),) if size.alone else ((size.dtype, "x", "dx"), (size.teacher_dtype, "z", "dz"))
    if whole_rows and size.offsets:  # a gradient takes as many bits
        return {"x": torch.float16, "z": torch.float16, **({"dx": size.dtype} if size.learners == 2 else {})}
    tiles = {name: logits_dtype(dtype, size.device) for dtype, name, _ in models}
    learned = {name: product_dtype(dtype, size.device) for dtype, _, name in models[: size.learners]}
    # A gradient in the products' dtype lies over the logits where those have that dtype, beside them otherwise. The student's lies
    # beside them too where the teacher learns after it, from the same logits.
    if whole_rows or size.known:
        beside = size.learners == 2
        return tiles | {name: dtype for name, dtype in learned.items() if dtype != tiles[name[1:]] or (beside and name == "dx")}
    if size.fused:  # one gradient at a time, and no logits
        return {"dx": max(learned.values(), key=lambda dtype: dtype.itemsize)}
    return tiles | ({"again": tiles["x"]} if size.learners == 2 else {})


def by_tokens(size: Size) -> Cut:
    """Chunks of tokens at full width: the fewest products. Where ranks share the vocabulary, each has as many chunks as the
    others, by the most columns that one of them holds."""
    whole_rows = not size.shared and not size.known
    rows = chunk_rows(size.tokens, max(size.vocab, size.widest), _entry_bytes(size, whole_rows), size.budget, size.device)
    return Cut(size, rows, max(1, size.vocab), whole_rows)


def by_columns(size: Size) -> Cut:
    """Blocks of the vocabulary for all tokens: the least memory."""
    per_logit = _entry_bytes(size, False)
    return Cut(size, size.tokens, block_columns(size.tokens, size.vocab, per_logit, size.budget, size.device), False)


def _entry_bytes(size: Size, whole_rows: bool) -> int:
    """Scratch bytes per token and column."""
    if size.known or (whole_rows and size.offsets):
        return sum(dtype.itemsize for dtype in _tiles(size, whole_rows).values())
    return (logit_bytes if whole_rows else column_bytes)(size.dtype, size.teacher_dtype, size.device, size.learners)


# A strategy is a way to make a Cut.
CUTS: dict[str, Callable[[Size], Cut]] = {"tokens": by_tokens, "vocab": by_columns}
