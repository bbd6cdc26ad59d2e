"""Block sizes of the kernels: one table for each architecture and operand size, chosen so that nothing spills (``make static``).

An architecture that is not listed takes the entry of the nearest older one of its kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kdkernels.backends.triton.arch import ENTRIES, architecture


@dataclass(frozen=True)
class Matrix:
    """Blocks of a kernel that multiplies: tokens x vocabulary tiles, ``block_d`` of the hidden size at a time; ``group`` blocks of
    tokens share the cache (vocabulary._place)."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group: int = 16

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v, "BLOCK_D": self.block_d, "GROUP": self.group}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Row:
    """The row kernel's tile: warps, and entries of the row that each of their threads takes in a step.

    maxnreg: registers of a thread, on NVIDIA. Without a number the assembler takes fewer, and spills what a dressed loss needs.
    """

    num_warps: int = 8
    entries: int = ENTRIES
    maxnreg: int = 96

    def options(self, device: torch.device) -> dict[str, int]:
        nvidia = architecture(device).startswith("sm_")
        return {"num_warps": self.num_warps, **({"maxnreg": self.maxnreg} if nvidia else {})}


@dataclass(frozen=True)
class Entry:
    """Blocks of each kernel. roomy: of the launches that hold more in registers than those blocks leave room for
    (vocabulary.LearnerSweeps.matrix); None where every launch has it. measured: of the sums with metrics, which hold most.

    offsets, dressed_offsets: of the products that store logits in 16 bits, without and with a bias or a softcap; None where they
    are not made that way (offsets.py)."""

    statistics: Matrix
    sums: Matrix
    gradient: Matrix
    row: Row = field(default_factory=Row)
    roomy: Matrix | None = None
    measured: Matrix | None = None
    offsets: Matrix | None = None
    dressed_offsets: Matrix | None = None


# Divergences whose sums and gradient leave room in the blocks that are not the roomy ones; others' formulas hold more.
LEAN = ("forward_kl", "reverse_kl", "jsd")

_WIDE = Matrix(128, 128, 64, 8, 4, group=8)
# (architecture, bytes of an operand) -> blocks. The sums kernel holds the most in registers: its tiles are smaller where those run
# out. The H100's 16-bit ones were the fastest of benchmarks/results/gpu-h100.jsonl; its roomy ones took 1.4 to 1.7 times as long,
# in groups of 16. No more than 8 warps on sm_100: with 16 Triton 3.7 takes the older mma.sync for tcgen05.mma.
TABLE: dict[tuple[str, int], Entry] = {
    ("sm_80", 2): Entry(Matrix(64, 64, 32, 8, 3), Matrix(64, 64, 32, 8, 3), Matrix(64, 128, 32, 8, 3)),
    ("sm_80", 4): Entry(
        Matrix(32, 32, 32, 8, 2), Matrix(32, 32, 32, 8, 2), Matrix(32, 64, 32, 8, 2), measured=Matrix(16, 64, 32, 8, 2)
    ),
    ("sm_90", 2): Entry(
        *(_WIDE, _WIDE, _WIDE),
        roomy=Matrix(128, 64, 64, 8, 4, group=8),
        measured=Matrix(64, 64, 64, 8, 4, group=8),
        offsets=Matrix(128, 256, 64, 8, 3, group=8),
        dressed_offsets=_WIDE,
    ),
    ("sm_90", 4): Entry(Matrix(32, 64, 16, 8, 3), Matrix(32, 64, 16, 8, 3), Matrix(64, 64, 16, 8, 3)),
    ("sm_100", 2): Entry(Matrix(64, 32, 64, 8, 3), Matrix(64, 32, 64, 8, 3), Matrix(64, 32, 64, 8, 3)),
    ("sm_100", 4): Entry(Matrix(32, 64, 16, 8, 3), Matrix(32, 64, 16, 8, 3), Matrix(64, 64, 16, 8, 3)),
    ("gfx942", 2): Entry(Matrix(64, 64, 64, 4, 2), Matrix(64, 64, 64, 4, 2), Matrix(64, 64, 64, 4, 2)),
    ("gfx942", 4): Entry(Matrix(64, 64, 32, 4, 2), Matrix(64, 64, 32, 4, 2), Matrix(64, 64, 32, 4, 2)),
}


def entry(device: torch.device, dtype: torch.dtype) -> Entry:
    """The table's blocks for products of ``dtype`` on ``device``."""
    return entry_of(architecture(device), dtype)


def entry_of(name: str, dtype: torch.dtype) -> Entry:
    kind = name.rstrip("0123456789abcdef")
    known = sorted((listed for listed, size in TABLE if size == dtype.itemsize and listed.startswith(kind)), key=_generation)
    older = [listed for listed in known if _generation(listed) <= _generation(name)]
    return TABLE[(older or known)[-1 if older else 0], dtype.itemsize]


def _generation(architecture: str) -> int:
    """sm_90 -> 90, gfx942 -> 0x942: within a kind, larger is newer."""
    kind, _, number = architecture.partition("_")
    return int(number) if number else int(kind.removeprefix("gfx"), 16)


def row_entry(device: torch.device) -> Row:
    """Rows are read as they are, whatever their dtype."""
    return entry(device, torch.float32).row
