"""Llama-style teacher and student from transformers, and their held-out loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kdkernels.demo.settings import ModelSize

Model = Any  # LlamaForCausalLM, which is not typed for us


def build(size: ModelSize, vocab: int, window: int, seed: int) -> Model:
    """A freshly initialised model, with the output head tied to the embedding; the same for the same arguments."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=size.width,
        intermediate_size=8 * size.width // 3 // 32 * 32 or 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        use_cache=False,
        initializer_range=0.06,  # large: the runs are short
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def hidden_states(model: Model, inputs: Tensor) -> Tensor:
    """inputs (batch, window) -> (batch, window, width): the model without its head, so that no logits are made."""
    states: Tensor = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def heldout_losses(model: Model, inputs: Tensor, labels: Tensor, first: int = 0, windows_at_once: int = 2) -> Tensor:
    """(windows,) mean cross-entropy of each window from position ``first`` on, in nats per token.

    In plain PyTorch, which judges the losses under test.
    """
    parts = []
    for x, y in zip(inputs.split(windows_at_once), labels.split(windows_at_once), strict=True):
        logits = hidden_states(model, x)[:, first:] @ model.lm_head.weight.T
        parts.append(torch.nn.functional.cross_entropy(logits.mT, y[:, first:], reduction="none").mean(1))
    return torch.cat(parts)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else 0.0
