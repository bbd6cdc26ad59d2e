"""``make static``: every GPU kernel compiled for every architecture, without a GPU, and what the compiler made of it.

    python -m benchmarks.static [--only ARCHITECTURE] [--dtype DTYPE] [--kernel KERNEL] [--all] [--compile-only]

The launches are recorded from the library's own launchers, with everything a loss can have switched on (biases, softcaps,
temperature, cross-entropy), and compiled for sm_80, sm_90, sm_100 and gfx942 with the blocks that the launchers take; where those
depend on what is switched on also without biases and softcaps, and with nothing. Per kernel and blocks the worst of its divergences
is printed (--all: each): registers of a thread, bytes spilled to memory, shared memory of a program, tensor-core
instructions, and occupancy, the share of the multiprocessor's warps that fit.

The cluster row kernel (static_cluster.py) is compiled by NVRTC for sm_90 and sm_100, of a plain loss and of one with everything,
with and without metrics, for rows that leave room for three blocks on a multiprocessor and for longer ones; the product in CUDA
C++ (static_product.py) for sm_90a.

For the row kernels a second table, of NVIDIA's machine code: instructions per logit in each sweep of a plain loss (no bias,
softcap, temperature or cross-entropy; float32 logits, or 16-bit offsets), at t = 1 and at t < 1, and the widths in bits of the
accesses to global memory in them.

Then, for the whole report, the bytes that both strategies move per token, counted in Triton's interpreter (benchmarks/traffic.py),
beside the least possible and beside Liger's.

Exit status 1 if anything spills, a kernel that multiplies 16-bit operands has no tensor-core instruction, a sweep of the row kernel
waits at a barrier, shuffles, or accesses memory by less than 128 bits, its instructions are not those that the roofline states, a
gradient is stored by less than 128 bits, float32 goes through NVIDIA's matrix units, shared memory is above the limit, or the bytes
could not be counted; 2 if TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import static_cluster, static_product
from benchmarks.cases import DTYPES
from benchmarks.compiled import CLUSTER, PRODUCT, ROW_KERNELS, TARGETS, Compiled, per_logit
from benchmarks.machine_code import Sweep, disassembled, stores_of, sweeps_of
from benchmarks.static_launches import KERNELS, PLAIN, Launch, launches

TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_|v_smfmac_)")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def _described(value: Any, path: tuple[int, ...], plain: bool, constants: dict[Any, Any], aligned: dict[Any, Any]) -> Any:
    """The type of an argument in Triton's notation; fills in the constants and what is divisible by 16. plain: not specialised."""
    if isinstance(value, tuple):
        return tuple(_described(part, (*path, at), plain, constants, aligned) for at, part in enumerate(value))
    if value is None or callable(value) or isinstance(value, (bool, str)):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        aligned[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        if value % 16 == 0 and not plain:
            aligned[path] = [["tt.divisibility", 16]]
        return "i32"
    if len(path) > 1:
        raise ValueError(f"argument {path}: a descriptor inside a tuple, where Triton's launcher does not look for them")
    shape = ", ".join(map(str, value.block_shape))
    return f"tensordesc<{POINTERS[value.base.dtype].removeprefix('*')}[{shape}]>"


OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compiled(launch: Launch, architecture: str, dtype: str) -> Compiled:
    """The launch as the compiler of that architecture sees it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    limits, kernel = TARGETS[architecture], launch.kernel
    options = {name: launch.keywords[name] for name in OPTIONS if name in launch.keywords}
    constants: dict[Any, Any] = {}
    aligned: dict[Any, Any] = {}
    signature: dict[str, Any] = {}
    for at, parameter in enumerate(kernel.params):
        if parameter.name in launch.keywords:
            signature[parameter.name], constants[(at,)] = "constexpr", launch.keywords[parameter.name]
        else:
            signature[parameter.name] = _described(launch.arguments[at], (at,), parameter.do_not_specialize, constants, aligned)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = triton.compile(
            ASTSource(kernel, signature, constants, aligned),
            target=GPUTarget(limits.backend, limits.number, limits.warp),
            options=options,
        )
    blocks = "x".join(str(launch.keywords[name]) for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D") if name in launch.keywords)
    sweeps: tuple[Sweep, ...] = ()
    stores: tuple[int, ...] = ()
    if limits.backend == "cuda":
        text, found = made.asm["ptx"], log.getvalue()
        if launch.name in ROW_KERNELS:
            sweeps = sweeps_of(disassembled(made.asm["cubin"]))
        elif launch.name in ("gradient", "scale"):
            stores = stores_of(disassembled(made.asm["cubin"]))
        registers = int(re.search(r"Used (\d+) registers", found)[1])  # type: ignore[index]
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", found)))
    else:
        text = made.asm["amdgcn"]
        # Scalar registers spill to lanes of vector registers, which costs no memory.
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
        spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
    return Compiled(
        architecture,
        dtype,
        launch.name,
        launch.label,
        blocks,
        registers,
        spilled,
        made.metadata.shared,
        len(TENSOR_CORES.findall(text)),
        made.metadata.num_warps,
        sweeps,
        stores,
    )


def _job(job: tuple[str, str, tuple[str, ...]]) -> list[Compiled]:
    from triton import knobs

    architecture, dtype, kernels = job
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # what the cache holds has no log
    found = launches(architecture, DTYPES[dtype])
    made = [compiled(launch, architecture, dtype) for launch in found if launch.name in kernels]
    in_cuda = {CLUSTER: static_cluster.kernels, PRODUCT: static_product.kernels}
    return made + [one for name, of in in_cuda.items() if name in kernels for one in of(architecture, dtype)]


HEADER = ("architecture", "dtype", "kernel", "blocks", "of", "registers", "spilled", "shared", "tensor-core", "occupancy")


def table(found: Sequence[Compiled], everything: bool) -> str:
    """One line for each kernel, blocks, architecture and dtype, the divergence with the most registers; or all of them."""
    groups: dict[tuple[str, str, str, str], list[Compiled]] = {}
    for one in found:
        groups.setdefault((one.architecture, one.dtype, one.kernel, one.blocks), []).append(one)
    lines = [HEADER]
    for group in groups.values():
        shown = group if everything else [max(group, key=lambda one: (one.spilled, one.registers, one.shared))]
        lines += [
            (
                *(
                    one.architecture,
                    one.dtype,
                    one.kernel,
                    one.blocks,
                    one.label if everything else f"{len(group)}, worst: {one.label}",
                ),
                *(str(one.registers), str(one.spilled), str(one.shared), str(one.tensor_cores), f"{one.occupancy:.0%}"),
            )
            for one in shown
        ]
    return aligned(lines, 5)


def aligned(lines: Sequence[Sequence[str]], names: int) -> str:
    """Columns under each other: the first ``names`` flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def flush(line: Sequence[str]) -> Iterator[str]:
        for at, (cell, width) in enumerate(zip(line, widths, strict=True)):
            yield cell.ljust(width) if at < names else cell.rjust(width)

    return "\n".join("  ".join(flush(line)) for line in lines)


def row_table(found: Sequence[Compiled]) -> str:
    """The plain row kernels: what their sweeps take. Those of the cluster kernel are alike in all of its cuts: the one with
    the most registers is shown."""
    lines: list[tuple[str, ...]] = [("architecture", "dx", "kernel", "divergence", "registers", "t = 1", "t < 1", "bits")]
    by_registers = sorted(found, key=lambda one: one.registers)
    shown = {(one.architecture, one.dtype, one.kernel, one.label): one for one in (*found, *by_registers)}
    for one in shown.values():
        if one.sweeps and one.label.endswith(PLAIN):
            counts = [" + ".join(f"{count:.0f}" for count in half) for half in per_logit(one)]
            bits = sorted({bits for sweep in one.sweeps for bits in sweep.widths})
            name = one.label.removesuffix(PLAIN)
            lines.append((one.architecture, one.dtype, one.kernel, name, str(one.registers), *counts, ", ".join(map(str, bits))))
    return aligned(lines, 4)


def count_traffic() -> int:
    """Prints the bytes of a loss per token, from a process of its own: kernels are either compiled in one or interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, "-m", "benchmarks.traffic", "--quick"], env=environment, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=TARGETS, help="one architecture (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the models (default: all)")
    parser.add_argument("--kernel", choices=(*KERNELS, CLUSTER, PRODUCT), help="one kernel (default: all)")
    parser.add_argument("--all", action="store_true", help="a line for every divergence, not only the worst of a kernel")
    parser.add_argument("--compile-only", action="store_true", help="count no bytes")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 is set, so nothing would be compiled; unset it", file=sys.stderr)
        return 2
    kernels = (arguments.kernel,) if arguments.kernel else (*KERNELS, CLUSTER, PRODUCT)
    jobs = [
        (architecture, dtype, kernels)
        for architecture in TARGETS
        for dtype in DTYPES
        if arguments.only in (None, architecture) and arguments.dtype in (None, dtype)
    ]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        found = [one for part in pool.imap(_job, jobs, chunksize=1) for one in part]
    print(f"Triton {importlib.metadata.version('triton')}")
    print(table(found, arguments.all))
    if any(one.sweeps for one in found):
        print(f"\nrow kernels: instructions per logit in each sweep\n{row_table(found)}")
    faults = [fault for one in found for fault in one.faults()]
    print(f"\n{len(found)} kernels compiled, {len(faults)} faults" + "".join(f"\n  {fault}" for fault in faults), flush=True)
    failed = 0
    if not arguments.compile_only and (arguments.only, arguments.dtype, arguments.kernel) == (None, None, None):
        print(flush=True)
        failed = count_traffic()
    return 1 if faults or failed else 0


if __name__ == "__main__":
    sys.exit(main())
