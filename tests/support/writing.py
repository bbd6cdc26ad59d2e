"""Batches for students that write, and what a tiny model writes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
from kdkernels.transformers.on_policy import OnPolicy  # noqa: E402
from tests.support.tiny_models import VOCAB, build  # noqa: E402


def lively(name: str, **more: Any) -> Any:
    """A tiny model whose most likely token changes from place to place: a tied head would say its input again, a bias its own."""
    model = build(name, tie_word_embeddings=False, **more)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0, generator=generator)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def data(prompts: tuple[int, ...] = (3, 6, 1), responses: tuple[int, ...] = (4, 2, 5), left: bool = False) -> dict[str, Tensor]:
    """Rows of random tokens with prompts and responses of these lengths, padded with a token that is no padding elsewhere."""
    generator = torch.Generator().manual_seed(len(prompts))
    width = max(p + r for p, r in zip(prompts, responses, strict=True)) + 1
    ids = torch.full((len(prompts), width), 7)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        length = prompt + response
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, place] = 1
        labels[row, place] = ids[row, place]
        labels[row, place][:prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rows(batch: dict[str, Tensor]) -> list[list[int]]:
    return [ids[mask != 0].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def responses(batch: dict[str, Tensor]) -> list[list[int]]:
    return [ids[label != -100].tolist() for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)]


@torch.no_grad()
def most_likely(model: Any, prompt: list[int], tokens: int, allowed: int = VOCAB) -> list[int]:
    """The model's own continuation, from whole forwards of one unpadded row without a cache."""
    text = list(prompt)
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        text.append(int(logits[:allowed].argmax()))
    return text[len(prompt) :]


def written(model: Any, batch: dict[str, Tensor], rank: int = 0, step: int = 0, **options: Any) -> dict[str, Tensor]:
    found, source = OnPolicy(1.0, **options).batch(model, batch, step=step, micro=0, progress=0.0, rank=rank)
    assert source == "generated"
    return found


class Parrot(nn.Module):
    """Writes one token: how often it was asked before. For tests about the choice, not the text."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.generation_config, self.asked = None, None, 0

    def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked += 1
        return torch.cat([input_ids, torch.full_like(input_ids[:, :1], self.asked - 1)], -1)
