"""A loss of a model's logits beside the fused one of its hidden states and head: the same training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdkernels as kd
from tests.support import oracle
from tests.support.cases import root_mean_square
from tests.support.oracle import Options

transformers = pytest.importorskip("transformers")
from kdkernels.transformers import hidden_states, lm_head  # noqa: E402  (needs nothing installed, but is of no use)
from tests.support.tiny_models import TOKENS, VOCAB, batch, labels  # noqa: E402


def logits_by(head: kd.LMHead, hidden: Tensor) -> Tensor:
    return oracle.after_head(hidden, head.weight, head.bias, head.logit_scale, head.softcap)


def as_close(found: Tensor, eager: Tensor, exact: Tensor, scale: Tensor | None = None) -> None:
    """The error is at most four times that of the eager computation, and four roundings of a typical value."""
    typical = exact if scale is None else scale
    allowed = 4 * root_mean_square([eager - exact]) + 4 * torch.finfo(found.dtype).eps * root_mean_square([typical])
    assert root_mean_square([found.double() - exact]) <= allowed


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that has one; those without are not in it."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    named = [(name.removeprefix("_orig_mod."), p) for name, p in model.named_parameters()]
    found = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


TEACHER = torch.randn(*TOKENS, VOCAB, generator=torch.Generator().manual_seed(9)).double() * 3
OPTIONS = Options(divergence="reverse_kl", temperature=1.5, ce_weight=0.3)


def eager_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """From the model's own logits, in its dtype."""
    x, targets = model(**inputs, use_cache=False).logits, labels(inputs)
    return oracle.mean(oracle.losses(x, TEACHER.to(x.dtype), targets, None, OPTIONS), targets, None, OPTIONS)


def fused_loss(model: Any, inputs: dict[str, Tensor]) -> Any:
    """The same from hidden states and head. The teacher's logits are its hidden states, times one."""
    hidden = hidden_states(model, inputs)
    teacher = (TEACHER.to(hidden.dtype), torch.eye(VOCAB, dtype=hidden.dtype))
    options = {"divergence": "reverse_kl", "temperature": 1.5, "ce_weight": 0.3}
    return kd.linear_kd_loss(hidden, lm_head(model), *teacher, labels(inputs), **options)


def assert_same_training(model: Any, plain: Any = None, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Loss and all gradients of the library are those of the model's own logits. plain: the model to get them from."""
    inputs = batch() if inputs is None else inputs
    plain = model if plain is None else plain
    twin = copy.deepcopy(plain).double()
    exact_loss, eager, loss = eager_loss(twin, inputs), eager_loss(plain, inputs), fused_loss(model, inputs)
    as_close(loss.detach(), eager.detach(), exact_loss.detach())
    exact, by_logits, found = gradients(twin, exact_loss), gradients(plain, eager), gradients(model, loss)
    assert found.keys() == exact.keys()
    everything = torch.cat([gradient.flatten() for gradient in exact.values()])
    for name in exact:
        as_close(found[name], by_logits[name], exact[name], everything)
    return found


# adapters


def adapted(model: Any, *, seed: int = 3, **options: Any) -> Any:
    """With LoRA whose B is not zero, as it is at first."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **options}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()
