"""Which implementation of the low-level operators runs where.

``native`` (C++) serves float32, bfloat16 and float16 on CPUs where the extension was built, ``triton`` the same on GPUs where
Triton is installed; ``reference`` (plain torch) the rest.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdkernels.backends import native, reference, triton
from kdkernels.backends.base import Backend
from kdkernels.backends.dtypes import DTYPES

# The first that serves the logits and can run here does; the last serves all, everywhere.
BACKENDS = (native.BACKEND, triton.BACKEND, reference.BACKEND)
NAMES = tuple(one.name for one in BACKENDS)
logger = logging.getLogger(__name__)
_forced: Backend | None = None


def made_for(device: torch.device, *dtypes: torch.dtype) -> Backend:
    """The backend that is made for logits of these dtypes on this device, whether it can run here or not."""
    return next(one for one in BACKENDS if one.serves(device, *dtypes))


def select(device: torch.device, *dtypes: torch.dtype) -> Backend:
    """The backend that runs for logits of these dtypes on this device."""
    if _forced is not None:
        return _forced
    here = usable()
    return next(one for one in BACKENDS if one.name in here and one.serves(device, *dtypes))


def usable() -> tuple[str, ...]:
    """Names of the backends that can run here, whatever the device."""
    return tuple(one.name for one in BACKENDS if one.usable())


def operators_of_loss(chosen: Backend, device: torch.device, *dtypes: torch.dtype) -> Any:
    """The operators of the backend that was selected for logits of these dtypes on this device; where it stands in for one that is
    made for them, says so once."""
    made = made_for(device, *dtypes)
    if _forced is None and made is not chosen and made.name not in usable():
        _say_what_is_missing(made)
    return chosen.operators()


@functools.cache
def _say_what_is_missing(made: Backend) -> None:
    logger.warning(
        "kdkernels: %s, so plain PyTorch does its work: the results are as exact, the loss takes several times as long and more "
        "memory. To get it, %s",
        made.missing,
        made.get_it,
    )


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything inside on one backend, for tests and comparisons; process-wide."""
    global _forced
    if name not in usable():
        raise ValueError(f"backend {name!r} is not usable here; accepted: {', '.join(usable())}")
    before, _forced = _forced, next(one for one in BACKENDS if one.name == name)
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
    return select(where, dtype).name
