"""What a device is to the kernels: its architecture, and what follows from it."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Entries of a row that a thread loads and stores together: 16 bytes of a 16-bit type, twice 16 of float32.
ENTRIES = 8


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as "sm_90" (compute capability 9.0) or "gfx942"; the interpreter stands for "sm_90"."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major * 10 + minor}"


def warp(device: torch.device) -> int:
    """Threads of a warp; AMD's data centre GPUs call it a wavefront."""
    return 64 if architecture(device).startswith("gfx9") else 32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Programs that take turns at many tiles start once on each; the interpreter runs a few, so that each has several."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def described(device: torch.device) -> bool:
    """Whether operands are loaded through tensor descriptors: compute capability 9.0 and later."""
    name = architecture(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


LOGITS = ("float32", "offsets", "offsets-cuda")


def logits_asked_for() -> str:
    """How logits of whole rows are kept; for "offsets-cuda" CUDA C++ makes the products that it can. Raises ValueError for an
    unknown KDKERNELS_LOGITS."""
    asked = os.environ.get("KDKERNELS_LOGITS") or "float32"
    if asked not in LOGITS:
        raise ValueError(f"KDKERNELS_LOGITS is {asked!r}; accepted: {', '.join(LOGITS)}, or nothing, which is float32")
    return asked


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, kernels start on that GPU: Triton takes the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
