"""What devices can do: the datasheets' GPUs by name, and processors as they are measured here or taken to be."""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kdkernels.backends.dtypes import product_dtype
from kdkernels.backends.products import HeadProducts, add_head_grad, block_size
from kdkernels.errors import nearest

# Kernels that follow each other in a stream: the gap between two, not the time the host takes to launch one.
LAUNCH_SECONDS = 3e-6
# A row operation that sweeps its row again reads it from the cache if the rows being worked on fit there: two blocks on each
# multiprocessor, three streams (two operands and the result).
BLOCKS_PER_UNIT, ROW_STREAMS = 2, 3

# Of kernels that multiply themselves, of the library's rate: estimated from the instructions of kernels compiled with 64x64 tiles,
# which have barriers in each step; and fitted to an H100 with its own blocks, 540 to 600 Tflop/s where
# the library reached 720 (benchmarks/results/gpu-h100.jsonl), for losses without bias, softcap and metrics whose formula is short.
FUSED_EFFICIENCY, HOPPER_FUSED_EFFICIENCY = 0.32, 0.7


@dataclass(frozen=True)
class Device:
    """What a device can do, from its datasheet.

    name: as ``DEVICES`` and the command line spell it. bandwidth: of the main memory, bytes/s. rates: dense products without
    sparsity, flop/s by dtype; float32 without TF32, which PyTorch leaves off. overhead: seconds between two kernels. memory: bytes.
    cache, units: last-level cache in bytes and multiprocessors. issue: instructions/s, one for each lane of all units.
    measured: the rates were reached here, nothing is taken off them; nor are tiles and instructions counted.
    operand_bandwidth: bytes/s by dtype at which products get through their operands and results, where that comes before
        multiplying; where there is none they arrive meanwhile, at ``bandwidth``.
    fused_efficiency: what the vocab strategy's kernels, which multiply themselves, reach of what library products do.
    architecture: of a GPU, as kernels are chosen by it: "sm_90" for compute capability 9.0, "gfx942".
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
    fused_efficiency: float = FUSED_EFFICIENCY
    architecture: str = ""

    @property
    def cached_row(self) -> int:
        """Bytes of the longest row that a second sweep finds in the cache."""
        return self.cache // (self.units * BLOCKS_PER_UNIT * ROW_STREAMS)

    def rate(self, dtype: torch.dtype) -> float:
        """Flop/s of products in ``dtype``; ValueError for a dtype whose rate is not known."""
        if dtype not in self.rates:
            raise ValueError(f"dtype is {dtype}; accepted on {self.name}: {', '.join(map(str, self.rates))}")
        return self.rates[dtype]


def _gpu(
    name: str,
    architecture: str,
    bandwidth: float,
    float32: float,
    half: float,
    memory: float,
    cache: float,
    units: int,
    clock: float,
    lanes: int = 128,
    fused_efficiency: float = FUSED_EFFICIENCY,
) -> Device:
    """bandwidth in TB/s, rates in Tflop/s (bfloat16 and float16 alike, sums in float32), memory in GB, cache in MB, clock in GHz.

    lanes: that a unit issues an instruction for in each cycle: four schedulers of 32 on NVIDIA's.
    """
    rates = {torch.float32: float32 * 1e12, torch.bfloat16: half * 1e12, torch.float16: half * 1e12}
    return Device(
        name,
        bandwidth * 1e12,
        rates,
        LAUNCH_SECONDS,
        memory=int(memory * 1e9),
        cache=int(cache * 1e6),
        units=units,
        issue=units * lanes * clock * 1e9,
        fused_efficiency=fused_efficiency,
        architecture=architecture,
    )


# float32 is the plain rate: TF32 would be half of the bfloat16 rate on NVIDIA's data centre GPUs, and is off in PyTorch by default.
# The clock is the boost clock that this rate is stated for: the rate over units and float32 operations of a unit in a cycle.
_GPUS = (
    # NVIDIA A100 datasheet, 40 GB: 1,555 GB/s, the rates and multiprocessors of the one of 80 GB
    _gpu("A100-40", "sm_80", 1.555, 19.5, 312, 40, 40, 108, 1.41),
    # NVIDIA A100 datasheet, SXM 80 GB: 2,039 GB/s, 19.5 / 312 Tflop/s; whitepaper: 40 MB L2, 108 SMs, 1.41 GHz
    _gpu("A100-80", "sm_80", 2.039, 19.5, 312, 80, 40, 108, 1.41),
    # NVIDIA H100 datasheet, SXM5: 3.35 TB/s, 67 / 989.4 Tflop/s; whitepaper: 50 MB L2, 132 SMs of 128 float32 units
    _gpu("H100", "sm_90", 3.35, 67, 989.4, 80, 50, 132, 1.98, fused_efficiency=HOPPER_FUSED_EFFICIENCY),
    # NVIDIA H100 datasheet, PCIe: 2 TB/s, 51 / 756 Tflop/s; whitepaper: 50 MB L2, 114 SMs
    _gpu("H100-PCIe", "sm_90", 2.0, 51, 756, 80, 50, 114, 1.755, fused_efficiency=HOPPER_FUSED_EFFICIENCY),
    # NVIDIA H200 datasheet, SXM: 4.8 TB/s, the H100's rates
    _gpu("H200", "sm_90", 4.8, 67, 989.4, 141, 50, 132, 1.98, fused_efficiency=HOPPER_FUSED_EFFICIENCY),
    # NVIDIA DGX B200 datasheet, an eighth of it: 8 TB/s, 180 GB, 75 / 2,250 Tflop/s; Blackwell tuning guide: 126 MB L2, 148 SMs
    _gpu("B200", "sm_100", 8.0, 75, 2250, 180, 126, 148, 1.98),
    # NVIDIA L4 datasheet: 300 GB/s, 30.3 / 121 Tflop/s, 24 GB, 7,424 CUDA cores of 128 in a multiprocessor; 48 MB L2, 2.04 GHz
    _gpu("L4", "sm_89", 0.300, 30.3, 121, 24, 48, 58, 2.04),
    # NVIDIA L40S datasheet: 864 GB/s, 91.6 / 362.05 Tflop/s, 48 GB, 18,176 CUDA cores; 96 MB L2, 2.52 GHz
    _gpu("L40S", "sm_89", 0.864, 91.6, 362.05, 48, 96, 142, 2.52),
    # NVIDIA GeForce RTX 3090: 936 GB/s, 35.6 Tflop/s, 24 GB, 6 MB L2, 82 SMs, 1.695 GHz; 142 Tflop/s with sums in float16, half of
    # it in float32
    _gpu("RTX3090", "sm_86", 0.936, 35.6, 71, 24, 6, 82, 1.695),
    # NVIDIA Ada whitepaper, GeForce RTX 4090: 1,008 GB/s, 82.6 / 165.2 Tflop/s with sums in float32, 72 MB L2, 128 SMs, 2.52 GHz
    _gpu("RTX4090", "sm_89", 1.008, 82.6, 165.2, 24, 72, 128, 2.52),
    # NVIDIA GeForce RTX 5090: 1,792 GB/s, 104.8 / 209.5 Tflop/s with sums in float32, 32 GB, 96 MB L2, 170 SMs, 2.407 GHz
    _gpu("RTX5090", "sm_120", 1.792, 104.8, 209.5, 32, 96, 170, 2.407),
    # NVIDIA RTX PRO 6000 Blackwell, Workstation Edition: 1,792 GB/s, 126 / 503.8 Tflop/s, 96 GB, 128 MB L2, 188 SMs, 2.617 GHz
    _gpu("RTXPRO6000", "sm_120", 1.792, 126, 503.8, 96, 128, 188, 2.617),
    # AMD Instinct MI300X datasheet: 5.3 TB/s, 163.4 / 1,307.4 Tflop/s, 304 compute units, 256 MB Infinity Cache, 2.1 GHz; CDNA 3:
    # four units of 16 lanes
    _gpu("MI300X", "gfx942", 5.3, 163.4, 1307.4, 192, 256, 304, 2.1, lanes=64),
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
    raise ValueError(f"device is {name!r}; accepted: {', '.join(device_names())}{nearest(name, device_names())}")


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
        accepted = f"{', '.join(device_names())}, or a torch device{nearest(str(named), device_names())}"
        raise ValueError(f"device is {named!r}; accepted: {accepted}") from None
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
