"""The CUDA product that stores 16-bit offsets, on a CPU: the library's own launcher starts product.cu on hopper.cpp's machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kdkernels.backends.cuda import compile, product

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
HERE = Path(__file__).parent
# setjmp's checked form knows of one stack only.
OPTIONS = ("-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", f"-I{HERE}")
ENTRY = """
extern "C" const char* start(const Map* hidden, const Map* weight, const Map* codes, const Arguments* of, unsigned grid,
                             unsigned threads, unsigned shared, unsigned seed) {
  return run(grid, threads, shared, seed, hidden->is_bfloat16, [=] { product(*hidden, *weight, *codes, *of); });
}
"""
Changes = tuple[tuple[str, str], ...]  # what stands once in product.cu, and what is there instead


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _compile(*arguments: str) -> None:
    assert CXX is not None
    done = subprocess.run([*shlex.split(CXX), *OPTIONS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def _machine() -> str:
    made = str(Path(_folder().name, "hopper.o"))
    _compile("-O2", "-c", str(HERE / "hopper.cpp"), "-o", made)
    return made


@functools.cache
def library(changes: Changes = ()) -> ctypes.CDLL:
    _, kernel = product._sources()
    for was, becomes in changes:
        assert kernel.count(was) == 1, was
        kernel = kernel.replace(was, becomes)
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    text, made = folder / "product.cpp", str(folder / "product.so")
    text.write_text("\n".join([product.macros(torch.bfloat16), '#include "hopper.h"', kernel, ENTRY]))
    _compile("-O1", "-shared", str(text), _machine(), "-o", made)
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
