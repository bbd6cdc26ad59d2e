# ruff: noqa: F811 (fixtures of another file)
"""Claims about what a run of ``distill`` shows and leaves: its progress, plot and reports, and what a full disk does to it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from huggingface_hub import constants
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from kdkernels.cli import main
from kdkernels.console import files, terminal
from kdkernels.errors import CommandError
from kdkernels.transformers.distill import data as data_module
from kdkernels.transformers.distill import run as run_module
from kdkernels.transformers.distill.configuration import merged
from kdkernels.transformers.distill.options import BY_NAME
from kdkernels.transformers.distill.run import last_checkpoint
from kdkernels.transformers.load import load_model, load_tokenizer
from tests.support.data import put
from tests.transformers.test_distill import TEXT, arguments, given, offline, pytestmark, refusal, weights  # noqa: F401


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# ---- what is shown ----


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


# ---- where the log goes ----


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


# ---- options ----


def test_help_shows_the_values_of_every_option_that_has_few(capsys: pytest.CaptureFixture[str]) -> None:
    choices = {option.flag: option.kind.names for option in BY_NAME.values() if option.kind.names}
    assert {"--schedule", "--dtype", "--teacher-dtype", "--topk-tail", "--method", "--divergence", "--on-policy-schedule"} == {
        *choices
    }
    for command in ("distill", "cache", "plan"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        expected = choices if command == "distill" else {"--dtype": ("bfloat16", "float16")}
        for flag, names in expected.items():
            assert re.search(rf"^  {flag} {{[\w,]*{','.join(names)}", shown, re.MULTILINE) or command == "cache", flag
    assert "--dtype {auto,float32,bfloat16,float16}" in _help("cache", capsys)


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_what_a_run_had_gives_way_to_what_excludes_it() -> None:
    before = {"teacher": "a", "student": "b", "out": "c", "method": "taid", "steps": 5}
    assert merged({"epochs": 2.0}, {}, before).steps is None
    assert merged({}, {"epochs": 2.0}, before).steps is None
    assert merged({}, {}, before).steps == 5
    with pytest.raises(CommandError, match="--lora-rank is of method okd; the method is taid"):
        merged({"lora_rank": 3}, {}, before)
    with pytest.raises(CommandError, match=r"--teacher is required, .*\(the run was cut off before it had kept its own\)"):
        merged({"out": "c"}, {}, {})


# ---- prompts alone ----


def test_prompts_alone_are_enough_where_the_student_writes_every_batch(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on is what it wrote, of --max-new-tokens each as no end is likely; a prompt's tokens do not count."""
    source = put(tmp_path / "prompts.jsonl", *({"prompt": TEXT[i : i + 6]} for i in range(12)))
    options = {"data": source, "on_policy_fraction": 1, "max_new_tokens": 5, "steps": 3}
    assert main(arguments(given, tmp_path / "run", **options)) == 0
    results = results_of(tmp_path / "run")
    assert (results["train_examples"], results["eval_examples"]) == (12, 0)
    assert 0.8 * 3 * 4 * 5 < results["tokens"] <= 3 * 4 * 5
    assert results["before"] == results["after"] == {}
    assert "prompts alone have no tokens to judge the student by: nothing is held out" in capsys.readouterr().out

    held = put(tmp_path / "pairs.jsonl", *[{"prompt": "on the", "completion": "mat"}] * 2)
    assert main(arguments(given, tmp_path / "judged", **options, eval_data=held, eval_steps=2)) == 0
    assert results_of(tmp_path / "judged")["eval_examples"] == 2
    mixed = put(tmp_path / "mixed.jsonl", *[{"prompt": "on the"}] * 8, *[{"prompt": "on the", "completion": "mat"}] * 8)
    assert main(arguments(given, tmp_path / "mixed", **{**options, "data": mixed}, eval_fraction=0.25)) == 0
    results = results_of(tmp_path / "mixed")
    assert (results["train_examples"], results["eval_examples"]) == (14, 2)
    assert results["before"]["loss"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 'a "prompt" alone only to learn from, where the student writes every batch (--on-policy-fraction 1)'),
        ({"on_policy_fraction": 0.9}, 'holds "prompt" (a string); accepted: '),
        ({"on_policy_fraction": 1, "eval_steps": 1}, "--eval-steps needs held-out data, and prompts alone are none"),
        ({"on_policy_fraction": 1, "max_length": 5}, "whose prompt fills the 5 tokens of --max-length"),
        (
            {"on_policy_fraction": 1, "max_new_tokens": 4000},
            "the longest prompt has 6 tokens, with --max-new-tokens 4,000 more than the 2,048 that the student",
        ),
    ],
)
def test_prompts_alone_that_teach_nothing_are_refused(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], expected: str
) -> None:
    source = put(tmp_path / "prompts.jsonl", *({"prompt": TEXT[i : i + 6]} for i in range(8)))
    assert expected in refusal(capsys, arguments(given, tmp_path / "run", data=source, **options))


