"""Distillation of causal language models from transformers.

``KDTrainer`` with ``KDConfig`` is transformers' Trainer with a teacher. A training loop of one's own takes ``hidden_states`` and
``lm_head`` of both models for ``kd.linear_kd_loss``, and ``shared_rows`` for its vocab_size; the README writes it out.
"""

import importlib
from typing import Any

from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.hidden import hidden_states
from kdkernels.transformers.padding import shared_rows
from kdkernels.transformers.verify import verify_lm_head

# What needs transformers, accelerate or safetensors to be imported.
_LAZY = {"KDConfig": "config", "KDTrainer": "trainer", "TopKCache": "cache", "write_cache": "cache"}

__all__ = ["KDConfig", "KDTrainer", "TopKCache", "hidden_states", "lm_head", "shared_rows", "verify_lm_head", "write_cache"]


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
