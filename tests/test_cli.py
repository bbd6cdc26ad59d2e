"""Claims about the command line, none of which needs more than torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels import info
from kdkernels.backends import native
from kdkernels.cli import main


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """Exit status and the last line on standard error."""
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        status = int(stop.code or 0)
    lines = capsys.readouterr().err.strip().splitlines()
    return status, lines[-1] if lines else ""


def test_info_names_versions_backends_and_instruction_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for expected in (kd.__version__, torch.__version__, *kd.divergences(), *native.instruction_sets(), info.processor()):
        assert expected in shown
    assert f"backend, cpu     {kd.backend('cpu')}" in shown


def test_info_says_what_an_unbuilt_extension_means(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_sets", lambda: ())
    assert main(["info"]) == 0
    assert "the C++ extension is not built" in capsys.readouterr().out


def test_info_works_without_the_libraries_of_the_demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "tokenizers", "safetensors", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["info"]) == 0
    assert capsys.readouterr().out.count("not installed") == 4


def test_help_lists_the_commands_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "demo " in shown
    assert "info " in shown
    assert "python -m kdkernels demo --minutes 1" in shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--minutes", "0"], ("--minutes", "'0'", "at least 0.1")),
        (["demo", "--minutes", "nan"], ("--minutes", "'nan'", "at least 0.1")),
        (["demo", "--minutes", "soon"], ("--minutes", "'soon'", "at least 0.1")),
        (["demo", "--seed", "1.5"], ("--seed", "'1.5'", "an integer")),
        (["demo", "--seed", "-1"], ("--seed", "'-1'", "from 0")),
        (["dmeo"], ("COMMAND", "'dmeo'", "demo")),
        ([], ("COMMAND",)),
    ],
)
def test_a_bad_argument_is_named_with_what_came_and_what_is_accepted(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: tuple[str, ...]
) -> None:
    status, line = error_of(capsys, arguments)
    assert status == 2
    for part in parts:
        assert part in line


def test_a_missing_library_is_one_line_that_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, line = error_of(capsys, ["demo", "--out", str(tmp_path / "new")])
    assert status == 2
    assert line == "error: the demo needs tokenizers, not installed here: pip install kdkernels[demo]"
    assert not (tmp_path / "new").exists()


def test_an_unrelated_folder_is_refused_and_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    status, line = error_of(capsys, ["demo", "--out", str(tmp_path)])
    assert status == 2
    assert line.startswith(f"error: --out {tmp_path} holds other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    status, line = error_of(capsys, ["demo", "--out", str(taken)])
    assert status == 2
    assert "is a file" in line
    assert taken.read_text() == "mine"


def test_an_interrupt_is_exit_130_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdkernels.demo.run.run", interrupted)
    status, line = error_of(capsys, ["demo", "--out", str(tmp_path / "new")])
    assert status == 130
    assert "--resume" in line
