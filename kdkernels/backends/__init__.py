"""Which implementation of the low-level operators runs where.

``native`` (C++) serves float32, bfloat16 and float16 on CPUs where the extension was built, ``triton`` the same on GPUs where
Triton is installed; ``reference`` (plain torch) the rest.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdkernels.backends import native, reference

NAMES = ("native", "triton", "reference")
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FAST_DTYPES, torch.float64)
logger = logging.getLogger(__name__)
_forced: str | None = None


def _fast(device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend that is made for logits of these dtypes on this device, whether it can run here or not."""
    fast = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
    return fast if all(dtype in FAST_DTYPES for dtype in dtypes) else "reference"


def select(device: torch.device, *dtypes: torch.dtype) -> str:
    """Name of the backend for logits of these dtypes on this device."""
    if _forced is not None:
        return _forced
    fast = _fast(device, *dtypes)
    return fast if fast in usable() else "reference"


@functools.cache
def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


def usable() -> tuple[str, ...]:
    """The backends that can run here, whatever the device; Triton also without a GPU if its interpreter is on."""
    gpu = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    here = {"native": native.available(), "triton": gpu and _triton_installed(), "reference": True}
    return tuple(name for name in NAMES if here[name])


def operators(name: str) -> Any:
    """The namespace that holds a backend's row_loss and, but for Triton's, block_stats, block_reduce and block_grad."""
    if name == "triton":
        from kdkernels.backends import triton

        return triton
    return reference if name == "reference" else torch.ops.kdkernels


def operators_of_loss(name: str, device: torch.device, *dtypes: torch.dtype) -> Any:
    """``operators`` for logits of these dtypes on this device; where plain torch stands in for a faster backend, says so once."""
    if name == "reference" and _forced is None and (fast := _fast(device, *dtypes)) not in usable():
        _say_what_is_missing(fast)
    return operators(name)


@functools.cache
def _say_what_is_missing(fast: str) -> None:
    why, get_it = {"native": (native.missing, native.GET_IT), "triton": ("Triton is not installed", "pip install triton")}[fast]
    logger.warning(
        "kdkernels: %s, so plain PyTorch does its work: the results are as exact, the loss takes several times as long and more "
        "memory. To get it, %s",
        why,
        get_it,
    )


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything inside on one backend, for tests and comparisons; process-wide."""
    global _forced
    if name not in usable():
        raise ValueError(f"backend {name!r} is not usable here; accepted: {', '.join(usable())}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def check_dtype(name: str, value: Any) -> None:
    """TypeError for what the losses do not take."""
    if value not in DTYPES:
        got = value if isinstance(value, torch.dtype) else type(value).__name__
        raise TypeError(f"{name} is {got}; accepted: {', '.join(map(str, DTYPES))}")


def backend(device: torch.device | str | int = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs for logits of ``dtype`` on ``device``: "native", "triton" or "reference".

    "reference" means that the dtype is float64, or on a CPU that the C++ extension was not built, on a GPU that Triton is missing.
    Raises ValueError for a name that is no device's, TypeError for another dtype and for arguments of another type.
    """
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"device is a name, a GPU's number or a torch.device, got {type(device).__name__}")
    check_dtype("dtype", dtype)
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; accepted: names of torch devices, such as 'cpu' and 'cuda'") from None
    return select(where, dtype)
