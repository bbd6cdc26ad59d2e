"""The benchmark measures what it says, at a size that takes no time, so that it cannot rot."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import linear, readme
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


@pytest.mark.parametrize("dtype", linear.DTYPES)
@pytest.mark.parametrize("kind", ["time", "memory"])
def test_each_kind_of_case_runs_with_a_teacher_that_learns(kind: str, dtype: str) -> None:
    if kind == "memory" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    case = Case(kind, "152k", dtype, "okd", repeats=2)
    assert dataclasses.replace(case, repeats=3) in linear.cases(3)
    result = measure(case)
    if kind == "time":
        assert result["ratio"] > 0
        assert result["yardstick"] == "products in torch.float32" or dtype == "bf16"
    else:
        one_model = measure(Case(kind, "152k", dtype))
        assert result["planned_scratch_bytes"] > one_model["planned_scratch_bytes"]


@pytest.mark.parametrize(("loss", "of_teacher"), [("forward_kl", 1), ("okd", 2)])
def test_the_bare_products_are_the_products_of_the_loss(loss: str, of_teacher: int) -> None:
    """x, z, dH and dW of the same sizes, 3 Us + Ut operations, and Ut for dH of a teacher that learns; counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    case = Case("time", "152k", loss=loss)
    inputs = Inputs(case)
    counts = []
    for run in (inputs.products(torch.float32), lambda: inputs.step(case)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    vocab, student_dim, teacher_dim = linear.SHAPES["152k"]
    assert counts[0] == 2 * case.tokens * vocab * (3 * student_dim + of_teacher * teacher_dim)
    assert counts[1] in (0, counts[0])  # 0 where the counter does not look into the operator


def test_eager_and_fused_compute_the_same_loss_gradient() -> None:
    case = Case("time", "32k", tokens=32)
    inputs = Inputs(case)
    inputs.step(case)
    assert inputs.head.grad is not None
    fused = inputs.head.grad.clone()
    inputs.eager_step()
    torch.testing.assert_close(inputs.head.grad, fused)


def test_an_online_step_makes_the_teachers_gradient_and_every_step_anew() -> None:
    case = Case("time", "32k", loss="okd", tokens=32)
    inputs = Inputs(case)
    grads = []
    for _ in range(2):
        inputs.step(case)
        made = [leaf.grad for leaf in (inputs.hidden, inputs.head, inputs.teacher_hidden)]
        grads.append([grad.clone() for grad in made if grad is not None])
    assert len(grads[0]) == 3
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert inputs.teacher_head.grad is None
    assert not Inputs(Case("time", "32k", tokens=32)).teacher_hidden.requires_grad


def test_the_readme_shows_the_losses_that_were_timed() -> None:
    machine = {"processor": "any", "threads": 1, "instruction_sets": ["plain"], "torch": "2", "date": "today"}
    timed = {linear.name(case): {"ratio": 1.0 + at / 1000} for at, case in enumerate(linear.cases(3)) if case.kind == "time"}
    with_memory = timed | {
        linear.name(case): {"scratch_bytes": 7 * linear.MIB, "planned_scratch_bytes": 8 * linear.MIB}
        for case in linear.cases(3)
        if case.kind == "memory"
    }
    shown = readme.table({"machine": machine, "cases": with_memory})
    assert "| okd |" in shown
    assert f"| {timed[linear.name(Case('time', '152k', loss='okd'))]['ratio']:.3f} |" in shown
    assert shown.count("| OKD, ") == len(linear.DTYPES)
    assert "over five products" in shown
    assert "not run" not in shown.replace("| not run |", "", 2), "but for eager, of each shape"
    without = {key: result for key, result in with_memory.items() if "okd" not in key}
    assert "okd" not in readme.table({"machine": machine, "cases": without}).lower()


def test_names_of_cases_are_all_different() -> None:
    names = [linear.name(case) for case in linear.cases(3)]
    assert len(set(names)) == len(names)
