"""Which rows the cluster kernel takes, how they are cut into slices, and its launch."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.backends import functors, polynomials
from kdkernels.backends.columns import ROW_COLUMNS, WEIGH
from kdkernels.backends.cuda import compile
from kdkernels.divergences import Divergence, flat, resolve

WIDE = 8  # entries of dx that a thread stores together
OUT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What a block holds in shared memory besides its slices, at most; 1 KiB of it the system's.
REST = 5120
OPTIONS = ("--std=c++17",)
logger = logging.getLogger(__name__)
Macros = tuple[tuple[str, int | str], ...]  # names and values


class Head(ctypes.Structure):
    _fields_ = (("bias", ctypes.c_void_p), ("scale", ctypes.c_float), ("softcap", ctypes.c_float))


class Terms(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float)
        for name in (*("share", "rest", "temperature", "kd", "ce"), *("value_0", "value_1", "slope_0", "slope_1", "balance"))
    )


class Arguments(ctypes.Structure):
    """As in rows.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "z", "dx")),
        *((name, ctypes.c_int64) for name in ("x_stride", "z_stride", "dx_stride")),
        *((name, ctypes.c_void_p) for name in ("columns", "labels", "weight", "t")),
        *((name, Head) for name in ("x_head", "z_head")),
        ("terms", Terms),
        *((name, ctypes.c_int) for name in ("rows", "vocab", "slice")),
    )


