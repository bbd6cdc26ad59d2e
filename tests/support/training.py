"""Short runs of ``KDTrainer``: models, examples, settings, and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers

from kdkernels.transformers import KDConfig, KDTrainer
from tests.support.tiny_models import VOCAB, build

STEPS, ACCUMULATED, BATCH = 4, 2, 2


def models(dtype: torch.dtype = torch.float64, **more: Any) -> tuple[Any, Any]:
    """A student and a teacher of another width."""
    return build("llama", **more).to(dtype), build("llama", seed=1, hidden_size=24, intermediate_size=40, **more).to(dtype)


def examples(count: int = STEPS * ACCUMULATED * BATCH, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences of different lengths whose prompts of different lengths do not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length, prompt = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((5, 12), (1, 4)))
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def settings(folder: Path, **more: Any) -> KDConfig:
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",  # a loop beside it then sees the same
        "okd_lora_rank": 4,
    }
    return KDConfig(**{**given, **more})


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def logs(trainer: KDTrainer) -> list[dict[str, float]]:
    """What was logged at the steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, through dictionaries and sequences."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    else:
        assert found == expected


def padded(batch: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and the token to predict at each position."""
    longest = max(len(one["input_ids"]) for one in batch)
    ids, mask = torch.zeros(len(batch), longest, dtype=torch.long), torch.zeros(len(batch), longest, dtype=torch.long)
    following = torch.full((len(batch), longest), -100)
    for row, one in enumerate(batch):
        length = len(one["input_ids"])
        ids[row, :length], mask[row, :length] = torch.tensor(one["input_ids"]), 1
        following[row, : length - 1] = torch.tensor(one["labels"][1:])
    return ids, mask, following


def trainer(folder: Path, student: Any = None, teacher: Any = None, **more: Any) -> KDTrainer:
    """Of models in float32 and the examples where none are given; ``more`` are data, tokenizers and settings."""
    ours, theirs = models(torch.float32)
    names = ("train_dataset", "eval_dataset", "processing_class", "teacher_processing_class")
    given = {"train_dataset": examples(), **{name: more.pop(name) for name in names if name in more}}
    student, teacher = ours if student is None else student, theirs if teacher is None else teacher
    return KDTrainer(student, settings(folder, **more), teacher=teacher, **given)


WORDS = [f"w{number}" for number in range(VOCAB)]


def word_tokenizer(words: list[str] = WORDS) -> Any:
    """One token for each word."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token=words[0])
