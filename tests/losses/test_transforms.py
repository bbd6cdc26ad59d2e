"""What takes a loss as a function: torch.export, derivatives of derivatives, the transforms of torch.func, forward mode."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import kdkernels as kd

# PyTorch warns of what PyTorch does: reading its own files, and its old TorchScript behind forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
]

TOKENS, VOCAB, WIDTH = 6, 37, 8
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, TEACHER_HIDDEN = (torch.randn(TOKENS, WIDTH, generator=GENERATOR) for _ in range(2))
WEIGHT, TEACHER_WEIGHT = (torch.randn(VOCAB, WIDTH, generator=GENERATOR) for _ in range(2))
LABELS = torch.tensor([1, 2, -100, 4, 5, 6])
TOPK = TEACHER_HIDDEN.matmul(TEACHER_WEIGHT.t()).log_softmax(-1).topk(5)


class Model(nn.Module):
    """Learns body and head; loss: what to make of hidden states, head and labels."""

    def __init__(self, loss: Callable[[Tensor, kd.LMHead, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.body(inputs), kd.LMHead(self.head.weight, self.head.bias), labels)


def linear(hidden: Tensor, head: Any = WEIGHT, labels: Tensor | None = None, **options: Any) -> Any:
    teacher = TEACHER_HIDDEN[: hidden.shape[0]]
    return kd.linear_kd_loss(hidden, head, teacher, TEACHER_WEIGHT, labels, **options)


def both(hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
    found = kd.linear_okd_loss(hidden, head, TEACHER_HIDDEN[: hidden.shape[0]], TEACHER_WEIGHT, labels)
    return found.student + found.teacher


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mean": lambda hidden, head, labels: linear(hidden, head, labels, ce_weight=0.5),
    "sum": lambda hidden, head, labels: linear(hidden, head, labels, reduction="sum", divergence="jsd"),
    "none": lambda hidden, head, labels: linear(hidden, head, labels, reduction="none").sum(),
    "metrics": lambda hidden, head, labels: sum(linear(hidden, head, labels, return_metrics=True)[1].values()) * head.weight.sum(),
    "okd": both,
    "top-k": lambda hidden, head, labels: kd.linear_topk_kd_loss(hidden, head, TOPK.indices, TOPK.values, labels),
    "logits": lambda hidden, head, labels: kd.kd_loss(
        nn.functional.linear(hidden, head.weight, head.bias), TEACHER_HIDDEN @ TEACHER_WEIGHT.t(), labels
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_an_exported_module_with_a_trainable_head_has_its_loss_and_its_gradients(name: str, strict: bool) -> None:
    model = Model(LOSSES[name])
    exported = torch.export.export(model, (HIDDEN, LABELS), strict=strict).module()
    results = []
    for one in (model, exported):
        loss = one(HIDDEN, LABELS)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for _, parameter in sorted(one.named_parameters()))])
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_an_exported_program_serves_any_token_count_and_survives_a_file(labelled: bool, strict: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Parameter(WEIGHT.clone())

        def forward(self, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Any:
            return kd.linear_kd_loss(hidden, self.head, teacher, TEACHER_WEIGHT, labels if labelled else None)

    count = torch.export.Dim("count", min=2, max=1000)
    model, inputs = Both(), (HIDDEN, TEACHER_HIDDEN, LABELS)
    program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: count} for _ in inputs), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (4, 6, 12):
        more = tuple(torch.cat([one, one])[:tokens] for one in inputs)
        torch.testing.assert_close(loaded(*more), model(*more))


DIFFERENTIATED: dict[str, Callable[[Tensor], Any]] = {
    "linear": linear,
    "linear, none": lambda hidden: linear(hidden, reduction="none").sum(),
    "head": lambda weight: linear(HIDDEN, weight),
    "okd": lambda hidden: kd.linear_okd_loss(hidden, WEIGHT, TEACHER_HIDDEN, TEACHER_WEIGHT, LABELS.clamp(min=0)).student,
    "top-k": lambda hidden: kd.linear_topk_kd_loss(hidden, WEIGHT, TOPK.indices, TOPK.values),
    "logits": lambda logits: kd.kd_loss(logits, TEACHER_HIDDEN),
}
every_loss = pytest.mark.parametrize("name", DIFFERENTIATED)


def argument(name: str) -> Tensor:
    return WEIGHT if name == "head" else HIDDEN


SECOND: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "hessian": torch.autograd.functional.hessian,
    "hvp": lambda loss, x: torch.autograd.functional.hvp(loss, x, torch.ones_like(x)),
    "vhp": lambda loss, x: torch.autograd.functional.vhp(loss, x, torch.ones_like(x)),
    # It differentiates the gradient with respect to what comes from above.
    "jvp by two backwards": lambda loss, x: torch.autograd.functional.jvp(loss, x, torch.ones_like(x)),
}


@every_loss
@pytest.mark.parametrize("second", SECOND)
def test_second_derivatives_are_refused_and_not_zero(second: str, name: str) -> None:
    with pytest.raises(RuntimeError, match="have no derivatives of their own"):
        SECOND[second](DIFFERENTIATED[name], argument(name))


@every_loss
def test_a_graph_of_the_gradients_that_nobody_goes_through_costs_nothing(name: str) -> None:
    x = argument(name).clone().requires_grad_()
    (expected,) = torch.autograd.grad(DIFFERENTIATED[name](x), x)
    (found,) = torch.autograd.grad(DIFFERENTIATED[name](x), x, create_graph=True)
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=0)


def test_what_refuses_second_derivatives_keeps_no_hidden_states_alive() -> None:
    body = nn.Linear(WIDTH, WIDTH)
    hidden = body(HIDDEN).add(0.0)  # an addition keeps nothing of its result
    alive = weakref.ref(hidden.untyped_storage())
    loss = linear(hidden)
    del hidden
    assert alive() is None
    loss.backward()


@every_loss
def test_several_upstream_gradients_at_once(name: str) -> None:
    x = argument(name).clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 0.5])
    (one,) = torch.autograd.grad(DIFFERENTIATED[name](x), x)
    (many,) = torch.autograd.grad(DIFFERENTIATED[name](x), x, upstream, is_grads_batched=True)
    torch.testing.assert_close(many, upstream[:, None, None] * one)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "vjp": lambda loss, x: torch.func.vjp(loss, x),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "vmap": lambda loss, x: torch.func.vmap(loss)(torch.stack([x, x])),
    "vmap of grad": lambda loss, x: torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x])),
}


@every_loss
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_refused_in_plain_words(transform: str, name: str) -> None:
    with pytest.raises(RuntimeError, match=r"kdkernels' losses came under a transform of torch.func.*accepted: loss.backward"):
        TRANSFORMS[transform](DIFFERENTIATED[name], argument(name))


@every_loss
def test_forward_mode_derivatives_are_refused_in_plain_words(name: str) -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(argument(name), torch.ones_like(argument(name)))
        with pytest.raises(RuntimeError, match="came under forward-mode derivatives"):
            DIFFERENTIATED[name](dual)
        DIFFERENTIATED[name](argument(name))  # no dual number, no derivative


def test_functional_call_is_no_transform() -> None:
    model = Model(LOSSES["mean"])
    parameters = {name: one.detach().clone().requires_grad_() for name, one in model.named_parameters()}
    loss = torch.func.functional_call(model, parameters, (HIDDEN, LABELS))
    expected = torch.autograd.grad(model(HIDDEN, LABELS), list(model.parameters()))
    for found, right in zip(torch.autograd.grad(loss, list(parameters.values())), expected, strict=True):
        torch.testing.assert_close(found, right)
