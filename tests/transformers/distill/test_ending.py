"""How a run ends that cannot go on: a full disk, no memory, an interrupt, a reader that goes away."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from kdkernels.cli import main
from kdkernels.console import files
from kdkernels.errors import CommandError
from kdkernels.transformers.distill import data as data_module
from kdkernels.transformers.distill import run as run_module
from kdkernels.transformers.distill.run import last_checkpoint
from tests.support.commands import refusal
from tests.support.distilling import arguments, assert_same_student, results_of


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


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that nothing hindered, one for each choice of options."""

    @functools.cache
    def run(**options: Any) -> Path:
        out = tmp_path_factory.mktemp("whole") / "run"
        assert main(arguments(given, out, **options)) == 0
        return out

    return run


@pytest.mark.parametrize("what", ["run.json", "loss.png", "results.json", "student"])
def test_a_full_disk_is_one_line_and_resume_goes_on(
    given: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
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
    assert_same_student(whole(), out)
    assert results_of(out)["after"] == results_of(whole())["after"]


@pytest.mark.parametrize("size", [10_000, 30_000, 60_000])
def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_one_before(
    given: Path, tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Files of at most so many bytes: at each size another file of the checkpoint, by another library, is cut short."""
    resource = pytest.importorskip("resource")
    options = {"steps": 4, "save_steps": 2}
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
    assert_same_student(whole(**options), out)


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
