"""Text that the student writes: ``generate`` of transformers from prompts of any lengths, with random numbers of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kdkernels.transformers.heads import unwrapped
from kdkernels.transformers.modes import evaluating


class _KnownTokens:
    """Never samples a token from ``vocab_size`` on: rows of a padded head, which the other model may not have."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -math.inf
        return scores


def responses(
    model: nn.Module,
    prompts: Sequence[Tensor],
    sampling: Mapping[str, Any],
    *,
    vocab_size: int | None,
    seed: int,
    device: torch.device,
    synced: bool,
) -> list[Tensor]:
    """What the student answers to each prompt, up to and with the first end token; int64 on the CPU.

    prompts: token ids (n,) int64 on the CPU. sampling: of a GenerationConfig, with pad_token_id, eos_token_id (a list, or None) and
    max_new_tokens. vocab_size: only the first so many tokens are written; None: all. synced: ranks run their forwards together.
    """
    from transformers import GenerationConfig  # not at the top: settings that speak of this are read without transformers

    groups = [list(range(len(prompts)))] if prompts else []
    generate, base = writer(model)
    if getattr(base, "_is_stateful", False):
        # A state that runs through the tokens may take in the padding too (RWKV, RecurrentGemma): one length at a time.
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[place for place, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    calls = most_of_ranks(len(groups), device) if synced else len(groups)
    found = [torch.empty(0, dtype=torch.int64)] * len(prompts)
    processors = [] if vocab_size is None else [_KnownTokens(vocab_size)]
    with _as_writer(model, base), _seeded(seed, device):
        for call in range(calls):
            # A rank with nothing left to write still takes part in what the others' forwards share.
            group = groups[call] if call < len(groups) else []
            asked = [prompts[place] for place in group] or [torch.zeros(1, dtype=torch.int64)]
            ids = pad_sequence(asked, batch_first=True, padding_value=sampling["pad_token_id"], padding_side="left")
            mask = pad_sequence([torch.ones_like(one) for one in asked], batch_first=True, padding_side="left")
            answered = generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(**{**sampling, **({} if group else {"max_new_tokens": 1})}),
                logits_processor=processors,
                synced_gpus=synced,
            )
            for place, tokens in zip(group, answered[:, ids.shape[1] :].cpu(), strict=False):
                found[place] = _ended(tokens, sampling["eos_token_id"] or [])
    return found


def _ended(response: Tensor, ends: Sequence[int]) -> Tensor:
    at = torch.isin(response, torch.tensor(ends, dtype=response.dtype)).nonzero()
    return response[: int(at[0]) + 1] if len(at) else response


def writer(model: Any) -> tuple[Any, Any]:
    """The ``generate`` to call, PEFT's own where there is one, and the model of transformers that it works on."""
    base = unwrapped(model)
    if not (callable(getattr(base, "generate", None)) and hasattr(base, "generation_config")):
        raise ValueError(f"{type(base).__name__} cannot generate; accepted: causal language models of transformers that can")
    if any("_fsdp_wrapped_module" in module._modules for module in model.modules()):
        raise ValueError("model is sharded by FSDP1, whose root a generation would by-pass; accepted: fully_shard (FSDP2)")
    outer = next((module for module in model.modules() if hasattr(module, "get_base_model")), base)
    for adapter in getattr(outer, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            raise ValueError(
                f"model has an adapter of {type(adapter).__name__}, whose virtual tokens would stand before the padding of shorter "
                "prompts; accepted: LoRA and others that change layers"
            )
    return outer.generate, base


@contextmanager
def _as_writer(model: nn.Module, base: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode and has a generation_config that says nothing; afterwards it is as it was."""
    from transformers import GenerationConfig

    configured = base.generation_config
    # What is None in a configuration given to generate() is taken from this one: penalties, forced tokens, lengths.
    base.generation_config = GenerationConfig()
    try:
        # a graph for each length would be compiled
        with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        base.generation_config = configured


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers of the CPU and the device follow from the seed; afterwards they go on as if nothing had been."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    # Not torch.manual_seed, which would seed the other devices too.
    accelerator = torch.get_device_module(device)
    with torch.random.fork_rng(devices=[device.index], device_type=device.type), accelerator.device(device):
        torch.default_generator.manual_seed(seed)
        accelerator.manual_seed(seed)
        yield


def most_of_ranks(count: int, device: torch.device) -> int:
    """The largest count of all ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
