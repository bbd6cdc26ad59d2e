"""Options on the command line and in files, and those that are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from kdkernels.cli import main
from kdkernels.engine.outcomes import TAILS
from kdkernels.errors import CommandError, to_install
from kdkernels.transformers.distill.configuration import merged, read_config
from kdkernels.transformers.distill.options import BY_NAME
from kdkernels.transformers.methods import methods
from tests.support import ROOT
from tests.support.commands import refusal
from tests.support.distilling import arguments, results_of


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_file_gives_options_and_the_command_line_comes_first(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    options = {
        "teacher": str(given / "teacher"),
        "student": str(given / "student"),
        "data": str(given / "text.txt"),
        "method": "skew_reverse_kl",
        "divergence-parameter": 0.2,
        "max_length": 16,
        "batch-size": 4,
        "epochs": 50,  # gives way to --steps
        "learning_rate": "1e-2",  # as YAML reads it
        "bf16": True,
        "eval-data": None,
        "out": str(tmp_path / "not here"),
    }
    file = tmp_path / f"run.{ending}"
    file.write_text(
        json.dumps(options) if ending == "json" else "\n".join(f"{k}: {'' if v is None else v}" for k, v in options.items())
    )
    assert main(["distill", f"--config={file}", "--steps=1", "--no-bf16", f"--out={tmp_path / 'run'}"]) == 0
    settings = results_of(tmp_path / "run")["settings"]
    assert settings["steps"] == 1
    assert settings["epochs"] is None
    assert settings["bf16"] is False
    assert settings["learning_rate"] == 0.01
    assert settings["divergence_parameter"] == 0.2
    assert settings["schedule"] == "cosine"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("learning-rat: 1", "'learning-rat' is not known; the nearest is learning_rate"),
        ("steps: many", "steps is 'many'; accepted: an integer from 1 on"),
        ("steps: 1.5", "steps is 1.5; accepted: an integer"),
        ("steps: true", "steps is True; accepted: an integer"),
        ("steps: 0", "steps is 0; accepted: an integer from 1 on"),
        ("temperature: .inf", "temperature is inf; accepted: a positive number"),
        ("temperature: [1]", "temperature is [1]; accepted: a positive number"),
        ("learning_rate: fast", "learning_rate is 'fast'; accepted: a number of at least 0"),
        ("bf16: 1", "bf16 is 1; accepted: true or false"),
        ("data: 3", "data is 3; accepted: text"),
        ("method: kl", "method is 'kl'; accepted: one of forward_kl,"),
        ("batch-size: 2\nbatch_size: 2", "batch_size is there twice"),
        ("method: taid\nmethod: okd", "method is there twice"),
        ("- a\n- b", "holds no names with values"),
        ("a: [", "is not YAML"),
        ("{'a': 1", "is not YAML"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(CommandError) as raised:
        read_config(tmp_path / "run.yaml")
    assert str(raised.value).startswith(f"--config {tmp_path / 'run.yaml'}")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "twice.json").write_text('{"steps": 1, "steps": 2}')
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    for name, expected in (
        ("a.json", "is not JSON"),
        ("twice.json", "steps is there twice"),
        ("b.yaml", "not text in UTF-8"),
        ("c.yaml", "No such file"),
    ):
        with pytest.raises(CommandError, match=expected):
            read_config(tmp_path / name)


def test_the_command_offers_the_methods_and_tails_of_the_library() -> None:
    for option, names in (("method", methods()), ("topk_tail", TAILS)):
        accepted = BY_NAME[option].kind.accepted.removeprefix("one of ").split(", ")
        assert sorted(accepted) == sorted(names)


def test_every_default_is_a_value_that_its_option_accepts() -> None:
    for option in BY_NAME.values():
        if option.default is not None:
            assert option.kind.of_value(option.default) == option.default


def test_options_exclude_each_other_within_one_place_only() -> None:
    base = {"teacher": "a", "student": "b", "out": "c", "method": "taid"}
    assert merged({**base, "epochs": 2.0}, {"steps": 5}).steps is None
    for first, second in (({"steps": 1, "epochs": 2.0}, {}), ({}, {"eval_data": "x", "eval_fraction": 0.1})):
        with pytest.raises(CommandError, match="exclude each other"):
            merged({**base, **first}, second)


@pytest.mark.parametrize(
    ("options", "more", "expected"),
    [
        ({"method": "kl"}, (), "--method: got 'kl'; accepted: one of forward_kl"),
        ({"steps": 0}, (), "--steps: got '0'; accepted: an integer from 1 on"),
        ({"temperature": "nan"}, (), "--temperature: got 'nan'; accepted: a positive number"),
        ({"eval_fraction": 1}, (), "--eval-fraction: got '1'; accepted: a number from 0, below 1"),
        ({"student": None}, (), "--student is required"),
        ({"data": None}, (), "--data is required"),
        ({"epochs": 1}, (), "--steps and --epochs exclude each other"),
        ({"lora_rank": 4}, (), "--lora-rank is of method okd; the method is forward_kl"),
        ({"taid_t_start": 0.3, "method": "okd"}, (), "--taid-t-start is of method taid"),
        ({}, ("--save-teacher",), "--save-teacher is of method okd"),
        ({"divergence": "jsd"}, (), "divergence='jsd' goes with method 'taid' or 'okd'"),
        ({"divergence_parameter": 0.5}, (), "forward_kl"),
        ({"on_policy_schedule": "adaptive"}, (), "goes by evaluations, and --eval-steps is not given"),
        ({"eval_steps": 1, "eval_fraction": 0}, (), "--eval-steps needs held-out data"),
        ({"student": "/nowhere/at/all"}, (), "--student: '/nowhere/at/all' cannot be loaded: there is no such folder"),
        ({"teacher": "owner/gone"}, (), "--teacher: 'owner/gone' cannot be loaded: neither a folder nor in the hub's cache here"),
        ({"data": "gone.txt"}, (), "--data: 'gone.txt': there is no such file or folder"),
        ({"split": "test"}, (), "has no split 'test'"),
        ({"eval_data": "gone.txt"}, (), "--eval-data: 'gone.txt'"),
        ({"max_length": 4096}, (), "leaves none to learn from"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_makes_no_folder(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], more: tuple[str, ...], expected: str
) -> None:
    assert expected in refusal(capsys, arguments(given, tmp_path / "run", *more, **options))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds other files" in refusal(capsys, arguments(given, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_examples_longer_than_a_model_takes_are_refused(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, arguments(given, tmp_path / "run", student=given / "gpt2_student", max_length=100))
    assert "the longest example has 100 tokens, and the student takes 64; accepted: --max-length 64" in said


def test_a_loss_that_is_no_number_ends_the_run(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, arguments(given, tmp_path / "run", learning_rate=1e30, steps=6, warmup=0))
    assert re.search(r"the (loss|norm of the gradients) is (nan|inf) at step \d; .*a smaller learning rate", said)
    assert not (tmp_path / "run" / "student").exists()


def test_a_missing_library_is_named(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert f"distill needs accelerate, not installed here: {to_install('transformers')}" in refusal(
        capsys, arguments(given, tmp_path / "run")
    )


def test_help_has_examples_and_every_option_and_needs_no_optional_library(tmp_path: Path) -> None:
    """In a process of its own, where these cannot be imported."""
    absent = ("transformers", "accelerate", "safetensors.torch", "rich", "peft", "datasets", "tokenizers", "yaml")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\nfrom kdkernels.cli import main\nmain(['distill', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python -m kdkernels distill --") >= 5
    for option in BY_NAME.values():
        assert option.flag in done.stdout
    for method in methods():
        assert method in done.stdout


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
