"""Checks of tensors, before any work: an error names the argument, what came and what is accepted. Of numbers: scalars.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.dtypes import DTYPES

_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} is {'nested' if value.is_nested else value.layout}; accepted: dense tensors (torch.strided)")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, the student on {device}; both must be on one device")
    return value


def float_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    found = tensor(name, value, device)
    if found.dtype not in DTYPES:
        mask = f"; of a mask pass {name}.to(torch.float32)" if found.dtype == torch.bool else ""
        raise TypeError(f"{name} is {found.dtype}; accepted: {', '.join(map(str, DTYPES))}{mask}")
    return found


def integer_tensor(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    found = tensor(name, value, device)
    if found.dtype not in INTEGERS:
        raise TypeError(f"{name} is {found.dtype}; accepted: integers such as torch.int64")
    return found


def of_tokens(name: str, value: Tensor, leading: Tensor, leading_name: str) -> None:
    """Raises ValueError unless ``value`` has an entry for each token of ``leading``, whose last dimension is not one of tokens."""
    if value.shape != leading.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; {leading_name} {tuple(leading.shape)} needs {tuple(leading.shape[:-1])}"
        )


def constant(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but is held constant; pass {name}.detach()")


def constant_target(name: str, value: Tensor, loss: str) -> None:
    """Of a teacher that ``loss`` holds constant."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but the target of {loss} is constant: run the teacher under torch.no_grad(), or train it along "
            "with linear_okd_loss"
        )


def scalar(name: str, value: Tensor, accepted: str, device: torch.device, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """A 0-dim tensor that can be brought to the device, cut from its graph. dtypes: what is accepted, None for any float."""
    fits = value.is_floating_point() if dtypes is None else value.dtype in dtypes
    if value.dim() != 0 or not fits:
        raise ValueError(f"{name} is {accepted}, got shape {tuple(value.shape)}, {value.dtype}")
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{name} is on meta, where it has no value, the student on {device}")
    return value.detach()
