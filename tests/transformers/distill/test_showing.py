"""What a run shows and where its log goes: progress, plot, reports."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from kdkernels.cli import main
from kdkernels.console import terminal
from kdkernels.transformers.distill import run as run_module
from tests.support.commands import refusal
from tests.support.data import put
from tests.support.distilling import arguments, results_of


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, given: Path, out: Path, columns: int, **options: Any) -> list[str]:
    """The lines of a run on a terminal of so many columns; a bar that is drawn anew is a new line."""
    screen = _Terminal()
    handler = logging.StreamHandler(screen)  # as transformers has it: made before the bar
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(
        run_module.terminal,
        "Output",
        lambda: terminal.Console(file=screen, force_terminal=True, width=columns, color_system=None, legacy_windows=False),
    )
    logger = logging.getLogger("kdkernels.test")
    logger.addHandler(handler)
    logger.propagate = False
    step = run_module.Watch.step

    def warned(self: Any, at: int) -> None:
        step(self, at)
        logger.warning("a warning from a logger")
        print("a line on standard error, as of warnings.warn", file=sys.stderr)

    monkeypatch.setattr(run_module.Watch, "step", warned)
    try:
        assert main(arguments(given, out, **options)) == 0
    finally:
        logger.removeHandler(handler)
    assert handler.stream is screen, "it has its own stream again"
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))


def test_a_bar_keeps_its_width_and_its_line_at_80_columns(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown_on_a_terminal(monkeypatch, given, tmp_path / "run", 80, method="okd", steps=3, eval_steps=2)
    bars = [line for line in lines if re.match(r"[━╸╺]", line)]
    assert max(map(len, bars)) <= 80
    assert not any("…" in line for line in lines)
    for bar in bars:
        assert re.match(r"[━╸╺ ]{20} \d/3 ", bar), bar
    last = bars[-1]
    assert re.search(r"3/3 .* loss [\d.]+, [\d,]+ tokens/s, teacher_loss [\d.]+", last), last


def test_evaluations_are_lines_above_the_bar_and_warnings_stay_whole(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown_on_a_terminal(monkeypatch, given, tmp_path / "run", 80, steps=4, eval_steps=2)
    evaluations = [line for line in lines if ", held out: loss" in line]
    steps = [re.match(r"step (\d) of 4, held out: loss [\d.]+, kd [\d.]+, ce [\d.]+, agreement", line) for line in evaluations]
    assert [step and step[1] for step in steps] == ["0", "2", "4"]
    log = [entry for entry in results_of(tmp_path / "run")["log"] if "eval_loss" in entry]
    assert f"loss {log[-1]['eval_loss']:.4g}," in evaluations[-1]
    assert lines.count("a warning from a logger") == 4
    assert lines.count("a line on standard error, as of warnings.warn") == 4
    for line in lines:
        assert not (re.search(r"[━╸╺]", line) and "warn" in line), line


def test_a_bar_on_a_narrow_terminal_has_less_text_and_the_same_bar() -> None:
    for columns, expected in ((120, "aaaa, bbbb, cccc"), (50, "aaaa, bbbb"), (44, "aaaa"), (30, "")):
        bar = terminal.Bar(Console(file=io.StringIO(), force_terminal=True, width=columns))
        assert bar.fitting(["aaaa", "bbbb", "cccc"], 1000) == expected


def test_tokens_per_second_are_the_tokens_that_count_over_the_time_of_the_steps(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations are not counted in, however long; the last report is of the last step, whatever logging_steps says."""
    evaluate = run_module.KDTrainer.evaluation_loop

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return evaluate(self, *arguments, **options)

    monkeypatch.setattr(run_module.KDTrainer, "evaluation_loop", slow)
    source = put(tmp_path / "pairs.jsonl", *[{"prompt": "abc", "completion": "de"}] * 40)
    argv = arguments(given, tmp_path / "run", data=source, steps=5, logging_steps=2, eval_steps=1)
    begun = time.monotonic()
    assert main(argv) == 0
    lasted = time.monotonic() - begun
    results = results_of(tmp_path / "run")
    logged = [entry for entry in results["log"] if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 5]
    assert [entry["tokens"] for entry in logged] == [24.0, 24.0, 12.0], "d, e and the end of 4 examples in a step"
    assert results["tokens"] == 60
    seconds = results["tokens"] / results["tokens_per_second"]
    assert 0 < seconds < min(lasted, results["seconds"]) - 5 * 0.2
    shown = capsys.readouterr().out
    assert re.search(r"step 5 of 5: loss .*, [\d,]+ tokens/s, 0 s left", shown)
    assert f"5 steps in {results['seconds']:.0f} s, {results['tokens_per_second']:,.0f} tokens/s" in shown