def test_prompts_that_fill_an_example_are_counted_apart_from_empty_records(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "on the", "completion": "mat"}
    source = put(
        tmp_path / "a.jsonl",
        *[pair] * 8,
        *[{"prompt": "a" * 20, "completion": "b"}] * 2,
        {"text": ""},
        {**pair, "prompt": "a" * 14},
    )
    assert main(arguments(given, tmp_path / "run", data=source, steps=1)) == 0
    expected = (
        f"{source}: 1 example cut at 16 tokens (--max-length); 2 examples left out, whose prompt fills the 16 tokens of "
        "--max-length; 1 example left out without a token to learn"
    )
    assert expected in capsys.readouterr().out


# ---- folders that are not what they are taken for ----


def test_a_folder_of_another_command_is_told_with_the_one_that_is_meant(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert main(arguments(given, run)) == 0
    assert (
        main(["cache", f"--teacher={given / 'teacher'}", f"--data={given / 'text.txt'}", "--max-length=16", f"--out={cache}"]) == 0
    )
    begun = tmp_path / "begun"
    files.claim(begun, "distill")
    student = f"it is a run of distill, whose student is {run / 'student'}"
    is_cache = "it is a cache of a teacher's log-probabilities, which distill takes as its --teacher"
    for options, expected in (
        ({"teacher": run}, student),
        ({"student": run}, student),
        ({"student": begun}, f"it is a run of distill that has no student yet (--resume --out {begun} finishes it)"),
        ({"student": cache}, is_cache),
        ({"student": cache / "tokenizer"}, "the folder holds no config.json"),
        ({"teacher": given}, f"some inside do: {given / 'gemma2_student'}"),
        ({"teacher": run / "student" / "model.safetensors"}, f"the folder {run / 'student'} is meant?"),
        ({"teacher": given / "techer"}, f"there is no such folder; the nearest is {given / 'teacher'}"),
        ({"data": cache}, "a cache has its examples: as --teacher it needs no --data"),
        ({"out": run / "student"}, f"the distill that it is a part of is in {run}"),
        ({"out": run / "checkpoint-2"}, f"the distill that it is a part of is in {run}"),
    ):
        out = options.pop("out", tmp_path / "new")
        assert expected in refusal(capsys, arguments(given, out, **options)), options
    assert f"the run that it is a part of is in {run}" in refusal(capsys, ["distill", "--resume", f"--out={run / 'checkpoint-2'}"])
    for name in ("run.json", "results.json"):
        said = refusal(capsys, ["distill", f"--config={run / name}"])
        assert said.endswith(f"is what a run has written; to go on with that: --resume --out {run}")
    said = refusal(capsys, ["cache", f"--teacher={run}", f"--data={given / 'text.txt'}", f"--out={tmp_path / 'new'}"])
    assert student in said
    assert main(arguments(given, tmp_path / "on", student=run / "checkpoint-2", teacher=run / "student", steps=1)) == 0


def test_a_cache_may_be_named_from_home(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = ["cache", f"--teacher={given / 'teacher'}", f"--data={given / 'text.txt'}", "--max-length=16"]
    assert main([*made, f"--out={tmp_path / 'cache'}"]) == 0
    assert main(arguments(given, tmp_path / "run", teacher="~/cache", data=None)) == 0


@pytest.mark.parametrize("name", ["techer", "owner/techer"])
def test_without_a_hub_a_mistyped_name_is_refused_at_once(name: str, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after huggingface_hub's many tries, which are half a minute for a file and a minute for a model."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.chdir(given)
    for load in (load_model, load_tokenizer):
        begun = time.monotonic()
        with pytest.raises(CommandError, match="in the hub's cache here, and the hub cannot be reached") as raised:
            load(name)
        assert time.monotonic() - begun < 5
        assert ("the nearest is teacher" in str(raised.value)) is ("/" not in name)


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.transformers import hub, load

    asked = []

    def loads(name: str, **options: Any) -> Any:
        asked.append((name, constants.HF_HUB_OFFLINE))
        raise OSError("not this time")

    for answer in (True, False):
        monkeypatch.setattr(hub, "answers", lambda answer=answer: answer)
        monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", loads)
        with pytest.raises(CommandError, match="not this time"):
            load_tokenizer("owner/name")
    assert asked == [("owner/name", False), ("owner/name", True)]
    assert constants.HF_HUB_OFFLINE, "as it was"


# ---- a full disk ----


@contextlib.contextmanager
def full_for(monkeypatch: pytest.MonkeyPatch, what: str) -> Iterator[None]:
    """Inside, what writes the named thing fails as it does on a full disk."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = files.write
    with monkeypatch.context() as patched:
        if what.endswith((".json", ".png")):

            def written(path: Path, content: bytes) -> None:
                if path.name == what:
                    patched.setattr(files.os, "fsync", no_space)
                write(path, content)

            patched.setattr(files, "write", written)
        elif what == "student":
            saved = run_module.KDTrainer.save_model

            def save(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
                if not _internal_call:
                    # as safetensors and tokenizers say it, which have classes of their own
                    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
                saved(self, output_dir, _internal_call)

            patched.setattr(run_module.KDTrainer, "save_model", save)
        yield


@pytest.mark.parametrize("what", ["run.json", "loss.png", "results.json", "student"])
def test_a_full_disk_is_one_line_and_resume_goes_on(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    assert main(arguments(given, tmp_path / "whole")) == 0
    out = tmp_path / "run"
    with full_for(monkeypatch, what):
        said = refusal(capsys, arguments(given, out))
    assert said == (
        f"error: --out {out} cannot be written: No space left on device; what was finished before is whole, and with room the same "
        "command with --resume goes on"
    )
    assert not (out / "results.json").exists()
    assert not list(out.glob("*.tmp"))
    assert main(arguments(given, out, "--resume")) == 0
    for name, tensor in weights(tmp_path / "whole" / "student").items():
        assert torch.equal(tensor, weights(out / "student")[name])
    assert results_of(out)["after"] == results_of(tmp_path / "whole")["after"]


@pytest.mark.parametrize("size", [10_000, 30_000, 60_000])
def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_one_before(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Files of at most so many bytes: at each size another file of the checkpoint, by another library, is cut short."""
    resource = pytest.importorskip("resource")
    options = {"steps": 4, "save_steps": 2}
    assert main(arguments(given, tmp_path / "whole", **options)) == 0
    out = tmp_path / "run"
    step = run_module.Watch.step
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def little_room(self: Any, at: int) -> None:
        step(self, at)
        if at == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module.Watch, "step", little_room)
        try:
            capsys.readouterr()
            assert main(arguments(given, out, **options)) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: --out {out} cannot be written: ")
    assert "Traceback" not in last
    assert last_checkpoint(out) == out / "checkpoint-2"
    assert (out / "checkpoint-4").exists()
    assert main(["distill", "--resume", f"--out={out}"]) == 0
    assert f"continuing from {out / 'checkpoint-2'}" in capsys.readouterr().out
    for name, tensor in weights(tmp_path / "whole" / "student").items():
        assert torch.equal(tensor, weights(out / "student")[name])


def test_a_checkpoint_whose_last_file_was_cut_short_is_passed_over(given: Path, tmp_path: Path) -> None:
    options = {"steps": 4, "save_steps": 2}
    assert main(arguments(given, tmp_path / "run", **options)) == 0
    (tmp_path / "run" / "results.json").unlink()
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "run" / "checkpoint-9")
    state = tmp_path / "run" / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    assert main(arguments(given, tmp_path / "run", "--resume", **options)) == 0
    assert not state.exists()


def test_errors_that_are_not_of_writing_are_left_as_they_are(tmp_path: Path) -> None:
    for error in (
        RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory (inline_container.cc)"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/data.txt"),
        KeyError("x"),
    ):
        with pytest.raises(type(error)), files.writing(tmp_path, "then"):
            raise error
    gone = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "run.json"))
    for error in (
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        gone,
    ):
        with pytest.raises(CommandError, match=r"--out .* cannot be written: .*; then"), files.writing(tmp_path, "then"):
            raise error


# ---- how it ends ----


def test_an_interrupt_at_any_moment_is_exit_130(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for module, place, begun in (
        (run_module, "load_tokenizer", False),
        (data_module, "prepare", False),
        (run_module, "load_model", True),
        (run_module, "KDTrainer", True),
        (run_module, "_evaluation", True),
        (run_module, "plot", True),
        (run_module, "show", True),
    ):
        out = tmp_path / place
        with monkeypatch.context() as patched:
            patched.setattr(module, place, interrupted)
            assert main(arguments(given, out)) == 130
        then = "the same command with --resume continues" if begun else "nothing was written yet: the same command begins anew"
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"interrupted; {then}")
        assert main(arguments(given, out, *(["--resume"] if begun else []))) == 0


def test_a_run_goes_on_to_its_end_when_its_reader_goes_away(given: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdkernels", *arguments(given, tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert results_of(tmp_path / "run")["steps"] == 2


def test_a_machine_without_memory_for_a_batch_is_one_line(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17 bytes.")

    monkeypatch.setattr(run_module.KDTrainer, "compute_loss", too_large)
    said = refusal(capsys, arguments(given, tmp_path / "run"))
    assert said.startswith("error: this machine's memory is too small: try a smaller --batch-size")
