"""Folders and names that are not what they are taken for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from huggingface_hub import constants

from kdkernels.cli import main
from kdkernels.console import files
from kdkernels.errors import CommandError
from kdkernels.transformers.load import load_model, load_tokenizer
from tests.support.commands import refusal
from tests.support.distilling import arguments, cache_of


def test_a_folder_of_another_command_is_told_with_the_one_that_is_meant(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert main(arguments(given, run)) == 0
    assert main(cache_of(given / "teacher", given / "text.txt", cache, "--max-length=16")) == 0
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
    said = refusal(capsys, cache_of(run, given / "text.txt", tmp_path / "new"))
    assert student in said
    assert main(arguments(given, tmp_path / "on", student=run / "checkpoint-2", teacher=run / "student", steps=1)) == 0


def test_a_cache_may_be_named_from_home(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(cache_of(given / "teacher", given / "text.txt", tmp_path / "cache", "--max-length=16")) == 0
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
