"""The operators keep torch.library's contracts: schemas, fakes, gradients, and compiled graphs without breaks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from tests.support.cases import (
    INSTRUCTION_SETS,
    NATIVE_DTYPES,
    Recorder,
    draw,
    dressed,
    keywords,
    parameters,
    running,
)
from tests.support.oracle import Options


def recorded(dtype: torch.dtype, bare: bool = False) -> dict[str, tuple[Any, ...]]:
    case = draw(dtype=dtype) if bare else dressed(draw(dtype=dtype))
    case = replace(case, options=Options("jsd", t=0.5, ce_weight=0.0 if bare else 0.5))
    x, z = (logits.to(dtype) for logits in case.logits())
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    with Recorder() as recorder:
        case.loss(leaves, return_metrics=not bare)
        kd.kd_loss(x.requires_grad_(), z, case.labels, return_metrics=not bare)
    return recorder.calls


class TestOpcheck:
    @pytest.mark.parametrize("bare", [False, True])
    @pytest.mark.parametrize("dtype", [*NATIVE_DTYPES, torch.float64])
    @pytest.mark.parametrize("name", ["linear_kd", "logits_kd"])
    def test_losses(self, name: str, dtype: torch.dtype, bare: bool) -> None:
        torch.library.opcheck(getattr(torch.ops.kdkernels, name).default, recorded(dtype, bare)[name])

    @pytest.mark.parametrize("variant", parameters(INSTRUCTION_SETS))
    @pytest.mark.parametrize("dtype", NATIVE_DTYPES)
    def test_rows_and_blocks(self, dtype: torch.dtype, variant: str) -> None:
        operators = torch.ops.kdkernels
        with running(variant):
            x, z, x_bias, z_bias, labels, weight, t, *terms, grad, metrics = recorded(torch.float32)["row_loss"][:15]
            x, z = x.to(dtype), z.to(dtype)
            divergence, a, temperature, kd_scale, ce_scale, head = terms
            logits, scales = (x, z, x_bias, z_bias), (kd_scale, ce_scale, head)
            everything = (*logits, labels, weight, t, divergence, a, temperature, *scales)
            torch.library.opcheck(operators.row_loss.default, (*everything, grad, metrics))
            torch.library.opcheck(operators.row_loss.default, (*everything, True, metrics, torch.empty_like(x)))
            statistics = (*logits, labels, t, temperature, head, "student", True, True)
            torch.library.opcheck(operators.block_stats.default, statistics)
            stats = operators.block_stats(*statistics)
            reduce = (*logits, t, divergence, a, temperature, head, stats, True)
            torch.library.opcheck(operators.block_reduce.default, reduce)
            sums = operators.block_reduce(*reduce)
            torch.library.opcheck(operators.block_grad.default, (*everything, stats, sums))


class TestGradcheck:
    """Against finite differences, in float64, through the public functions."""

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_from_hidden_states(self, name: str, reduction: str) -> None:
        case = dressed(draw(tokens=(4,), vocab=7, dims=(3, 5), dtype=torch.float64))
        case = replace(case, student_softcap=8.0, options=Options(name, t=1.0, temperature=1.5, ce_weight=0.5, kd_weight=2.0))

        def loss(*leaves: Tensor) -> Tensor:
            return case.loss(dict(zip(case.learned(), leaves, strict=True)), reduction=reduction)

        assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in case.learned().values()])

    @pytest.mark.parametrize("name", kd.divergences())
    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_from_logits(self, name: str, reduction: str) -> None:
        x, z = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
        labels = torch.tensor([2, -100, 5])

        def loss(x: Tensor) -> Tensor:
            return kd.kd_loss(x, z, labels, divergence=name, temperature=2.0, ce_weight=1.0, reduction=reduction)

        assert torch.autograd.gradcheck(loss, [x.requires_grad_()])


# PyTorch warns of what PyTorch does: its tracer makes an instance of every autograd.Function, its Inductor uses old TorchScript.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    """One graph without breaks, with the values and gradients of the eager call."""

    def compiled(self, function: Any, backend: str = "aot_eager", **options: Any) -> tuple[Any, list[int]]:
        """The function, and a list that grows with every graph that is compiled for it."""
        graphs: list[int] = []
        inner = torch._dynamo.lookup_backend(backend)

        def counting(graph: Any, inputs: Any) -> Any:
            graphs.append(len(graphs))
            return inner(graph, inputs)

        return torch.compile(function, fullgraph=True, backend=counting, **options), graphs

    @pytest.mark.parametrize(("reduction", "dtype"), [("mean", torch.float32), ("mean", torch.float16), ("none", torch.float32)])
    def test_from_hidden_states(self, reduction: str, dtype: torch.dtype) -> None:
        case = replace(dressed(draw(dtype=dtype)), options=Options("jsd", temperature=2.0, ce_weight=0.5))

        def step(leaves: dict[str, Tensor], t: Tensor) -> Any:
            loss, metrics = case.loss(leaves, t=t, reduction=reduction, return_metrics=True)
            return (loss * 1.5).sum(), metrics

        compiled, graphs = self.compiled(step)
        for t in (1.0, 0.4, 0.0):
            results = []
            for function in (step, compiled):
                leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.learned().items()}
                loss, metrics = function(leaves, torch.tensor(t))
                loss.backward()
                results.append([loss.detach(), *metrics.values(), *(leaf.grad for leaf in leaves.values())])
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(found.dtype).eps, atol=1e-7)
        assert len(graphs) == 1, "t is a tensor: another value must not compile again"

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_from_logits(self, reduction: str) -> None:
        x, z = torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([1, 2, -100, 4, 5])

        def step(x: Tensor, t: Tensor) -> Tensor:
            return kd.kd_loss(x, z, labels, t=t, ce_weight=0.5, temperature=2.0, reduction=reduction).sum()

        compiled, graphs = self.compiled(step)
        for t in (1.0, 0.3):
            grads = []
            for function in (step, compiled):
                leaf = x.clone().requires_grad_()
                loss = function(leaf, torch.tensor(t))
                grads.append([loss.detach(), *torch.autograd.grad(loss, [leaf])])
            for found, expected in zip(*grads, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        assert len(graphs) == 1

    def test_token_counts_share_a_graph(self) -> None:
        """Defect 8 of the neighbours: one compiled graph for every token count."""
        weights = draw(vocab=37)

        def step(hidden: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
            return kd.linear_kd_loss(hidden, weight, teacher, weights.teacher_weight, labels, ce_weight=0.5)

        compiled, graphs = self.compiled(step)
        for tokens in (5, 8, 13, 21):
            case = draw(seed=tokens, tokens=(tokens,))
            labels = torch.arange(tokens)
            results = []
            for function in (step, compiled):
                hidden, weight = (part.clone().requires_grad_() for part in (case.student_hidden, weights.student_weight))
                loss = function(hidden, case.teacher_hidden, labels, weight)
                results.append([loss.detach(), *torch.autograd.grad(loss, [hidden, weight])])
            for found, expected in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        assert len(graphs) <= 2, "once for the first shape, once for all others"

    def test_dynamic_from_the_start(self) -> None:
        compiled, graphs = self.compiled(lambda x, z: kd.kd_loss(x, z), dynamic=True)
        after_the_first = 0
        for tokens in (3, 4, 9):
            x, z = torch.randn(2, tokens, 11, generator=torch.Generator().manual_seed(tokens))
            torch.testing.assert_close(compiled(x.requires_grad_(), z), kd.kd_loss(x, z))
            after_the_first = after_the_first or len(graphs)
        assert len(graphs) == after_the_first

    def test_a_module_inside_a_model(self) -> None:
        case = draw()
        criterion, body = kd.LinearKDLoss(divergence="reverse_kl", temperature=2.0), torch.nn.Linear(8, 8)

        def step() -> Tensor:
            hidden = torch.tanh(body(case.student_hidden))
            return criterion(hidden, case.student_weight, case.teacher_hidden, case.teacher_weight)

        compiled, _ = self.compiled(step)
        grads = [torch.autograd.grad(function(), list(body.parameters())) for function in (step, compiled)]
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)

    def test_under_autocast(self) -> None:
        case = draw()

        def step(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return kd.linear_kd_loss(hidden, weight, case.teacher_hidden, case.teacher_weight)

        compiled, _ = self.compiled(step)
        results = []
        for function in (step, compiled):
            leaves = [case.student_hidden.bfloat16().requires_grad_(), case.student_weight.clone().requires_grad_()]
            loss = function(*leaves)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)

    def test_inductor(self) -> None:
        x, z = torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(lambda x: kd.kd_loss(x * 2, z), fullgraph=True)
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward()
        expected = x.clone().requires_grad_()
        kd.kd_loss(expected * 2, z).backward()
        torch.testing.assert_close(leaf.grad, expected.grad)


@pytest.mark.parametrize("name", kd.divergences())
def test_the_operator_knows_every_listed_divergence_on_every_backend(name: str) -> None:
    x, z = torch.randn(2, 3, 5)
    for backend in backends.NAMES if backends.native.available() else ("reference",):
        with backends.use(backend):
            assert kd.kd_loss(x, z, **{**keywords(Options(name)), "normalizer": None}).isfinite()
