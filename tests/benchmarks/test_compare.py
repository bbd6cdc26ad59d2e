"""The comparison measures every head, loss and mask with every contender, keeps what it found, and its tables show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, measure, overview, peers, readme, runner
from benchmarks.cases import GIB, MIB, Case, problem
from benchmarks.rows import RESULTS, line
from tests.support import ROOT

ROW: dict[str, Any] = {
    **{"part": "heads", "head": "32k", "dtype": "fp32", "loss": "forward_kl", "masked": False, "tokens": 512, "vocab": 32_000},
    **{"student_dim": 512, "teacher_dim": 1024, "contender": "tokens"},
    **{"ratio": 1.25, "ratios": [1.5, 1.25, 1.125], "seconds": 1.0, "yardstick_seconds": 0.8},
    **{"peak_bytes": 7 * MIB, "returned_bytes": 3 * MIB},
    **{"value_error": 1e-7, "hidden_grad_error": 2e-6, "head_grad_error": 3e-5},
}
MACHINE: dict[str, Any] = {
    "processor": "any",
    "threads": 1,
    "instruction_sets": ["plain"],
    "torch": "2",
    "trl": "9",
    "date": "today",
}


def toy(part: str, *contenders: str) -> list[Case]:
    return [case for case in compare.cases(compare.TOY) if case.part == part and case.contender in contenders]


class TestCases:
    def test_every_loss_mask_and_head_is_measured(self) -> None:
        listed = [case for case in compare.cases(compare.FULL) if case.contender == "eager"]
        assert {case.head.name for case in listed} == {*(head.name for head in compare.FULL.heads), "narrow"}
        for head in compare.FULL.heads:
            assert {(case.loss, case.masked) for case in listed if case.head == head} == set(compare.EVERY)
            assert any(case == Case("heads", head, case.tokens, "fp32", "eager", limit=case.limit) for case in listed)
        for some in compare.problems(compare.FULL, everything=True):
            if some[0].part == "heads":
                assert {(case.loss, case.masked) for case in some} == set(compare.EVERY)

    def test_taids_formula_is_a_contender_where_there_is_taid(self) -> None:
        heads = {case.head.name for case in compare.cases(compare.FULL) if case.contender == "taid published"}
        assert heads == {head.name for head in compare.FULL.heads}

    def test_a_sweep_has_inputs_of_its_own_size(self) -> None:
        given = problem(toy("tokens", "eager")[-1])
        tensors = given.hidden.detach(), given.head.detach(), given.teacher_hidden, given.teacher_head
        assert [tuple(tensor.shape) for tensor in tensors] == [(16, 8), (64, 8), (16, 8), (64, 8)]
        logits = torch.cat([tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T])
        assert 2 < float(logits.std()) < 4

    def test_a_padded_teacher_keeps_its_padding_where_the_vocabulary_is_whole(self) -> None:
        case = toy("heads", "eager")[0]
        assert len(problem(case).teacher_head) == 208
        assert len(problem(replace(case, head=case.head.cut(100))).teacher_head) == 100

    def test_cases_that_share_inputs_share_their_tensors(self) -> None:
        case = toy("heads", "eager")[0]
        plain, masked = compare.given_of(case), compare.given_of(replace(case, loss="taid", masked=True, contender="trl"))
        assert plain.head is masked.head
        assert plain.labels is None
        assert masked.labels is not None
        right = problem(replace(case, masked=True))
        assert torch.equal(masked.head, right.head)
        assert torch.equal(masked.labels, right.labels)


class TestRows:
    def test_a_contender_has_a_process_of_its_own_and_float64_comes_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[runner.Part] = []

        def results(parts: Any, *_: Any) -> Any:
            ran.extend(parts)
            yield {}

        monkeypatch.setattr(runner, "results", results)
        monkeypatch.setattr(runner, "rows", lambda part: ran.append(part) or [])
        chosen = toy("tokens", "eager", "trl") + toy("vocab", "eager")
        assert list(compare.rows(chosen, 1)) == []
        kinds = [(part.opened, {case.contender for item in part.items for case in item}, len(part.items)) for part in ran]
        assert kinds == [
            *((compare.prepare, {"eager", "trl"}, 1), (compare.opened, {"eager"}, 2), (compare.opened, {"trl"}, 2)),
            *((compare.prepare, {"eager"}, 1), (compare.opened, {"eager"}, 2)),
        ]

    def test_without_float64_results_nothing_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "results", lambda *_: iter([{"part": "float64", "broken": "MemoryError"}, {"not_run": []}]))
        rows = list(compare.rows(toy("vocab", "eager", "trl"), 1))
        assert [row["failed"] for row in rows] == ["no float64 results: MemoryError"] * 4

    def test_who_needs_a_gpu_says_so_in_no_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "results", lambda *_: iter([{}]))
        monkeypatch.delattr(runner, "rows")
        chosen = toy("heads", "fla", "liger kl_div")
        rows = list(compare.rows(chosen, 1))
        assert {(row["contender"], row["loss"]) for row in rows} == {("fla", "forward_kl"), ("liger kl_div", "forward_kl")}
        assert all("Triton" in row["skipped"] for row in rows)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        timeout=300,
        check=False,
    )


class TestCommand:
    def test_rows_of_one_that_runs_and_of_one_that_fails(self, tmp_path: Path) -> None:
        done = command("--quick", "--out", tmp_path, "--only", "tokens: narrow fp32 eager", "--repeats", 2)
        assert done.returncode == 0, done.stderr
        path = tmp_path / "growth.json"
        rows = json.loads(path.read_text())["rows"]
        assert [row["tokens"] for row in rows] == [8, 16]
        for row in rows:
            assert len(row["ratios"]) == 2
            assert row["head_grad_error"] < 1e-5
            assert line(row) in done.stdout
        # less memory than a process has before it computes anything
        done = command("--quick", "--out", tmp_path, "--only", "tokens: narrow fp32 checkpointed", "--memory", 0.001)
        assert done.returncode == 0, done.stderr
        report = json.loads(path.read_text())
        assert report["machine"] == measure.machine() | {"threads": report["machine"]["threads"]}
        assert report["rows"][:2] == rows, "what was not measured again stays"
        assert [bool(row["failed"]) for row in report["rows"][2:]] == [True, True]
        assert [file.name for file in tmp_path.iterdir()] == ["growth.json"]


class TestTables:
    def test_the_overview_has_a_row_for_each_contender_with_what_was_measured_and_what_it_offers(self, tmp_path: Path) -> None:
        timed = {"stage": "others", "head": "qwen2.5", "student": "small", "teacher": "large", "tokens": 8192, "dtype": "bfloat16"}
        timed |= {"loss": "forward_kl", "median_ms": 50.0, "ratio": 2.5, "peak_bytes": 3 * GIB, "contender": "fla"}
        path = tmp_path / "gpu.jsonl"
        path.write_text("\n".join(map(json.dumps, ({"device": "H9"}, timed, timed | {"loss": "jsd", "median_ms": 70.0}))))
        of_tokens = {**ROW, "part": "tokens", "peak_bytes": 2 * GIB}
        failed = {**part_of(ROW), "part": "tokens", "contender": "torchtune", "failed": "MemoryError"}
        grown = {"rows": [of_tokens, of_tokens | {"tokens": 64, "ratio": 9.0}, failed]}
        bf16 = [ROW | {"dtype": "bf16", "contender": "trl", "head_grad_error": error} for error in (1e-3, 4e-3, 2e-3)]
        shown = overview.overview_table(path, grown, {"rows": [ROW, *bf16]})
        cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in shown.splitlines() if row.startswith("| ")}
        assert set(peers.OFFERS) <= set(cells)
        assert {name: found[:3] for name, found in cells.items() if name in ("tokens", "trl", "fla", "torchtune", "eager")} == {
            "tokens": ["–", "1.25; 2.0 GiB", "–"],
            "trl": ["–", "–", "4.0e-03"],
            "fla": ["50.0 ms, 2.50; 3.0 GiB", "–", "–"],
            "torchtune": ["–", "failed", "–"],
            "eager": ["–", "–", "–"],
        }
        assert cells["fla"][3:] == [*peers.OFFERS["fla"][1:], f"{peers.OFFERS['fla'].source} |"]
        assert set(cells["vocab"][3:-1]) == {"″"}

    def test_the_comparison_shows_times_memory_errors_and_what_is_missing(self) -> None:
        rows = [
            ROW,
            ROW | {"contender": "eager", "ratio": 1.75, "ratios": [1.75], "head_grad_error": 4e-4},
            ROW | {"contender": "eager", "masked": True, "ratio": 2.125, "ratios": [2.0, 2.25], "head_grad_error": 5e-4},
            ROW | {"contender": "eager", "head": "gemma3", "ratio": 1.5, "ratios": [1.5]},
            *({**part_of(ROW), "contender": "trl", "loss": loss, **what} for loss, what in MISSING.items()),
        ]
        shown = readme.compare_table({"machine": MACHINE, "rows": rows})
        assert "| tokens | 1.25 (1.12 to 1.50), 4 MiB | – |" in shown
        assert "| eager | 1.75, 4 MiB | 1.50, 4 MiB |" in shown
        assert "| trl | failed | – |" in shown
        assert "| 32k fp32, N = 512 | forward_kl | forward_kl, masked | taid |" in shown
        assert "| eager | 1.75 | 2.12 (2.00 to 2.25) | – |" in shown
        assert "\n| gemma3 fp32, N = 512 |" not in shown, "it has forward KL alone, which the first table shows"
        assert "| eager | 1.0e-07 | 2.0e-06 | 5.0e-04 |" in shown
        assert "- trl: MemoryError (forward_kl at 32k fp32, N = 512, V = 32,000)" in shown
        assert "- trl: TRL has no TAID\n" in shown
        assert "trl 9" in shown

    def test_growth_has_a_table_for_each_sweep(self) -> None:
        rows = [ROW | {"part": "tokens", "tokens": tokens} for tokens in (16_384, 256)]
        rows += [{**part_of(ROW), "part": "vocab", "tokens": 1024, "contender": "eager", "failed": "MemoryError"}]
        shown = readme.growth_table({"machine": MACHINE, "rows": rows})
        assert "| V = 32,000, D_s = 512, D_t = 1024 | N = 256 | N = 16,384 |" in shown
        assert "| N = 1,024, D_s = 512, D_t = 1024 | V = 32,000 |" in shown
        assert "| eager | failed |" in shown
        assert "- eager: MemoryError (forward_kl at 32k fp32, N = 1,024, V = 32,000)" in shown

    def test_the_files_that_the_command_writes_are_those_that_are_shown(self) -> None:
        shown = {readme.SECTIONS[mark][0] for mark in ("compare", "growth")}
        assert shown == set(compare.FILES.values())
        assert all((RESULTS / name).exists() for name in shown)


MISSING = {"forward_kl": {"failed": "MemoryError"}, "taid": {"skipped": "TRL has no TAID"}}


def part_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row before anything is measured."""
    return {name: row[name] for name in toy("heads", "eager")[0].facts if name in row}
