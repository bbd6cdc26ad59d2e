"""How long a loss step should take on a device that is not at hand: a stated roofline, not a measurement.

A step is a sequence of passes. A pass does some matrix work, issues some instructions and moves some bytes; it takes the longest of
the three, and each of its kernels costs a launch:

    seconds = Σ max(flops / (rate · MATRIX_EFFICIENCY · efficiency · filled),
                    instructions / (issue rate · ISSUE_EFFICIENCY),
                    bytes / (bandwidth · MEMORY_EFFICIENCY)) + launches · overhead

``filled`` is what a library product loses to tiles that hang over its result and to waves that do not fill the device.

On a processor a product takes both, one after the other: a matrix library copies its operands into its own order before it
multiplies, and the same cores do both. (A chunk of ``tokens`` took a time for the heads and one for each of its rows, from 4 rows
to 256.) The bytes of a product go at their own rate there, a quarter to a half of what a copy reaches.

The passes of a strategy are plain functions of its sizes. Everything that comes out is a prediction, and is called one wherever it
is printed; ``python -m benchmarks.roofline`` holds the model against published measurements.

Notation: N tokens, V vocabulary, D_s and D_t hidden sizes, U = 2·N·V·D one head product. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch

from kdkernels import traffic
from kdkernels.divergences import resolve
from kdkernels.products import HeadProducts, add_head_grad, block_size, product_dtype

# What large products reach of the dense rate where their tiles fill the device. With what ``filled`` takes off that is 728 of 989
# Tflop/s on an H100 (the bare head products of huggingface/trl#7244, a row of benchmarks/published.csv). The clock falls under
# a full matrix load, so no library reaches the datasheet's rate.
MATRIX_EFFICIENCY = 0.744
# Tiles that matrix libraries cut results into, and what the small one reaches of the rate: it waits for its operands. Where there
# are fewer tiles than multiprocessors the inner size is split, into parts of at least SPLIT_INNER, and the parts are added up. The
# two shares are estimates.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.88))
SPLIT_INNER, SPLIT_EFFICIENCY = 512, 0.93
# Instructions that kernels issue, of those that the multiprocessors could at the datasheet's clock: 1.7 of 1.98 GHz under load, and
# three of four slots filled. An estimate, not a measurement.
ISSUE_EFFICIENCY = 0.64
# What the vocab strategy's kernels that multiply reach of what library products do: about 250 of 790 Tflop/s, estimated from the
# instructions of the compiled kernels (64x64 tiles, barriers in each step), not measured.
VOCAB_KERNEL_EFFICIENCY = 0.32
# Instructions of the row kernel for each logit: statistics, sums, gradient. Read off the machine code for sm_90 by ``make static``,
# which holds these to it: float32 logits, bfloat16 gradient, t < 1 (at t = 1 each sweep takes ten fewer), no bias, softcap, T or
# labels. A divergence that is not listed is counted at the most in each sweep that it makes.
ROW_INSTRUCTIONS: dict[str, tuple[int, int, int]] = {
    "forward_kl": (41, 0, 36),
    "reverse_kl": (41, 0, 36),
    "jsd": (28, 64, 63),
    "skew_forward_kl": (28, 65, 66),
    "skew_reverse_kl": (28, 66, 66),
    "total_variation": (28, 37, 41),
}
# Tokens that the bare products are made for at a time (benchmarks/contenders.py).
PRODUCTS_BLOCK = 4096
# What kernels that stream large tensors reach of the datasheet's bandwidth: 0.92 to 0.95 in the forward rows of Liger's table for
# H100s (benchmarks/published.csv); the rest goes to refresh and to turns between reads and writes.
MEMORY_EFFICIENCY = 0.92
# Kernels that follow each other in a stream: the gap between two, not the time the host takes to launch one.
LAUNCH_SECONDS = 3e-6
# A row operation that sweeps its row again reads it from the cache if the rows being worked on fit there: two blocks on each
# multiprocessor, three streams (two operands and the result).
BLOCKS_PER_UNIT, ROW_STREAMS = 2, 3
# Float32 numbers per token that the vocab strategy keeps between its sweeps: both maxima, both sums, value, sum of the slopes.
STATISTICS = 6


@dataclass(frozen=True)
class Device:
    """What a device can do, from its datasheet.

    name: as ``DEVICES`` and the command line spell it. bandwidth: of the main memory, bytes/s. rates: dense products without
    sparsity, flop/s by dtype; float32 without TF32, which PyTorch leaves off. overhead: seconds between two kernels. memory: bytes.
    cache, units: last-level cache in bytes and multiprocessors. issue: instructions/s, one for each lane of all units.
    measured: the rates were reached here, nothing is taken off them; nor are tiles and instructions counted.
    operand_bandwidth: bytes/s by dtype at which products get through their operands and results, where that comes before
        multiplying; where there is none they arrive meanwhile, at ``bandwidth``.
    """

    name: str
    bandwidth: float
    rates: dict[torch.dtype, float] = field(hash=False)
    overhead: float
    memory: int
    cache: int
    units: int
    issue: float = math.inf
    measured: bool = False
    operand_bandwidth: dict[torch.dtype, float] = field(default_factory=dict, hash=False)

    @property
    def cached_row(self) -> int:
        """Bytes of the longest row that a second sweep finds in the cache."""
        return self.cache // (self.units * BLOCKS_PER_UNIT * ROW_STREAMS)

    def rate(self, dtype: torch.dtype) -> float:
        """Flop/s of products in ``dtype``; ValueError for a dtype whose rate is not known."""
        if dtype not in self.rates:
            raise ValueError(f"dtype is {dtype}; accepted on {self.name}: {', '.join(map(str, self.rates))}")
        return self.rates[dtype]


@dataclass(frozen=True)
class Pass:
    """flops: of matrix products. bytes: read and written in main memory. dtype: of the products. launches: kernels.

    times: how often the pass is made; the other figures are of one of them. shape: rows, columns and inner size of a library's
    product, whose tiles count. efficiency: of the library's rate, of a kernel that multiplies itself. instructions: of all threads.
    """

    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32
    launches: int = 1
    times: int = 1
    shape: tuple[int, int, int] | None = None
    efficiency: float = 1.0
    instructions: float = 0.0


def _gpu(
    name: str,
    bandwidth: float,
    float32: float,
    half: float,
    memory: float,
    cache: float,
    units: int,
    clock: float,
    lanes: int = 128,
) -> Device:
    """bandwidth in TB/s, rates in Tflop/s (bfloat16 and float16 alike, sums in float32), memory in GB, cache in MB, clock in GHz.

    lanes: that a unit issues an instruction for in each cycle: four schedulers of 32 on NVIDIA's.
    """
    rates = {torch.float32: float32 * 1e12, torch.bfloat16: half * 1e12, torch.float16: half * 1e12}
    issue = units * lanes * clock * 1e9
    return Device(name, bandwidth * 1e12, rates, LAUNCH_SECONDS, int(memory * 1e9), int(cache * 1e6), units, issue)


# float32 is the plain rate: TF32 would be half of the bfloat16 rate on NVIDIA's data centre GPUs, and is off in PyTorch by default.
# The clock is the boost clock that this rate is stated for: the rate over units and float32 operations of a unit in a cycle.
_GPUS = (
    # NVIDIA A100 datasheet, 40 GB: 1,555 GB/s, the rates and multiprocessors of the one of 80 GB
    _gpu("A100-40", 1.555, 19.5, 312, 40, 40, 108, 1.41),
    # NVIDIA A100 datasheet, SXM 80 GB: 2,039 GB/s, 19.5 / 312 Tflop/s; whitepaper: 40 MB L2, 108 SMs, 1.41 GHz
    _gpu("A100-80", 2.039, 19.5, 312, 80, 40, 108, 1.41),
    # NVIDIA H100 datasheet, SXM5: 3.35 TB/s, 67 / 989.4 Tflop/s; whitepaper: 50 MB L2, 132 SMs of 128 float32 units
    _gpu("H100", 3.35, 67, 989.4, 80, 50, 132, 1.98),
    # NVIDIA H100 datasheet, PCIe: 2 TB/s, 51 / 756 Tflop/s; whitepaper: 50 MB L2, 114 SMs
    _gpu("H100-PCIe", 2.0, 51, 756, 80, 50, 114, 1.755),
    # NVIDIA H200 datasheet, SXM: 4.8 TB/s, the H100's rates
    _gpu("H200", 4.8, 67, 989.4, 141, 50, 132, 1.98),
    # NVIDIA DGX B200 datasheet, an eighth of it: 8 TB/s, 180 GB, 75 / 2,250 Tflop/s; Blackwell tuning guide: 126 MB L2, 148 SMs
    _gpu("B200", 8.0, 75, 2250, 180, 126, 148, 1.98),
    # NVIDIA L4 datasheet: 300 GB/s, 30.3 / 121 Tflop/s, 24 GB, 7,424 CUDA cores of 128 in a multiprocessor; 48 MB L2, 2.04 GHz
    _gpu("L4", 0.300, 30.3, 121, 24, 48, 58, 2.04),
    # NVIDIA L40S datasheet: 864 GB/s, 91.6 / 362.05 Tflop/s, 48 GB, 18,176 CUDA cores; 96 MB L2, 2.52 GHz
    _gpu("L40S", 0.864, 91.6, 362.05, 48, 96, 142, 2.52),
    # NVIDIA GeForce RTX 3090: 936 GB/s, 35.6 Tflop/s, 24 GB, 6 MB L2, 82 SMs, 1.695 GHz; 142 Tflop/s with sums in float16, half of
    # it in float32
    _gpu("RTX3090", 0.936, 35.6, 71, 24, 6, 82, 1.695),
    # NVIDIA Ada whitepaper, GeForce RTX 4090: 1,008 GB/s, 82.6 / 165.2 Tflop/s with sums in float32, 72 MB L2, 128 SMs, 2.52 GHz
    _gpu("RTX4090", 1.008, 82.6, 165.2, 24, 72, 128, 2.52),
    # NVIDIA GeForce RTX 5090: 1,792 GB/s, 104.8 / 209.5 Tflop/s with sums in float32, 32 GB, 96 MB L2, 170 SMs, 2.407 GHz
    _gpu("RTX5090", 1.792, 104.8, 209.5, 32, 96, 170, 2.407),
    # NVIDIA RTX PRO 6000 Blackwell, Workstation Edition: 1,792 GB/s, 126 / 503.8 Tflop/s, 96 GB, 128 MB L2, 188 SMs, 2.617 GHz
    _gpu("RTXPRO6000", 1.792, 126, 503.8, 96, 128, 188, 2.617),
    # AMD Instinct MI300X datasheet: 5.3 TB/s, 163.4 / 1,307.4 Tflop/s, 304 compute units, 256 MB Infinity Cache, 2.1 GHz; CDNA 3:
    # four units of 16 lanes
    _gpu("MI300X", 5.3, 163.4, 1307.4, 192, 256, 304, 2.1, lanes=64),
)
DEVICES = {gpu.name: gpu for gpu in _GPUS}


def device_names() -> tuple[str, ...]:
    """What ``device`` accepts."""
    return (*DEVICES, "cpu")


def check_name(name: str) -> str:
    """The name as ``device_names`` spells it; ValueError for an unknown one."""
    for known in device_names():
        if known.lower() == name.lower():
            return known
    raise ValueError(f"device is {name!r}; accepted: {', '.join(device_names())}")


def device(name: str) -> Device:
    """The device of that name, in any case; "cpu" is measured here, once, in about half a second. ValueError for another name."""
    known = check_name(name)
    return measured_cpu() if known == "cpu" else DEVICES[known]


# A processor of no particular make: what counts for a choice is how many operations it does while a byte arrives. The measured
# rates of one machine differ from run to run, and a choice made from them would too. Rounded from those of two cores with AVX-512
# (and bfloat16 products), which limits.json holds the choice against.
NOMINAL_CPU = Device(
    "cpu",
    bandwidth=20e9,
    rates={torch.float64: 75e9, torch.float32: 150e9, torch.bfloat16: 600e9, torch.float16: 600e9},
    overhead=1e-6,
    memory=0,
    cache=0,
    units=1,
    measured=True,
    operand_bandwidth={torch.float64: 12e9, torch.float32: 12e9, torch.bfloat16: 25e9, torch.float16: 25e9},
)


def nominal(where: torch.device) -> Device:
    """What choices for a torch device are made from: its datasheet, or a processor's nominal rates."""
    return NOMINAL_CPU if where.type == "cpu" else this_gpu(where) or DEVICES["H100"]


