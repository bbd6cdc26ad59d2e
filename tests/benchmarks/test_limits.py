"""The benchmark of limits checks what it runs, stops who goes over the limit, and reports what it found; at toy sizes."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels as kd
from benchmarks import limits
from benchmarks.contenders import CONTENDERS
from benchmarks.limits import GIB, MIB, Case, Inputs, Scale, cases, crossing, errors, limits_table, run
from benchmarks.measure import in_own_process
from kdkernels.backends import dtypes, native
from tests.support import oracle

SMALL = Case("largest", 256, 600, 12, 20, "fp32", (64 * 1024,))
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc, which only Linux has"
)


def float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Inputs, torch.Tensor]:
    """Inputs in float64 with the oracle's gradients over all tokens in their leaves, and its loss."""
    monkeypatch.setitem(limits.DTYPES, "fp64", torch.float64)
    inputs = Inputs(replace(case, dtype="fp64"))
    given = inputs.problem
    x, z = given.hidden @ given.head.mT, given.teacher_hidden @ given.teacher_head.mT
    loss = oracle.mean(oracle.losses(x, z, None, None, oracle.Options()), None, None, oracle.Options())
    loss.backward()
    return inputs, loss.detach()


def test_the_different_tokens_give_the_float64_result_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 both computations differ by roundings alone, whatever the blocks of the vocabulary."""
    inputs, loss = float64(SMALL, monkeypatch)
    for block in (100, 600, 4096):
        assert max(errors(inputs, loss, block).values()) < 1e-12


def test_one_wrong_entry_anywhere_is_an_error_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, loss = float64(SMALL, monkeypatch)
    assert errors(inputs, loss * (1 + 1e-6))["value_error"] == pytest.approx(1e-6)
    for name in ("hidden", "head"):
        grad = getattr(inputs.problem, name).grad
        whole, kept = grad.norm(), grad[-1, -1].clone()
        grad[-1, -1] += 1e-3 * whole
        found = errors(inputs, loss)
        assert found[f"{name}_grad_error"] == pytest.approx(1e-3)
        grad[-1, -1] = kept
    assert max(errors(inputs, loss).values()) < 1e-12


def test_each_different_token_is_there_as_often_and_in_no_order() -> None:
    inputs = Inputs(replace(SMALL, tokens=1024))
    assert inputs.places.bincount().tolist() == [1024 // limits.DISTINCT] * limits.DISTINCT
    assert not torch.equal(inputs.places, inputs.places.sort().values)
    assert torch.equal(inputs.problem.hidden.detach().double(), inputs.distinct[0][inputs.places])
    assert torch.equal(inputs.problem.teacher_hidden.double(), inputs.distinct[1][inputs.places])
    logits = inputs.problem.hidden.detach() @ inputs.problem.head.detach().mT
    assert float(logits.std()) == pytest.approx(limits.SPREAD, rel=0.1)
    assert len(Inputs(replace(SMALL, tokens=97)).distinct[0]) == 1, "97 tokens cannot be several ones as often"


@linux
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_strategies_pass_the_check_that_the_eager_formula_passes(dtype: str) -> None:
    """In several chunks and blocks; errors are at most twice those of eager PyTorch in the same dtype, plus one rounding."""
    case = replace(SMALL, dtype=dtype)
    inputs = Inputs(case)
    eager = errors(inputs, inputs.step(CONTENDERS["eager"]("forward_kl")))
    for strategy in limits.STRATEGIES:
        plan = kd.plan(*case.sizes, memory_budget=case.budgets[0], strategy=strategy)
        assert max(plan.chunks, plan.blocks) > 1
        found = limits.measure(replace(case, contender=strategy))
        for name, error in eager.items():
            assert found[name] <= 2 * error + torch.finfo(limits.DTYPES[dtype]).eps, name
        assert found["planned_peak_bytes"] == plan.scratch_bytes + inputs.returned_bytes
        assert found["process_bytes"] > found["peak_bytes"]


@linux
def test_who_goes_over_the_limit_fails_with_the_allocators_words_and_who_does_not_gets_through() -> None:
    """Processes of their own, as in a run: four tensors of the eager formula's logits are larger than the limit."""
    case = Case("largest", 1024, 65_536, 8, 8, "fp32", (8 * MIB,), limit=GIB)
    eager, tokens = (in_own_process("benchmarks.limits", asdict(replace(case, contender=name))) for name in ("eager", "tokens"))
    assert "can't allocate memory" in eager["failed"]
    assert eager["planned_peak_bytes"] > GIB
    assert "failed" not in tokens
    assert tokens["process_bytes"] < GIB


