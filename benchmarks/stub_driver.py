"""A driver that runs nothing (stub_driver.c) as Triton's, and the library on CPU tensors as on the GPU that it stands for."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.compiled import TARGETS
from kdkernels import backends
from tests.support.cases import InsideOperators

BUILT = Path(__file__).parent.parent / "build" / "launch"


class StubLaunch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 64),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
    )


class StubTensorMap(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("rank", ctypes.c_uint32),
        ("element_size", ctypes.c_uint32),
        ("box", ctypes.c_uint32 * 5),
        ("launches", ctypes.c_uint32),
    )


class CompilerMissingError(Exception):
    """Says what is looked for."""


def built() -> Path:
    """The stub driver, compiled against the header of the installed Triton."""
    import triton
    from triton.backends.nvidia import driver

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CompilerMissingError("Triton's launcher is compiled with gcc, clang or $CC, and there is none")
    source = Path(__file__).with_name("stub_driver.c")
    library: Path = BUILT / triton.__version__ / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")  # another process may want it at the same time
        # Whoever asks for libcuda.so.1 gets what is loaded by that name.
        options = ("-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
        subprocess.run([compiler, *options, *(f"-I{path}" for path in driver.include_dirs), source, "-o", made], check=True)
        made.replace(library)
    return library


class Stub:
    """The stub driver as Triton's, for the rest of this process. CPU tensors stand for those of a device of that architecture."""

    def __init__(self, architecture: str) -> None:
        library = built()
        os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
        os.environ["TRITON_CACHE_DIR"] = str(BUILT / "cache")
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name, kind in (("stub_launches", StubLaunch), ("stub_tensor_maps", StubTensorMap)):
            getattr(self.library, name).restype = ctypes.POINTER(kind)
        limits = TARGETS[architecture]
        capability = int(limits.number)
        self.library.stub_device(capability, limits.shared, limits.shared_all)

        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
        from triton.runtime.driver import driver

        class Driver(CudaDriver):  # type: ignore[misc]
            """Triton's, which asks the driver and not torch.cuda."""

            def __init__(self) -> None:
                self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
                self.get_device_capability = lambda device=0: divmod(capability, 10)
                self.get_current_stream = lambda device: 0
                self.get_current_device = lambda: 0
                self.set_current_device = lambda device: None

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        driver.set_active(Driver())

    def _read(self, name: str) -> list[Any]:
        count = ctypes.c_size_t()
        found = getattr(self.library, name)(ctypes.byref(count))
        return [type(found[at]).from_buffer_copy(found[at]) for at in range(count.value)]

    def taken(self) -> tuple[list[StubLaunch], list[StubTensorMap]]:
        """What was asked of the driver since the last time, refusals left out."""
        found = self._read("stub_launches"), self._read("stub_tensor_maps")
        self.library.stub_forget()
        return found


class OnlyLaunches(InsideOperators):
    """Products, which CPUs may not have in these dtypes, and operators over large tensors leave memory as they find it."""

    LARGE = 2**22  # elements
    PRODUCTS = ("mm", "addmm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        product = func._schema.name.removeprefix("aten::").rstrip("_") in self.PRODUCTS
        views, written = _aliases(func)
        if func.namespace != "aten" or views or not (product or any(one.numel() > self.LARGE for one in tensors)):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if written is not None:
            return kwargs.get(written, args[0] if args else None)
        if product:
            left, right = tensors[-2:]
            dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), left.dtype)
            return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)

        def imagined(value: Any) -> Any:
            if isinstance(value, Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return torch.device("meta") if isinstance(value, torch.device) else value

        made = func(*map(imagined, args), **{name: imagined(value) for name, value in kwargs.items()})
        return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype)


@functools.cache
def _aliases(operator: Any) -> tuple[bool, str | None]:
    """Whether it returns a view, and the argument that it writes to."""
    aliases = {argument.name: argument.alias_info for argument in operator._schema.arguments if argument.alias_info is not None}
    written = next((name for name, alias in aliases.items() if alias.is_write), None)
    return bool(aliases) and written is None, written


@contextlib.contextmanager
def as_on_a_gpu(architecture: str) -> Iterator[None]:
    """The library takes CPU tensors to lie on a device of that architecture."""
    from tests.support.interpreter import GPU_CHOICES

    replaced = {
        **GPU_CHOICES,
        **{f"kdkernels.backends.triton.{module}.architecture": lambda _: architecture for module in ("arch", "blocks")},
        "kdkernels.backends.triton.arch.multiprocessors": lambda _: 132,
        "kdkernels.backends.usable": lambda: backends.NAMES,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(backends.use("triton"))
        stack.enter_context(OnlyLaunches())  # type: ignore[no-untyped-call]
        yield
