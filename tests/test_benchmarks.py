"""The benchmark measures what it says, at a size that takes no time, so that it cannot rot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import linear
from benchmarks.linear import Case, Inputs, measure


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SHAPES", {"152k": (640, 16, 24), "32k": (320, 8, 16)})


@pytest.mark.parametrize("dtype", linear.DTYPES)
@pytest.mark.parametrize("kind", ["time", "eager", "memory"])
def test_each_kind_of_case_runs(kind: str, dtype: str) -> None:
    if kind != "time" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    result = measure(Case(kind, "152k", dtype, repeats=2))
    if kind == "memory":
        assert result["planned_scratch_bytes"] > 0
    else:
        assert len(result["ratios"]) == 2
        assert result["ratio"] > 0
        assert result["seconds"] > 0


def test_a_masked_step_is_held_against_the_whole_one() -> None:
    result = measure(Case("time", "152k", masked=True, repeats=2, tokens=64))
    assert result["yardstick"] == "the step with every label"
    inputs = Inputs(Case("time", "152k", masked=True, tokens=64))
    assert (inputs.half_of_labels == -100).sum() == 32


def test_the_bare_products_are_the_products_of_the_loss() -> None:
    """x, z, dH and dW of the same sizes: 3 Us + Ut operations, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    case = Case("time", "152k")
    inputs = Inputs(case)
    counts = []
    for run in (inputs.products(torch.float32), lambda: inputs.step(case)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    vocab, student_dim, teacher_dim = linear.SHAPES["152k"]
    assert counts[0] == 2 * case.tokens * vocab * (3 * student_dim + teacher_dim)
    assert counts[1] in (0, counts[0])  # 0 where the counter does not look into the operator


def test_eager_and_fused_compute_the_same_loss_gradient() -> None:
    case = Case("time", "32k", tokens=32)
    inputs = Inputs(case)
    inputs.step(case)
    assert inputs.head.grad is not None
    fused = inputs.head.grad.clone()
    inputs.eager_step()
    torch.testing.assert_close(inputs.head.grad, fused)


def test_names_of_cases_are_all_different() -> None:
    names = [linear.name(case) for case in linear.cases(3)]
    assert len(set(names)) == len(names)