def test_the_break_even_is_between_both_strategies_and_says_what_auto_takes() -> None:
    case = Case("break-even", 128, 512, 16, 24, "fp32", (16 * 1024, MIB), divergence="jsd", repeats=2)
    found = limits.measure(case)
    for point, budget in zip(found["points"], case.budgets, strict=True):
        assert point["memory_budget"] == budget
        assert len(point["ratios"]) == 2
        for strategy in limits.STRATEGIES:
            assert point[f"{strategy}_seconds"] > 0
            plan = kd.plan(*case.sizes, memory_budget=budget, strategy=strategy, divergence="jsd")
            assert point[f"planned_{strategy}_seconds"] == plan.seconds
        assert point["auto"] == kd.plan(*case.sizes, memory_budget=budget, divergence="jsd").strategy
    assert found["points"][0]["chunk_rows"] == 4  # 16 KiB of two float32 rows of 512


def test_the_crossing_is_exact_where_the_ratio_is_a_power_of_the_budget() -> None:
    budgets = [1, 2, 4, 8, 16]
    for even in (1.5, 5.0, 16.0):
        assert crossing(budgets, [math.sqrt(even / budget) for budget in budgets]) == pytest.approx(even)
        assert crossing(budgets, [budget / even for budget in budgets]) == pytest.approx(even)
    assert crossing(budgets, [3.0, 2.0, 1.0, 0.5, 0.4]) == pytest.approx(4.0)
    assert crossing(budgets, [3.0, 2.0, 1.5, 1.2, 1.1]) is None
    assert crossing(budgets, [0.9, 0.8, 0.7, 0.6, 0.5]) is None


def test_cases_have_names_and_fields_of_their_own_and_grow() -> None:
    for scale in (limits.FULL, limits.QUICK):
        listed = cases(scale)
        assert len({case.name for case in listed}) == len(listed)
        assert len({json.dumps(case.fields(), sort_keys=True) for case in listed}) == len(listed)
        grows = [case for case in listed if case.part == "growth"]
        for one, two in itertools.pairwise(grows):
            if (one.sweep, one.contender) == (two.sweep, two.contender):
                assert getattr(one, one.sweep) < getattr(two, two.sweep)
    largest = cases(limits.FULL)[0]
    assert (largest.tokens, largest.vocab, largest.dtype) == (32_768, 262_144, "bf16")


