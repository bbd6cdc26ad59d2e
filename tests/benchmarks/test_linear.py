"""The benchmark measures what it says, at a size that takes no time, so that it cannot rot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import linear, readme
from benchmarks.cases import IGNORED, MIB, ONLINE, Case, problem
from benchmarks.contenders import loss_of
from benchmarks.linear import measure
from benchmarks.measure import planned, stepped
from tests.support.needs import needs_proc

pytestmark = needs_proc
FIRST, SECOND = linear.TOY


@pytest.mark.parametrize("dtype", linear.TIMED)
@pytest.mark.parametrize("contender", ["auto", "eager"])
@pytest.mark.parametrize("part", linear.FILES)
def test_each_kind_of_case_runs(part: str, contender: str, dtype: str) -> None:
    result = measure(Case(part, FIRST, 1024, dtype, contender), 2)
    if part == "memory":
        assert result["peak_bytes"] > result["returned_bytes"]
    else:
        assert len(result["ratios"]) == 2
        assert result["ratio"] > 0
        assert result["seconds"] > 0


def test_a_masked_step_is_held_against_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(case: Case) -> object:
        loss = loss_of(case)
        return lambda given: (seen.append(len(given.kept[0])), loss(given))[1]

    monkeypatch.setattr(linear, "loss_of", counted)
    case = Case("time", FIRST, 128, "fp32", masked=True)
    assert measure(case, 2)["ratio"] > 0
    assert set(seen) == {128}, "of the yardstick"
    labels = problem(case).labels
    assert labels is not None
    assert (labels == IGNORED).sum() == 64


@pytest.mark.parametrize("dtype", linear.TIMED)
@pytest.mark.parametrize("part", linear.FILES)
def test_each_kind_of_case_runs_with_a_teacher_that_learns(part: str, dtype: str) -> None:
    case = Case(part, FIRST, 1024, dtype, loss=ONLINE)
    assert case in linear.cases(linear.TOY)
    assert ("ratio" in measure(case, 2)) == (part == "time")
    one_model = replace(case, loss="forward_kl")
    scratch = [planned(of)["planned_peak_bytes"] - of.returned_bytes for of in (case, one_model)]
    assert scratch[0] > scratch[1]


def test_eager_and_fused_compute_the_same_loss_gradient() -> None:
    case = Case("time", SECOND, 32, "fp32")
    given, grads = problem(case), []
    for contender in ("auto", "eager"):
        stepped(loss_of(replace(case, contender=contender)), given)()
        assert given.head.grad is not None
        grads.append(given.head.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])


def test_the_readme_shows_the_losses_that_were_timed() -> None:
    machine = {"processor": "any", "threads": 1, "instruction_sets": ["plain"], "torch": "2", "date": "today"}
    peaks = {"peak_bytes": 9 * MIB, "planned_peak_bytes": 10 * MIB, "returned_bytes": 2 * MIB}
    rows = [case.facts | peaks | {"ratio": 1.0 + at / 1000} for at, case in enumerate(linear.cases()) if case.contender != "eager"]
    shown = readme.linear_table({"machine": machine, "rows": rows})
    (online,) = (row for row in rows if (row["part"], row["head"], row["dtype"], row["loss"]) == ("time", "152k", "fp32", ONLINE))
    assert "| okd |" in shown
    assert f"| {online['ratio']:.3f} |" in shown
    assert shown.count("| OKD, ") == len(linear.TIMED)
    assert "| forward KL, bf16, N = 8192 | 7 | 8 |" in shown
    assert "over five products" in shown
    assert shown.count("not run") == 3, "eager: at each head, and its memory"
    assert "okd" not in readme.linear_table({"machine": machine, "rows": [row for row in rows if row["loss"] != ONLINE]}).lower()
