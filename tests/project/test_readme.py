"""The README's code runs and does what the text around it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import kdkernels as kd
from kdkernels.planning.devices import device_names
from kdkernels.transformers import KDConfig, KDTrainer
from tests.support import README, ROOT
from tests.support.pages import blocks
from tests.support.tiny_models import build

TEXT = README.read_text()
CODE = [content for language, content in blocks(README) if language == "python"]
# What each block is known by. Two take models of the reader's or another library: tests/transformers/test_trainer.py and
# tests/compat/test_trl.py run those.
HAD, TRAINER, LOOP, SWAP = "# You had", "KDTrainer(", "hidden_states(student, batch)", "kdkernels.compat"


def block(known_by: str) -> str:
    (found,) = (content for content in CODE if known_by in content)
    return found


def test_every_block_is_known() -> None:
    assert [sum(known in content for known in (HAD, TRAINER, LOOP, SWAP)) for content in CODE] == [1] * len(CODE)


def test_the_two_sides_of_you_had_you_write_agree() -> None:
    had, write = block(HAD).split("# You write:")
    torch.manual_seed(0)
    scope: dict[str, Any] = {
        "torch": torch,
        "kd": kd,
        "student_head": torch.nn.Linear(8, 50, bias=False),
        "teacher_head": torch.nn.Linear(12, 50, bias=False).requires_grad_(False),
        "student_hidden": torch.randn(2, 5, 8),
        "teacher_hidden": torch.randn(2, 5, 12),
    }
    learned = [scope["student_head"].weight]

    def result(code: str) -> list[torch.Tensor]:
        exec(code, scope)
        return [scope["loss"], *torch.autograd.grad(scope["loss"], learned)]

    expected = result(had)
    torch.testing.assert_close(result(write), expected)


@pytest.mark.parametrize("rows", [(61, 64), (72, 64), (61, 61)])
def test_the_loop_runs_with_heads_that_are_padded_differently_and_has_the_trainers_loss(
    rows: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{number}": number for number in range(61)}))
    )
    student, teacher = (build("qwen2", vocab_size=vocab, seed=seed) for seed, vocab in enumerate(rows))
    for name, model in (("student", student), ("teacher", teacher)):  # as from_pretrained leaves them
        tokenizer.save_pretrained(tmp_path / name)
        model.config._name_or_path = str(tmp_path / name)
    ids = torch.arange(3, 19).view(2, 8)
    scope: dict[str, Any] = {"student": student, "teacher": teacher, "batch": {"input_ids": ids, "labels": ids}}
    exec(block(LOOP), scope)
    assert not caplog.records
    log_q, log_p = (model(ids).logits[:, :-1, : min(rows)].double().log_softmax(-1) for model in (student, teacher))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(scope["loss"].double(), expected, rtol=1e-5, atol=0)
    assert student.lm_head.weight.grad[: min(rows)].any(1).all()
    assert not student.lm_head.weight.grad[min(rows) :].any()

    trainer = KDTrainer(
        student,
        KDConfig(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no"),
        eval_dataset=[{"input_ids": row.tolist()} for row in ids],
        teacher=teacher,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(scope["loss"].item(), rel=1e-6)


def test_every_divergence_is_in_its_table() -> None:
    assert re.findall(r"^\| `(\w+)` \| (?=.*KL|½)", TEXT, re.MULTILINE) == list(kd.divergences())


def test_the_devices_that_a_page_lists_are_those_of_the_plan() -> None:
    listed = re.search(r"at\s+hand \(([^)]*); `cpu` is this one\)", (ROOT / "docs" / "memory-planning.md").read_text())
    assert listed is not None
    assert (*re.split(r",\s+", listed[1]), "cpu") == device_names()


def test_the_options_that_a_page_lists_are_those_of_the_loss() -> None:
    rows = (ROOT / "docs" / "losses.md").read_text().partition("| option |")[2].partition("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`(\w+)(?:=\"\w+\")?`", row.split("|")[1])]
    assert len(named) > 5
    assert set(named) <= {"labels", *kd.linear_kd_loss.__kwdefaults__}
