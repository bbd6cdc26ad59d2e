"""A run that was cut off is finished by ``--resume``, and is then the run that was not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from kdkernels.cli import main
from kdkernels.errors import CommandError
from kdkernels.transformers.distill.configuration import merged
from kdkernels.transformers.distill.run import last_checkpoint
from tests.support.commands import refusal
from tests.support.distilling import TEXT, arguments, assert_same_student, interrupted_at, results_of, weights
from tests.support.training import assert_same


@pytest.mark.parametrize("method", ["taid", "okd"])
def test_a_resumed_run_gives_the_student_of_an_uninterrupted_one(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    options = {"method": method, "steps": 6, "save_steps": 2, "gradient_accumulation": 2, "eval_steps": 3}
    assert main(arguments(given, tmp_path / "whole", **options)) == 0
    with monkeypatch.context() as patched:
        interrupted_at(patched, 5)
        assert main(arguments(given, tmp_path / "cut", **options)) == 130
    assert "the same command with --resume continues" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-4"
    assert not (tmp_path / "cut" / "student").exists()
    # a checkpoint that was being written is passed over
    (tmp_path / "cut" / "checkpoint-5").mkdir()

    said = refusal(capsys, arguments(given, tmp_path / "cut", **options))
    assert said == f"error: --out {tmp_path / 'cut'} holds a run that is not finished; accepted: --resume, or another folder"
    assert main(arguments(given, tmp_path / "cut", "--resume", **{**options, "logging_steps": 3})) == 0
    shown = capsys.readouterr().out
    assert f"continuing from {tmp_path / 'cut' / 'checkpoint-4'}" in shown
    assert "step 6 of 6" in shown
    assert "step 3 of 6" not in shown, "the steps before the checkpoint were taken again"
    assert_same_student(tmp_path / "whole", tmp_path / "cut")
    results = [results_of(tmp_path / name) for name in ("whole", "cut")]
    for when in ("before", "after"):
        assert results[0][when] == results[1][when]


def test_a_run_cut_off_between_its_last_checkpoint_and_its_end_is_finished_without_a_step(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(given, out)) == 0
    expected = weights(out / "student")
    (out / "results.json").unlink()
    shutil.rmtree(out / "student")
    assert main(arguments(given, out, "--resume")) == 0
    assert_same(weights(out / "student"), expected)


def test_a_finished_run_is_neither_overwritten_nor_run_again(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(given, out)) == 0
    table = capsys.readouterr().out.split("held out\n")[-1].split("┏")[1]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "kdkernels-distill.json"}
    said = refusal(capsys, arguments(given, out))
    assert said == f"error: --out {out} holds a finished run; accepted: --resume, or another folder"
    assert main(arguments(given, out, "--resume")) == 0
    shown = capsys.readouterr().out
    assert "finished before" in shown
    assert shown.split("┏")[1] == table
    said = refusal(capsys, arguments(given, out, "--resume", learning_rate=0.5))
    assert f"--resume: --learning-rate is 0.5, and was 0.01 in the run in {out}" in said
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_run_is_not_resumed_with_other_data(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert main(arguments(given, tmp_path / "run", data=text)) == 0
    (tmp_path / "run" / "results.json").unlink()
    text.write_text(TEXT.replace("mat", "hat"))
    assert "--resume: the data is not that of the run" in refusal(capsys, arguments(given, tmp_path / "run", "--resume", data=text))


def test_resuming_what_was_never_begun_is_refused(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gone", "empty"):
        if name == "empty":
            (tmp_path / name).mkdir()
        said = refusal(capsys, arguments(given, tmp_path / name, "--resume"))
        assert said.startswith("error: --resume: ")
        assert str(tmp_path / name) in said
        assert said.endswith("accepted: the --out of an earlier run, or the same command without --resume, which begins one")
    assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[]]


def test_a_run_interrupted_before_its_first_checkpoint_is_begun_again(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same command with --resume, as the interrupted one says, and by --resume --out alone."""
    assert main(arguments(given, tmp_path / "whole", save_steps=2)) == 0
    for name, again in (("same", arguments(given, tmp_path / "same", "--resume", save_steps=2)), ("alone", None)):
        with monkeypatch.context() as patched:
            interrupted_at(patched, 1)
            assert main(arguments(given, tmp_path / name, save_steps=2)) == 130
        assert "the same command with --resume continues" in capsys.readouterr().err
        assert main(again or ["distill", "--resume", f"--out={tmp_path / name}"]) == 0
        assert "no checkpoint yet: starting from the beginning" in capsys.readouterr().out
        assert_same_student(tmp_path / "whole", tmp_path / name)


