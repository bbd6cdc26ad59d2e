"""The CUDA product that stores 16-bit offsets, on a CPU: the library's own launcher starts product.cu on hopper.cpp's machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from kdkernels.backends.cuda import compile, product
from tests.support import cxx

OPTIONS = ("-std=c++20",)
ENTRY = """
extern "C" const char* start(const Map* hidden, const Map* weight, const Map* codes, const Arguments* of, unsigned grid,
                             unsigned threads, unsigned shared, unsigned seed) {
  return run(grid, threads, shared, seed, hidden->is_bfloat16, [=] { product(*hidden, *weight, *codes, *of); });
}
"""
Changes = tuple[tuple[str, str], ...]  # what stands once in product.cu, and what is there instead


@functools.cache
def _machine() -> str:
    made = str(cxx.folder() / "hopper.o")
    cxx.compile(*OPTIONS, "-O2", "-c", str(cxx.HERE / "hopper.cpp"), "-o", made)
    return made


@functools.cache
def library(changes: Changes = ()) -> ctypes.CDLL:
    _, kernel = product._sources()
    for was, becomes in changes:
        assert kernel.count(was) == 1, was
        kernel = kernel.replace(was, becomes)
    folder = cxx.folder()
    text, made = folder / "product.cpp", str(folder / "product.so")
    text.write_text("\n".join([product.macros(torch.bfloat16), '#include "hopper.h"', kernel, ENTRY]))
    cxx.compile(*OPTIONS, "-O1", "-shared", str(text), _machine(), "-o", made)
    loaded = ctypes.CDLL(made)
    loaded.start.restype = ctypes.c_char_p
    return loaded


class Kernel:
    """Stands for a compiled kernel. grids: of its launches."""

    def __init__(self, changes: Changes, seed: int) -> None:
        self.library, self.seed = library(changes), seed
        self.grids: list[int] = []

    def launch(self, grid: int, threads: int, shared: int, stream: int, arguments: Sequence[Any]) -> None:
        self.grids.append(grid)
        wrong = self.library.start(*map(ctypes.byref, arguments), grid, threads, shared, self.seed)
        assert not wrong, wrong.decode()


@contextlib.contextmanager
def on_this_machine(clusters: int = 2, seed: int = 0, changes: Changes = ()) -> Iterator[Kernel]:
    """Inside, the launcher has CPU tensors multiplied by so many clusters. seed: of the order in which things happen."""
    kernel = Kernel(changes, seed)
    with (
        mock.patch.object(product, "why_not", return_value=""),
        mock.patch.object(product, "_kernel", return_value=(kernel, clusters)),
        mock.patch.object(compile, "_driver", return_value=kernel.library),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", return_value=mock.Mock(cuda_stream=0)),
    ):
        yield kernel