@functools.cache
def gpu_memory(where: torch.device) -> int:
    """Bytes of memory of a GPU of this machine; where there is none, of the one that choices are made from."""
    return torch.cuda.get_device_properties(where).total_memory if torch.cuda.is_available() else nominal(where).memory


# By what torch calls them, the first that fits: laptops and other editions, which are slower, are none of these.
_NAMES = {
    r"A100.*40GB": "A100-40",
    r"A100": "A100-80",
    r"H100 PCIe": "H100-PCIe",
    r"H100": "H100",
    r"H200": "H200",
    r"B200": "B200",
    r"L4$": "L4",
    r"L40S": "L40S",
    r"RTX 3090$": "RTX3090",
    r"RTX 4090$": "RTX4090",
    r"RTX 5090$": "RTX5090",
    r"RTX PRO 6000 Blackwell Workstation": "RTXPRO6000",
    r"MI300X": "MI300X",
}


@functools.cache
def this_gpu(where: torch.device) -> Device | None:
    """The GPU of this machine, if the table has it."""
    if where.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(where)
    return next((DEVICES[device] for known, device in _NAMES.items() if re.search(known, name)), None)


def resolve_device(named: torch.device | str) -> tuple[torch.device, Device | None]:
    """The torch device that a plan is for, and its rates, if known: for "cpu" those measured here, for "cuda" this machine's GPU.

    ValueError for what is neither a torch device nor one of ``device_names``.
    """
    if isinstance(named, str) and named.lower() in (known.lower() for known in DEVICES):
        return torch.device("cuda"), device(named)
    try:
        where = torch.device(named)
    except RuntimeError:
        raise ValueError(f"device is {named!r}; accepted: {', '.join(device_names())}, or a torch device") from None
    return where, measured_cpu() if where.type == "cpu" else this_gpu(where)


