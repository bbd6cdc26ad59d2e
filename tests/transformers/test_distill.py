"""Claims about ``python -m kdkernels distill`` and what it loads, with models of some thousand parameters in folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers
from huggingface_hub import constants

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.engine.outcomes import TAILS
from kdkernels.errors import CommandError, to_install
from kdkernels.transformers.distill.configuration import merged, read_config
from kdkernels.transformers.distill.options import BY_NAME
from kdkernels.transformers.distill.report import Watch
from kdkernels.transformers.distill.run import last_checkpoint
from kdkernels.transformers.load import load_model, load_tokenizer
from kdkernels.transformers.methods import methods
from tests.support import ROOT
from tests.support.data import CHAT, put, tokenizer
from tests.support.tiny_models import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

TEXT = "The cat sat on the mat, and the rat sat on the cat. " * 12
WIDER = {"hidden_size": 24, "intermediate_size": 40}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each name that is not there is asked for on the network, several times."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a student and a teacher of Llama, GPT-2 and Gemma 2, each with the same tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("given")
    made = tokenizer()
    for family, wider in (("llama", WIDER), ("gpt2", {"n_embd": 24}), ("gemma2", WIDER)):
        for role, more in (("student", {}), ("teacher", wider)):
            name = folder / (role if family == "llama" else f"{family}_{role}")
            build(family, vocab_size=len(made), seed=len(role), **more).save_pretrained(name)
            made.save_pretrained(name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def arguments(given: Path, out: Path, *more: str, **options: Any) -> list[str]:
    """Of a short run; ``options`` replace what stands here, and None leaves it out."""
    all_of_them: dict[str, Any] = {
        "teacher": given / "teacher",
        "student": given / "student",
        "data": given / "text.txt",
        "method": "forward_kl",
        "out": out,
        "max_length": 16,
        "batch_size": 4,
        "steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        **options,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in all_of_them.items() if value is not None]
    return ["distill", *flags, *more]


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line of a refused command."""
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as stop:
        status = int(stop.code or 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("[transformers]", "usage:", " "))]
    assert status == 2
    assert len(lines) == 1
    return lines[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def swap_tokens(folder: Path) -> None:
    """Exchange the ids of two tokens of the tokenizer in a folder."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def learned(folder: Path, before: Path) -> bool:
    """Whether the weights in ``folder`` are finite and others than those in ``before``."""
    new, old = weights(folder), weights(before)
    assert all(tensor.isfinite().all() for tensor in new.values())
    return any(not torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("method", [*kd.divergences(), "taid", "okd"])
def test_each_method_trains_a_student_that_loads_with_its_tokenizer(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "run"
    assert main(arguments(given, out, method=method)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"step 2 of 2: loss [\d.e-]+, kd [\d.e-]+, ce [\d.]+", shown)
    assert (", t 0." in shown) is (method == "taid")
    for row in ("loss", "kd", "ce", "agreement"):
        assert re.search(rf"│ {row} +│ [\d.]+ │ [\d.]+ │", shown)
    assert f"student: {out / 'student'}" in shown
    assert learned(out / "student", given / "student")
    assert transformers.AutoTokenizer.from_pretrained(out / "student").get_vocab() == tokenizer().get_vocab()
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 2
    assert results["settings"]["method"] == method
    assert results["train_examples"] > results["eval_examples"] > 0
    assert {"loss", "kd", "ce", "agreement"} <= results["before"].keys() == results["after"].keys()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_architectures_are_distilled(given: Path, tmp_path: Path, family: str) -> None:
    student = given / f"{family}_student"
    assert main(arguments(given, tmp_path / "run", teacher=given / f"{family}_teacher", student=student, method="okd")) == 0
    assert learned(tmp_path / "run" / "student", student)


def test_a_student_of_another_architecture_learns_what_it_is_to_learn(given: Path, tmp_path: Path) -> None:
    """The loss that is reported falls; so does, on the held-out part, the distance to the teacher."""
    argv = arguments(
        given, tmp_path / "run", student=given / "gpt2_student", steps=40, warmup=0, eval_fraction=0.2, logging_steps=40
    )
    assert main(argv) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["kd"] < 0.9 * results["before"]["kd"]


@pytest.mark.parametrize("method", ["taid", "okd"])
def test_before_and_after_are_held_against_the_same_teacher(given: Path, tmp_path: Path, method: str) -> None:
    """With a rate of 0 the student stays as it was, while TAID's target and OKD's teacher move."""
    more = {"teacher_learning_rate": 0.1} if method == "okd" else {}
    assert main(arguments(given, tmp_path / "run", method=method, learning_rate=0, steps=4, warmup=0, **more)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("kd", "ce", "agreement"):
        assert results["after"][name] == results["before"][name]


def test_every_kind_of_data_is_taken(given: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chats = [{"messages": CHAT[:3]}] * 6
    datasets.DatasetDict({"train_sft": datasets.Dataset.from_list(chats)}).save_to_disk(str(tmp_path / "saved"))
    sources: dict[str, dict[str, Any]] = {
        "texts": {"data": put(tmp_path / "texts.jsonl", *({"text": f"{TEXT[i : i + 20]}"} for i in range(8)))},
        "chats": {"data": put(tmp_path / "chats.jsonl", *chats), "max_length": 64},
        "pairs": {"data": put(tmp_path / "pairs.jsonl", *[{"prompt": "ab", "completion": "c"}] * 4)},
        "saved": {"data": tmp_path / "saved", "split": "train_sft", "max_length": 64},
        "held out": {"eval_data": put(tmp_path / "held.jsonl", {"text": "on the mat"}), "limit": 5},
    }
    expected = {"texts": (14, 2), "chats": (5, 1), "pairs": (3, 1), "saved": (5, 1), "held out": (5, 1)}
    for name, options in sources.items():
        assert (
            main(
                arguments(
                    given, tmp_path / "runs" / name, steps=1, eval_fraction=None if "eval_data" in options else 0.1, **options
                )
            )
            == 0
        )
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert (results["train_examples"], results["eval_examples"]) == expected[name]
        assert results["before"]["loss"] > 0


def test_without_held_out_data_the_student_is_trained_all_the_same(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(given, tmp_path / "run", eval_fraction=0)) == 0
    assert "│" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["after"] == {}
    assert learned(tmp_path / "run" / "student", given / "student")


def test_epochs_accumulation_and_memory_options_reach_the_run(given: Path, tmp_path: Path) -> None:
    argv = arguments(
        given,
        tmp_path / "run",
        "--gradient-checkpointing",
        "--bf16",
        steps=None,
        epochs=2,
        gradient_accumulation=3,
        memory_budget=2**20,
    )
    assert main(argv) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    a_pass = -(-results["train_examples"] // (4 * 3))
    assert results["steps"] == 2 * a_pass
    assert next(iter(weights(tmp_path / "run" / "student").values())).dtype == torch.float32


def test_okd_saves_the_teachers_lora_where_asked(given: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    argv = arguments(
        given, tmp_path / "run", "--save-teacher", method="okd", lora_rank=3, teacher_alpha=0.7, teacher_learning_rate=1e-3
    )
    assert main(argv) == 0
    about = json.loads((tmp_path / "run" / "student" / "teacher" / "adapter_config.json").read_text())
    assert about["r"] == 3


def test_the_student_may_write_its_own_batches(given: Path, tmp_path: Path) -> None:
    source = put(tmp_path / "pairs.jsonl", *({"prompt": TEXT[i : i + 6], "completion": TEXT[i : i + 5]} for i in range(12)))
    argv = arguments(
        given,
        tmp_path / "run",
        data=source,
        on_policy_fraction=1,
        on_policy_schedule="adaptive",
        max_new_tokens=4,
        eval_steps=1,
        eval_fraction=0.2,
    )
    assert main(argv) == 0
    log = json.loads((tmp_path / "run" / "results.json").read_text())["log"]
    assert [entry["on_policy_fraction"] for entry in log if "loss" in entry] == [1.0, 1.0]
    assert sum("eval_loss" in entry for entry in log) >= 2


def test_a_cached_teacher_takes_the_teachers_place(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["cache", f"--teacher={given / 'teacher'}", f"--data={given / 'text.txt'}", "--max-length=16", "--top-k=8"]
    assert main([*cache, f"--out={tmp_path / 'cache'}"]) == 0
    results = {}
    for name, data in (("with", given / "text.txt"), ("without", None)):
        argv = arguments(given, tmp_path / name, teacher=tmp_path / "cache", data=data, eval_fraction=0.1)
        assert main(argv) == 0
        results[name] = json.loads((tmp_path / name / "results.json").read_text())
    assert learned(tmp_path / "with" / "student", given / "student")
    for name, tensor in weights(tmp_path / "with" / "student").items():
        assert torch.equal(tensor, weights(tmp_path / "without" / "student")[name])
    assert results["with"]["after"] == results["without"]["after"]
    shutil.copytree(given / "student", tmp_path / "student")
    swap_tokens(tmp_path / "student")
    said = refusal(
        capsys, arguments(given, tmp_path / "other", teacher=tmp_path / "cache", student=tmp_path / "student", data=None)
    )
    assert "disagree on 2 of their tokens, the first: 'a' is" in said


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    before = Watch.step

    def stop(self: Any, at: int) -> None:
        before(self, at)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "step", stop)


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
    whole, cut = weights(tmp_path / "whole" / "student"), weights(tmp_path / "cut" / "student")
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
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
    for name, tensor in weights(out / "student").items():
        assert torch.equal(tensor, expected[name])


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
        for entry, tensor in weights(tmp_path / "whole" / "student").items():
            assert torch.equal(tensor, weights(tmp_path / name / "student")[entry])


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
    whole, cut = weights(tmp_path / "whole" / "student"), weights(tmp_path / "cut" / "student")
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
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


# ---- configuration files ----


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
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
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


# ---- what is refused ----


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


def test_models_of_other_tokens_are_refused(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(given / "teacher", tmp_path / "teacher")
    swap_tokens(tmp_path / "teacher")
    said = refusal(capsys, arguments(given, tmp_path / "run", teacher=tmp_path / "teacher"))
    assert "disagree on 2 of their tokens, the first: 'a' is" in said


def test_tokens_of_the_student_alone_are_cut_off_and_refused_in_the_data(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer()
    shared = len(made)
    made.add_special_tokens({"pad_token": "<pad>"})
    made.add_tokens("<new>")
    build("llama", vocab_size=len(made)).save_pretrained(tmp_path / "student")
    made.save_pretrained(tmp_path / "student")
    assert main(arguments(given, tmp_path / "run", student=tmp_path / "student")) == 0
    before, after = weights(tmp_path / "student")["lm_head.weight"], weights(tmp_path / "run" / "student")["lm_head.weight"]
    assert torch.equal(before[shared:], after[shared:])
    assert not torch.equal(before[:shared], after[:shared])
    (tmp_path / "new.txt").write_text(TEXT + "<new>")
    said = refusal(capsys, arguments(given, tmp_path / "other", student=tmp_path / "student", data=tmp_path / "new.txt"))
    assert f"--data has the token '<new>' ({shared + 1}) in 1 of " in said
    assert f"examples, which the teacher does not know: both know the first {shared}; accepted: examples without such tok" in said


def test_conversations_that_are_not_learned_whole_are_told_with_the_first_of_them(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By distill and by cache; what can be learned is."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    source = put(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 4, {"messages": [*CHAT[:2], call]})
    for argv in (
        arguments(given, tmp_path / "run", data=source, eval_fraction=0.25, max_length=200),
        ["cache", f"--teacher={given / 'teacher'}", f"--data={source}", f"--out={tmp_path / 'cache'}", "--top-k=4"],
    ):
        assert main(argv) == 0
        said = capsys.readouterr().out
        assert f"conversations left out: 1, the first: {source}, record 5: the chat template does not write tool_calls (m" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["train_examples"], results["eval_examples"]) == (3, 1)
    bad = put(tmp_path / "b.jsonl", {"messages": [*CHAT[:2], call]})
    said = refusal(capsys, arguments(given, tmp_path / "other", data=bad))
    assert "--data: " in said
    assert f"conversations left out: 1, the first: {bad}, record 1: the chat template does not write tool_calls (message 3)" in said


def test_tokens_that_the_student_lacks_are_said_to_be_lacking_there(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The examples of a cache are the teacher's, with or without its tokenizer beside them."""
    made = tokenizer()
    shared = len(made)
    made.add_tokens([f"<new{number}>" for number in range(3)])
    build("llama", vocab_size=len(made)).save_pretrained(tmp_path / "teacher")
    made.save_pretrained(tmp_path / "teacher")
    source = put(tmp_path / "a.jsonl", {"text": "ab<new2>"}, *[{"text": "abc"}] * 3)
    cached = ["cache", f"--teacher={tmp_path / 'teacher'}", f"--data={source}", "--top-k=8", f"--out={tmp_path / 'cache'}"]
    assert main(cached) == 0
    argv = arguments(given, tmp_path / "run", teacher=tmp_path / "cache", data=None, eval_fraction=0)
    expected = f"error: the cache {tmp_path / 'cache'} has the token "
    said = refusal(capsys, argv)
    assert said.startswith(
        f"{expected}'<new2>' ({shared + 2}) in 1 of 4 examples, which the student does not know: both know the f"
    )
    shutil.rmtree(tmp_path / "cache" / "tokenizer")
    assert refusal(capsys, argv).startswith(
        f"{expected}without a name ({shared + 2}) in 1 of 4 examples, which no tokenizer here k"
    )


def rename_token(folder: Path, before: str, after: str) -> None:
    """Another name for a special token at its id."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(json.dumps(before)[1:-1], after))


@pytest.mark.parametrize("cached", [False, True])
def test_renamed_tokens_are_refused_naming_the_option_with_which_they_are_trained(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cached: bool
) -> None:
    shutil.copytree(given / "teacher", tmp_path / "teacher")
    rename_token(tmp_path / "teacher", "<|user|>", "<|User|>")
    size, renamed = len(tokenizer()), tokenizer().convert_tokens_to_ids("<|user|>")
    teacher = tmp_path / "teacher"
    if cached:
        (tmp_path / "text.txt").write_text(TEXT)
        argv = ["cache", f"--teacher={teacher}", f"--data={tmp_path / 'text.txt'}", "--max-length=16", "--top-k=8"]
        teacher = tmp_path / "cache"
        assert main([*argv, f"--out={teacher}"]) == 0
    said = refusal(capsys, arguments(given, tmp_path / "run", teacher=teacher, data=None if cached else given / "text.txt"))
    assert f"--vocab-size): {size} takes the tokens at one id for one another and {renamed} leaves them out" in said
    argv = arguments(given, tmp_path / "run", teacher=teacher, data=None if cached else given / "text.txt", vocab_size=size)
    assert main(argv) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["settings"]["vocab_size"] == size
    same = arguments(given, tmp_path / "same", data=given / "text.txt")
    assert main(same) == 0
    other = json.loads((tmp_path / "same" / "results.json").read_text())
    if not cached:  # to the same numbers as between tokenizers of the same names
        assert results["before"] == other["before"]
        assert results["after"] == other["after"]


def test_a_token_to_learn_that_vocab_size_cuts_off_is_refused_and_one_to_read_is_not(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tokenizer()
    size, user = len(made), made.convert_tokens_to_ids("<|user|>")
    pairs = [{"prompt": "<|user|>hi", "completion": "a" * 5}] * 4
    made.eos_token = "e"  # one of the first
    for role in ("student", "teacher"):
        shutil.copytree(given / role, tmp_path / role)
        made.save_pretrained(tmp_path / role)
    both = {"student": tmp_path / "student", "teacher": tmp_path / "teacher", "vocab_size": user, "eval_fraction": 0.25}
    source = put(tmp_path / "a.jsonl", *pairs)
    assert main(arguments(given, tmp_path / "run", data=source, **both)) == 0
    source = put(tmp_path / "b.jsonl", *pairs, {"prompt": "hi", "completion": "<|user|>"})
    said = refusal(capsys, arguments(given, tmp_path / "other", data=source, **both))
    assert (
        f"--data has the token '<|user|>' ({user}) in 1 of 2 examples, which vocab_size cuts off: both know the first {user}"
        in said
    )
    assert f"accepted: 1 to {size}" in refusal(
        capsys, arguments(given, tmp_path / "third", data=source, **{**both, "vocab_size": size + 1})
    )


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


def test_two_processes_train_the_student_of_one_and_write_readable_output_once(given: Path, tmp_path: Path) -> None:
    """As torchrun starts them. The gradients are those of a batch twice as large, to rounding."""
    options = {"steps": 3, "warmup": 0, "learning_rate": 1e-3}
    assert main(arguments(given, tmp_path / "one", batch_size=4, **options)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "kdkernels", *arguments(given, tmp_path / "two", batch_size=2, **options)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        (shown, errors), (nothing, more_errors) = (process.communicate(timeout=200) for process in started)
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors + more_errors
    assert nothing == ""
    assert shown.count("step 3 of 3: loss") == 1
    for text in (shown, errors):
        assert not {"\r", "\x1b"} & set(text)
    runs = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for when in ("before", "after"):
        assert runs[1][when] == pytest.approx(runs[0][when], rel=1e-4)
    norms = [[entry["grad_norm"] for entry in run["log"] if "grad_norm" in entry] for run in runs]
    assert len(norms[0]) == 3
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# ---- models and tokenizers ----


def test_a_model_is_loaded_as_it_was_saved_or_in_the_dtype_asked_for(given: Path, tmp_path: Path) -> None:
    saved = build("llama").to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "model")
    assert load_model(tmp_path / "model").dtype == torch.bfloat16
    found = load_model(str(tmp_path / "model"), dtype="float32")
    assert not found.training
    for name, tensor in saved.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float())
    with pytest.raises(ValueError, match="dtype is one of auto, float32"):
        load_model(tmp_path / "model", dtype="int8")


def damage(folder: Path, what: str) -> None:
    """Spoil a folder of a model, a tokenizer with it."""
    file = folder / "config.json"
    about = json.loads(file.read_text())
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "half the weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif what == "no config":
        file.unlink()
    elif what == "broken config":
        file.write_text("{")
    elif what == "other sizes":
        file.write_text(json.dumps({**about, "intermediate_size": 99}))
    elif what == "another layer":
        file.write_text(json.dumps({**about, "num_hidden_layers": 3}))
    elif what == "unknown type":
        file.write_text(json.dumps({**about, "model_type": "wub"}))
    elif what == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("no weights", "no file named model.safetensors"),
        ("half the weights", "its weights are damaged"),
        ("no config", "the folder holds no config.json"),
        ("broken config", "not a valid JSON file"),
        ("other sizes", "its weights have other sizes than its config.json says"),
        ("another layer", "of the weights of LlamaForCausalLM are missing, model.layers.2."),
        ("unknown type", "model type `wub`"),
    ],
)
def test_a_damaged_folder_is_told_from_others_in_one_line(given: Path, tmp_path: Path, what: str, expected: str) -> None:
    shutil.copytree(given / "student", tmp_path / "model")
    damage(tmp_path / "model", what)
    with pytest.raises(CommandError) as raised:
        load_model(tmp_path / "model")
    assert str(raised.value).startswith(f"'{tmp_path / 'model'}' cannot be loaded: ")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["student", "gpt2_student", "gemma2_student"])
def test_a_folder_without_a_tokenizer_is_not_given_an_empty_one(given: Path, tmp_path: Path, family: str) -> None:
    shutil.copytree(given / family, tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").get_vocab() == tokenizer().get_vocab()
    damage(tmp_path / "model", "no tokenizer")
    with pytest.raises(CommandError, match="it has no tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    small = {"vocab_size": 10, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**small))
    translator = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=10, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    )
    headless = transformers.LlamaModel(build("llama").config)
    for name, model, expected in (
        ("bert", masked, "lets a token see the tokens after it"),
        ("t5", translator, "t5 models are not causal language models"),
        ("base", headless, "1 of the weights of LlamaForCausalLM are missing, lm_head.weight"),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(CommandError, match=expected):
            load_model(tmp_path / name)


def test_a_causal_model_whose_configuration_says_it_is_no_decoder_is_loaded(tmp_path: Path) -> None:
    model = build("gpt_neox")
    assert model.config.is_decoder is False
    model.save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "GPTNeoXForCausalLM"


def test_an_adapter_is_loaded_on_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "adapter")(ids).logits, adapted.eval()(ids).logits)


@pytest.mark.parametrize("name", ["/nowhere", "./gone", "a/b/c", "two words", ""])
def test_a_name_that_can_only_be_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(CommandError, match="there is no such folder"):
            load(name)


def test_a_file_and_a_name_that_cannot_be_asked_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    for load in (load_model, load_tokenizer):
        with pytest.raises(CommandError, match="a file; accepted: a folder"):
            load(tmp_path / "weights.bin")
        with pytest.raises(CommandError, match="neither a folder nor in the hub's cache here, and the hub cannot be reached"):
            load("owner/gone")
