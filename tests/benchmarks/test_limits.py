"""The benchmark of limits checks what it runs, stops who goes over the limit, and reports what it found; at toy sizes."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels as kd
from benchmarks import limits, runner
from benchmarks.cases import DTYPES, GIB, MIB, Case, Head
from benchmarks.limits import Extent, cases
from benchmarks.measure import planned
from benchmarks.readme import crossing, limits_table
from benchmarks.rows import RESULTS, options, run
from benchmarks.runner import Part
from kdkernels.backends import dtypes, native
from tests.support.needs import needs_proc

SMALL = Case("largest", Head("small", "student", "teacher", 600, 600, 12, 20), 256, "fp32", "eager")


@needs_proc
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_strategies_pass_the_check_that_the_eager_formula_passes(dtype: str) -> None:
    """In several chunks and blocks; errors are at most twice those of eager PyTorch in the same dtype, plus one rounding."""
    case = replace(SMALL, dtype=dtype)
    eager = limits.measure(case, 1)
    for strategy in ("tokens", "vocab"):
        ours = replace(case, contender=strategy, budget=64 * 1024)
        plan = ours.plan(strategy)
        assert max(plan.chunks, plan.blocks) > 1
        found = limits.measure(ours, 1)
        for name in ("value_error", "hidden_grad_error", "head_grad_error"):
            assert found[name] <= 2 * eager[name] + torch.finfo(DTYPES[dtype]).eps, name
        assert planned(ours)["planned_peak_bytes"] == plan.scratch_bytes + found["returned_bytes"]
        assert found["process_bytes"] > found["peak_bytes"]


@needs_proc
def test_who_goes_over_the_limit_fails_with_the_allocators_words_and_who_does_not_gets_through() -> None:
    """Processes of their own, as in a run: four tensors of the eager formula's logits are larger than the limit."""
    case = Case("tokens", Head("slim", "slim", "slim", 65_536, 65_536, 8, 8), 1024, "fp32", limit=GIB)
    chosen = [replace(case, contender="eager"), replace(case, contender="tokens", budget=8 * MIB)]
    eager, tokens = limits.rows(chosen, 1)
    assert "can't allocate memory" in eager["failed"]
    assert eager["planned_peak_bytes"] > GIB
    assert "failed" not in tokens
    assert tokens["process_bytes"] < GIB


@needs_proc
def test_the_break_even_is_between_both_strategies_and_says_what_auto_takes() -> None:
    head = Head("any", "student", "teacher", 512, 512, 16, 24)
    for budget in (16 * 1024, MIB):
        case = Case("break-even", head, 128, "fp32", "tokens", "jsd", budget=budget)
        found = planned(case) | limits.measure(case, 2)
        assert len(found["ratios"]) == 2
        sizes = 128, 512, 16, 24, torch.float32
        for strategy, key in (("tokens", "seconds"), ("vocab", "yardstick_seconds")):
            assert found[key] > 0
            plan = kd.plan(*sizes, memory_budget=budget, strategy=strategy, divergence="jsd")
            assert found[f"planned_{key}"] == plan.seconds
        assert found["auto"] == kd.plan(*sizes, memory_budget=budget, divergence="jsd").strategy
        assert budget == MIB or found["chunk_rows"] == 4  # 16 KiB of two float32 rows of 512


def test_the_crossing_is_exact_where_the_ratio_is_a_power_of_the_budget() -> None:
    budgets = [1, 2, 4, 8, 16]
    for even in (1.5, 5.0, 16.0):
        assert crossing(budgets, [math.sqrt(even / budget) for budget in budgets]) == pytest.approx(even)
        assert crossing(budgets, [budget / even for budget in budgets]) == pytest.approx(even)
    assert crossing(budgets, [3.0, 2.0, 1.0, 0.5, 0.4]) == pytest.approx(4.0)
    assert crossing(budgets, [3.0, 2.0, 1.5, 1.2, 1.1]) is None
    assert crossing(budgets, [0.9, 0.8, 0.7, 0.6, 0.5]) is None


def test_a_contenders_growth_goes_from_small_to_large() -> None:
    for extent in (limits.FULL, limits.TOY):
        for one, two in itertools.pairwise(cases(extent)):
            if one.part in ("tokens", "vocab") and (one.part, one.contender) == (two.part, two.contender):
                assert one.facts[one.part] < two.facts[two.part]
    largest = cases(limits.FULL)[0]
    assert (largest.tokens, largest.head.vocab, largest.dtype) == (32_768, 262_144, "bf16")


