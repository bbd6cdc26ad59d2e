"""CUDA C++ compiled at run time and started: NVRTC, which comes with PyTorch's CUDA wheels, and the driver, both through ctypes.

What was compiled is kept in the folder that KDKERNELS_CACHE names (default: kdkernels in the user's cache folder). Neither library
is loaded before it is needed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CAPABILITY = (9, 0)  # the first with clusters
DRIVER = "libcuda.so.1"
# CUfunction_attribute
DYNAMIC_SHARED_LIMIT, LARGE_CLUSTERS = 8, 14
# CUresult: invalid value, image, binary for the device, PTX (and its version), source, not found, out of resources, grid too large,
# not supported, invalid cluster size
REFUSALS = frozenset({1, 200, 209, 218, 222, 300, 500, 701, 720, 801, 912})
PORTABLE_CLUSTER = 8  # blocks that every device of the kind takes


class CompileError(RuntimeError):
    """A source that NVRTC does not take; its text is NVRTC's log."""


class DriverError(RuntimeError):
    """A call that the driver refused; its text has the call and the driver's own name and words for what is wrong.

    code: its CUresult.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code

    @property
    def spares_others(self) -> bool:
        """Whether it is about this kernel or its launch alone. What is not, such as an illegal address of an
        earlier kernel, leaves a context in which nothing runs any more."""
        return self.code in REFUSALS


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL(DRIVER)


def _nvrtc_names() -> tuple[str, ...]:
    """PyTorch's own; of a PyTorch without CUDA, which compiles but starts nothing, any that is known."""
    built_for = torch.version.cuda
    return tuple(f"libnvrtc.so.{major}" for major in ([built_for.partition(".")[0]] if built_for else [13, 12]))


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """OSError where there is none."""
    names = _nvrtc_names()
    for name in names:
        with suppress(OSError):
            return ctypes.CDLL(name)  # the one that is loaded already, if any
    for name in names:
        # of the wheels: nvidia/cu13/lib, nvidia/cuda_nvrtc/lib
        for found in (file for folder in sys.path for file in sorted(Path(folder, "nvidia").glob(f"*/lib/{name}"))):
            with suppress(OSError):
                for part in found.parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(part))  # it asks for this one by its name alone
                return ctypes.CDLL(str(found))
    raise OSError(f"no NVRTC ({' or '.join(names)}), which comes with the wheel nvidia-cuda-nvrtc")


def _nvrtc_checked(function: str, *arguments: Any) -> None:
    code = getattr(_nvrtc(), function)(*arguments)
    if code:
        _nvrtc().nvrtcGetErrorString.restype = c_char_p
        raise CompileError(f"{function}: {_nvrtc().nvrtcGetErrorString(code).decode()}")


def nvrtc_version() -> str:
    """Such as "13.0"."""
    major, minor = c_int(), c_int()
    _nvrtc_checked("nvrtcVersion", byref(major), byref(minor))
    return f"{major.value}.{minor.value}"


def _nvrtc_architectures() -> tuple[int, ...]:
    """Those that it compiles for, as 90 for sm_90."""
    count = c_int()
    _nvrtc_checked("nvrtcGetNumSupportedArchs", byref(count))
    found = (c_int * count.value)()
    _nvrtc_checked("nvrtcGetSupportedArchs", found)
    return tuple(found)


def _nvrtc_bytes(what: str, program: c_void_p) -> bytes:
    """What nvrtcGet``what`` copies out."""
    size = c_size_t()
    _nvrtc_checked(f"nvrtcGet{what}Size", program, byref(size))
    copied = ctypes.create_string_buffer(size.value)
    _nvrtc_checked(f"nvrtcGet{what}", program, copied)
    return copied.raw


def compiled(source: str, options: Sequence[str], architecture: str) -> tuple[bytes, str]:
    """``cubin`` without the cache, and the compiler's log, which is empty where it has nothing to say."""
    program = c_void_p()
    _nvrtc_checked("nvrtcCreateProgram", byref(program), source.encode(), b"kdkernels.cu", 0, None, None)
    try:
        given = [option.encode() for option in (f"--gpu-architecture={architecture}", *options)]
        code = _nvrtc().nvrtcCompileProgram(program, len(given), (c_char_p * len(given))(*given))
        log = _nvrtc_bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
        if code:
            raise CompileError(log)
        return _nvrtc_bytes("CUBIN", program), log
    finally:
        _nvrtc().nvrtcDestroyProgram(byref(program))


def cubin(source: str, options: Sequence[str], architecture: str) -> bytes:
    """Machine code of a source, from the cache where it has it.

    options: NVRTC's, such as "--std=c++17", besides the architecture, such as "sm_90".
    Raises CompileError with NVRTC's log, and OSError where there is no NVRTC.
    """
    text = json.dumps([source, list(options), architecture, nvrtc_version()])
    file = _cached(f"{hashlib.sha256(text.encode()).hexdigest()}.cubin")
    kept = _read(file) if file else None
    if kept is not None:
        return kept
    made, _ = compiled(source, options, architecture)
    if file:
        _write(file, made)
    return made


def _cached(name: str) -> Path | None:
    """Where the cache has it; None for a user without a home."""
    if named := os.environ.get("KDKERNELS_CACHE"):
        return Path(named, name)
    # the specification has relative ones ignored
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "kdkernels" / name
    except RuntimeError:
        return None


def _read(file: Path) -> bytes | None:
    """What ``_write`` wrote, if all of it is there."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, kept = content[:32], content[32:]
    return kept if hashlib.sha256(kept).digest() == digest else None


def _write(file: Path, content: bytes) -> None:
    """In one move, with a digest in front: whoever reads meanwhile finds all of it or none. Where it cannot be, no error."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=file.parent)
        try:
            with open(handle, "wb") as opened:
                opened.write(hashlib.sha256(content).digest() + content)
            os.replace(temporary, file)
        except OSError:
            os.unlink(temporary)