def _best_seconds(run: Callable[[], object], budget: float = 0.08) -> float:
    """Shortest of several runs within the budget; the first, which may set things up, does not count."""
    run()
    best, end = math.inf, time.perf_counter() + budget
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _few_and_many(dtype: torch.dtype) -> tuple[float, float]:
    """Rate of products and bandwidth of their operands, from a chunk of ``tokens`` with few rows and one with many.

    Both models' logits, dH, and dW added to a float32 sum. The times lie on a line, and so do flops and bytes: what many rows take
    longer is multiplying, and the rest of the few is the heads.
    """
    vocab, dim = 16_384, 512
    heads = [torch.ones(vocab, dim, dtype=dtype) for _ in range(2)]
    summed = torch.zeros(vocab, dim)
    buffer = torch.empty(block_size(vocab, dim, summed.device))
    student, teacher = (HeadProducts(head, dtype, buffer) for head in heads)

    def chunk(rows: int) -> Callable[[], None]:
        hidden, logits = torch.zeros(rows, dim, dtype=dtype), torch.empty(rows, vocab, dtype=dtype)
        hidden_grad = torch.empty_like(hidden)

        def run() -> None:
            teacher.logits(hidden, logits)
            student.logits(hidden, logits)
            student.hidden_grad(logits, hidden_grad)
            add_head_grad(logits, hidden, summed, False, buffer)

        return run

    few, many = 8, 256
    took = [_best_seconds(chunk(rows)) for rows in (few, many)]
    flops = 8.0 * vocab * dim  # of a row
    rate = flops * (many - few) / max(took[1] - took[0], 1e-9)
    read = vocab * dim * (3 * dtype.itemsize + 8)
    return rate, read / max(took[0] - few * flops / rate, 1e-9)


