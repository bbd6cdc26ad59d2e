"""What is computed of each token, checked: the terms of the loss and the target's mixture, as the operators take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdkernels.divergences import resolve
from kdkernels.losses.checks import constant, scalar
from kdkernels.scalars import flag, share, temperature_of, weight_of


def terms_of(divergence: Any, temperature: Any, square_temperature: Any, kd_weight: Any, ce_weight: Any) -> dict[str, Any]:
    """An operator's arguments of both terms."""
    chosen, temperature = resolve(divergence), temperature_of("temperature", temperature)
    kd_weight = weight_of("kd_weight", kd_weight)
    return {
        "divergence": chosen.name,
        "a": float(chosen.a),
        "temperature": temperature,
        "kd_scale": kd_weight * square_of(temperature, square_temperature),
        "ce_scale": weight_of("ce_weight", ce_weight),
    }


def square_of(temperature: float, square_temperature: Any) -> float:
    """What a divergence at this temperature is multiplied by."""
    return temperature**2 if flag("square_temperature", square_temperature) else 1.0


def share_of_teacher(t: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``t``, the teacher's share in the target, 0-dim there."""
    either = " or a 0-dim float tensor"
    if not isinstance(t, Tensor):
        return torch.full((), share("t", t, either), dtype=dtype, device=device)
    constant("t", t)
    return scalar("t", t, f"a number in [0, 1]{either}", device).to(device=device, dtype=dtype)
