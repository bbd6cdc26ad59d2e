"""Means over the tokens of many batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class TokenMeans:
    """Means over tokens, of batches that come one by one: sums on the device, so that nothing waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, means: Mapping[str, Tensor]) -> None:
        """means: 0-dim tensors; "tokens" says of how many tokens they are the means."""
        tokens = means["tokens"].double()
        for name, value in means.items():
            part = tokens if name == "tokens" else torch.where(tokens > 0, value.double() * tokens, 0.0)
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def drained(self) -> dict[str, Tensor]:
        """Means over all tokens of all ranks (to be called on each of them), and a new start; empty if nothing was added."""
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        stacked = torch.stack(list(sums.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(stacked)
        found = dict(zip(sums, stacked, strict=True))
        tokens = found.pop("tokens")
        return {**{name: value / tokens.clamp(min=1) for name, value in found.items()}, "tokens": tokens}


def floats(means: Mapping[str, Tensor]) -> dict[str, float]:
    """What is logged of them, in one transfer."""
    if not means:
        return {}
    values = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    del values["tokens"]
    return values
