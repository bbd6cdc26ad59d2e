"""Which products of hidden states and heads the CUDA kernel stores as 16-bit offsets (product.cu), and its launch."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.backends.cuda import compile

CAPABILITY = (9, 0)  # later ones multiply in other ways
ARCHITECTURE = "sm_90a"
OPTIONS = ("--std=c++17",)
BLOCK_N, BLOCK_V, BLOCK_D, STAGES, CLUSTER, THREADS = 128, 256, 64, 4, 2, 384
BOX_ROWS, BOX_COLUMNS, BOXES = 16, 64, 16  # of codes on their way to memory, two of each warp that stores
# Bytes of a block: what is multiplied, boxes of codes, and two barriers of each stage.
SHARED = STAGES * (BLOCK_N + BLOCK_V) * BLOCK_D * 2 + BOXES * BOX_ROWS * BOX_COLUMNS * 2 + STAGES * 16
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
logger = logging.getLogger(__name__)


class Arguments(ctypes.Structure):
    """As in product.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("largest", "sums", "t")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("tokens", "vocab", "width")),
    )


@functools.cache
def _sources() -> tuple[str, str]:
    folder = Path(__file__).parent
    return (folder / "hopper.cuh").read_text(), (folder / "product.cu").read_text()


def macros(dtype: torch.dtype) -> str:
    """dtype: of hidden states and heads."""
    sizes = {
        **{"BLOCK_N": BLOCK_N, "BLOCK_V": BLOCK_V, "BLOCK_D": BLOCK_D, "STAGES": STAGES, "THREADS": THREADS},
        **{"BOX_ROWS": BOX_ROWS, "BOX_COLUMNS": BOX_COLUMNS, "SHARED": SHARED, "TYPE": f'"{TYPES[dtype]}"'},
    }
    return "\n".join(f"#define KD_{name} {value}" for name, value in sizes.items())


def source(dtype: torch.dtype) -> str:
    """What a compiler gets for a kernel."""
    return "\n".join([macros(dtype), *_sources()])


@functools.cache
def _kernel(dtype: torch.dtype, device: torch.device) -> tuple[compile.Kernel, int]:
    """The kernel, and how many of its clusters the device runs at the same time."""
    kernel = compile.Kernel(compile.cubin(source(dtype), OPTIONS, ARCHITECTURE), "product", SHARED, CLUSTER)
    return kernel, kernel.clusters(CLUSTER, THREADS, SHARED)


# Those that could not be compiled or started.
_given_up: set[tuple[torch.dtype, torch.device]] = set()


def why_not(device: torch.device) -> str:
    """Why Triton's kernel makes the products of a device; empty where this one does (the log names those it was given up for)."""
    why = compile.missing(device)
    if why or (found := torch.cuda.get_device_capability(device)) == CAPABILITY:
        return why
    return "compute capability {}.{}; the kernel is made for {}.{}".format(*found, *CAPABILITY)


def _give_up(dtype: torch.dtype, device: torch.device, error: Exception) -> None:
    _given_up.add((dtype, device))
    logger.warning(
        "kdkernels: the CUDA kernel that multiplies %s and stores 16-bit offsets cannot run on %s, so Triton's does its work: the "
        "results are as exact, a loss takes longer. %s",
        dtype,
        device,
        error,
    )


def _takes(hidden: Tensor, weight: Tensor, factor: float, codes: Tensor, largest: Tensor) -> bool:
    return (
        hidden.dtype == weight.dtype
        and hidden.dtype in TYPES
        and all(map(compile.is_mapped, (hidden, weight, codes)))
        # to be taken out of the largest, and multiplied by in float32
        and torch.finfo(torch.float32).tiny <= factor <= torch.finfo(torch.float32).max
        and largest.shape[1] == -(-codes.shape[1] // BLOCK_V)
        and (hidden.dtype, hidden.device) not in _given_up
        and not why_not(hidden.device)
    )


def stored(
    hidden: Tensor, weight: Tensor, factor: float, codes: Tensor, largest: Tensor, sums: Tensor, t: Tensor | None = None
) -> bool:
    """Stores logits = factor hidden weightᵀ as offsets; False, and nothing done, for what the kernel does not take.

    hidden [N, D], weight [V, D], codes [N, V] float16; largest and sums, float32 [N, tiles], of each row's tiles of BLOCK_V
    columns, contiguous (backends/triton/offsets.py says what they are). t: [] float32; at another value than 1 nothing is stored.
    Raises DriverError for what is not this kernel's fault.
    """
    if not _takes(hidden, weight, factor, codes, largest):
        return False
    device, (tokens, vocab) = hidden.device, codes.shape
    arguments = Arguments(
        largest=largest.data_ptr(),
        sums=sums.data_ptr(),
        t=None if t is None else t.data_ptr(),
        factor=factor,
        tokens=tokens,
        vocab=vocab,
        width=hidden.shape[1],
    )
    with torch.cuda.device(device):
        try:
            kernel, clusters = _kernel(hidden.dtype, device)
            if clusters == 0:
                return False
            maps = [
                compile.tensor_map(matrix, rows, columns)
                for matrix, rows, columns in (
                    (hidden, BLOCK_N, BLOCK_D),
                    (weight, BLOCK_V // CLUSTER, BLOCK_D),
                    (codes, BOX_ROWS, BOX_COLUMNS),
                )
            ]
            grid = CLUSTER * min(clusters, -(-tokens // (CLUSTER * BLOCK_N)) * largest.shape[1])
            kernel.launch(grid, THREADS, SHARED, torch.cuda.current_stream().cuda_stream, (*maps, arguments))
        except (compile.CompileError, compile.DriverError, OSError) as error:
            if isinstance(error, compile.DriverError) and not error.spares_others:
                raise
            _give_up(hidden.dtype, device, error)
            return False
    return True
