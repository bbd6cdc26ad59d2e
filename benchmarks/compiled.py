"""What a compiler made of a kernel, and what a GPU would suffer from: the faults that static.py reports."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from benchmarks.machine_code import Sweep
from benchmarks.static_launches import ODD, PLAIN, VALUE
from kdkernels.planning.roofline import OFFSETS_INSTRUCTIONS, ROW_INSTRUCTIONS

ROW_KERNELS = ("row_loss", "offsets_row")
WITHOUT_PRODUCTS = (*ROW_KERNELS, "scale")
CLUSTER = "cluster_row"  # in CUDA C++, from compute capability 9.0 on; its gradient is stored as bf16
PRODUCT = "cuda_product"  # likewise, of 16-bit operands on 9.0 alone


@dataclass(frozen=True)
class Limits:
    """One multiprocessor: registers of 32 bits, threads and programs in flight, bytes of shared memory of one program and of all;
    threads of a warp."""

    backend: str
    number: int | str
    registers: int
    threads: int
    programs: int
    shared: int
    shared_all: int
    warp: int


TARGETS = {
    # CUDA C++ Programming Guide, table of technical specifications per compute capability
    "sm_80": Limits("cuda", 80, 65536, 2048, 32, 163 * 1024, 164 * 1024, 32),
    "sm_90": Limits("cuda", 90, 65536, 2048, 32, 227 * 1024, 228 * 1024, 32),
    "sm_100": Limits("cuda", 100, 65536, 2048, 32, 227 * 1024, 228 * 1024, 32),
    # AMD Instinct MI300 ISA: per compute unit four SIMDs of 512 vector registers x 64 lanes, 64 KiB of local data share
    "gfx942": Limits("hip", "gfx942", 4 * 512 * 64, 2048, 32, 64 * 1024, 64 * 1024, 64),
}
# What the roofline's instructions of the row kernel are counted for, at t < 1.
COUNTED = ("sm_90", "bf16")


@dataclass(frozen=True)
class Compiled:
    architecture: str
    dtype: str
    kernel: str
    label: str
    blocks: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: int
    warps: int
    sweeps: tuple[Sweep, ...] = ()
    stores: tuple[int, ...] = ()

    @property
    def occupancy(self) -> float:
        limits = TARGETS[self.architecture]
        threads = self.warps * limits.warp
        granule = -(-self.registers // 8) * 8
        fit = min(
            limits.registers // max(1, granule * threads),
            limits.threads // threads,
            limits.programs,
            limits.shared_all // max(1, self.shared),
        )
        return fit * threads / limits.threads

    @property
    def narrowest(self) -> int:
        """Bits of an access in a sweep: a tile's largest is one number for each of its lanes."""
        return 32 if self.kernel == "offsets_row" else 128

    def faults(self) -> list[str]:
        found = []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        on_nvidia = TARGETS[self.architecture].backend == "cuda"
        if self.kernel not in (*WITHOUT_PRODUCTS, CLUSTER):
            if on_nvidia and self.dtype == "fp32":
                if self.tensor_cores:
                    found.append("multiplies float32 by matrix units, which cut it to TF32")
            elif not self.tensor_cores:
                found.append("has no tensor-core instruction")
        if narrow := [bits for bits in self.stores if bits < 128]:
            found.append(f"stores the gradient by {', '.join(map(str, narrow))} bits")
        if self.kernel in ROW_KERNELS and on_nvidia:
            if len(self.sweeps) < (2 if self.label.endswith(VALUE) else 4):
                found.append(f"has {len(self.sweeps)} loops, fewer than it has sweeps")
            if exchanges := sum(sweep.exchanges for sweep in self.sweeps):
                found.append(f"has {exchanges} barriers, shuffles and accesses to shared memory inside its sweeps")
            of = ROW_INSTRUCTIONS if self.kernel == "row_loss" else OFFSETS_INSTRUCTIONS
            stated = [count for count in of.get(self.label.removesuffix(PLAIN), ()) if count]
            if stated and (self.architecture, self.dtype) == COUNTED and self.label.endswith(PLAIN):
                counted = [round(count) for count in per_logit(self)[1]]
                if any(abs(one - other) > 3 for one, other in itertools.zip_longest(counted, stated, fillvalue=0)):
                    found.append(f"takes {counted} instructions per logit in its sweeps; the roofline states {stated}")
            narrow = sorted({bits for sweep in self.sweeps for bits in sweep.widths if bits < self.narrowest})
            if narrow and not self.label.endswith(ODD):
                found.append(f"accesses memory by {', '.join(map(str, narrow))} bits inside its sweeps")
        if self.shared > TARGETS[self.architecture].shared:
            found.append(f"takes {self.shared} bytes of shared memory of {TARGETS[self.architecture].shared}")
        return [f"{self.architecture} {self.dtype} {self.kernel} {self.label}: {fault}" for fault in found]


def per_logit(one: Compiled) -> tuple[list[float], list[float]]:
    """Instructions per logit of each sweep, at t = 1 and at t < 1."""
    from kdkernels.backends.triton.blocks import Row

    if one.kernel == CLUSTER:  # four logits of either model are loaded together
        counts = [sweep.instructions / (2 * sweep.shared_loads) for sweep in one.sweeps if sweep.shared_loads]
    else:
        counts = [sweep.instructions / Row().entries for sweep in one.sweeps]
    if (
        one.kernel == "offsets_row"
    ):  # but with metrics t is the product's; what comes first goes over tiles, or over banned rows alone
        swept = OFFSETS_INSTRUCTIONS.get(one.label.removesuffix(PLAIN), (1, 1))
        counts = counts[-sum(count > 0 for count in swept) :]
        return counts, counts
    halves = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    return (halves[0], halves[1]) if sum(halves[0]) <= sum(halves[1]) else (halves[1], halves[0])
