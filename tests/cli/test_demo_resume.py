"""The demo after an interruption, on a full disk, with damaged files, and on a machine that is slow."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")


from kdkernels.console import files
from kdkernels.demo import corpus as corpora
from kdkernels.demo import train
from kdkernels.errors import CommandError
from tests.support.demo import TINY, learned, run

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("steps_before", [10, 24, 37, 61])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    finished: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_before: int
) -> None:
    """Cut off in the middle of the teacher, right after it, in the middle of the student, and of its further steps."""
    take_step: Callable[..., None] = train.take_step
    trial_steps = train.TIMED_STEPS + 1
    taken = 0

    def cut_off(phase: train.Phase, *arguments: Any) -> None:
        nonlocal taken
        phases_before = (steps_before - 1) // 24
        if taken == trial_steps * (1 + phases_before) + steps_before:
            raise KeyboardInterrupt
        taken += 1
        take_step(phase, *arguments)

    monkeypatch.setattr(train, "take_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(train, "take_step", take_step)
    assert not (tmp_path / "results.json").exists()
    results, _ = run(tmp_path, resume=True)
    assert learned(results) == learned(finished[1])
    whole, resumed = (files.load(place / "students.safetensors")[0] for place in (finished[0], tmp_path))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_second_run_reuses_corpus_and_teacher_and_trains_the_students_anew(
    finished: tuple[Path, dict[str, Any], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "learn", None)  # a vocabulary learned again would fail
    results, screen = run(folder)
    assert "from the cache" in screen
    assert results["teacher"]["from_cache"]
    assert results["student"]["from_cache"]
    assert not results["students"]["from_cache"]
    assert learned(results) == learned(finished[1])


def test_resuming_a_finished_run_trains_nothing_and_nothing_else_is_on_the_screen(
    finished: tuple[Path, dict[str, Any], str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "take_step", None)
    results, _ = run(folder, resume=True)
    assert learned(results) == learned(finished[1])
    assert capfd.readouterr() == ("", "")


def test_resuming_a_demo_that_is_not_there_is_an_error_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"--resume: .*gone holds no demo; accepted: the --out of an earlier one"):
        run(tmp_path / "gone", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_resuming_goes_on(
    finished: tuple[Path, dict[str, Any], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "results.json").unlink()

    write = files.write

    def no_space(path: Path, content: bytes) -> None:
        if path.name == "results.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", no_space)
        with pytest.raises(CommandError, match=r"--out .* cannot be written: No space left on device; with room the same command"):
            run(folder, resume=True)
    assert not list(folder.glob("*.tmp"))
    assert learned(run(folder, resume=True)[0]) == learned(finished[1])


def test_resuming_with_other_settings_is_an_error_that_names_them(folder: Path) -> None:
    with pytest.raises(CommandError, match=r"--resume cannot continue .*teacher.safetensors.*--minutes 5 --seed 0.*--seed 3"):
        run(folder, dataclasses.replace(TINY, seed=3), resume=True)


@pytest.mark.parametrize("name", ["corpus.safetensors", "teacher.safetensors", "student.safetensors", "students.safetensors"])
@pytest.mark.parametrize("harm", ["cut short", "emptied", "one bit changed"])
def test_a_damaged_file_is_named_with_what_to_do(folder: Path, name: str, harm: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    if harm == "one bit changed":
        content[-100] ^= 1
    else:
        del content[len(content) // 2 if harm == "cut short" else 0 :]
    path.write_bytes(content)
    with pytest.raises(CommandError) as caught:
        run(folder, resume=True)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith("delete it and run again: what it held is made anew")
    assert "\n" not in message


def test_a_killed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    files.save(path, {"a": torch.ones(3)}, {"step": 1})

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.save(path, {"a": torch.zeros(3)}, {"step": 2})
    assert files.load(path)[1] == {"step": 1}


def test_a_slow_machine_does_fewer_steps_and_says_so(folder: Path) -> None:
    slow = dataclasses.replace(TINY, further_seconds=0.0)
    results, screen = run(folder, slow)
    assert results["students"]["steps"] == train.FEWEST_STEPS < results["students"]["planned_steps"]
    assert "20 steps instead of 24" in screen


def test_a_machine_that_slows_down_stops_all_students_at_one_earlier_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_step_seconds", lambda *arguments: 1e-9)
    results, _ = run(folder, dataclasses.replace(TINY, further_seconds=1e-3))
    assert results["students"]["steps"] == train.FEWEST_STEPS < results["students"]["planned_steps"]
    assert {curve[-1][0] for curve in results["students"]["curves"].values()} == {train.FEWEST_STEPS}