TOY = Extent(
    limit=GIB,
    budget=64 * 1024,
    largest=(SMALL.head, 256),
    growth=(Head("slim", "slim", "slim", 64, 64, 8, 8), 16),
    tokens=(8, 16, 32),
    vocab=(64, 128),
    even=(Head("any", "any", "any", 64, 64, 8, 8), 16),
    pairs=(("fp32", "forward_kl"), ("fp32", "jsd")),
    budgets=(MIB, 2 * MIB),
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that would be measured; eager fails from 16 tokens on in the sweep, every figure is made up."""
    seen: list[Case] = []

    def fake(part: Part) -> Any:
        ((case,),) = part.items
        seen.append(case)
        found: dict[str, Any] = {"seconds": float(len(seen)), "peak_bytes": GIB, "returned_bytes": 1}
        if case.part == "break-even":
            assert case.budget is not None
            size = case.budget // MIB
            found |= {"ratio": 2.0 / size**2, "ratios": [1.0], "planned_seconds": 3.0, "planned_yardstick_seconds": 2.0}
            found["auto"] = "vocab" if size == 1 else "tokens"
        elif case.contender == "eager" and (case.part == "largest" or (case.part == "tokens" and case.tokens >= 16)):
            where = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0."
            said = "DefaultCPUAllocator: you tried to allocate 17179869184 bytes."
            found = {"planned_peak_bytes": 80 * GIB, "failed": f"{where} {said}"}
        else:
            found |= {} if case.contender == "compiled" else {"planned_peak_bytes": 2 * GIB, "planned_seconds": 7.0}
            names = ("value_error", "hidden_grad_error", "head_grad_error")
            found |= {"process_bytes": 3 * GIB, **dict.fromkeys(names, 1.5e-3)} if case.part == "largest" else {}
        yield case.facts | found

    monkeypatch.setattr(runner, "rows", fake)
    return seen


def measured(folder: Path, only: str = "") -> dict[str, Any]:
    """What limits.json holds after a run of the command at these sizes."""
    parser = options("")
    chosen = parser.parse_args(["--only", only, "--out", str(folder)])
    assert run(parser, chosen, cases(TOY), limits.FILES, lambda some: limits.rows(some, 3)) == 0
    found: dict[str, Any] = json.loads((folder / "limits.json").read_text())
    return found


def test_who_failed_is_not_run_at_larger_sizes_of_that_sweep(ran: list[Case], tmp_path: Path) -> None:
    rows = measured(tmp_path)["rows"]
    eager = {(row["part"], row[row["part"]]): row for row in rows if row["contender"] == "eager" and row["part"] != "largest"}
    assert "seconds" in eager["tokens", 8]
    assert "failed" in eager["tokens", 16]
    assert eager["tokens", 32]["skipped"] == "not run: it failed at N = 16"
    assert "seconds" in eager["vocab", 128], "the other sweep is another matter"
    assert len(ran) == len(cases(TOY)) - 1
    assert len(rows) == len(cases(TOY))


def test_only_runs_what_it_names_and_keeps_the_rest_in_order(
    ran: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = measured(tmp_path)["rows"]
    ran.clear()
    after = measured(tmp_path, "tokens: slim fp32 vocab")["rows"]
    assert [(case.contender, case.tokens) for case in ran] == [("vocab", 8), ("vocab", 16), ("vocab", 32)]
    for one, two in zip(before, after, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert (one != two) == ((one["part"], one["contender"]) == ("tokens", "vocab"))
    ran.clear()
    path = tmp_path / "limits.json"
    path.write_text(path.read_text().replace('"processor": "', '"processor": "another '))
    with pytest.raises(SystemExit):
        measured(tmp_path, "jsd")
    assert "of another machine (processor 'another" in capsys.readouterr().err
    assert ran == []
    measured(tmp_path)
    assert len(ran) == len(cases(TOY)) - 1, "without it all of them run again"


def test_the_table_shows_what_was_measured_planned_and_refused(ran: list[Case], tmp_path: Path) -> None:
    shown = limits_table(measured(tmp_path))
    assert "N = 256, V = 600, D_s = 12, D_t = 20; the whole process may hold 1 GiB" in shown
    assert "| tokens | 1 (7) | 1.00 (2.00) | 3.00 | 1.5e-03 | 1.5e-03 | 1.5e-03 |" in shown
    refused = "failed: RuntimeError: DefaultCPUAllocator: you tried to allocate 17,179,869,184 bytes."
    assert f"| eager | {refused} | (80.0) | | | | |" in shown
    assert "| compiled | 4 | 1.00 | 3.00 |" in shown
    # 2 / size²: even at √2 MiB; the plan's 1.5 never is
    assert "| forward_kl, fp32 | **2.00 (1.50)** | 0.50 (1.50) | 1.4 MiB (none of them) |" in shown


def test_the_table_of_an_unfinished_run_has_what_there_is(ran: list[Case], tmp_path: Path) -> None:
    shown = limits_table(measured(tmp_path, "largest: small bf16 tokens"))
    assert "| tokens |" in shown
    assert "memory_budget" not in shown
    results = measured(tmp_path, "break-even")
    results["rows"][-1] = cases(TOY)[-1].facts | {"failed": "ended by signal SIGKILL"}
    assert "| jsd, fp32 | **2.00 (1.50)** | failed: ended by signal SIGKILL | none of them" in limits_table(results)


@pytest.mark.parametrize(("dtype", "divergence"), limits.FULL.pairs)
def test_auto_takes_what_was_measured_to_be_faster(dtype: str, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every budget of the committed break-even where one strategy was ahead by more than a fifth; planned as on the machine that
    was measured, with the native backend and products in bfloat16, whatever this one is."""
    monkeypatch.setattr(importlib.import_module("kdkernels.engine.cut"), "backend_of", lambda *_: native.BACKEND)
    monkeypatch.setattr(dtypes, "cpu_multiplies", lambda _: True)
    rows = json.loads((RESULTS / "limits.json").read_text())["rows"]
    points = [row for row in rows if (row["part"], row["dtype"], row["loss"]) == ("break-even", dtype, divergence)]
    clear = [point for point in points if abs(math.log(point["ratio"])) > math.log(1.2)]
    assert {point["ratio"] > 1 for point in clear} == {True, False}
    for point in clear:
        head, tokens = limits.FULL.even
        plan = Case("break-even", head, tokens, dtype, "auto", divergence, budget=point["budget"]).plan("auto")
        assert plan.strategy == ("vocab" if point["ratio"] > 1 else "tokens"), f"at {point['budget'] / MIB:g} MiB"
