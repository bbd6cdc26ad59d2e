"""The products of hidden states, heads and gradients: blocks of the head, and 16-bit products on machines that are fast at them.

Whether a CPU multiplies 16-bit matrices itself decides which code runs. Both are tested everywhere: the other kind is pretended.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import products
from tests.support.cases import InsideOperators, assert_as_good_as_eager, draw, dressed, ratios
from tests.support.interpreter import as_on_a_gpu
from tests.support.oracle import Options

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# Whole, and in several chunks of rows or blocks of columns.
RUNS: list[dict[str, Any]] = [{}, {"memory_budget": 20_000}, {"memory_budget": 20_000, "strategy": "vocab"}]
every_dtype = pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)


@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_a_gpu_adds_up_inside_its_products(strategy: str) -> None:
    """The head's gradient over chunks, the hidden states' over blocks: whole products into the float32 sum, none beside it."""
    case = draw(tokens=(40,), vocab=301, dtype=torch.bfloat16)
    with as_on_a_gpu("reference"):
        added: list[tuple[torch.dtype, ...]] = []
        add = products.add_multiplied

        def seen(left: Tensor, right: Tensor, out: Tensor) -> None:
            added.append((left.dtype, right.dtype, out.dtype, *out.shape))
            add(left, right, out)

        with mock.patch.object(products, "add_multiplied", seen):
            case.run(memory_budget=200_000, strategy=strategy)
    sums = {(torch.bfloat16, torch.bfloat16, torch.float32, *((301, 8) if strategy == "tokens" else (40, 8)))}
    assert set(added) == sums


@every_dtype
@pytest.mark.parametrize("spread", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "total_variation"])
def test_both_kinds_are_as_good_as_eager(kind: str, dtype: torch.dtype, spread: float, name: str) -> None:
    compared = {}
    for t, temperature in ((1.0, 1.0), (0.4, 2.0)):
        options = Options(name, t=t, temperature=temperature, ce_weight=0.5)
        cases = [replace(dressed(draw(seed, (12,), 1003, (16, 24), spread, dtype)), options=options) for seed in range(2)]
        exact, eager = [case.plain() for case in cases], [case.plain(dtype) for case in cases]
        for how in RUNS:
            found = [case.run(**how) for case in cases]
            compared[t, temperature, str(how)] = ratios(found, eager, exact)
    assert_as_good_as_eager(compared)


@every_dtype
def test_the_head_may_be_cut_into_any_blocks(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(dressed(draw(tokens=(40,), vocab=301, dtype=dtype)), options=Options(ce_weight=0.5))
    whole = case.run()
    for rows in (300, 100, 7):
        monkeypatch.setattr(products, "block_rows", lambda *_, rows=rows: rows)
        for how in RUNS:
            for name, value in case.run(**how).items():
                tolerance = 4 * torch.finfo(dtype).eps * whole[name].abs().max().item()
                torch.testing.assert_close(value, whole[name], rtol=0, atol=tolerance, msg=lambda text, of=name: f"{of}: {text}")


class Logits(InsideOperators):
    """The dtypes in which the row operation of the native backend meets its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[tuple[torch.dtype, torch.dtype]] = set()

    def before(self, name: str, args: tuple[Tensor, ...]) -> None:
        if name == "kdkernels::row_loss":
            self.dtypes.add((args[0].dtype, args[1].dtype))


@pytest.mark.skipif(kd.backend() != "native", reason="the C++ extension was not built here")
@pytest.mark.parametrize("kind", ["widened", "fast"], indirect=True)
def test_products_run_in_the_dtype_of_their_model_or_of_autocast(kind: str) -> None:
    of = {dtype: dtype if kind == "fast" else torch.float32 for dtype in SIXTEEN_BITS}
    case = draw(dtype=torch.bfloat16)
    case = replace(case, teacher_hidden=case.teacher_hidden.float(), teacher_weight=case.teacher_weight.float())
    with Logits() as plain:
        case.loss()
    assert plain.dtypes == {(of[torch.bfloat16], torch.float32)}
    for dtype in SIXTEEN_BITS:
        with Logits() as under_autocast, torch.autocast("cpu", dtype=dtype):
            case.loss()
        assert under_autocast.dtypes == {(of[dtype], of[dtype])}


def test_autocast_does_not_reach_into_a_backward_that_computes_again(kind: str) -> None:
    case = draw()
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    loss = case.loss(leaves, reduction="none").sum()
    expected = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, list(leaves.values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@every_dtype
def test_the_compiler_is_told_the_dtype_that_comes_out(kind: str, dtype: torch.dtype) -> None:
    case = draw(dtype=dtype)
    recorded = []

    class Calls(InsideOperators):
        def before(self, name: str, args: tuple[Tensor, ...]) -> None:
            if name == "kdkernels::linear_kd":
                recorded.append(args)

    with Calls():
        case.loss(return_metrics=True)
    torch.library.opcheck(torch.ops.kdkernels.linear_kd.default, recorded[0], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("rows", [1, 3, 7, 50])
def test_parts_of_a_float64_sum_leave_a_widened_head_alone(rows: int) -> None:
    """Both want the buffer. rows: of the sum that the buffer would hold at a time, of seven."""
    dx, weight = torch.randn(7, 300), torch.randn(300, 8).half()
    out = torch.randn(7, 8, dtype=torch.float64)
    right = out + (dx @ weight.float()).double()
    head = products.HeadProducts(weight, torch.float32, torch.empty(max(rows, 300) * 8))
    head.add_hidden_grad(dx, out, first=False)
    torch.testing.assert_close(out, right, rtol=0, atol=300 * torch.finfo(torch.float32).eps)
    small = torch.empty(rows * 8)
    products.add_product(dx, weight.float(), out, True, small)
    torch.testing.assert_close(out, (dx @ weight.float()).double(), rtol=0, atol=300 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("first", [True, False])
def test_a_float64_sum_of_16_bit_products_is_made_in_parts(first: bool) -> None:
    """As where one of two models that learn is in float64: torch's products give 16-bit operands no other result than float32."""
    left, right = torch.randn(7, 30).bfloat16(), torch.randn(30, 8).bfloat16()
    out = torch.ones(7, 8, dtype=torch.float64)
    exact = left.double() @ right.double() + (not first)
    with as_on_a_gpu("reference"):
        products.add_product(left, right, out, first, torch.empty(300))
    torch.testing.assert_close(out, exact, rtol=0, atol=torch.finfo(torch.bfloat16).eps * exact.abs().max().item())