TOY = Scale(
    largest=replace(SMALL, limit=GIB),
    growth=Case("growth", 16, 64, 8, 8, "fp32", (1024,), limit=GIB),
    swept=((8, 16, 32), (64, 128)),
    break_even=Case("break-even", 16, 64, 8, 8, "fp32", (MIB, 2 * MIB)),
    pairs=(("fp32", "forward_kl"), ("fp32", "jsd")),
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """The cases that would be measured; eager fails from 16 tokens on in the sweep, every figure is made up."""
    seen: list[Case] = []

    def fake(module: str, fields: dict[str, Any]) -> dict[str, Any]:
        assert module == "benchmarks.limits"
        case = Case(**json.loads(json.dumps(fields)))
        seen.append(case)
        if case.part == "break-even":
            plans = {"planned_tokens_seconds": 3.0, "planned_vocab_seconds": 2.0}
            made = [{"memory_budget": size * MIB, "ratio": 2.0 / size**2, "ratios": [1.0], **plans} for size in (1, 2)]
            points = [{**point, "auto": auto} for point, auto in zip(made, ("vocab", "tokens"), strict=True)]
            return {"points": points, **limits.crossings(points)}
        if case.contender == "eager" and (case.part == "largest" or (case.sweep == "tokens" and case.tokens >= 16)):
            where = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0."
            said = "DefaultCPUAllocator: you tried to allocate 17179869184 bytes."
            return {"planned_peak_bytes": 80 * GIB, "failed": f"{where} {said}"}
        plans = {} if case.contender == "compiled" else {"planned_peak_bytes": 2 * GIB, "planned_seconds": 7.0}
        names = ("value_error", "hidden_grad_error", "head_grad_error")
        more = {"process_bytes": 3 * GIB, **dict.fromkeys(names, 1.5e-3)} if case.part == "largest" else {}
        return {"seconds": float(len(seen)), "peak_bytes": GIB, "returned_bytes": 1, **plans, **more}

    monkeypatch.setattr(limits, "in_own_process", fake)
    return seen


def test_who_failed_is_not_run_at_larger_sizes_of_that_sweep(ran: list[Case], tmp_path: Path) -> None:
    results = run(TOY, tmp_path / "limits.json")
    assert json.loads((tmp_path / "limits.json").read_text()) == results
    eager = {(row["sweep"], row[row["sweep"]]): row for row in results["growth"] if row["contender"] == "eager"}
    assert "seconds" in eager["tokens", 8]
    assert "failed" in eager["tokens", 16]
    assert eager["tokens", 32]["skipped"] == "not run: it failed at N = 16"
    assert "seconds" in eager["vocab", 128], "the other sweep is another matter"
    assert len(ran) == len(cases(TOY)) - 1
    assert len(results["growth"]) == sum(case.part == "growth" for case in cases(TOY))


def test_only_runs_what_it_names_and_keeps_the_rest_in_order(ran: list[Case], tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    before = run(TOY, path)
    ran.clear()
    after = run(TOY, path, "growth in tokens vocab")
    assert [(case.contender, case.tokens) for case in ran] == [("vocab", 8), ("vocab", 16), ("vocab", 32)]
    assert after["largest"] == before["largest"]
    assert after["break_even"] == before["break_even"]
    for one, two in zip(before["growth"], after["growth"], strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert (one != two) == ((one["sweep"], one["contender"]) == ("tokens", "vocab"))
    assert run(TOY, path, "jsd")["growth"] == after["growth"]
    ran.clear()
    path.write_text(path.read_text().replace('"processor": "', '"processor": "another '))
    with pytest.raises(ValueError, match="another machine: other processor; --only adds to results of this one"):
        run(TOY, path, "jsd")
    assert ran == []
    run(TOY, path)
    assert len(ran) == len(cases(TOY)) - 1, "without it all of them run again"


def test_the_table_shows_what_was_measured_planned_and_refused(ran: list[Case], tmp_path: Path) -> None:
    shown = limits_table(run(TOY, tmp_path / "limits.json"))
    assert "N = 256, V = 600, D_s = 12, D_t = 20; the whole process may hold 1 GiB" in shown
    assert "| tokens | 1 (7) | 1.00 (2.00) | 3.00 | 1.5e-03 | 1.5e-03 | 1.5e-03 |" in shown
    refused = "failed: RuntimeError: DefaultCPUAllocator: you tried to allocate 17,179,869,184 bytes."
    assert f"| eager | {refused} | (80.0) | | | | |" in shown
    assert "| compiled | 4 | 1.00 | 3.00 |" in shown
    # 2 / size²: even at √2 MiB; the plan's 1.5 never is
    assert "| forward_kl, fp32 | **2.00 (1.50)** | 0.50 (1.50) | 1.4 MiB (none of them) |" in shown


def test_the_table_of_an_unfinished_run_has_what_there_is(ran: list[Case], tmp_path: Path) -> None:
    shown = limits_table(run(TOY, tmp_path / "limits.json", "largest tokens"))
    assert "| tokens |" in shown
    assert "memory_budget" not in shown
    results = run(TOY, tmp_path / "limits.json", "break-even")
    results["break_even"]["fp32 jsd"] = {**TOY.break_even.fields(), "divergence": "jsd", "failed": "ended by signal SIGKILL"}
    assert "jsd, fp32: failed: ended by signal SIGKILL" in limits_table(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick needs --out FOLDER"),
        (["--out", "/does/not/exist"], "--out /does/not/exist is no folder"),
        (["--only", "no such case"], "'no such case' is in no case; accepted: parts of largest tokens bf16"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["limits", *arguments])
    with pytest.raises(SystemExit):
        limits.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "divergence"), limits.FULL.pairs)
def test_auto_takes_what_was_measured_to_be_faster(dtype: str, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every budget of the committed break-even where one strategy was ahead by more than a fifth; planned as on the machine that
    was measured, with the native backend and products in bfloat16, whatever this one is."""
    monkeypatch.setattr(importlib.import_module("kdkernels.engine.cut"), "backend_of", lambda *_: native.BACKEND)
    monkeypatch.setattr(dtypes, "cpu_multiplies", lambda _: True)
    measured = json.loads(limits.RESULTS.read_text())["break_even"][f"{dtype} {divergence}"]
    case = replace(limits.FULL.break_even, dtype=dtype, divergence=divergence)
    clear = [point for point in measured["points"] if abs(math.log(point["ratio"])) > math.log(1.2)]
    assert {point["ratio"] > 1 for point in clear} == {True, False}
    for point in clear:
        plan = kd.plan(*case.sizes, memory_budget=point["memory_budget"], divergence=divergence)
        assert plan.strategy == ("vocab" if point["ratio"] > 1 else "tokens"), f"at {point['memory_budget'] / MIB:g} MiB"