@pytest.mark.parametrize("method", ["forward_kl", "taid", "okd"])
def test_a_run_leaves_a_plot_of_its_losses(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figures.Figure.savefig

    def kept(self: Any, *arguments: Any, **options: Any) -> None:
        drawn.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figures.Figure, "savefig", kept)
    assert main(arguments(given, tmp_path / "run", method=method, steps=4, eval_steps=2)) == 0
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    results = results_of(tmp_path / "run")
    learned = [entry for entry in results["log"] if "loss" in entry]
    training, held_out = figure.axes[0].lines
    assert training.get_xdata().tolist() == [1, 2, 3, 4] == [entry["step"] for entry in learned]
    assert training.get_ydata().tolist() == [entry["loss"] for entry in learned]
    assert held_out.get_xdata().tolist() == [0, 2, 4]
    assert held_out.get_ydata()[[0, -1]].tolist() == [results["before"]["loss"], results["after"]["loss"]]
    moving = {"taid": "t", "okd": "teacher_loss"}.get(method)
    assert len(figure.axes) == (1 if moving is None else 2)
    if moving is not None:
        assert figure.axes[1].lines[0].get_ydata().tolist() == [entry[moving] for entry in learned]


def test_without_matplotlib_a_run_says_once_that_there_is_no_plot(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(arguments(given, tmp_path / "run", eval_fraction=0)) == 0
    assert capsys.readouterr().out.count("no loss.png: matplotlib is not installed here (pip install matplotlib)") == 1
    assert not (tmp_path / "run" / "loss.png").exists()
    assert results_of(tmp_path / "run")["steps"] == 2


class _Reports(TrainerCallback):
    """Stands for a library's callback."""

    logs: list[dict[str, float]] = []  # noqa: RUF012 (one for all instances, as transformers makes its own)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.logs.append(given["logs"])


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """As if it, and no other, were installed."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", _Reports)
    monkeypatch.setattr(run_module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    _Reports.logs.clear()
    yield _Reports.logs
    _Reports.logs.clear()


@pytest.mark.parametrize("names", ["tensorboard", "all", "tensorboard, none,tensorboard"])
def test_the_log_is_sent_where_report_to_says(given: Path, tmp_path: Path, tensorboard: list[dict[str, float]], names: str) -> None:
    assert main(arguments(given, tmp_path / "run", report_to=names, eval_steps=2)) == 0
    assert sum("loss" in logs for logs in tensorboard) == 2
    assert any("eval_kd" in logs for logs in tensorboard)


def test_what_is_not_installed_is_refused_with_what_is(
    given: Path, tmp_path: Path, tensorboard: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    for names, wrong in (("wandb", "'wandb' is not installed here"), ("tensorbord", "'tensorbord' is not known")):
        said = refusal(capsys, arguments(given, tmp_path / "run", report_to=names))
        assert f"--report-to {wrong}; accepted: none, all, tensorboard; once installed: azure_ml, comet_ml, mlflow" in said
    assert not (tmp_path / "run").exists()


def test_where_nothing_is_installed_all_is_refused(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "get_available_reporting_integrations", list)
    said = refusal(capsys, arguments(given, tmp_path / "run", report_to="all"))
    assert "--report-to 'all' is not installed here; accepted: none; once installed: " in said


def test_an_error_of_what_the_log_is_sent_to_names_the_option(
    given: Path, tmp_path: Path, tensorboard: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    error = type("UsageError", (Exception,), {"__module__": "tensorboard.errors"})

    def refused(*_: Any, **__: Any) -> None:
        raise error("no account\nis logged in")

    monkeypatch.setattr(_Reports, "on_log", refused)
    said = refusal(capsys, arguments(given, tmp_path / "run", report_to="tensorboard"))
    assert said == "error: --report-to tensorboard: no account is logged in"


def test_a_resumed_run_reports_where_it_is_told_now(given: Path, tmp_path: Path, tensorboard: list[dict[str, float]]) -> None:
    assert main(arguments(given, tmp_path / "run", report_to="tensorboard")) == 0
    (tmp_path / "run" / "results.json").unlink()
    assert main(["distill", "--resume", f"--out={tmp_path / 'run'}", "--report-to=none"]) == 0
