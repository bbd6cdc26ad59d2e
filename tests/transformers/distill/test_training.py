"""What a run of ``distill`` trains, with models of some thousand parameters in folders."""

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

import kdkernels as kd
from kdkernels.cli import main
from tests.support.commands import refusal
from tests.support.data import CHAT, put, tokenizer
from tests.support.distilling import TEXT, arguments, assert_same_student, cache_of, learned, results_of, swap_tokens, weights


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
    results = results_of(out)
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
    results = results_of(tmp_path / "run")
    assert results["after"]["kd"] < 0.9 * results["before"]["kd"]


@pytest.mark.parametrize("method", ["taid", "okd"])
def test_before_and_after_are_held_against_the_same_teacher(given: Path, tmp_path: Path, method: str) -> None:
    """With a rate of 0 the student stays as it was, while TAID's target and OKD's teacher move."""
    more = {"teacher_learning_rate": 0.1} if method == "okd" else {}
    assert main(arguments(given, tmp_path / "run", method=method, learning_rate=0, steps=4, warmup=0, **more)) == 0
    results = results_of(tmp_path / "run")
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
        results = results_of(tmp_path / "runs" / name)
        assert (results["train_examples"], results["eval_examples"]) == expected[name]
        assert results["before"]["loss"] > 0


def test_without_held_out_data_the_student_is_trained_all_the_same(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(given, tmp_path / "run", eval_fraction=0)) == 0
    assert "│" not in capsys.readouterr().out
    assert results_of(tmp_path / "run")["after"] == {}
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
    results = results_of(tmp_path / "run")
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
    log = results_of(tmp_path / "run")["log"]
    assert [entry["on_policy_fraction"] for entry in log if "loss" in entry] == [1.0, 1.0]
    assert sum("eval_loss" in entry for entry in log) >= 2


def test_a_cached_teacher_takes_the_teachers_place(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(cache_of(given / "teacher", given / "text.txt", tmp_path / "cache", "--max-length=16", "--top-k=8")) == 0
    results = {}
    for name, data in (("with", given / "text.txt"), ("without", None)):
        argv = arguments(given, tmp_path / name, teacher=tmp_path / "cache", data=data, eval_fraction=0.1)
        assert main(argv) == 0
        results[name] = results_of(tmp_path / name)
    assert learned(tmp_path / "with" / "student", given / "student")
    assert_same_student(tmp_path / "with", tmp_path / "without")
    assert results["with"]["after"] == results["without"]["after"]
    shutil.copytree(given / "student", tmp_path / "student")
    swap_tokens(tmp_path / "student")
    said = refusal(
        capsys, arguments(given, tmp_path / "other", teacher=tmp_path / "cache", student=tmp_path / "student", data=None)
    )
    assert "disagree on 2 of their tokens, the first: 'a' is" in said


def test_two_processes_train_the_student_of_one_and_write_readable_output_once(given: Path, tmp_path: Path) -> None:
    """As torchrun starts them. The gradients are those of a batch twice as large, to rounding."""
    options = {"steps": 3, "warmup": 0, "learning_rate": 1e-3}
    assert main(arguments(given, tmp_path / "one", batch_size=4, **options)) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "kdkernels", *arguments(given, tmp_path / "two", batch_size=2, **options)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
    runs = [results_of(tmp_path / name) for name in ("one", "two")]
    for when in ("before", "after"):
        assert runs[1][when] == pytest.approx(runs[0][when], rel=1e-4)
    norms = [[entry["grad_norm"] for entry in run["log"] if "grad_norm" in entry] for run in runs]
    assert len(norms[0]) == 3
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
