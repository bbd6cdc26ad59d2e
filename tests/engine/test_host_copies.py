"""On a GPU a step makes the host wait once at most: where it reads how many rows count, and the largest label. With
``check_labels=False`` it never does, so that a CUDA graph can capture it.

Shown on a CPU: what would be a copy between host and device is refused where it is asked for, in everything that a loss runs in
Python on the path of a GPU. The kernels are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kdkernels as kd
from kdkernels.divergences import resolve
from kdkernels.losses import autograd
from kdkernels.losses import operators as ops
from tests.support.cases import Case, draw, dressed, keywords

pytest.importorskip("triton", reason="Triton is not installed")

from kdkernels.backends.triton import rows, scaling, vocabulary
from tests.support.interpreter import as_on_a_gpu

# Of these the host needs the values, or how many there are; or their values come from the host.
WAITING = {
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "numpy",
    "cpu",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
}
FROM_THE_HOST = {"tensor", "as_tensor", "new_tensor", "from_numpy", "asarray"}


class NoHostCopies(TorchFunctionMode):
    """Refuses what waits for the device or copies to it; counts reads of whole tables (``tolist``), the one that is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "tolist":
            self.reads += 1
        elif name in WAITING | FROM_THE_HOST or (name == "where" and len(args) + len(kwargs or {}) == 1):
            raise AssertionError(f"{name} waits for the device, or copies from the host")
        elif name in ("__getitem__", "__setitem__"):
            for part in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(part, list) or (isinstance(part, Tensor) and part.dtype == torch.bool):
                    raise AssertionError(f"{name} with {part}: a list is copied to the device, and a mask counted on it")
        elif isinstance(func, torch._ops.OpOverloadPacket) and name == "scale_":
            with self:
                return autograd._scale_(*args)
        elif isinstance(func, torch._ops.OpOverloadPacket) and name in ops.IMPLEMENTATIONS:
            with self, torch.no_grad():  # what it does inside; its result comes from the dispatcher, which has its backward
                ops.IMPLEMENTATIONS[name](*args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Nothing:
        fn = lambda: None  # noqa: E731

        def __getitem__(self, _: Any) -> Callable[..., None]:
            return lambda *_, **__: None

    for name in kd.divergences():
        resolve(name).linear()  # computed once, on the CPU
    for module, names in ((rows, ["row_loss"]), (vocabulary, ["statistics", "sums", "gradient"]), (scaling, ["scale"])):
        for name in names:
            monkeypatch.setattr(module, f"{name}_kernel", Nothing())
    with as_on_a_gpu():
        yield


def everything(name: str) -> Case:
    case = dressed(draw(tokens=(40,), vocab=150))
    return replace(case, options=replace(case.options, divergence=name, temperature=2.0, ce_weight=0.5))


def step(loss: Callable[..., Any]) -> None:
    """Forward and backward, each with one read at most; without a check of the labels, none."""
    for check in (True, False):
        with NoHostCopies() as forward:
            made = loss(check_labels=check)
            value = made[0] if isinstance(made, tuple) else made
        assert forward.reads <= check
        with NoHostCopies() as backward:
            value.sum().backward()
        assert backward.reads <= check


@pytest.mark.parametrize(
    "more", [{}, {"memory_budget": 20_000}, {"reduction": "none"}, {"reduction": "sum", "return_metrics": True}]
)
@pytest.mark.parametrize("strategy", ["auto", "tokens", "vocab"])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
class TestSteps:
    def test_distillation(self, name: str, strategy: str, more: dict[str, Any]) -> None:
        case = everything(name)
        leaves = {key: leaf.requires_grad_() for key, leaf in case.learned().items()}
        schedule = kd.TAIDSchedule()
        step(lambda **check: case.loss(leaves, strategy=strategy, t=schedule.t, **more, **check))
        step(lambda **check: case.loss(leaves, strategy=strategy, t=0.5, **more, **check))

    def test_okd(self, name: str, strategy: str, more: dict[str, Any]) -> None:
        case = everything(name)
        leaves = {key: leaf.requires_grad_() for key, leaf in case.learned().items()}
        student, teacher = case.heads(leaves)
        options = {key: value for key, value in keywords(case.options).items() if key not in ("t", "kd_weight")}
        step(
            lambda **check: kd.linear_okd_loss(
                *(leaves["student_hidden"], student, case.teacher_hidden.requires_grad_(), teacher, case.labels),
                **{**options, "strategy": strategy, **more, **check},
            )
        )

    def test_most_likely_tokens(self, name: str, strategy: str, more: dict[str, Any]) -> None:
        case = everything(name)
        leaves = {key: leaf.requires_grad_() for key, leaf in case.learned().items()}
        known = torch.randn(40, 150).log_softmax(-1).topk(8)
        options = {key: value for key, value in keywords(case.options).items() if key != "divergence"}
        step(
            lambda **check: kd.linear_topk_kd_loss(
                *(leaves["student_hidden"], case.heads(leaves)[0], known.indices, known.values, case.labels),
                **{**options, "strategy": strategy, **more, **check},
            )
        )


@pytest.mark.parametrize("more", [{}, {"reduction": "none"}, {"return_metrics": True}])
def test_logits(more: dict[str, Any]) -> None:
    x, z = torch.randn(2, 40, 150)
    x.requires_grad_()
    labels = torch.arange(40).masked_fill(torch.arange(40) % 3 == 0, -100)
    step(lambda **check: kd.kd_loss(x, z, labels, ce_weight=0.5, token_weight=torch.ones(40), **more, **check))


@pytest.mark.parametrize("loss", [1.5, torch.tensor(1.5)], ids=["number", "tensor"])
def test_taid_schedule(loss: float | Tensor) -> None:
    schedule = kd.TAIDSchedule()
    with NoHostCopies() as seen:
        schedule.update(loss, 0.5)
    assert seen.reads == 0


def test_what_copies_is_refused() -> None:
    x = torch.randn(3, 4)
    for copies in (
        lambda: x[:, [0, 2]],
        lambda: x[x > 0],
        lambda: x.sum().item(),
        lambda: bool(x.sum() > 0),
        lambda: x.new_tensor([3]),
        lambda: torch.tensor(2.0),
        lambda: torch.where(x > 0),
    ):
        with pytest.raises(AssertionError, match="device"), NoHostCopies():
            copies()
