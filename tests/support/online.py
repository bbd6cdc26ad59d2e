"""OKD's teachers that learn from a loss of tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from kdkernels.transformers import hidden_states, lm_head  # noqa: E402  (needs what the lines above look for)
from kdkernels.transformers.online import OnlineTeacher  # noqa: E402
from tests.support.tiny_models import batch, build, labels  # noqa: E402

# Options as a student has them: the rate and the decay in them are not the teacher's.
ADAMW: tuple[Any, dict[str, Any]] = (torch.optim.AdamW, {"betas": (0.8, 0.9), "lr": 7.0, "weight_decay": 7.0})


def lively(teacher: OnlineTeacher, seed: int = 3) -> OnlineTeacher:
    """With B that is not zero, so that every part has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return teacher


def teach(model: Any = None, learning_rate: float = 1e-2, **options: Any) -> OnlineTeacher:
    teacher = OnlineTeacher(build("llama", seed=5) if model is None else model, **{"rank": 3, **options})
    teacher.optimize_with(*ADAMW, learning_rate)
    return teacher


def losses(student: Any, teacher: OnlineTeacher, seed: int = 1) -> kd.OKDLoss:
    inputs = batch(seed)
    models = [part for model in (student, teacher.model) for part in (hidden_states(model, inputs), lm_head(model))]
    return kd.linear_okd_loss(*models, labels(inputs), return_metrics=True)


def backward(teacher: OnlineTeacher, seed: int = 1, scale: float = 1.0) -> None:
    """From a loss of the teacher's logits alone."""
    inputs = batch(seed)
    logits = teacher.model(**inputs, use_cache=False).logits
    (nn.functional.cross_entropy(logits.flatten(0, 1), labels(inputs).flatten()) * scale).backward()


def contents(teacher: OnlineTeacher) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in teacher.named_parameters().items()}