@functools.cache
def measured_cpu() -> Device:
    """This processor with the threads that torch uses now: products of 16-bit and float32 heads, and a copy of 32 MiB."""
    size = 32 * 2**20
    rates: dict[torch.dtype, float] = {}
    operands: dict[torch.dtype, float] = {}
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            # where 16-bit types have no fast path the products run in float32, see products.product_dtype
            runs_in = product_dtype(dtype, torch.device("cpu"))
            if runs_in not in rates:
                rates[runs_in], operands[runs_in] = _few_and_many(runs_in)
            rates[dtype], operands[dtype] = rates[runs_in], operands[runs_in]
        source = torch.ones(size // 4)
        copy = _best_seconds(functools.partial(torch.empty_like(source).copy_, source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    # sweeps over a row are counted as reads of main memory: how much cache a thread has is not asked for
    return Device("cpu", 2 * size / copy, rates, 1e-6, memory, 0, 1, measured=True, operand_bandwidth=operands)


def seconds(passes: Sequence[Pass], on: Device) -> float:
    """Predicted time of the passes one after the other."""
    return sum(step.times * ((_on_cpu if on.measured else _on_gpu)(step, on) + step.launches * on.overhead) for step in passes)


def _on_cpu(step: Pass, on: Device) -> float:
    multiplying = step.flops / on.rate(step.dtype) if step.flops else 0.0
    operands = on.operand_bandwidth.get(step.dtype) if step.flops else None
    arriving = step.bytes / (operands or on.bandwidth)
    return multiplying + arriving if operands else max(multiplying, arriving)


def _on_gpu(step: Pass, on: Device) -> float:
    multiplying = 0.0
    if step.flops:
        reached = MATRIX_EFFICIENCY * step.efficiency * (filled(step.shape, on.units) if step.shape else 1.0)
        multiplying = step.flops / (on.rate(step.dtype) * reached)
    issuing = step.instructions / (on.issue * ISSUE_EFFICIENCY)
    return max(multiplying, issuing, step.bytes / (on.bandwidth * MEMORY_EFFICIENCY))


def filled(shape: tuple[int, int, int], units: int) -> float:
    """What a product [rows, inner] x [inner, columns] keeps of the rate on so many multiprocessors, by the best of TILES.

    A tile that hangs over the edge takes as long as a whole one, and so does the last wave of tiles, however few they are.
    """
    rows, columns, inner = shape
    best = 0.0
    for height, width, reached in TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        busy = tiles / (math.ceil(tiles / units) * units)
        if tiles < units:
            parts = min(inner / SPLIT_INNER, units // tiles)
            busy = max(busy, parts * tiles / units * SPLIT_EFFICIENCY)
        best = max(best, reached * busy * rows * columns / (tiles * height * width))
    return best


def total_flops(passes: Sequence[Pass]) -> float:
    """Of all matrix products."""
    return sum(step.times * step.flops for step in passes)


def total_bytes(passes: Sequence[Pass]) -> float:
    """Read and written in main memory."""
    return sum(step.times * step.bytes for step in passes)


def _parts(total: int, size: int | None) -> list[tuple[int, int]]:
    """Sizes of the parts of ``size`` (None: one part), and how many there are of each: the last one may be smaller."""
    size = min(size or total, total)
    count, rest = divmod(total, size)
    return [(size, count), *([(rest, 1)] if rest else [])]


def _times(count: int, passes: Sequence[Pass]) -> list[Pass]:
    return [replace(step, times=count) for step in passes]


def product(rows: int, inner: int, columns: int, dtype: torch.dtype, out_bytes: float | None = None) -> Pass:
    """A library product [rows, inner] x [inner, columns]: operands read once, the result (or out_bytes) written."""
    moved = (rows * inner + inner * columns) * dtype.itemsize
    written = rows * columns * dtype.itemsize if out_bytes is None else out_bytes
    return Pass(2.0 * rows * inner * columns, moved + written, dtype, shape=(rows, columns, inner))


# How often eager PyTorch goes over a float32 [N, V] tensor in the plain formula of each divergence, given both log-softmaxes: reads
# and writes of the forward, its kernels, reads and writes of the backward down to the gradient of the student's log-softmax, its
# kernels. exp and log are 2, a - b and a * b are 3, a sum is 1; where the upstream gradient is one number it is not read.
# A divergence that is not listed is counted as the longest. tests/planning/test_roofline.py counts them again.
EAGER_TRAFFIC: dict[str, tuple[int, int, int, int]] = {
    "forward_kl": (9, 4, 4, 2),
    "reverse_kl": (9, 4, 10, 4),
    "jsd": (29, 13, 33, 13),
    "skew_forward_kl": (18, 8, 12, 5),
    "skew_reverse_kl": (18, 8, 23, 9),
    "total_variation": (10, 5, 7, 3),
}


class Learns(TypedDict):
    """Who takes a gradient beside the student's hidden states.

    online_teacher: the teacher learns too, by forward KL to the student; train_teacher_head: and so does its head.
    """

    train_head: bool
    online_teacher: bool
    train_teacher_head: bool


class Loss(Learns):
    """What the passes of every strategy depend on beside the sizes."""

    divergence: str


def check_divergence(name: str) -> str:
    """The name itself; ValueError for one that ``kd.divergences()`` does not list."""
    return resolve(name).name


def eager_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    divergence: str = "forward_kl",
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
    cached_row: int = 0,
) -> tuple[Pass, ...]:
    """Loss and gradients in plain PyTorch: logits of both models, a float32 copy of each, its log-softmax, the formula, back.

    Products: 3·Us + Ut. cached_row: float32 rows of at most so many bytes are read once by a softmax (``Device.cached_row``),
    longer ones once for each of its sweeps: maximum, sum, result; in the backward sum, result. An online teacher goes through the
    formula of forward KL and back from the same log-softmaxes, and through a cross-entropy, whose gradient is made and added.
    """
    logits, single = tokens * vocab * dtype.itemsize, tokens * vocab * 4
    resident = vocab * 4 <= cached_row
    forward, forward_launches, backward, backward_launches = EAGER_TRAFFIC.get(check_divergence(divergence), EAGER_TRAFFIC["jsd"])
    cast = [Pass(0.0, logits + single)] if dtype.itemsize < 4 else []
    softmax, softmax_back = Pass(0.0, (2 if resident else 4) * single), Pass(0.0, (3 if resident else 4) * single)
    passes = [product(tokens, student_dim, vocab, dtype), product(tokens, teacher_dim, vocab, dtype)]
    passes += [*cast, *cast, softmax, softmax]
    passes += [Pass(0.0, (forward + backward) * single, launches=forward_launches + backward_launches)]
    passes += [softmax_back, *cast, *_gradients(tokens, vocab, student_dim, dtype, train_head)]
    if online_teacher:
        forward, forward_launches, backward, backward_launches = EAGER_TRAFFIC["forward_kl"]
        passes += [Pass(0.0, (forward + backward) * single, launches=forward_launches + backward_launches)]
        passes += [Pass(0.0, 4 * single, launches=2), softmax_back, *cast]
        passes += _gradients(tokens, vocab, teacher_dim, dtype, train_teacher_head)
    return tuple(passes)


def _gradients(
    tokens: int,
    vocab: int,
    dim: int,
    dtype: torch.dtype,
    head: bool,
    out_bytes: float | None = None,
    head_bytes: float | None = None,
) -> list[Pass]:
    """Products of the logits' gradient: dH, and dW if the ``head`` is trained. out_bytes, head_bytes: as for ``product``."""
    made = [product(tokens, vocab, dim, dtype, out_bytes)]
    return [*made, product(vocab, tokens, dim, dtype, head_bytes)] if head else made


def tokens_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    chunk_rows: int | None = None,
    divergence: str = "forward_kl",
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
) -> tuple[Pass, ...]:
    """Loss and gradients of the ``tokens`` strategy in chunks of ``chunk_rows`` tokens (None: all in one), a row kernel each.

    Products: 3·Us + Ut. Each chunk reads both heads for its logits, which are kept in at least float32 as on a GPU, and the
    student's again for dH. The row kernel's bytes are those of ``traffic.row_loss``, its instructions those of
    ``row_instructions``; the products read dx back. With several chunks the head's gradient is summed in float32, inside the
    product: read and written by each of them. An online teacher is another row kernel over the same logits, and its own products:
    Ut, or 2·Ut with its head.
    """
    logit = max(4, dtype.itemsize)
    learners = _learners(student_dim, teacher_dim, divergence, train_head, online_teacher, train_teacher_head)
    summed = chunk_rows is not None and chunk_rows < tokens
    passes: list[Pass] = []
    for rows, count in _parts(tokens, chunk_rows):
        one = [product(rows, dim, vocab, dtype, logit * rows * vocab) for dim in (student_dim, teacher_dim)]
        for dim, learned, head in learners:
            moved = traffic.row_loss(rows, vocab, (logit, logit), dtype.itemsize, sweeps=traffic.sweeps(learned)).total
            one += [Pass(0.0, moved, instructions=rows * vocab * sum(row_instructions(learned)))]
            one += _gradients(rows, vocab, dim, dtype, head, head_bytes=8 * vocab * dim if summed else None)
        passes += _times(count, one)
    if summed and dtype.itemsize < 4:
        passes += [Pass(0.0, vocab * dim * (4 + dtype.itemsize)) for dim, _, head in learners if head]
    return tuple(passes)


def row_instructions(divergence: str) -> tuple[int, int, int]:
    """Of the row kernel for each logit: statistics, sums (0 where the value needs none), gradient."""
    most = tuple(max(counts) for counts in zip(*ROW_INSTRUCTIONS.values(), strict=True))
    statistics, sums, gradient = ROW_INSTRUCTIONS.get(check_divergence(divergence), most)
    return statistics, sums if traffic.sweeps(divergence) == 2 else 0, gradient


def _learners(
    student_dim: int, teacher_dim: int, divergence: str, train_head: bool, online_teacher: bool, train_teacher_head: bool
) -> tuple[tuple[int, str, bool], ...]:
    """Of each model that learns: hidden size, divergence to the other, whether its head is trained."""
    student, teacher = (student_dim, divergence, train_head), (teacher_dim, "forward_kl", train_teacher_head)
    return (student, teacher) if online_teacher else (student,)


def vocab_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    block_columns: int | None = None,
    divergence: str = "forward_kl",
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
    shared: bool = False,
) -> tuple[Pass, ...]:
    """Loss and gradients of the ``vocab`` strategy in blocks of ``block_columns`` columns (None: all in one).

    The forward takes statistics only, Us + Ut with no logits in main memory: once, or twice for a divergence whose value needs the
    log-sum-exps first. The backward recomputes both tiles of a block, writes the gradient tile, and multiplies it: dH is summed in
    float32, dW_b is written once. Products: 4·Us + 2·Ut with one sweep, 5·Us + 3·Ut with two.

    Kernels that multiply are counted at VOCAB_KERNEL_EFFICIENCY of the library's rate, and their bytes (``traffic.statistics``,
    ``sums`` and ``gradient``) as if they read every operand from main memory once in each launch: what their other tiles read again
    is taken to come from the cache, as in library products.

    shared: where library products make the tiles instead, at their rate and for both learners. Otherwise an online teacher goes
    over the vocabulary by itself, 2·Us + 2·Ut; its own gradients are Ut, or 2·Ut with its head.
    """
    of = traffic.Products(tokens, vocab, ((student_dim, dtype.itemsize), (teacher_dim, dtype.itemsize)))
    whole = traffic.Cut.whole(tokens, vocab)
    learners = _learners(student_dim, teacher_dim, divergence, train_head, online_teacher, train_teacher_head)
    products = 2.0 * tokens * (student_dim + teacher_dim)

    def multiplying(learner: int, columns: int, kernel: traffic.Traffic) -> Pass:
        flops = 0.0 if shared and learner else products * columns
        return Pass(flops, kernel.total, dtype, efficiency=1.0 if shared else VOCAB_KERNEL_EFFICIENCY)

    passes: list[Pass] = []
    for at, (_, learned, _) in enumerate(learners):
        kernels = [traffic.statistics(of, whole), traffic.sums(of, whole)][: traffic.sweeps(learned)]
        passes += [multiplying(at, vocab, kernel) for kernel in kernels]
    for columns, count in _parts(vocab, block_columns):
        kernel = traffic.gradient(of, traffic.Cut.whole(tokens, columns), 0, columns, dtype.itemsize)
        one: list[Pass] = []
        for at, (dim, _, head) in enumerate(learners):
            one += [multiplying(at, columns, kernel)]
            one += _gradients(tokens, columns, dim, dtype, head, out_bytes=8 * tokens * dim)
        passes += _times(count, one)
    if dtype.itemsize < 4:
        passes += [Pass(0.0, tokens * dim * (4 + dtype.itemsize)) for dim, _, _ in learners]
    return tuple(passes)


def products_passes(
    tokens: int,
    vocab: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    *,
    train_head: bool = True,
    online_teacher: bool = False,
    train_teacher_head: bool = False,
) -> tuple[Pass, ...]:
    """The bare products, which no loss with these gradients can do without: x, z, dH and dW of PRODUCTS_BLOCK tokens at a time.

    Logits in ``dtype``, one gradient of the head, added to in ``dtype``: benchmarks/contenders.py times these beside the losses. Of
    an online teacher dH too, and dW with its head.
    """
    learners = _learners(student_dim, teacher_dim, "forward_kl", train_head, online_teacher, train_teacher_head)
    passes: list[Pass] = []
    for rows, count in _parts(tokens, PRODUCTS_BLOCK):
        one = [product(rows, dim, vocab, dtype) for dim in (student_dim, teacher_dim)]
        for dim, _, head in learners:
            added = 2 * vocab * dim * dtype.itemsize if tokens > PRODUCTS_BLOCK else None
            one += _gradients(rows, vocab, dim, dtype, head, head_bytes=added)
        passes += _times(count, one)
    return tuple(passes)
