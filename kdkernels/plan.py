"""How much memory and how many matrix products a loss step takes, before it runs. The strategies run what the plan says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdkernels import backends
from kdkernels.backends.operators import accumulate_dtype
from kdkernels.backends.reference import LIVE_COPIES
from kdkernels.products import block_size, logits_dtype, product_dtype
from kdkernels.step import Step

STRATEGIES = ("auto", "tokens", "vocab")
DEFAULT_BUDGET = {"cpu": 512 * 2**20}
OTHER_BUDGET = 2**30
# Live [tokens, V] tensors in the working dtype at the peak of the eager computation: both logits, both log-softmaxes, the
# target's probabilities and one gradient.
EAGER_COPIES = 6


@dataclass(frozen=True)
class Plan:
    """One loss step with gradients; bytes are above the inputs and the returned gradients, unless said otherwise.

    strategy: "tokens". chunk_rows: tokens per chunk, of ``chunks`` in all.
    logits_bytes: the reused scratch that holds both models' logits of a chunk; this is what the memory budget bounds.
    accumulator_bytes: float32 sum of a 16-bit head's gradient, needed when there are several chunks.
    scratch_bytes: all of the step's own memory, at its peak. peak_bytes: scratch, inputs and returned gradients together.
    flops: of the matrix products. eager_*: the same for plain PyTorch.
    """

    strategy: str
    chunk_rows: int
    chunks: int
    logits_bytes: int
    accumulator_bytes: int
    scratch_bytes: int
    peak_bytes: int
    flops: int
    eager_scratch_bytes: int
    eager_peak_bytes: int
    eager_flops: int


def default_budget(device: torch.device) -> int:
    """Bytes of logits scratch where the caller names none: 512 MiB on a CPU, 1 GiB elsewhere."""
    return DEFAULT_BUDGET.get(device.type, OTHER_BUDGET)


def logit_bytes(student: torch.dtype, teacher: torch.dtype, device: torch.device) -> int:
    """Scratch bytes per token and vocabulary entry for both models' logits, the reference backend's temporaries included."""
    both = logits_dtype(student, device).itemsize + logits_dtype(teacher, device).itemsize
    if logits_dtype(student, device) != product_dtype(student, device):
        both += product_dtype(student, device).itemsize  # the gradient lies beside the logits
    if backends.select(device, student, teacher) == "reference":
        both += LIVE_COPIES * accumulate_dtype(student).itemsize
    return both


def chunk_rows(tokens: int, vocab: int, bytes_per_logit: int, budget: int) -> int:
    """Tokens per chunk: as many as the budget holds, in chunks of one size, a multiple of 16, 8 or 4 where that still fits.

    Matrix libraries work in such tiles: 103 rows take a tenth longer each than 104.
    """
    most = max(1, budget // max(1, vocab * bytes_per_logit))
    if tokens <= most:
        return max(1, tokens)
    even = math.ceil(tokens / math.ceil(tokens / most))
    rounded = (math.ceil(even / tile) * tile for tile in (16, 8, 4))
    return next((rows for rows in rounded if rows <= most), even)


def column_bytes(student: torch.dtype, teacher: torch.dtype, device: torch.device) -> int:
    """Scratch bytes per token and column of a vocabulary block: both models' logits, or the gradient alone where the kernels
    multiply themselves."""
    if backends.select(device, student, teacher) == "triton":
        return product_dtype(student, device).itemsize
    return logit_bytes(student, teacher, device)


def block_columns(tokens: int, vocab: int, bytes_per_logit: int, budget: int) -> int:
    """Vocabulary columns per block: as many as the budget holds, in blocks of one size, a multiple of 128, 64 or 16 where that
    still fits."""
    most = max(1, budget // max(1, tokens * bytes_per_logit))
    if vocab <= most:
        return vocab
    even = math.ceil(vocab / math.ceil(vocab / most))
    rounded = (math.ceil(even / tile) * tile for tile in (128, 64, 16))
    return next((columns for columns in rounded if columns <= most), even)


def choose(strategy: str, step: Step) -> str:
    """The strategy that "auto" stands for."""
    return "tokens" if strategy == "auto" else strategy


def plan(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    memory_budget: int | None = None,
    train_head: bool = True,
    teacher_dtype: torch.dtype | None = None,
) -> Plan:
    """What one step of ``linear_kd_loss``, loss and gradients, will take.

    tokens: kept rows N. vocab: V. student_dim, teacher_dim: hidden sizes. dtype: of hidden states and heads (teacher_dtype: of the
    teacher's, if different). memory_budget: bytes for logits scratch. train_head: whether the student's head takes a gradient.
    Raises ValueError for sizes below 1 and a budget below 1 byte.
    """
    for name, size in {
        "tokens": tokens,
        "vocab": vocab,
        "student_dim": student_dim,
        "teacher_dim": teacher_dim,
    }.items():
        if size < 1:
            raise ValueError(f"{name} is at least 1, got {size}")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget is a number of bytes, at least 1, got {memory_budget}")
    device = torch.device(device)
    teacher_dtype = dtype if teacher_dtype is None else teacher_dtype
    budget = default_budget(device) if memory_budget is None else memory_budget
    per_logit = logit_bytes(dtype, teacher_dtype, device)
    rows = chunk_rows(tokens, vocab, per_logit, budget)
    chunks = math.ceil(tokens / rows)

    logits = rows * vocab * per_logit
    accumulator = vocab * student_dim * 4 if train_head and dtype.itemsize == 2 and chunks > 1 else 0
    computed = product_dtype(dtype, device), product_dtype(teacher_dtype, device)
    widened = dtype != computed[0] or teacher_dtype != computed[1]
    blocks = 4 * max(block_size(vocab, width) for width in (student_dim, teacher_dim))
    hidden = rows * (student_dim * computed[0].itemsize * 2 + teacher_dim * computed[1].itemsize) if widened else 0
    buffers = torch.get_num_threads() * 3 * vocab * 4 if backends.select(device, dtype, teacher_dtype) == "native" else 0
    scratch = logits + accumulator + blocks + hidden + buffers

    inputs = (tokens + vocab) * (student_dim * dtype.itemsize + teacher_dim * teacher_dtype.itemsize)
    gradients = (tokens + (vocab if train_head else 0)) * student_dim * dtype.itemsize
    student_product, teacher_product = 2 * tokens * vocab * student_dim, 2 * tokens * vocab * teacher_dim
    flops = (3 if train_head else 2) * student_product + teacher_product
    eager = EAGER_COPIES * tokens * vocab * max(4, dtype.itemsize)
    return Plan(
        strategy="tokens",
        chunk_rows=rows,
        chunks=chunks,
        logits_bytes=logits,
        accumulator_bytes=accumulator,
        scratch_bytes=scratch,
        peak_bytes=scratch + inputs + gradients,
        flops=flops,
        eager_scratch_bytes=eager,
        eager_peak_bytes=eager + inputs + gradients,
        eager_flops=flops,
    )