def test_a_resumed_run_takes_its_other_options_from_its_folder(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"method": "skew_forward_kl", "divergence_parameter": 0.3, "steps": 4, "save_steps": 2, "temperature": 2}
    assert main(arguments(given, tmp_path / "whole", "--bf16", **options)) == 0
    with monkeypatch.context() as patched:
        interrupted_at(patched, 3)
        assert main(arguments(given, tmp_path / "cut", "--bf16", **options)) == 130
    alone = ["distill", "--resume", f"--out={tmp_path / 'cut'}"]
    for more, expected in (
        ("--steps=5", "--steps is 5, and was 4 in the run"),
        ("--epochs=5", "--steps is not given, and was 4 in the run"),
        ("--method=okd", "--method is okd, and was skew_forward_kl in the run"),
        ("--no-bf16", "--bf16 is False, and was True in the run"),
    ):
        assert expected in refusal(capsys, [*alone, more])
    assert main([*alone, "--temperature=2"]) == 0
    assert f"continuing from {tmp_path / 'cut' / 'checkpoint-2'}" in capsys.readouterr().out
    assert_same_student(tmp_path / "whole", tmp_path / "cut")
    assert main(alone) == 0
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "cannot be read ("),
        ("[]", "cannot be read ("),
        ('{"settings": {"steps": "many"}}', "steps is 'many'; accepted: an integer from 1 on"),
    ],
)
def test_a_run_whose_record_is_lost_is_not_begun_anew(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, expected: str
) -> None:
    out = tmp_path / "run"
    for name, text in (("kdkernels-distill.json", ""), ("checkpoint-2/trainer_state.json", "{}"), ("run.json", content)):
        if text is not None:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)
    for argv in (arguments(given, out, "--resume"), ["distill", "--resume", f"--out={out}"]):
        said = refusal(capsys, argv)
        assert str(out / "run.json") in said
        assert expected in said
    assert (out / "checkpoint-2").is_dir()


def test_a_checkpoint_that_was_damaged_is_named(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(arguments(given, out)) == 0
    (out / "results.json").unlink()
    for name in ("optimizer.pt", "model.safetensors", "distillation.pt"):
        file = out / "checkpoint-2" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        said = refusal(capsys, ["distill", "--resume", f"--out={out}"])
        assert said.startswith(f"error: {out / 'checkpoint-2'} is damaged")
        file.write_bytes(content)
    assert main(["distill", "--resume", f"--out={out}"]) == 0


def test_what_a_run_had_gives_way_to_what_excludes_it() -> None:
    before = {"teacher": "a", "student": "b", "out": "c", "method": "taid", "steps": 5}
    assert merged({"epochs": 2.0}, {}, before).steps is None
    assert merged({}, {"epochs": 2.0}, before).steps is None
    assert merged({}, {}, before).steps == 5
    with pytest.raises(CommandError, match="--lora-rank is of method okd; the method is taid"):
        merged({"lora_rank": 3}, {}, before)
    with pytest.raises(CommandError, match=r"--teacher is required, .*\(the run was cut off before it had kept its own\)"):
        merged({"out": "c"}, {}, {})
