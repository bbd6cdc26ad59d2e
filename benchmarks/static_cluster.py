"""The cluster row kernel compiled by NVRTC without a GPU: part of ``make static`` (static.py)."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import kdkernels as kd
from benchmarks.cases import DTYPES
from benchmarks.compiled import CLUSTER, TARGETS, Compiled
from benchmarks.machine_code import disassembled, sweeps_of
from benchmarks.static_launches import PLAIN
from kdkernels.backends.cuda import compile, rows
from kdkernels.divergences import resolve

# Of Llama 3, whose slices leave room for three blocks on a multiprocessor, and of Qwen 3, whose do not.
VOCABULARIES = (128256, 151936)
ROWS = 2


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, rows.Macros, rows.Shape]]]:
    """What the launcher asks the compiler for, instead of running it; CPU tensors stand for a GPU's."""
    found: list[tuple[str, rows.Macros, rows.Shape]] = []

    def kernel(divergence: str, macros: rows.Macros, shape: rows.Shape, _: torch.device) -> tuple[Any, int]:
        found.append((divergence, macros, shape))
        return mock.Mock(), 1

    with (
        mock.patch.object(rows, "_kernel", kernel),
        mock.patch.object(rows, "why_not", return_value=""),
        mock.patch.object(rows, "is_worth_it", return_value=True),
        mock.patch.object(rows, "_multiprocessors"),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream"),
    ):
        yield found


def launches(dtype: torch.dtype, of_block: int, of_multiprocessor: int) -> list[tuple[str, rows.Macros, rows.Shape]]:
    """Every divergence with nothing and with everything that a loss can have, with and without metrics, in both cuts. dtype: of
    dx. of_block, of_multiprocessor: bytes of shared memory."""
    with recorded() as found:
        for vocab in VOCABULARIES:
            x, z, dx = torch.empty(ROWS, vocab), torch.empty(ROWS, vocab), torch.empty(ROWS, vocab, dtype=dtype)
            bias, labels = torch.empty(vocab), torch.zeros(ROWS, dtype=torch.int64)
            with mock.patch.object(rows, "_shapes", return_value=rows.shapes_of(vocab, of_block, of_multiprocessor)[:1]):
                for name, metrics in itertools.product(kd.divergences(), (False, True)):
                    weights, a = (torch.ones(ROWS), torch.ones(()), name), resolve(name).a
                    rows.row_loss(x, z, None, None, None, *weights, a, 1.0, 1.0, 0.0, [1.0, 0.0, 1.0, 0.0], dx, metrics)
                    rows.row_loss(x, z, bias, bias, labels, *weights, a, 2.0, 1.0, 0.5, [0.5, 30.0, 0.5, 30.0], dx, metrics)
    return found


def compiled(divergence: str, macros: rows.Macros, shape: rows.Shape, architecture: str, dtype: str) -> Compiled:
    options = (*rows.OPTIONS, "--ptxas-options=-v")
    of = dict(macros)
    cubin, log = compile.compiled(rows.source(divergence, macros, shape), options, architecture)
    registers, static = (
        int(found[1]) if (found := re.search(form, log)) else 0 for form in (r"Used (\d+) reg", r"(\d+) bytes smem")
    )
    return Compiled(
        architecture,
        dtype,
        CLUSTER,
        divergence + (", metrics" if of["KD_METRICS"] else "") + ("" if of["KD_SCALED"] else PLAIN),
        f"{shape.cluster} x {shape.slice}",
        registers,
        sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shape.shared + static,
        0,
        shape.threads // 32,
        () if of["KD_SCALED"] else sweeps_of(disassembled(cubin)),
    )


def kernels(architecture: str, dtype: str) -> list[Compiled]:
    """Of an architecture that has clusters, the gradient stored as bf16."""
    limits = TARGETS[architecture]
    if limits.backend != "cuda" or int(limits.number) < 90 or dtype != "bf16":
        return []
    return [compiled(*launch, architecture, dtype) for launch in launches(DTYPES[dtype], limits.shared, limits.shared_all)]
