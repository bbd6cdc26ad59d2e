"""What the models write: continuations of held-out prompts, how likely the teacher finds them, and how varied they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kdkernels.demo.corpus import Corpus
from kdkernels.demo.models import Model, heldout_losses, mean_and_error
from kdkernels.demo.settings import AGAINST, Settings
from kdkernels.transformers.writing import responses

HELD_OUT = "held-out text"
LONGEST_NGRAM = 3


def measure(models: Mapping[str, Model], settings: Settings, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of each model, the teacher among them, and of how the text itself goes on.

    All models continue the same prompts by the same number of tokens, since shares of distinct n-grams fall as a text grows; they
    sample at temperature 1, with the same seed. ``lower`` is how far the teacher's loss lies below that on what the student trained
    by cross-entropy alone wrote, from the differences prompt by prompt.
    """
    length = settings.prompt_tokens
    inputs, _ = corpus.held_out(settings.prompts, length + settings.written_tokens)
    prompts = inputs[:, :length]
    written = {HELD_OUT: inputs[:, length:]}
    written |= {name: write(model, prompts, settings) for name, model in models.items()}
    judged = {name: judge(models["teacher"], prompts, text) for name, text in written.items()}
    rows: dict[str, Any] = {}
    for name, text in written.items():
        loss, error = mean_and_error(judged[name])
        lower, lower_error = mean_and_error(judged[AGAINST] - judged[name])
        rows[name] = {
            "teacher_loss": loss,
            "error": error,
            "lower": lower,
            "lower_error": lower_error,
            "distinct": [distinct(text, n) for n in range(1, LONGEST_NGRAM + 1)],
            "text": tokenizer.decode(text[0].tolist(), skip_special_tokens=False),
        }
    return {
        "prompts": len(prompts),
        "prompt_tokens": length,
        "written_tokens": settings.written_tokens,
        "prompt": tokenizer.decode(prompts[0].tolist(), skip_special_tokens=False),
        "models": rows,
    }


def write(model: Model, prompts: Tensor, settings: Settings) -> Tensor:
    """(prompts, written_tokens) continuations of prompts (prompts, prompt_tokens), none of which ends early."""
    sampling = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": settings.written_tokens,
        "pad_token_id": 0,
        "eos_token_id": None,
        "use_cache": True,
    }
    device = torch.device("cpu")
    return torch.stack(responses(model, list(prompts), sampling, vocab_size=None, seed=settings.seed, device=device, synced=False))


def judge(teacher: Model, prompts: Tensor, written: Tensor) -> Tensor:
    """(prompts,) the teacher's loss in nats per token of each continuation, given its prompt."""
    whole = torch.cat([prompts, written], dim=1)
    return heldout_losses(teacher, whole[:, :-1], whole[:, 1:], first=prompts.shape[1] - 1)


def distinct(written: Tensor, n: int) -> float:
    """The share of different n-grams among all that stand within a continuation, over all continuations (rows)."""
    grams = written.unfold(1, n, 1).flatten(0, 1)
    return len(grams.unique(dim=0)) / len(grams)


def shown(text: str) -> str:
    """As terminals and the picture's font can show it."""
    plain = text.expandtabs(4).encode("latin-1", "replace").decode("latin-1")
    return "".join(character if character == "\n" or character.isprintable() else " " for character in plain)
