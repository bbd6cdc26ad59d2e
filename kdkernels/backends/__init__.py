"""Which implementation of the low-level operators runs where.

``native`` (C++) serves float32, bfloat16 and float16 on CPUs where the extension was built; ``reference`` (plain torch) the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdkernels.backends import native, reference

NAMES = ("native", "reference")
_forced: str | None = None


def select(device: torch.device, *dtypes: torch.dtype) -> str:
    """Name of the backend for logits of these dtypes on this device."""
    if _forced is not None:
        return _forced
    fast = device.type == "cpu" and native.available() and all(dtype in native.DTYPES for dtype in dtypes)
    return "native" if fast else "reference"


def operators(name: str) -> Any:
    """The namespace that holds a backend's row_loss, block_stats, block_reduce and block_grad."""
    return reference if name == "reference" else torch.ops.kdkernels


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything inside on one backend, for tests and comparisons; process-wide."""
    global _forced
    if name not in NAMES or (name == "native" and not native.available()):
        usable = NAMES if native.available() else ("reference",)
        raise ValueError(f"backend {name!r} is not usable here; accepted: {', '.join(usable)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs for logits of ``dtype`` on ``device``: "native" or "reference".

    "reference" on a CPU means that the C++ extension was not built, or that the dtype is float64.
    """
    return select(torch.device(device), dtype)
