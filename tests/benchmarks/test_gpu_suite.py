"""The GPU suite runs as a whole at toy size through the Triton interpreter, so that it is ready when there is a GPU."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import kdkernels as kd
from benchmarks import contenders, gpu, gpu_checks, gpu_kernels, gpu_report, gpu_smoke, gpu_times, runner
from benchmarks.cases import DTYPES, Case, Head, problem
from kdkernels import backends
from tests.benchmarks.test_runner import part, wait_until
from tests.support import ROOT
from tests.support.cases import draw, dressed
from tests.support.needs import needs_triton

Record = dict[str, Any]
# What has to be asked for, and takes no rows of the toy head: kernels in CUDA C++ need a GPU, offsets a model of 16 bits.
ASKED = (gpu_times.CLUSTERED, gpu_times.OFFSETS, gpu_times.OFFSETS_CUDA)


def suite(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=600,
        check=False,
    )


def lines(path: Path) -> list[Record]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The whole suite at toy size, once for all workers of a test run: how it ended, and where it wrote."""
    session, root = os.environ.get("PYTEST_XDIST_TESTRUNUID"), tmp_path_factory.getbasetemp()
    folder = root.parent / f"gpu-{session}" if session else root / "gpu"
    out, ended = folder / "toy.jsonl", folder / "ended"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker runs it
        wait_until(ended.exists, seconds=600)
    else:
        done = suite("--out", out, "--interpret")
        (folder / "ended.part").write_bytes(pickle.dumps(done))
        (folder / "ended.part").rename(ended)
    return pickle.loads(ended.read_bytes()), out


def of(run: Any, stage: str, key: str) -> list[Record]:
    """The results of a stage that have this key."""
    return [record for record in lines(run[1])[1:] if record["stage"] == stage and key in record]


