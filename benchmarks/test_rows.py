"""Micro suite of the row operation: ``pytest -o addopts= benchmarks --benchmark-only``. One call is 64 rows of 32,000 logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels.backends import native

ROWS, VOCAB = 64, 32_000
HEAD = [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("metrics", [False, True], ids=["loss", "metrics"])
@pytest.mark.parametrize("divergence", kd.divergences())
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_row_loss(benchmark: Any, instruction_set: str, divergence: str, metrics: bool) -> None:
    x, z = torch.randn(ROWS, VOCAB), torch.randn(ROWS, VOCAB)
    out, weight, t = torch.empty_like(x), torch.ones(ROWS), torch.tensor(1.0)
    a = kd.jsd().a
    with native.instruction_set(instruction_set):
        benchmark(
            torch.ops.kdkernels.row_loss,
            *(x, z, None, None, None, weight, t, divergence, a, 1.0, 1.0, 0.0, HEAD, True, metrics),
            out=out,
        )
    benchmark.extra_info["ns_per_logit"] = benchmark.stats["median"] / (ROWS * VOCAB) * 1e9
