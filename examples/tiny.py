"""What the examples share, in place of models and data of a hub: a tokenizer, text of this machine, and two small Llamas."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB, WINDOW, END = 4096, 64, "<|end|>"


def text() -> list[str]:
    """Modules of Python's standard library."""
    return [path.read_text(encoding="utf-8") for path in sorted(Path(argparse.__file__).parent.glob("[a-h]*.py"))[:40]]


def tokenizer() -> Any:
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(text(), vocab_size=VOCAB, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END, pad_token=END)


def examples(tokens: Any) -> list[dict[str, list[int]]]:
    """Windows of the text, each {"input_ids": [...], "labels": [...]}; as in transformers the labels are not shifted."""
    stream = [number for one in text() for number in [*tokens(one)["input_ids"], tokens.eos_token_id]]
    windows = [stream[begin : begin + WINDOW] for begin in range(0, len(stream) - WINDOW, WINDOW)]
    return [{"input_ids": window, "labels": window} for window in windows]


def model(width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=WINDOW, eos_token_id=0, **size, **heads))


def batches(data: list[dict[str, list[int]]], size: int = 8) -> Any:
    """{"input_ids", "labels"}, (size, WINDOW) each, in an order that is the same in every run."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order) - size + 1, size):
        ids = torch.tensor([data[at]["input_ids"] for at in order[begin : begin + size]])
        yield {"input_ids": ids, "labels": ids}


def trained(data: list[dict[str, list[int]]], width: int, seed: int, steps: int = 60) -> Any:
    """A model after a little training."""
    made = model(width, seed)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _, batch in zip(range(steps), batches(data), strict=False):
        made(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def teacher(data: list[dict[str, list[int]]]) -> Any:
    """The larger model, from which there is something to learn."""
    return trained(data, width=128, seed=0).eval().requires_grad_(False)