@needs_triton
class TestThroughTheInterpreter:
    def test_the_first_line_says_where_the_rest_comes_from(self, run: Any) -> None:
        facts = lines(run[1])[0]
        assert facts["interpreter"] is True
        assert "interpreter" in facts["device"]
        assert facts["versions"]["torch"] == torch.__version__
        assert facts["versions"]["triton"]
        assert facts["command"].endswith("--interpret")
        assert facts["date"]

    def test_every_stage_ends_with_nothing_broken_or_left_over(self, run: Any) -> None:
        done, out = run
        assert done.returncode == 0, done.stderr
        assert [record for record in lines(out) if "broken" in record] == []
        ended = [record for record in lines(out) if "not_run" in record]
        assert [record["stage"] for record in ended] == list(gpu.LIMITS)
        assert all(record["not_run"] == [] and record["seconds"] < record["limit_s"] for record in ended)

    def test_smoke_holds_small_losses_to_float64_and_takes_rates(self, run: Any) -> None:
        losses = [check for check in of(run, "smoke", "check") if check["check"] == "small_loss"]
        assert len(losses) == 2 * len(gpu_checks.TOY_DIVERGENCES) * 2
        for check in losses:
            assert check["passed"], check
            assert 0 < max(check["relative_errors"]) <= gpu_smoke.BOUND[check["dtype"]]
        rates = of(run, "smoke", "rate")
        assert [rate["rate"].split()[-1] for rate in rates] == ["bfloat16", "float32", "copy"]
        assert all(rate["per_second"] > 0 for rate in rates)
        served = [check for check in of(run, "smoke", "check") if check["check"] == "backend"]
        assert [(check["dtype"], check["backend"]) for check in served] == [(dtype, "triton") for dtype in DTYPES]

    def test_every_check_passes_or_says_why_it_means_nothing_here(self, run: Any) -> None:
        checks = of(run, "checks", "check")
        assert [check for check in checks if check.get("passed") is False] == []
        passed = {(check["check"], check["strategy"], check["dtype"]) for check in checks if check.get("passed")}
        for strategy in gpu.STRATEGIES:
            for dtype in DTYPES:
                for check in ("accuracy", "two_runs", "backward_twice", "scaled", "special_values"):
                    assert (check, strategy, dtype) in passed
        assert all(check["skipped"] for check in checks if "passed" not in check)

    @pytest.mark.parametrize(("stage", "names"), [("ours", gpu_times.OURS), ("others", gpu_times.EXTENTS["toy"].others)])
    def test_every_contender_has_times_or_a_reason(self, run: Any, stage: str, names: Any) -> None:
        extent = gpu_times.EXTENTS["toy"]
        rows = of(run, stage, "contender")
        assert {(row["loss"], row["tokens"], row["contender"]) for row in rows} == {
            (loss, tokens, name) for loss in extent.losses for tokens in extent.tokens for name in names
        }
        for row in rows:
            if row["contender"] in ASKED:
                assert "what it asks for takes no rows here" in row["failed"]
                continue
            if "skipped" in row:
                assert row["loss"] != "forward_kl", row
                continue
            if "failed" in row:
                assert row["contender"] in gpu_times.WHEELS, row
                assert gpu_times.WHEELS[row["contender"]] in row["failed"]
                continue
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert len(row["ratios"]) == extent.repeats
            assert min(row["first_s"], row["ratio"], row["share_of_product_rate"]) > 0

    def test_the_contenders_computed_the_same_loss(self, run: Any) -> None:
        values: dict[str, list[float]] = {}
        for row in of(run, "ours", "loss_value") + of(run, "others", "loss_value"):
            if (row["contender"], row["loss"]) not in contenders.CROSS_ENTROPY:
                values.setdefault(row["loss"], []).append(row["loss_value"])
        for some in values.values():
            assert some == pytest.approx([some[0]] * len(some), rel=1e-4)

    def test_a_profile_lists_what_a_step_was_made_of(self, run: Any) -> None:
        profiles = of(run, "profile", "contender")
        assert {(row["loss"], row["contender"]) for row in profiles} == {
            (loss, name) for loss in ("forward_kl", "jsd") for name in gpu_kernels.PROFILED
        }
        for row in profiles:
            if row["contender"] in ASKED:
                assert "what it asks for takes no rows here" in row["failed"]
                continue
            assert 0 < len(row["kernels"]) <= gpu_kernels.SHOWN
            times = [kernel["ms"] for kernel in row["kernels"]]
            assert times == sorted(times, reverse=True)
            assert row["kernel_ms"] >= sum(times) * 0.999
            assert "kdkernels::linear_kd" in {kernel["name"] for kernel in row["kernels"]}

    def test_row_candidates_are_compiled_and_then_timed(self, run: Any) -> None:
        rows = of(run, "rows", "candidate")
        ran = [row for row in rows if row["candidate"] == gpu_kernels.TRITON]
        assert all(row["first_s"] > 0 for row in ran)
        timed = [row for row in ran if "median_ms" in row]
        assert 2 * len(timed) == len(ran)
        assert {row["loss"] for row in timed} == {"forward_kl", "jsd"}
        assert {row["skipped"] for row in rows if row not in ran} == {"the cluster kernel needs an NVIDIA GPU"}
        # three sweeps of two float32 matrices and one of dx for jsd, two for a divergence with its value in one sweep
        entries = 4 * 150
        for row in timed:
            assert row["bytes"] == pytest.approx(entries * (8 * (3 if row["loss"] == "jsd" else 2) + 2), rel=0.03)
            assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["median_ms"] * 1e3)

    def test_block_candidates_run_and_say_what_cannot_be_timed_here(self, run: Any) -> None:
        blocks = of(run, "blocks", "candidate")
        assert len(blocks) == 2 * 2 * len(gpu_kernels.TOY_BLOCKS)
        assert {row["loss"] for row in blocks} == {
            loss + dress for loss in ("forward_kl", "jsd") for dress in ("", " dressed", " capped")
        }
        assert [row["skipped"] for row in blocks if "skipped" in row] == [
            "the interpreter's kernels are none of the profiler's"
        ] * (2 * len(gpu_kernels.TOY_BLOCKS))

    def test_what_is_written_is_printed(self, run: Any) -> None:
        done, out = run
        for record in lines(out)[1:]:
            assert gpu_report.line(record) in done.stdout

    def test_the_report_shows_every_stage(self, run: Any) -> None:
        done = suite("--report", run[1])
        assert done.returncode == 0, done.stderr
        assert " 0 failed," in done.stdout
        for row in of(run, "ours", "median_ms"):
            assert f"{row['median_ms']:.2f}" in done.stdout
        for row in of(run, "rows", "median_ms"):
            assert f"{row['median_ms']:.3f}" in done.stdout
        for kernel in of(run, "profile", "kernels")[0]["kernels"]:
            assert kernel["name"] in done.stdout


