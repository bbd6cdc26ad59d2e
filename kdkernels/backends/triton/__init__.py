"""The backend for NVIDIA and AMD GPUs, in Triton.

- device.py: what is done to a tile of logits [rows, columns] in registers; every kernel is made of it.
- rows.py: the row operation over logits in memory (strategy ``tokens``).
- offsets.py: the same over logits of 16 bits, which its own products make (opt-in).
- vocabulary.py: kernels that multiply hidden states and heads themselves and keep no logits (strategy ``vocab``).
- scaling.py: finished gradients times the upstream one.
- arch.py: what a device is; blocks.py: block sizes for each architecture; autotune.py: the search around the table.
- launch.py: how a kernel is started.

Triton and these files are not imported before a GPU tensor arrives, or a test asks for them under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends import base
from kdkernels.backends.base import Backend, OffsetRows, Step, Sweeps
from kdkernels.backends.dtypes import FAST_DTYPES

logger = logging.getLogger(__name__)
_scaled_by_torch: set[torch.device] = set()


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


def _offsets(steps: Sequence[Step], hidden: Sequence[Tensor], codes: Sequence[Tensor], labels: Tensor | None) -> OffsetRows:
    from kdkernels.backends.triton.offsets import OffsetRows

    return OffsetRows(steps, hidden, codes, labels)


def _scale_(grad: Tensor, factor: Tensor) -> None:
    """By torch where the kernel does not start: the loss of a teacher's saved top-k takes no other kernel."""
    if grad.is_contiguous() and grad.device not in _scaled_by_torch:
        try:
            from kdkernels.backends.triton.scaling import scale_

            scale_(grad, factor)
            return
        except Exception as error:  # nothing is written yet, whatever Triton or a compiler raises
            _scaled_by_torch.add(grad.device)
            logger.warning("kdkernels: Triton cannot scale gradients on %s, so PyTorch does: %r", grad.device, error)
    base.scale_(grad, factor)


def _keeps_offsets(device: torch.device, architecture: str, *dtypes: torch.dtype) -> bool:
    """On GPUs whose table has blocks for it, where it is asked for: of older ones' blocks a newer one takes none."""
    from kdkernels.backends.triton import arch, blocks

    if arch.logits_asked_for() == "float32" or any(dtype.itemsize != 2 for dtype in dtypes):
        return False
    entry = blocks.entry_of(architecture, dtypes[0]) if architecture else blocks.entry(device, dtypes[0])
    return entry.offsets is not None


BACKEND = Backend(
    name="triton",
    operators=_operators,
    device="cuda",
    dtypes=FAST_DTYPES,
    usable=_usable,
    missing="Triton is not installed",
    get_it="pip install triton",
    sweeps=_sweeps,
    offsets=_offsets,
    keeps_offsets=_keeps_offsets,
    scale_=_scale_,
)
