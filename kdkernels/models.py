"""Output heads of well known models, and how to name others on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShape:
    """An output head. vocab: rows V, padding included. dim: hidden size D."""

    vocab: int
    dim: int


# vocab_size and hidden_size as each model's config.json should have them (text_config for Gemma 3 from 4B). Written from memory and
# not yet checked against the files: where it matters, give sizes VxD instead of a name.
HEADS = {
    "Gemma-2-2B": HeadShape(256_000, 2304),
    "Gemma-2-9B": HeadShape(256_000, 3584),
    "Gemma-2-27B": HeadShape(256_000, 4608),
    "Gemma-3-1B": HeadShape(262_144, 1152),
    "Gemma-3-4B": HeadShape(262_208, 2560),
    "Gemma-3-12B": HeadShape(262_208, 3840),
    "Gemma-3-27B": HeadShape(262_208, 5376),
    "Llama-3.1-8B": HeadShape(128_256, 4096),
    "Llama-3.1-70B": HeadShape(128_256, 8192),
    "Llama-3.2-1B": HeadShape(128_256, 2048),
    "Llama-3.2-3B": HeadShape(128_256, 3072),
    "Mistral-7B-v0.1": HeadShape(32_000, 4096),
    "Mistral-7B-v0.3": HeadShape(32_768, 4096),
    "Qwen2.5-0.5B": HeadShape(151_936, 896),
    "Qwen2.5-1.5B": HeadShape(151_936, 1536),
    "Qwen2.5-3B": HeadShape(151_936, 2048),
    "Qwen2.5-7B": HeadShape(152_064, 3584),
    "Qwen2.5-14B": HeadShape(152_064, 5120),
    "Qwen2.5-32B": HeadShape(152_064, 5120),
    "Qwen2.5-72B": HeadShape(152_064, 8192),
    "Qwen3-0.6B": HeadShape(151_936, 1024),
    "Qwen3-1.7B": HeadShape(151_936, 2048),
    "Qwen3-4B": HeadShape(151_936, 2560),
    "Qwen3-8B": HeadShape(151_936, 4096),
    "Qwen3-14B": HeadShape(151_936, 5120),
    "Qwen3-32B": HeadShape(151_936, 5120),
}
SIZES = re.compile(r"([0-9]+)x([0-9]+)")
# Heads beyond this are typing errors: a thousand times the largest vocabulary and hidden size there are.
LARGEST = 2**28


def head_shape(text: str) -> HeadShape:
    """The head of a model of the table, in any case, or of sizes VxD such as 151936x896. ValueError names what is accepted."""
    for name, shape in HEADS.items():
        if name.lower() == text.lower():
            return shape
    found = SIZES.fullmatch(text)
    if found:
        vocab, dim = int(found[1]), int(found[2])
        if 1 <= vocab <= LARGEST and 1 <= dim <= LARGEST:
            return HeadShape(vocab, dim)
    raise ValueError(f"got {text!r}; accepted: sizes VxD such as 151936x896, or one of {', '.join(HEADS)}")