class Command:
    """``python -m benchmarks.gpu`` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> int:
        self.monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
        return gpu.main()

    def refused(self, *arguments: object) -> str:
        """What it says on stderr when it ends with exit status 2."""
        with pytest.raises(SystemExit) as ended:
            self(*arguments)
        assert ended.value.code == 2
        return self.capsys.readouterr().err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


class TestRefusals:
    """Exit status 2, a reason on stderr, and no work."""

    def test_an_existing_file_is_not_overwritten(self, tmp_path: Path, command: Command) -> None:
        out = tmp_path / "there.jsonl"
        out.write_text("precious")
        assert "exists" in command.refused("--out", out, "--interpret")
        assert out.read_text() == "precious"

    def test_results_of_two_devices_are_not_mixed(self, tmp_path: Path, command: Command) -> None:
        out = tmp_path / "there.jsonl"
        out.write_text('{"device": "NVIDIA Other"}\n')
        said = command.refused("--out", out, "--interpret", "--append")
        assert "'NVIDIA Other'" in said
        assert "through the Triton interpreter" in said
        assert out.read_text() == '{"device": "NVIDIA Other"}\n'

    def test_no_gpu(self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no GPU" in command.refused("--out", tmp_path / "new.jsonl")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (("--only", "nothing"), "time toy"),
            (("--stages", "smoke,mirrors"), "'mirrors' is none of smoke, checks"),
            (("--full",), "not allowed"),
            (("--append",), "No such file"),
            (("--report", "FILE"), "not allowed"),
            ((), "no folder"),
        ],
    )
    def test_what_cannot_be_run(self, arguments: tuple[str, ...], reason: str, tmp_path: Path, command: Command) -> None:
        out = tmp_path / "new.jsonl" if arguments else tmp_path / "nowhere" / "new.jsonl"
        assert reason in command.refused("--out", out, "--interpret", *arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("content", [None, "", '{"stage": "smoke"}\n', "[1]\n"])
    def test_a_report_of_something_else(self, content: str | None, tmp_path: Path, command: Command) -> None:
        path = tmp_path / "other.jsonl"
        if content is not None:
            path.write_text(content)
        assert str(path) in command.refused("--report", path)


def test_results_of_the_same_device_are_added_to(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    out, made = tmp_path / "some.jsonl", {"rate": "copy", "unit": "bytes", "median_ms": 1.0, "per_second": 1e12}
    monkeypatch.setattr(gpu, "results", lambda *_: iter([made]))
    for more in ((), ("--append",)):
        assert command("--out", out, "--interpret", "--stages", "rows,smoke", *more) == 0
    first, second = lines(out)[:3], lines(out)[3:]
    assert [record["stage"] for record in first[1:]] == ["smoke", "rows"]  # in order of worth, whatever was asked first
    assert first[0]["device"] == second[0]["device"]
    assert (first[0]["command"].split()[-1], second[0]["command"].split()[-1]) == ("rows,smoke", "--append")


@needs_triton
def test_what_breaks_off_is_written_and_fails_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "broken.jsonl"
    assert gpu.measure(out, "toy", {"smoke": [part(tmp_path, "die")], "rows": [part(tmp_path, "leave")]}) == 1
    assert [record["stage"] for record in lines(out) if "broken" in record] == ["smoke", "rows"]
    assert capfd.readouterr().out.count("BROKE part die: the process ended by signal SIGSEGV") == 2


class TestFailures:
    def test_a_contender_that_fails_is_a_row_that_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def out_of_memory(loss: str) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        def missing(loss: str) -> Any:
            raise ModuleNotFoundError("No module named 'datasets'")

        for name, contender in (("checkpointed", out_of_memory), ("trl", missing)):
            monkeypatch.setitem(contenders.CONTENDERS, name, contender)
        time_of = gpu_times.opened("toy", "toy")
        rows = [row for name in ("checkpointed", "trl", "eager") for row in time_of(6, "jsd", name)]
        assert [row.get("failed") for row in rows] == [
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB",
            "ModuleNotFoundError: No module named 'datasets'; the wheels that bring it: trl, datasets, dill and multiprocess",
            None,
        ]
        assert "out of memory" in gpu_report.line({"stage": "others", **rows[0]})

    def test_a_compiler_s_error_is_told_with_the_line_that_says_what_is_wrong(self) -> None:
        error = RuntimeError("at 67:7:\n    if teacher is None:\n       ^\nUnsupported type\n")
        assert runner.why(error) == "RuntimeError: at 67:7:: Unsupported type"

    def test_a_wrong_gradient_fails_its_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = gpu_checks.Case.run
        monkeypatch.setattr(
            gpu_checks.Case, "run", lambda case, **_: {**right(case), "student_weight": right(case)["student_weight"] * 1.01}
        )
        found = gpu_checks.checked({}, gpu_checks.accuracy, "jsd", "tokens", torch.float32, 3.0, "toy", "cpu")
        assert found["passed"] is False
        assert "student_weight" in found["reason"]

    def test_a_gradient_that_is_not_scaled_fails_its_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for dtype in DTYPES.values():
            case = dressed(draw(dtype=dtype))
            assert gpu_checks.checked({}, gpu_checks.scaled, case, "tokens") == {"passed": True}
            for wrong in (lambda grad, factor: grad.mul_(factor + 1e-3), lambda grad, factor: grad.mul_(factor.bfloat16())):
                with monkeypatch.context() as patch:
                    patch.setattr(backends, "BACKENDS", [replace(one, scale_=wrong) for one in backends.BACKENDS])
                    assert gpu_checks.checked({}, gpu_checks.scaled, case, "tokens")["passed"] is False, dtype

    def test_a_step_is_captured_once_and_replayed_beside_the_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[str] = []
        graph = mock.Mock(replay=lambda: called.append("replay"))
        monkeypatch.setattr(gpu_kernels, "milliseconds", lambda run, _: run() or float(len(called)))
        for name in ("Stream", "current_stream", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        found = gpu_kernels.replayed(lambda: called.append("step"), lambda: called.append("products"), 2)
        assert called == ["step", "step", "replay", "products", "products", *["replay", "products"] * 2]
        assert found == {"replayed_ms": (6 + 8) / 2, "replayed_ratio": 1.0}
        monkeypatch.setattr(torch.cuda, "graph", mock.Mock(side_effect=RuntimeError("not permitted when stream is capturing")))
        found = gpu_kernels.replayed(lambda: None, lambda: None, 2)
        assert found == {"not_replayed": "RuntimeError: not permitted when stream is capturing"}

    def test_a_difference_between_two_runs_fails_its_check(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs = iter([1.0, 1.0 + 2**-23])
        monkeypatch.setattr(gpu_checks.Case, "run", lambda case, **_: {"loss": torch.tensor(next(runs))})
        found = gpu_checks.checked({}, gpu_checks.two_runs, dressed(draw()), "tokens")
        assert found == {"passed": False, "reason": "ArithmeticError: loss differs by up to 1.19e-07"}

    @pytest.mark.parametrize("wrong", [1.001, torch.nan])
    def test_a_wrong_small_loss_fails_its_check(self, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
        right = kd.linear_kd_loss
        monkeypatch.setattr(
            kd, "linear_kd_loss", lambda *args, **more: right(*args, **more) * (1.0 if args[0].dtype == torch.float64 else wrong)
        )
        found = gpu_checks.checked({}, gpu_smoke.small_loss, "toy", "tokens", "jsd", "fp32")
        assert found["passed"] is False
        assert "relative error" in found["reason"]


def test_the_bare_products_are_those_of_the_loss() -> None:
    """x, z, dH and dW once each, however many blocks they come in: 3 Us + Ut operations."""
    from torch.utils.flop_counter import FlopCounterMode

    given = problem(Case("", Head("any", "student", "teacher", 50, 60, 8, 12), 24, "fp32"))
    for block in (7, 24, 100):
        with FlopCounterMode(display=False) as counter:
            contenders.products(given, block)()
        assert counter.get_total_flops() == 2 * 24 * 50 * (3 * 8 + 12)


def test_a_recorded_command_names_no_folder_of_the_machine() -> None:
    given = ["--out", "/home/someone/out/gpu.jsonl", "--stages", "smoke,checks"]
    assert gpu.command(given) == "python -m benchmarks.gpu --out gpu.jsonl --stages smoke,checks"
    assert gpu.command(["--out=/srv/gpu.jsonl"]) == "python -m benchmarks.gpu --out=gpu.jsonl"
    assert gpu.command(["--out", "results/gpu.jsonl"]) == "python -m benchmarks.gpu --out results/gpu.jsonl"
