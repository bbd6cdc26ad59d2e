"""A tokenizer whose every character or word is one token, its chat template, and files of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from kdkernels.transformers.batches.layout import IGNORED

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def tokenizer(*, eos: bool = True, bos: bool = False, template: str | None = TEMPLATE, merges: int = 0) -> Any:
    """Bytes, with so many merges learned on a line of text, and the special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat and the rat sat on the cat"], trainer)
    if bos:
        made.add_special_tokens(["<s>"])
        number = made.token_to_id("<s>")
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        additional_special_tokens=CHAT_TOKENS,
        eos_token="</s>" if eos else None,
        bos_token="<s>" if bos else None,
    )
    wrapped.chat_template = template
    return wrapped


def put(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def learned(example: dict[str, list[int]], made: Any) -> str:
    """The text of the tokens that count."""
    for label, number in zip(example["labels"], example["input_ids"], strict=True):
        assert label in (IGNORED, number)
    return made.decode([label for label in example["labels"] if label != IGNORED])


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "\n hello"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "thanks"},
]
