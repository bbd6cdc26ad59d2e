"""How a step is cut: tokens of a chunk and columns of a block, from the bytes that are there for logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from kdkernels import backends
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.backends.products import logits_dtype, product_dtype
from kdkernels.backends.reference import LIVE_COPIES
from kdkernels.engine.scratch import ROW_ELEMENTS, row_stride

Strategy: TypeAlias = Literal["auto", "tokens", "vocab"]
STRATEGIES = get_args(Strategy)
# Multiples that the rows of a chunk and the columns of a block come in, the first with which they fit. On a GPU libraries cut
# results into tiles of 128 and 256: 129 rows take as long as 256. On a CPU 103 rows take a tenth longer each than 104.
CPU_ROWS, CPU_COLUMNS = (16, 8, 4), (128, 64, 16)
GPU_MULTIPLES = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Size:
    """What a plan depends on: kept tokens N, vocabulary V, hidden sizes, dtypes of both models, the divergence's forward sweeps.

    learners: 2 where the teacher learns too (OKD), by forward KL to the student; train_teacher_head: whether its head does.
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

    @property
    def accumulators(self) -> tuple[tuple[int, bool], ...]:
        """Of each learner whose gradients have 16 bits: hidden size, and whether the head takes one."""
        models = (self.student_dim, self.train_head, self.dtype), (self.teacher_dim, self.train_teacher_head, self.teacher_dtype)
        return tuple((dim, head) for dim, head, dtype in models[: self.learners] if dtype.itemsize == 2)


def backend_of(device: torch.device, *dtypes: torch.dtype) -> str:
    """What runs there. A GPU that is not in this machine is planned with what would run on it."""
    if device.type == "cuda" and not torch.cuda.is_available() and all(dtype in backends.FAST_DTYPES for dtype in dtypes):
        return "triton"
    return backends.select(device, *dtypes)


def logit_bytes(student: torch.dtype, teacher: torch.dtype, device: torch.device, learners: int = 1) -> int:
    """Scratch bytes per token and vocabulary entry of a chunk: both models' logits, the gradient of each learner where it does not
    lie over them, and the reference backend's temporaries. Of two learners the student's gradient lies beside its logits."""
    both = logits_dtype(student, device).itemsize + logits_dtype(teacher, device).itemsize
    for dtype, beside in ((student, learners == 2), (teacher, False))[:learners]:
        if beside or logits_dtype(dtype, device) != product_dtype(dtype, device):
            both += product_dtype(dtype, device).itemsize
    if backend_of(device, student, teacher) == "reference":
        both += LIVE_COPIES * accumulate_dtype(student).itemsize
    return both


def column_bytes(student: torch.dtype, teacher: torch.dtype, device: torch.device, learners: int = 1) -> int:
    """Scratch bytes per token and column of a vocabulary block: as for a chunk, or one gradient alone where the kernels multiply
    themselves. For two learners a block's student logits are copied, and gradients of another dtype lie beside the copy."""
    if backend_of(device, student, teacher) == "triton":
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


def cut_of(strategy: str, size: Size) -> tuple[int, int]:
    """Tokens of a chunk, and columns of a block."""
    if strategy == "tokens":
        per_logit = logit_bytes(size.dtype, size.teacher_dtype, size.device, size.learners)
        return chunk_rows(size.tokens, size.vocab, per_logit, size.budget, size.device), size.vocab
    per_logit = column_bytes(size.dtype, size.teacher_dtype, size.device, size.learners)
    return size.tokens, block_columns(size.tokens, size.vocab, per_logit, size.budget, size.device)
