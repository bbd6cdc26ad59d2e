"""TRL's trainers on tiny models: data, runs, and one batch's loss and gradients."""

from __future__ import annotations

import math
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.import_utils import TRLExperimentalWarning

from kdkernels.compat import trl as compat
from tests.support.tiny_models import VOCAB, build

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.gkd import GKDConfig, GKDTrainer


STEPS, BATCH, ACCUMULATED = 5, 2, 2
HALF = math.sqrt(torch.finfo(torch.float32).eps)  # half of the digits of float32, in which TRL's tiles are computed
DOUBLE = math.sqrt(torch.finfo(torch.float64).eps)
TRAINERS: dict[str, tuple[Any, Any]] = {
    "gkd": (GKDTrainer, compat.gkd_trainer_patched),
    "distillation": (DistillationTrainer, compat.distillation_trainer_patched),
}
both_trainers = pytest.mark.parametrize("kind", TRAINERS)


def tokenizer(vocab: int = VOCAB) -> Any:
    """Words w0, w1, ..., and marks of the user's turn and the assistant's."""
    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", *(f"w{place}" for place in range(vocab - 5))]
    made = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return found


def data(kind: str, count: int = STEPS * BATCH * ACCUMULATED, vocab: int = VOCAB, longest: int = 9) -> Any:
    """Chats, or prompts alone for the trainer whose student writes all answers; of different lengths."""
    dice = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{dice.randrange(vocab - 5)}" for _ in range(dice.randint(least, most)))

    rows = []
    for _ in range(count):
        chat = [{"role": "user", "content": text(1, 6)}, {"role": "assistant", "content": text(2, longest)}]
        rows.append({"messages": chat} if kind == "gkd" else {"prompt": chat[:1]})
    return Dataset.from_list(rows)


Pair = tuple[Any, Any]


def models(name: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> Pair:
    """A student and a teacher of another width."""
    pair = build(name, **more), build(name, seed=1, hidden_size=24, intermediate_size=40, **more)
    for model in pair:
        model.to(dtype).set_attn_implementation("sdpa")  # eager attention in float64 makes NaN of padding on the left
    return pair


def family(name: str) -> Pair:
    return build(name), build(name, seed=1)


def trainer_of(kind: str, folder: Path, pair: Pair | None = None, cls: Any = None, **more: Any) -> Any:
    set_seed(0)
    student, teacher = models() if pair is None else pair
    given = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam's first steps divide gradients by themselves, rounding included
        "logging_steps": 1,
        "save_strategy": "no",
        "temperature": 0.7,
    }
    given |= {"lmbda": 0.0, "max_new_tokens": 5} if kind == "gkd" else {"max_completion_length": 5}
    config = (GKDConfig if kind == "gkd" else DistillationConfig)(str(folder), **{**given, **more.pop("args", {})})
    made = (cls or TRAINERS[kind][0])(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=tokenizer(student.config.get_text_config().vocab_size),
        **{"train_dataset": data(kind), **more},
    )
    made.remove_callback(PrinterCallback)
    return made


def run(kind: str, folder: Path, **more: Any) -> dict[str, Any]:
    """What a run logs, and its student, whole."""
    trainer = trainer_of(kind, folder, **more)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.is_fsdp_enabled == ("fsdp" in more.get("args", {}))
    whole = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in trainer.model.state_dict().items()
    }
    return {"logs": steps, "student": {name: tensor.clone() for name, tensor in whole.items()}}


def assert_same_run(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert len(found["logs"]) == len(expected["logs"]) > 0
    for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"step_time"}:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name
    for name, tensor in expected["student"].items():
        assert (found["student"][name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def compare(
    kind: str, folder: Path, pair: Callable[[], Pair] = models, tolerance: float | None = None, **more: Any
) -> dict[str, Any]:
    """The same run without the patch and with it."""
    expected = run(kind, folder, pair=pair(), **more)
    with TRAINERS[kind][1]():
        found = run(kind, folder, pair=pair(), **more)
    assert_same_run(found, expected, tolerance or (DOUBLE if kind == "gkd" else HALF))
    return found


def batch(kind: str, vocab: int = VOCAB) -> dict[str, Tensor]:
    """A batch as the trainer makes it: prompts padded on the left, answers on the right."""
    generator = torch.Generator().manual_seed(0)
    prompts, answers = torch.randint(5, vocab, (3, 4), generator=generator), torch.randint(5, vocab, (3, 6), generator=generator)
    prompt_mask, answer_mask = torch.ones_like(prompts), torch.ones_like(answers)
    prompt_mask[0, :2], answer_mask[1, 3:], answer_mask[2, 5:] = 0, 0, 0
    if kind == "distillation":
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        return dict(zip(names, (prompts, prompt_mask, answers, answer_mask), strict=True))
    return {
        "input_ids": torch.cat([prompts, answers], 1),
        "attention_mask": torch.cat([prompt_mask, answer_mask], 1),
        "labels": torch.cat([torch.full_like(prompts, -100), answers.masked_fill(answer_mask == 0, -100)], 1),
    }


def loss_and_gradients(trainer: Any, inputs: dict[str, Tensor], **more: Any) -> list[Tensor]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs), **more)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in trainer.model.parameters() if parameter.grad is not None)]


def child_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}
