"""The backend for NVIDIA and AMD GPUs, in Triton.

- device.py: what is done to a tile of logits [rows, columns] in registers; every kernel is made of it.
- rows.py: the row operation over logits in memory (strategy ``tokens``).
- vocabulary.py: kernels that multiply hidden states and heads themselves and keep no logits (strategy ``vocab``).
- arch.py: what a device is; blocks.py: block sizes for each architecture; autotune.py: the search around the table.
- launch.py: how a kernel is started.

Triton and these files are not imported before a GPU tensor arrives, or a test asks for them under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.base import Backend, Step, Sweeps
from kdkernels.backends.dtypes import FAST_DTYPES


@functools.cache
def installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


def _usable() -> bool:
    """Also without a GPU if Triton's interpreter is on."""
    return (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1") and installed()


def _operators() -> Any:
    from kdkernels.backends.triton import rows

    return rows


def _sweeps(steps: Sequence[Step], hidden: tuple[Tensor, Tensor], tile: Tensor, buffer: Tensor) -> Sweeps:
    from kdkernels.backends.triton.vocabulary import FusedSweeps

    return FusedSweeps(steps, hidden, tile, buffer)


BACKEND = Backend(
    name="triton",
    operators=_operators,
    device="cuda",
    dtypes=FAST_DTYPES,
    usable=_usable,
    missing="Triton is not installed",
    get_it="pip install triton",
    sweeps=_sweeps,
)