@functools.cache
def _missing_libraries() -> str:
    if torch.version.hip or not torch.version.cuda:
        return f"PyTorch is built {'for ROCm' if torch.version.hip else 'without CUDA'}"
    try:
        _driver()
        _nvrtc()
    except OSError as error:
        return str(error)
    return ""


@functools.cache
def _missing_capability(capability: tuple[int, int]) -> str:
    if capability < CAPABILITY:
        return "compute capability {}.{}; clusters came with {}.{}".format(*capability, *CAPABILITY)
    number = 10 * capability[0] + capability[1]
    return "" if number in _nvrtc_architectures() else f"NVRTC {nvrtc_version()} does not compile for sm_{number}"


def missing(device: torch.device) -> str:
    """Why a device has no kernels of this kind; "" where it has them.

    CUDA is not initialised for the question: as long as nothing else has done so, what the device can do is not looked at.
    """
    if device.type != "cuda":
        return f"{device} is no CUDA device"
    why = _missing_libraries()
    if why or not torch.cuda.is_initialized():
        return why
    return _missing_capability(torch.cuda.get_device_capability(device))


def _checked(function: str, *arguments: Any) -> None:
    """Call the driver; DriverError for a CUresult that is not success."""
    code = getattr(_driver(), function)(*arguments)
    if code:
        name, text = c_char_p(), c_char_p()
        _driver().cuGetErrorName(code, byref(name))
        _driver().cuGetErrorString(code, byref(text))
        said = [part.value.decode() for part in (name, text) if part.value]
        raise DriverError(f"{function}: {': '.join(said) or f'CUDA error {code}'}", code)


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("count", c_uint),
    )


class Kernel:
    """One function of a compiled module, on the device that was current when it was made.

    image: what ``cubin`` made. name: the function's, extern "C". shared: the most bytes of dynamic shared memory that it will be
    started with. cluster: blocks of its clusters, as its source has them (__cluster_dims__).
    """

    def __init__(self, image: bytes, name: str, shared: int, cluster: int) -> None:
        self._image, module, function = image, c_void_p(), c_void_p()
        _need_context()
        _checked("cuModuleLoadData", byref(module), image)
        _checked("cuModuleGetFunction", byref(function), module, name.encode())
        _checked("cuFuncSetAttribute", function, DYNAMIC_SHARED_LIMIT, shared)
        if cluster > PORTABLE_CLUSTER:
            _checked("cuFuncSetAttribute", function, LARGE_CLUSTERS, 1)
        self._function = function

    def clusters(self, size: int, threads: int, shared: int) -> int:
        """How many clusters of ``size`` blocks the device runs at the same time; 0 where not even one fits.

        threads and shared: of a block; shared in bytes, of dynamic shared memory.
        """
        config, count = LaunchConfig((size, 1, 1), (threads, 1, 1), shared), c_int()
        _need_context()
        _checked("cuOccupancyMaxActiveClusters", byref(count), self._function, byref(config))
        return count.value

    def launch(self, grid: int, threads: int, shared: int, stream: int, arguments: Sequence[Any]) -> None:
        """Start ``grid`` blocks on a stream (torch's ``cuda_stream``); nothing is allocated or waited for.

        arguments: the function's, as ctypes values of their exact types: c_void_p for a pointer, a Structure by value.
        """
        addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        _need_context()
        _checked("cuLaunchKernel", self._function, grid, 1, 1, threads, 1, 1, shared, c_void_p(stream), addresses, None)


def _need_context() -> None:
    """A thread that has called nothing of CUDA yet takes the context that PyTorch has."""
    context = c_void_p()
    _checked("cuCtxGetCurrent", byref(context))
    if not context:
        _checked("cuDevicePrimaryCtxRetain", byref(context), torch.cuda.current_device())
        _checked("cuCtxSetCurrent", context)


# CUtensorMapDataType, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
MAPPED = {torch.float16: 6, torch.bfloat16: 9}
NOT_INTERLEAVED, SWIZZLED_128_BYTES, READ_BY_128_BYTES, ZEROS_OUTSIDE = 0, 3, 2, 0


class TensorMap(ctypes.Structure):
    """CUtensorMap: an argument of a kernel that copies boxes of a matrix."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


def is_mapped(matrix: Tensor) -> bool:
    """Whether there is a tensor map of a matrix: 16-bit entries side by side, in rows that lie 16 bytes or a multiple apart."""
    width, stride = matrix.shape[1], matrix.stride(0)
    starts = matrix.data_ptr() % 16 == 0 and stride * matrix.itemsize % 16 == 0
    return matrix.dtype in MAPPED and starts and matrix.stride(1) == 1 and stride >= width


def tensor_map(matrix: Tensor, rows: int, columns: int) -> TensorMap:
    """Of boxes of rows x columns, at most 64 of these, that lie in shared memory as the products of warpgroups read them."""
    alignment = 64
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + alignment)
    made = TensorMap.from_buffer(room, -ctypes.addressof(room) % alignment)
    count, width = matrix.shape
    _checked(
        "cuTensorMapEncodeTiled",
        byref(made),
        MAPPED[matrix.dtype],
        2,
        c_void_p(matrix.data_ptr()),
        (ctypes.c_uint64 * 2)(width, count),
        (ctypes.c_uint64 * 1)(matrix.stride(0) * matrix.itemsize),
        (c_uint * 2)(columns, rows),
        (c_uint * 2)(1, 1),
        NOT_INTERLEAVED,
        SWIZZLED_128_BYTES,
        READ_BY_128_BYTES,
        ZEROS_OUTSIDE,
    )
    return made