@dataclass(frozen=True)
class Shape:
    """cluster: blocks that share a row. slice: columns of a block, a multiple of 64. warps: of a block, that compute.
    blocks: that a multiprocessor holds."""

    cluster: int
    slice: int
    warps: int
    blocks: int

    @property
    def threads(self) -> int:
        return self.warps * 32 + 32

    @property
    def chunk(self) -> int:
        """Columns that are copied together: what the threads store at a time."""
        return self.warps * 32 * WIDE

    @property
    def shared(self) -> int:
        """Bytes of a block's slices of both models."""
        return 2 * 4 * self.slice

    def fits(self, of_block: int, of_multiprocessor: int) -> bool:
        """of_block, of_multiprocessor: bytes of shared memory."""
        return self.shared + REST <= min(of_block, of_multiprocessor // self.blocks)


def cut(vocab: int, cluster: int, warps: int, blocks: int) -> Shape:
    return Shape(cluster, -(-vocab // (cluster * 64)) * 64, warps, blocks)


def shapes_of(vocab: int, of_block: int, of_multiprocessor: int) -> tuple[Shape, ...]:
    """The cuts of a row, the one to be tried first in front; none where 16 blocks cannot hold it. of_block, of_multiprocessor:
    bytes of shared memory.

    Three blocks on a multiprocessor wait for each other least; of a longer row there is one, with twice the warps.
    """
    fitting = (
        (shape for cluster in (1, 2, 4, 8, 16) if (shape := cut(vocab, cluster, warps, blocks)).fits(of_block, of_multiprocessor))
        for blocks, warps in ((3, 8), (1, 16))
    )
    return tuple(itertools.chain.from_iterable(itertools.islice(shapes, 1) for shapes in fitting))


@functools.cache
def shared_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a block at most, and of a multiprocessor, which keeps 1 KiB of each block's for itself."""
    whole = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return whole - 1024, whole


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shapes(vocab: int, device: torch.device) -> tuple[Shape, ...]:
    return shapes_of(vocab, *shared_memory(device))


# How much longer Triton's kernel takes with all multiprocessors at work: on an H100, 2,048 rows of 151,936 logits (docs/gpus.md).
TRITON_TAKES = 1.6


def is_worth_it(shape: Shape, clusters: int, rows: int, vocab: int, multiprocessors: int) -> bool:
    """Whether the kernel is expected to take no longer than Triton's. clusters: that the device runs at the same time; few where
    its parts' multiprocessors do not make up whole clusters.

    A multiprocessor reads so many logits a second, however many blocks it has. So a wave of rows, one for each cluster, takes the
    time of a slice for each block of a multiprocessor; a wave of Triton's kernel, one row for each multiprocessor, that of a row.
    """

    def wave(count: int) -> int:
        return shape.slice * -(-count * shape.cluster // multiprocessors)

    return clusters > 0 and (
        rows // clusters * wave(clusters) + wave(rows % clusters) <= TRITON_TAKES * vocab * -(-rows // multiprocessors)
    )


@functools.cache
def _sources() -> tuple[str, str, str]:
    math, machine, rows = (Path(__file__).with_name(name).read_text() for name in ("math.cuh", "machine.cuh", "rows.cu"))
    return math, machine, rows


def source(divergence: str, macros: Macros, shape: Shape) -> str:
    """What a compiler gets for a kernel."""
    math, machine, rows = _sources()
    pair = functors.functor(importlib.import_module("kdkernels.divergences"), divergence)
    sizes = {"CLUSTER": shape.cluster, "SLICE": shape.slice, "WARPS": shape.warps, "CHUNK": shape.chunk, "BLOCKS": shape.blocks}
    places = {"ROW_COLUMNS": len(ROW_COLUMNS), **{f"ROW_{name.upper()}": at for at, name in enumerate(ROW_COLUMNS)}}
    defined = [*macros, *polynomials.macros(), *((f"KD_{name}", value) for name, value in (sizes | places).items())]
    return "\n".join([*(f"#define {name} {value}" for name, value in defined), math, pair, machine, rows])


@functools.cache
def _kernel(divergence: str, macros: Macros, shape: Shape, device: torch.device) -> tuple[compile.Kernel, int]:
    """The kernel, and how many of its clusters the device runs at the same time: none where it has no cluster of that size."""
    text = source(divergence, macros, shape)
    major, minor = torch.cuda.get_device_capability(device)
    kernel = compile.Kernel(compile.cubin(text, OPTIONS, f"sm_{major}{minor}"), "row_loss", shape.shared, shape.cluster)
    return kernel, kernel.clusters(shape.cluster, shape.threads, shape.shared)


CHOICES = ("cluster", "triton")
Setting = tuple[str, Macros, Shape, torch.device]
# Those that could not be compiled or started.
_given_up: set[Setting] = set()


def why_not(device: torch.device) -> str:
    """Why Triton's kernel does the rows of a device; empty where this one does (the log names those that it was given up for).
    Raises ValueError for an unknown KDKERNELS_ROWS."""
    asked = os.environ.get("KDKERNELS_ROWS") or "triton"
    if asked not in CHOICES:
        raise ValueError(f"KDKERNELS_ROWS is {asked!r}; accepted: {', '.join(CHOICES)}, or nothing, which is triton")
    return "KDKERNELS_ROWS=cluster is not set" if asked == "triton" else compile.missing(device)


def _give_up(setting: Setting, error: Exception) -> None:
    _given_up.add(setting)
    divergence, _, shape, device = setting
    logger.warning(
        "kdkernels: the cluster row kernel of %s, in clusters of %d blocks with %d logits each, cannot run on %s, so another one "
        "does its work: the results are as exact, a loss takes up to a tenth longer. %s",
        divergence,
        shape.cluster,
        shape.slice,
        device,
        error,
    )


@functools.cache
def _say_slow(shape: Shape, clusters: int, device: torch.device) -> None:
    """Once."""
    logger.info(
        "kdkernels: %s runs %d clusters of %d blocks at a time, too few for the cluster row kernel with %d logits in each block",
        device,
        clusters,
        shape.cluster,
        shape.slice,
    )


def _takes(x: Tensor, z: Tensor, dx: Tensor | None, kd_scale: float) -> bool:
    return (
        kd_scale != 0.0
        and x.dtype == z.dtype == torch.float32
        and not why_not(x.device)
        and (dx is None or dx.dtype in OUT)
        and all(_has_room(side) for side in (x, z, dx) if side is not None)
    )


def _has_room(rows: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, and the memory behind each reaches to a multiple of WIDE entries."""
    count, vocab = rows.shape
    end = vocab + -vocab % WIDE
    return (
        rows.stride(1) == 1
        and rows.data_ptr() % 16 == 0
        and rows.stride(0) * rows.itemsize % 16 == 0
        and rows.stride(0) >= end
        and (rows.storage_offset() + (count - 1) * rows.stride(0) + end) * rows.itemsize <= rows.untyped_storage().nbytes()
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _terms(divergence: Divergence, weigh: str, temperature: float, kd_scale: float, ce_scale: float) -> Terms:
    share, rest, _ = divergence.shares(temperature)
    terms = Terms(share=share, rest=rest, temperature=temperature, kd=kd_scale / temperature, ce=ce_scale)
    if weigh:
        (terms.value_0, terms.value_1), (terms.slope_0, terms.slope_1) = divergence.linear()
        terms.balance = divergence.balance()
    return terms


def _macros(
    divergence: str, weigh: str, temperature: float, metrics: bool, arguments: Arguments, out: torch.dtype | None
) -> Macros:
    """What the arguments have: the rest is compiled away. out: of the gradient, None where there is none."""
    x_head, z_head = arguments.x_head, arguments.z_head
    return (
        ("KD_PAIR", divergence),
        ("KD_WEIGH", WEIGH[weigh]),
        ("KD_FLAT", int(flat(temperature))),
        ("KD_METRICS", int(metrics)),
        ("KD_CE", int(arguments.labels is not None)),
        ("KD_TEMPERED", int(temperature != 1.0)),
        ("KD_SCALED", int((x_head.scale, z_head.scale) != (1.0, 1.0))),
        ("KD_X_BIAS", int(x_head.bias is not None)),
        ("KD_Z_BIAS", int(z_head.bias is not None)),
        ("KD_X_SOFTCAP", int(x_head.softcap != 0.0)),
        ("KD_Z_SOFTCAP", int(z_head.softcap != 0.0)),
        ("KD_GRAD", int(out is not None)),
        ("KD_OUT", OUT[out or torch.float32]),
    )


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
    dx: Tensor | None,
    metrics: bool,
) -> Tensor | None:
    """As backends/operators.py says, or None for what the kernel does not take: it does float32 logits with room behind each row,
    and no loss of the cross-entropy alone. dx: where the gradient goes, which may be x; None for no gradient."""
    if not _takes(x, z, dx, kd_scale):
        return None
    rows, vocab = x.shape
    of = replace(resolve(divergence), a=a)
    # Running sums cancel in flat distributions to nothing; metrics take a sweep for sums anyway.
    weigh = "" if metrics or flat(temperature) else of.one_sweep
    columns = torch.empty((rows, len(ROW_COLUMNS)), dtype=torch.float32, device=x.device)
    # Held until the launch, as the arguments name only their addresses.
    x_bias, z_bias = (None if bias is None else bias.to(torch.float32).contiguous() for bias in (x_bias, z_bias))
    labels = None if labels is None or not (ce_scale != 0.0 or metrics) else labels.contiguous()
    weight, t = weight.to(torch.float32).contiguous(), t.to(torch.float32)
    arguments = Arguments(
        x=_address(x),
        z=_address(z),
        dx=_address(dx),
        x_stride=x.stride(0),
        z_stride=z.stride(0),
        dx_stride=0 if dx is None else dx.stride(0),
        columns=_address(columns),
        labels=_address(labels),
        weight=_address(weight),
        t=_address(t),
        x_head=Head(_address(x_bias), head[0], head[1]),
        z_head=Head(_address(z_bias), head[2], head[3]),
        terms=_terms(of, weigh, temperature, kd_scale, ce_scale),
        rows=rows,
        vocab=vocab,
    )
    macros = _macros(divergence, weigh, temperature, metrics, arguments, None if dx is None else dx.dtype)
    return columns if _started(divergence, macros, arguments, x.device) else None


def _started(divergence: str, macros: Macros, arguments: Arguments, device: torch.device) -> bool:
    """Starts the kernel with the first cut that can be started and is worth it. Raises DriverError for what is not this kernel's
    fault."""
    rows, vocab = arguments.rows, arguments.vocab
    with torch.cuda.device(device):
        for shape in _shapes(vocab, device):
            setting = divergence, macros, shape, device
            if setting in _given_up:
                continue
            try:
                kernel, clusters = _kernel(*setting)
                if not is_worth_it(shape, clusters, rows, vocab, _multiprocessors(device)):
                    _say_slow(shape, clusters, device)
                    continue
                arguments.slice = shape.slice
                grid = min(rows, clusters) * shape.cluster
                kernel.launch(grid, shape.threads, shape.shared, torch.cuda.current_stream().cuda_stream, (arguments,))
                return True
            except (compile.CompileError, compile.DriverError, OSError) as error:
                if isinstance(error, compile.DriverError) and not error.spares_others:
                    raise
                _give_up(setting, error)
    return False
