"""Two documents, models that read them, and losses of batches beside those of examples one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import KDConfig, KDTrainer, write_cache  # noqa: E402
from tests.support.tiny_models import VOCAB  # noqa: E402

A, B = [5, 6, 7, 8], [9, 8, 7, 6, 5]
APART = [{"input_ids": A, "labels": A}, {"input_ids": B, "labels": B}]
TOGETHER = {"input_ids": A + B, "labels": A + B}
RESTARTING = {**TOGETHER, "position_ids": [0, 1, 2, 3, 0, 1, 2, 3, 4]}


def llama(seed: int, vocab: int = VOCAB, **more: Any) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            **more,
        )
    )


def gpt2(seed: int, positions: int = 64) -> Any:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=positions,
            initializer_range=0.3,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def trainer(student: Any, teacher: Any, data: Any, folder: Path, *, collator: Any = None, **more: Any) -> KDTrainer:
    given = {"report_to": [], "use_cpu": True, "max_steps": 1, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    args = KDConfig(str(folder / "out"), per_device_train_batch_size=8, **{**given, **more})
    return KDTrainer(student, args, train_dataset=data, eval_dataset=data, teacher=teacher, data_collator=collator)


def loss(student: Any, teacher: Any, data: Any, folder: Path, **more: Any) -> float:
    return float(trainer(student, teacher, data, folder, **more).evaluate()["eval_loss"])


def one_by_one(student: Any, teacher: Any, sequences: list[list[int]]) -> float:
    """Mean over all tokens but each sequence's first of KL(teacher, student), from whole logits in float64."""
    parts = []
    for ids in sequences:
        with torch.no_grad():
            x, z = (model.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].double() for model in (student, teacher))
        p, q = z.log_softmax(-1), x.log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(parts).mean())


def both_ways(student: Any, teacher: Any, data: list[dict[str, Any]], folder: Path, **more: Any) -> tuple[float, float]:
    """The loss against the teacher itself, and against a cache of all its log-probabilities."""
    live = loss(student, teacher, data, folder, **more)
    return live, loss(student, write_cache(teacher, data, folder / "cache", top_k=VOCAB), data, folder, **more)
