"""The product in CUDA C++ that stores 16-bit offsets, compiled by NVRTC without a GPU: part of ``make static`` (static.py)."""

from __future__ import annotations

import re

from benchmarks.cases import DTYPES
from benchmarks.compiled import PRODUCT, TARGETS, Compiled
from benchmarks.machine_code import disassembled
from kdkernels.backends.cuda import compile, product

BLOCKS = f"{product.BLOCK_N}x{product.BLOCK_V}x{product.BLOCK_D}"


def kernels(architecture: str, dtype: str) -> list[Compiled]:
    """Of the one architecture that it is made for, and operands of 16 bits."""
    if TARGETS[architecture].number != 90 or DTYPES[dtype] not in product.TYPES:
        return []
    image, log = compile.compiled(product.source(DTYPES[dtype]), (*product.OPTIONS, "--ptxas-options=-v"), product.ARCHITECTURE)
    registers = re.search(r"Used (\d+) reg", log)
    assert registers is not None, log
    return [
        Compiled(
            architecture,
            dtype,
            PRODUCT,
            "plain heads",
            BLOCKS,
            int(registers[1]),
            sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            product.SHARED + sum(map(int, re.findall(r"(\d+) bytes smem", log))),
            disassembled(image).count("HGMMA"),
            product.THREADS // 32,
        )
    ]
