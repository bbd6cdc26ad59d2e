"""The driver that runs nothing (benchmarks/stub_driver.c) in the place of CUDA's."""

from __future__ import annotations

import ctypes
import os
import shutil
from typing import Any

import pytest
import torch

from benchmarks import stub_driver
from kdkernels.backends.cuda import compile

KIB = 1024


def _without_nvrtc() -> str:
    try:
        compile.nvrtc_version()
    except OSError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_without_nvrtc()), reason=_without_nvrtc())


def in_place(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """On a thread that has no context yet; a device of compute capability 9.0."""
    pytest.importorskip("triton.backends.nvidia", reason="the stub driver is built with the CUDA header that comes with Triton")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("the stub driver takes a compiler of C")
    library = ctypes.CDLL(str(stub_driver.built()))
    library.stub_device(90, 227 * KIB, 228 * KIB)
    library.stub_forget()
    library.cuCtxSetCurrent(None)
    for name, kind in (("stub_launches", stub_driver.StubLaunch), ("stub_tensor_maps", stub_driver.StubTensorMap)):
        getattr(library, name).restype = ctypes.POINTER(kind)
    monkeypatch.setattr(compile, "_driver", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return library


def seen(library: ctypes.CDLL, name: str) -> list[Any]:
    """What has arrived there: stub_launches, stub_tensor_maps."""
    count = ctypes.c_size_t()
    found = getattr(library, name)(ctypes.byref(count))
    return list(found[: count.value])
