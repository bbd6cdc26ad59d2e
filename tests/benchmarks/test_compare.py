"""The comparison measures what it says: every contender computes its loss, errors are those by hand, and whoever fails is a row."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, contenders, measure, readme
from benchmarks.compare import Part, Point
from benchmarks.contenders import LOSSES, Head, NotOfferedError, Problem
from tests.support import ROOT, memory

LIBRARY = {"liger": "liger-kernel", "trl": "trl"}
SIZES = Head("student", "teacher", 97, 101, 8, 12)
POINTS = tuple(Point(loss, masked, 20, SIZES.vocab) for loss, masked in compare.EVERY)
ROW: dict[str, Any] = {
    **{"sweep": "heads", "head": "32k", "dtype": "fp32", "loss": "forward_kl", "masked": False, "tokens": 512, "vocab": 32_000},
    **{"student_dim": 512, "teacher_dim": 1024, "contender": "tokens"},
    **{"ratio": 1.25, "ratios": [1.5, 1.25, 1.125], "seconds": 1.0, "yardstick_seconds": 0.8},
    **{"peak_bytes": 7 * measure.MIB, "returned_bytes": 3 * measure.MIB},
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


def inputs(spread: float = 3.0) -> dict[str, torch.Tensor]:
    given = contenders.problem(SIZES, 20, torch.float32, "cpu", spread)
    names = ("hidden", "head", "teacher_hidden", "teacher_head")
    return {name: getattr(given, name).detach() for name in names}


def by_hand(masked: bool) -> tuple[Problem, Point]:
    """Two tokens of a vocabulary of two: q = (3/4, 1/4) for both, p = (1/2, 1/2) and (1/4, 3/4)."""
    point = Point("forward_kl", masked, 2, 2)
    log_3 = math.log(3.0)
    rows = {"hidden": [[1], [1]], "head": [[log_3], [0]], "teacher_hidden": [[0], [1]], "teacher_head": [[0], [log_3]]}
    return compare.problem({name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}, point), point


def exact(given: Problem, loss: str = "forward_kl") -> dict[str, torch.Tensor]:
    return compare.mean(compare.per_token(given, loss), given)


class TestTruth:
    def test_value_and_gradients_are_those_by_hand(self) -> None:
        given, _ = by_hand(masked=False)
        found = exact(given)
        first, second = 0.5 * math.log(4 / 3), 0.5 * math.log(3)  # KL of each token
        entropies = math.log(2), 2 * math.log(2) - 0.75 * math.log(3)
        assert float(found["value"]) == pytest.approx((first + second) / 2, rel=1e-14)
        assert float(found["target_entropy"]) == pytest.approx(sum(entropies) / 2, rel=1e-14)
        # dx = q - p is (1/4, -1/4) and (1/2, -1/2), each times a half
        torch.testing.assert_close(found["hidden_grad"], torch.tensor([[1 / 8], [1 / 4]]).double() * math.log(3))
        torch.testing.assert_close(found["head_grad"], torch.tensor([[3 / 8], [-3 / 8]]).double())

    def test_masked_tokens_change_nothing(self) -> None:
        given, _ = by_hand(masked=True)
        found = exact(given)
        assert float(found["value"]) == pytest.approx(0.5 * math.log(3), rel=1e-14)
        assert found["hidden_grad"][0] == 0
        torch.testing.assert_close(found["head_grad"], torch.tensor([[0.5], [-0.5]]).double())

    def test_the_mean_of_three_is_taken_in_float64(self) -> None:
        one = torch.ones(3, 1)
        given, rows = Problem(one, one, one, one), {"hidden_grad": one.double(), "sampled_dx": one.double()}
        found = compare.mean(rows | {"value": one[:, 0].double(), "target_entropy": one[:, 0].double()}, given)
        assert float(found["value"]) == pytest.approx(1.0, rel=1e-15)
        assert float(found["hidden_grad"][0]) == pytest.approx(1 / 3, rel=1e-15)

    def test_smaller_points_are_prefixes_of_the_inputs(self) -> None:
        tensors = inputs()
        points = (Point("jsd", False, 20, 97), Point("jsd", True, 7, 97), Point("forward_kl", False, 9, 50))
        together = compare.truth(tensors, points)
        for point, found in zip(points, together, strict=True):
            (alone,) = compare.truth(tensors, (point,))
            for name, value in alone.items():
                torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)
        assert together[2]["hidden_grad"].shape == (9, 8)
        assert together[2]["head_grad"].shape == (50, 8)

    def test_errors_are_relative_norms(self) -> None:
        given, _ = by_hand(masked=False)
        found = exact(given)
        given.hidden.grad, given.head.grad = found["hidden_grad"] * 1.25, found["head_grad"] * 0.5
        expected = {"value_error": 0.125, "hidden_grad_error": 0.25, "head_grad_error": 0.5}
        assert compare.errors(found["value"] * 1.125, given, found) == pytest.approx(expected)
        cross_entropy = found["value"] + found["target_entropy"]
        assert compare.errors(cross_entropy, given, found, of_cross_entropy=True)["value_error"] == 0
        given.head.grad = None
        with pytest.raises(ArithmeticError, match="missing or not finite"):
            compare.errors(found["value"], given, found)

    def test_the_sampled_rows_are_spread_over_the_vocabulary(self) -> None:
        assert compare.sampled(97).tolist() == list(range(97))
        large = compare.sampled(262_144)
        assert (len(large), large[0], large[-1]) == (compare.SAMPLE, 0, 262_143)
        assert large.diff().unique().tolist() == [513]


class TestContenders:
    # torch's compiler looks at the gradient of whatever it is given
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
    @pytest.mark.parametrize("name", compare.NAMES)
    def test_every_loss_is_that_of_float64(self, name: str, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> None:
        library = LIBRARY.get(name.split()[0])
        if library is not None and measure.version(library) is None:
            pytest.skip(f"{library} is not installed")
        if name == "liger compiled":  # its compiler takes longer than all else here
            monkeypatch.setattr(torch, "compile", lambda function: function)
        tensors, lacking = inputs(), []
        # A logit is a sum of D terms, each rounded; its absolute error is the relative one of a probability.
        logits = tensors["teacher_hidden"] @ tensors["teacher_head"].T
        tolerance = 2 * SIZES.teacher_dim * torch.finfo(torch.float32).eps * float(logits.abs().max())
        for point, right in zip(POINTS, compare.truth(tensors, POINTS), strict=True):
            given = compare.problem(tensors, point)
            try:
                value = (contenders.CONTENDERS | contenders.PUBLISHED)[name](point.loss)(given)
            except NotOfferedError:
                lacking.append(point.loss)
                continue
            value.backward()
            found = compare.errors(value, given, right, of_cross_entropy=name in contenders.PUBLISHED)
            assert max(found.values()) < tolerance, (point, found)
        expected = set(LOSSES) - {"taid"} if name in contenders.PUBLISHED else {"taid"} if library else set()
        assert set(lacking) == expected

    def test_half_of_the_tokens_are_masked(self) -> None:
        for tokens in (2, 16, 64, 128, 512):
            labels = contenders.half_masked(tokens)
            assert int((labels == contenders.IGNORED).sum()) == tokens // 2
            assert labels[0] == contenders.IGNORED
            assert labels[-1] != contenders.IGNORED

    def test_the_products_of_a_masked_step_are_those_of_the_tokens_that_count(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        for masked, tokens in ((False, 20), (True, 10)):
            given = compare.problem(inputs(), Point("forward_kl", masked, 20, 97))
            with FlopCounterMode(display=False) as counter:
                contenders.products(given, 7)()
            assert counter.get_total_flops() == 2 * tokens * 97 * (3 * 8 + 12)


class TestMeasure:
    @pytest.mark.parametrize(("slow", "count"), [(1e9, 3), (0.0, 1)])
    def test_a_slow_step_is_timed_once(self, slow: float, count: int) -> None:
        tensors = inputs()
        given = compare.problem(tensors, POINTS[1])
        found = compare.measured("eager", contenders.CONTENDERS["eager"]("forward_kl"), given, exact(given), 3, slow)
        assert len(found["ratios"]) == count
        assert found["ratio"] > 0
        assert found["seconds"] > 0
        assert found["returned_bytes"] == 4 * (20 * 8 + 97 * 8)
        assert found["head_grad_error"] < 1e-5

    def test_no_repeat_is_begun_out_of_patience(self) -> None:
        found = measure.interleaved(lambda: time.sleep(0.01), lambda: time.sleep(0.005), 5, patience=0.0)
        assert len(found["ratios"]) == 1
        assert len(measure.interleaved(int, int, 5)["ratios"]) == 5

    def test_memory_freed_before_does_not_hide_a_peak(self) -> None:
        block, blocks = 2**18, 200  # bytes; small enough for the C library to keep
        kept = 2 * 4096 * blocks  # pages that a block shares with its neighbours

        pins = []  # the last of them stays, and below it the C library keeps what was freed

        def allocate() -> None:
            some = [torch.ones(block // 4) for _ in range(blocks)]
            pins.append(some[-1])

        for _ in range(4):
            assert block * blocks - kept <= memory.peak_above(allocate) < block * blocks * 1.25

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal SIGKILL"),
            ("raise MemoryError('too much')", "MemoryError: too much"),
            ("import time; time.sleep(60)", "not done after 1 s"),
        ],
    )
    def test_a_process_that_ends_early_says_why(
        self, script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "ends.py").write_text(script)
        monkeypatch.chdir(tmp_path)
        assert measure.in_own_process("ends", {}, timeout=1.0 if "sleep" in script else 60.0) == {"failed": reason}

    def test_the_header_has_the_versions_of_the_contenders(self) -> None:
        assert measure.machine()["trl"] == measure.version("trl")
        assert measure.version("no such library") is None


class TestRows:
    @pytest.mark.parametrize(
        ("error", "kind", "reason"),
        [
            (torch.OutOfMemoryError("tried to allocate 9 GiB\nmore"), "failed", "OutOfMemoryError: tried to allocate 9 GiB"),
            (ModuleNotFoundError("No module named 'trl'"), "failed", "ModuleNotFoundError: No module named 'trl'"),
            (NotOfferedError("TRL has no TAID"), "skipped", "TRL has no TAID"),
        ],
    )
    def test_who_cannot_run_is_a_row_that_says_why(
        self, error: Exception, kind: str, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(loss: str) -> Any:
            raise error

        monkeypatch.setitem(contenders.CONTENDERS, "trl", fails)
        part = compare.parts("toy")[0]
        row = compare.row(part, part.points[0], "trl", compare.problem(inputs(), POINTS[0]), {}, 1)
        assert row == part.row(part.points[0], "trl") | {kind: reason}
        assert reason in compare.line(row)

    def test_the_other_points_of_a_process_that_ended_early_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def ends(module: str, case: dict[str, Any], timeout: float) -> dict[str, Any]:
            if case["contender"] is None:
                return {}
            (Path(case["folder"]) / "rows").write_text(json.dumps(part.row(part.points[0], "eager") | {"ratio": 1.5}) + "\n")
            return {"failed": "ended by signal SIGKILL"}

        monkeypatch.setattr(compare, "in_own_process", ends)
        part = compare.parts("toy")[-1]
        ((first, *others),) = compare.rows_of(part, ["eager"], 1, 1.0)
        assert first["ratio"] == 1.5
        assert [row["failed"] for row in others] == ["ended by signal SIGKILL"] * (len(part.points) - 1)

    def test_without_float64_results_nothing_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compare, "in_own_process", lambda *_: {"failed": "MemoryError"})
        part = compare.parts("toy")[-1]
        rows = list(itertools.chain.from_iterable(compare.rows_of(part, ["eager", "trl"], 1, 1.0)))
        assert [row["failed"] for row in rows] == ["no float64 results: MemoryError"] * 2 * len(part.points)

    def test_results_of_another_machine_are_not_added_to(self, tmp_path: Path) -> None:
        path = tmp_path / "compare.json"
        assert compare.kept(path, MACHINE) == []
        path.write_text(json.dumps({"machine": MACHINE | {"date": "long ago"}, "rows": [ROW]}))
        assert compare.kept(path, MACHINE) == [ROW]
        with pytest.raises(ValueError, match=r"torch '2'.*run all"):
            compare.kept(path, MACHINE | {"torch": "3"})


class TestParts:
    def test_every_loss_mask_and_head_is_measured(self) -> None:
        parts = compare.parts("full")
        points = [(part.head, part.dtype, point.loss, point.masked) for part in parts for point in part.points]
        assert {head for head, *_ in points} == {*compare.EXTENTS["full"].heads, "narrow"}
        for head in compare.EXTENTS["full"].heads:
            assert {(loss, masked) for of, _, loss, masked in points if of == head} == set(compare.EVERY)
            assert (head, "fp32", "forward_kl", False) in points
        for part in compare.parts("full", everything=True):
            if part.sweep == "heads":
                assert {(point.loss, point.masked) for point in part.points} == set(compare.EVERY)

    def test_names_and_rows_are_all_different(self) -> None:
        parts = compare.parts("full", everything=True)
        names = [part.name(name) for part in parts for name in compare.contenders_of(part)]
        assert len(set(names)) == len(names)
        keys = [compare.key(part.row(point, "eager")) for part in parts for point in part.points]
        assert len(set(keys)) == len(keys)

    def test_a_sweep_has_inputs_of_its_own_size(self) -> None:
        part = compare.parts("toy")[-2]
        tensors = compare.inputs(part)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            **{"hidden": (16, 8), "head": (64, 8), "teacher_hidden": (16, 8), "teacher_head": (64, 8)}
        }
        logits = torch.cat([tensors["hidden"] @ tensors["head"].T, tensors["teacher_hidden"] @ tensors["teacher_head"].T])
        assert 2 < float(logits.std()) < 4

    def test_a_padded_teacher_keeps_its_padding_where_the_vocabulary_is_whole(self) -> None:
        part = compare.parts("toy")[0]
        tensors = compare.inputs(part)
        assert len(tensors["teacher_head"]) == 208
        assert len(compare.problem(tensors, part.points[0]).teacher_head) == 208
        assert len(compare.problem(tensors, replace(part.points[0], vocab=100)).teacher_head) == 100


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
            assert compare.line(row) in done.stdout
        # less memory than a process has before it computes anything
        done = command("--quick", "--out", tmp_path, "--only", "tokens: narrow fp32 checkpointed", "--memory", 0.001)
        assert done.returncode == 0, done.stderr
        report = json.loads(path.read_text())
        assert report["machine"] == measure.machine() | {"threads": report["machine"]["threads"]}
        assert report["rows"][:2] == rows, "what was not measured again stays"
        assert [bool(row["failed"]) for row in report["rows"][2:]] == [True, True]
        assert [file.name for file in tmp_path.iterdir()] == ["growth.json"]

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("--quick",), "--quick needs --out"),
            (("--repeats", "0"), "1 or more"),
            (("--out", "nowhere"), "no folder"),
            (("--only", "nothing"), "heads: qwen2.5 fp32 tokens"),
        ],
    )
    def test_what_cannot_be_run(
        self, arguments: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        with pytest.raises(SystemExit, match="2"):
            compare.main()
        assert reason in capsys.readouterr().err


class TestTables:
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
        rows = [ROW | {"sweep": "tokens", "tokens": tokens} for tokens in (16_384, 256)]
        rows += [{**part_of(ROW), "sweep": "vocab", "tokens": 1024, "contender": "eager", "failed": "MemoryError"}]
        shown = readme.growth_table({"machine": MACHINE, "rows": rows})
        assert "| V = 32,000, D_s = 512, D_t = 1024 | N = 256 | N = 16,384 |" in shown
        assert "| N = 1,024, D_s = 512, D_t = 1024 | V = 32,000 |" in shown
        assert "| eager | failed |" in shown
        assert "- eager: MemoryError (forward_kl at 32k fp32, N = 1,024, V = 32,000)" in shown

    def test_the_files_that_the_command_writes_are_those_that_are_shown(self) -> None:
        shown = {readme.RESULTS.with_name(readme.SECTIONS[mark][0]) for mark in ("compare", "growth")}
        assert shown == {compare.RESULTS / name for name in compare.FILES.values()}


MISSING = {"forward_kl": {"failed": "MemoryError"}, "taid": {"skipped": "TRL has no TAID"}}


def part_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row before anything is measured."""
    names = Part("heads", "32k", "fp32", (), "full").row(Point("forward_kl", False, 1, 1), "any")
    return {name: row[name] for name in names}
