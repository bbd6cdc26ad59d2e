"""The GPU suite runs as a whole at toy size through the Triton interpreter, so that it is ready when there is a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contenders, gpu, gpu_checks, gpu_times
from tests.cases import draw, dressed


def suite(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The whole suite at toy size: what it printed, and what it wrote."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    out = tmp_path_factory.mktemp("gpu") / "toy.json"
    done = suite("--out", out, "--interpret")
    return done, json.loads(out.read_text())


class TestThroughTheInterpreter:
    def test_every_check_passes(self, run: Any) -> None:
        done, report = run
        assert [check for check in report["checks"] if check.get("passed") is False] == []
        assert done.returncode == 0, done.stderr
        passed = {(check["check"], check["strategy"], check["dtype"]) for check in report["checks"] if check.get("passed")}
        for strategy in ("tokens", "vocab"):
            for dtype in gpu_checks.DTYPES:
                for check in ("backend", "accuracy", "two_runs", "backward_twice", "special_values"):
                    assert (check, strategy, dtype) in passed
        assert {check["backend"] for check in report["checks"] if check["check"] == "backend"} == {"triton"}
        assert all(check["skipped"] for check in report["checks"] if "passed" not in check)

    def test_the_file_says_where_it_comes_from(self, run: Any) -> None:
        _, report = run
        assert report["interpreter"] is True
        assert "interpreter" in report["device"]
        assert report["versions"]["torch"] == torch.__version__
        assert report["versions"]["triton"]
        assert report["command"].endswith("--interpret")
        assert report["date"]

    def test_every_row_has_times_or_a_reason(self, run: Any) -> None:
        _, report = run
        extent = gpu_times.EXTENTS["toy"]
        assert len(report["rows"]) == len(extent.heads) * len(contenders.LOSSES) * len(extent.tokens) * len(contenders.CONTENDERS)
        for row in report["rows"]:
            if "failed" in row:
                assert row["contender"] not in ("tokens", "vocab", "eager", "compiled"), row["failed"]
                assert row["failed"]
            else:
                assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
                assert len(row["ratios"]) == extent.repeats
                assert row["ratio"] > 0
                assert row["share_of_product_rate"] > 0

    def test_the_contenders_computed_the_same_loss(self, run: Any) -> None:
        _, report = run
        values: dict[Any, list[float]] = {}
        for row in report["rows"]:
            if "failed" not in row:
                values.setdefault((row["head"], row["loss"], row["tokens"]), []).append(row["loss_value"])
        for some in values.values():
            assert some == pytest.approx([some[0]] * len(some), rel=1e-4)

    def test_progress_and_a_table_are_printed(self, run: Any) -> None:
        done, report = run
        for row in report["rows"]:
            assert gpu.line(row) in done.stdout
        assert gpu.table(report["rows"]) in done.stdout


class TestRefusals:
    """Exit status 2, a reason on stderr, and no work."""

    def test_an_existing_file_is_not_overwritten(self, tmp_path: Path) -> None:
        out = tmp_path / "there.json"
        out.write_text("precious")
        done = suite("--out", out, "--interpret")
        assert done.returncode == 2
        assert "exists" in done.stderr
        assert out.read_text() == "precious"

    def test_no_gpu(self, tmp_path: Path) -> None:
        done = suite("--out", tmp_path / "new.json", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
        assert done.returncode == 2
        assert "no GPU" in done.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "reason"), [(("--only", "nothing"), "times: toy jsd"), (("--quick",), "not allowed"), ((), "no folder")]
    )
    def test_what_cannot_be_run(self, arguments: tuple[str, ...], reason: str, tmp_path: Path) -> None:
        out = tmp_path / "new.json" if arguments else tmp_path / "nowhere" / "new.json"
        done = suite("--out", out, "--interpret", *arguments)
        assert done.returncode == 2
        assert reason in done.stderr
        assert list(tmp_path.iterdir()) == []


class TestFailures:
    def test_a_contender_that_fails_is_a_row_that_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def out_of_memory(loss: str) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

        monkeypatch.setattr(gpu_times, "CONTENDERS", {"large": out_of_memory, "eager": contenders.CONTENDERS["eager"]})
        rows = list(gpu_times.run("toy", "toy", "jsd"))
        assert [row.get("failed") for row in rows] == ["OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB", None] * 2
        assert "out of memory" in gpu.line(rows[0])

    def test_a_wrong_gradient_fails_its_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = gpu_checks.Case.run
        monkeypatch.setattr(
            gpu_checks.Case, "run", lambda case, **_: {**right(case), "student_weight": right(case)["student_weight"] * 1.01}
        )
        found = gpu_checks.checked({}, "cpu", gpu_checks.accuracy, "jsd", "tokens", torch.float32, 3.0, "toy", "cpu")
        assert found["passed"] is False
        assert "student_weight" in found["reason"]

    def test_a_difference_between_two_runs_fails_its_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs = iter([1.0, 1.0 + 2**-23])
        monkeypatch.setattr(gpu_checks.Case, "run", lambda case, **_: {"loss": torch.tensor(next(runs))})
        found = gpu_checks.checked({}, "cpu", gpu_checks.two_runs, dressed(draw()), "tokens")
        assert found == {"passed": False, "reason": "ArithmeticError: loss differs by up to 1.19e-07"}

    def test_a_part_that_breaks_off_fails_and_the_others_go_on(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "broken.json"
        broken = {"times: nowhere": ("times", "nowhere", "jsd"), "times: neither": ("times", "neither", "jsd")}
        assert gpu.measure(out, "toy", broken) == 1
        report = json.loads(out.read_text())
        assert [check["check"] for check in report["checks"]] == [f"{name} ran to its end" for name in broken]
        assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]
        assert "FAIL" in capfd.readouterr().out


def test_the_bare_products_are_those_of_the_loss() -> None:
    """x, z, dH and dW once each, however many blocks they come in: 3 Us + Ut operations."""
    from torch.utils.flop_counter import FlopCounterMode

    head = contenders.Head("student", "teacher", 50, 60, 8, 12)
    given = contenders.problem(head, 24, torch.float32, "cpu")
    for block in (7, 24, 100):
        with FlopCounterMode(display=False) as counter:
            contenders.products(given, block)()
        assert counter.get_total_flops() == 2 * 24 * 50 * (3 * 8 + 12)


def test_every_head_and_token_count_is_measured() -> None:
    names = gpu.parts("full")
    assert [name for name in names if name.startswith("times")] == [
        f"times: {head} {loss}" for head in contenders.HEADS for loss in contenders.LOSSES
    ]
    assert [name for name in names if name.startswith("checks")] == [
        f"checks: {strategy} {dtype}" for strategy in ("tokens", "vocab") for dtype in ("fp32", "bf16", "fp16")
    ]
    assert set(gpu_checks.QUICK) <= set(gpu_checks.SETTINGS)
    assert gpu_times.EXTENTS["full"].tokens == (2048, 4096, 8192, 16_384, 32_768)
