"""Asking a model something leaves it as it was, layers among them that change their weights once nothing trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from kdkernels.transformers import KDTrainer, verify_lm_head, write_cache  # noqa: E402
from kdkernels.transformers.load import is_causal  # noqa: E402
from tests.support.tiny_models import batch, build  # noqa: E402
from tests.support.training import BATCH, examples, logs, settings, weights  # noqa: E402


class Quantised(nn.Linear):
    """As those of bitsandbytes on a CPU: scales in an object on the weight, and once it runs in evaluation mode without gradients,
    the weight is laid out anew and no gradient comes back through it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes: Any = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        codes.state = SimpleNamespace(scale=scale, packed=False)
        self.weight = codes

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if not self.training and not x.requires_grad and not weight.state.packed:
            weight.data = weight.data.T.contiguous()
            weight.state.scale = weight.state.scale.T.bfloat16()
            weight.state.packed = True
        if weight.state.packed:
            return x.detach() @ (weight.data * weight.state.scale).to(x.dtype)
        return x @ (weight.data * weight.state.scale).T.to(x.dtype)


class InBuffers(nn.Module):
    """The same with codes in a buffer, which is written into."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (linear.weight.detach() / self.scale + 128).round().to(torch.uint8))
        self.packed = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.packed or torch.is_grad_enabled()):
            self.codes.copy_(self.codes.flip(0))
            self.scale.copy_(self.scale.flip(0))
            self.packed = True
        weight = (self.codes.float() - 128) * self.scale
        return x.detach() @ weight.flip(0).T.to(x.dtype) if self.packed else x @ weight.T.to(x.dtype)


class Fused(nn.Module):
    """Full precision, in a child: the first forward without gradients replaces the weight by its transpose, for good."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = copy.deepcopy(linear)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not torch.is_grad_enabled() and not hasattr(self.inner, "transposed"):
            self.inner.weight.data = self.inner.weight.data.T.contiguous()
            self.inner.transposed = True
            self.inner.register_buffer("used", torch.ones(1))
        weight = self.inner.weight if hasattr(self.inner, "transposed") else self.inner.weight.T
        return x @ weight


def with_layers_of(kind: Callable[[nn.Linear], nn.Module], but: tuple[str, ...] = (), **more: Any) -> Any:
    """A model with such linear layers below its head, but those of some names."""
    model = build("llama", **more)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name not in but:
                setattr(module, name, kind(child))
    return model


def everything(model: Any) -> dict[str, Any]:
    """Modes, attributes and values, by name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        found[name] = plain, sorted(module._buffers), sorted(module._parameters)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        held = {key: copy.deepcopy(vars(value)) for key, value in vars(tensor).items() if hasattr(value, "__dict__")}
        found[f"{name}:"] = id(tensor), tensor.dtype, tensor.tolist(), held, tensor.grad
    return found


QUESTIONS: dict[str, Callable[[Any, Path], Any]] = {
    "verify_lm_head": lambda model, _: verify_lm_head(model),
    "write_cache": lambda model, folder: write_cache(model, examples(3), folder / "cache", top_k=4),
    "whether it is causal": lambda model, _: is_causal(model),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("kind", [Quantised, InBuffers, Fused])
def test_a_question_leaves_a_model_as_it_was(kind: Any, question: str, training: bool, tmp_path: Path) -> None:
    model = with_layers_of(kind, is_decoder=False).train(training)
    model.model.layers[0].train(not training)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = everything(model)
    QUESTIONS[question](model, tmp_path)
    after = everything(model)
    assert after.keys() == before.keys()
    for name in before:
        assert str(after[name]) == str(before[name]), name


def gradients(model: Any) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(**batch(), use_cache=False).logits.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", [Quantised, InBuffers, Fused])
def test_a_trainer_that_was_made_and_has_evaluated_leaves_a_student_its_gradients(kind: Any, tmp_path: Path) -> None:
    student = with_layers_of(kind)
    expected = gradients(student)
    trainer = KDTrainer(student, settings(tmp_path), eval_dataset=examples(3), teacher=build("llama", seed=1))
    if kind is not Fused:  # which no evaluation leaves as it is, whoever makes it
        trainer.evaluate()
    found = gradients(student)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "run",
    [{}, {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 3}, {"method": "okd", "okd_target_modules": ["v_proj"]}],
    ids=str,
)
@pytest.mark.parametrize("kind", [Quantised, InBuffers])
def test_a_run_that_evaluates_is_the_run_that_does_not(kind: Any, run: dict[str, Any], tmp_path: Path) -> None:
    """OKD's teacher has such layers too, and learns through them."""
    ends = []
    for strategy in ("no", "steps"):
        student = with_layers_of(kind)
        teacher = with_layers_of(kind, seed=1, but=("v_proj",))
        args = settings(tmp_path / strategy, eval_strategy=strategy, eval_steps=1, **run)
        trainer = KDTrainer(student, args, train_dataset=examples(4 * BATCH), eval_dataset=examples(2), teacher=teacher)
        if strategy == "steps":
            trainer.evaluate()
        norm = student.model.layers[0].input_layernorm.weight.detach().clone()
        trainer.train()
        assert not torch.equal(student.model.layers[0].input_layernorm.weight, norm)
        ends.append(({**weights(student), **weights(trainer.teacher)}, [entry["grad_norm"] for entry in logs(trainer)]))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(tensor, ends[1][0][name]) for name, tensor in ends[0][0].items())
