"""NVIDIA's machine code, as its disassembler prints it: the loops, and how wide memory is accessed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def disassembled(cubin: bytes) -> str:
    """By the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Sweep:
    """An innermost loop of NVIDIA's machine code: its instructions, those that wait for or pass values to other threads, the bits
    of its accesses to global memory, and its loads of 128 bits from shared memory."""

    instructions: int
    exchanges: int
    widths: tuple[int, ...]
    shared_loads: int = 0


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")
ACCESS_BITS = re.compile(r"^(?:LDG|STG)\.E(?:\.\w+)*?\.(?:U|S)?(8|16|64|128)\b")


def _widths(opcodes: Sequence[str], kinds: tuple[str, ...]) -> tuple[int, ...]:
    """The bits of the accesses to global memory."""
    accesses = [opcode for opcode in opcodes if opcode.startswith(kinds)]
    return tuple(sorted({int(bits[1]) if (bits := ACCESS_BITS.match(opcode)) else 32 for opcode in accesses}))


def stores_of(machine_code: str) -> tuple[int, ...]:
    """The bits of all stores to global memory."""
    return _widths([found[1] for line in machine_code.splitlines() if (found := INSTRUCTION.match(line))], ("STG",))


def sweeps_of(machine_code: str) -> tuple[Sweep, ...]:
    """The innermost loops, in their order, of what nvdisasm prints."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in machine_code.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and labels.get(target[1], len(opcodes)) < len(opcodes):
                loops.append((labels[target[1]], len(opcodes) + 1))
            opcodes.append(found[1])
    inner = [one for one in loops if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in loops)]
    found_sweeps = []
    for begin, end in sorted(inner):
        exchanges = sum(opcode.startswith(("BAR", "SHFL", "LDS", "STS")) for opcode in opcodes[begin:end])
        widths = _widths(opcodes[begin:end], ("LDG", "STG"))
        found_sweeps.append(Sweep(end - begin, exchanges, widths, opcodes[begin:end].count("LDS.128")))
    return tuple(found_sweeps)
