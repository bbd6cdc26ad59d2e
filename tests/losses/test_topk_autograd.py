"""Gradients of distillation from k tokens follow autograd's rules, and its operator keeps torch.library's contracts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels.engine import outcomes
from tests.support.cases import (
    DTYPES,
    Recorder,
    assert_close,
    assert_same,
    both_strategies,
    draw,
    dressed,
    every_divergence,
    every_reduction,
    strided,
)
from tests.support.oracle import Options
from tests.support.topk import BUDGET, NAN, Kept, both_tails, full, keep


class TestAutograd:
    def leaves(self, kept: Kept) -> dict[str, Tensor]:
        return {name: leaf.clone().requires_grad_() for name, leaf in kept.learned().items()}

    @both_tails
    @both_strategies
    @every_reduction
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_backward_twice_gives_the_same_gradient_twice(
        self, dtype: torch.dtype, reduction: str, strategy: str, tail: str
    ) -> None:
        kept = full(tail, dtype, divergence="jsd", t=0.6)
        leaves = self.leaves(kept)
        value = kept.loss(leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        upstream, inputs = torch.full_like(value, 0.25), list(leaves.values())
        first = torch.autograd.grad(value, inputs, upstream, retain_graph=True)
        assert [grad.dtype for grad in first] == [dtype] * 3
        saved = [grad.clone() for grad in first]
        for grad in first:
            grad.fill_(NAN)  # what a caller does with a gradient is their own business
        assert_same(torch.autograd.grad(value, inputs, upstream), saved)

    @both_tails
    def test_each_token_has_its_own_upstream_gradient(self, tail: str) -> None:
        kept = full(tail, torch.float64)
        leaves = self.leaves(kept)
        upstream = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1e-3], dtype=torch.float64)
        inputs = list(leaves.values())
        together = torch.autograd.grad(kept.loss(leaves, reduction="none"), inputs, upstream)
        per_token = [torch.autograd.grad(kept.loss(leaves, reduction="none")[token], inputs) for token in range(6)]
        for at, grad in enumerate(together):
            by_hand = sum(factor * grads[at] for factor, grads in zip(upstream, per_token, strict=True))
            torch.testing.assert_close(grad, by_hand, rtol=1e-10, atol=1e-14)

    @both_strategies
    @every_reduction
    @pytest.mark.parametrize("learn", [("student_hidden",), ("student_weight",), ("student_bias",), ()])
    def test_gradients_go_only_where_they_are_asked_for(self, learn: tuple[str, ...], reduction: str, strategy: str) -> None:
        kept = full()
        everything = kept.run(reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        leaves = {name: leaf.clone().requires_grad_(name in learn) for name, leaf in kept.learned().items()}
        loss = kept.loss(leaves, reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert loss.requires_grad == bool(learn)
        if learn:
            loss.sum().backward()
        for name, leaf in leaves.items():
            if name in learn:
                torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-6, atol=1e-9)
            else:
                assert leaf.grad is None

    @both_strategies
    @every_reduction
    def test_two_runs_agree_bit_for_bit_and_inputs_are_never_written_to(self, reduction: str, strategy: str) -> None:
        kept = full(divergence="jsd")
        parts = [part for part in (*vars(kept.case).values(), kept.ids, kept.log_probs) if isinstance(part, Tensor)]
        before, versions = [part.clone() for part in parts], [part._version for part in parts]
        first, second = (kept.run(reduction=reduction, strategy=strategy, memory_budget=BUDGET) for _ in range(2))
        assert_same(list(first.values()), list(second.values()))
        assert_same(parts, before)
        assert [part._version for part in parts] == versions

    @both_strategies
    @both_tails
    def test_pieces_are_only_a_size(self, tail: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = full(tail)
        whole = kept.run(strategy=strategy)
        monkeypatch.setattr(outcomes, "PIECE_BYTES", {"cpu": 1})
        assert_close(kept.run(strategy=strategy), whole, 1e-6)

    @both_strategies
    @every_reduction
    def test_autocast(self, reduction: str, strategy: str) -> None:
        """bfloat16 hidden states over float32 master weights."""
        kept = full(temperature=1.0)
        case = replace(kept.case, student_hidden=kept.case.student_hidden.bfloat16())
        right = replace(kept, case=replace(case, student_hidden=case.student_hidden.float())).run(reduction=reduction)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = replace(kept, case=case).run(reduction=reduction, strategy=strategy, memory_budget=BUDGET)
        assert found["loss"].dtype == torch.float32
        assert {name: found[name].dtype for name in kept.learned()} == {name: leaf.dtype for name, leaf in case.learned().items()}
        assert_close(found, right, 4 * torch.finfo(torch.bfloat16).eps)

    def test_float16_gradients_of_single_tokens_survive_until_a_gradient_scaler_multiplies_them(self) -> None:
        kept = keep(draw(tokens=(2048,), vocab=53, spread=1.0, dtype=torch.float16), 5, "bucket")
        exact, scale = kept.plain(), 2.0**14
        leaves = self.leaves(kept)
        (kept.loss(leaves) * scale).backward()
        for name, leaf in leaves.items():
            wrong = (leaf.grad.double() / scale - exact[name]).norm() / exact[name].norm()  # type: ignore[union-attr]
            assert wrong < 2e-3, name

    def test_a_padded_head_is_cut(self) -> None:
        kept = full("bucket", torch.float64)
        case = kept.case
        assert case.student_bias is not None
        padded = replace(
            case,
            student_weight=torch.cat([case.student_weight, torch.full((4, 8), NAN, dtype=torch.float64)]),
            student_bias=torch.cat([case.student_bias, torch.full((4,), NAN, dtype=torch.float64)]),
        )
        for strategy in ("tokens", "vocab"):
            found = replace(kept, case=padded).run(vocab_size=37, strategy=strategy)
            assert (found["student_weight"][37:] == 0).all()
            assert (found["student_bias"][37:] == 0).all()
            found = {name: value[:37] if name in ("student_weight", "student_bias") else value for name, value in found.items()}
            assert_close(found, kept.run(), 1e-12)

    def test_strides_are_nothing(self) -> None:
        kept = full()
        case = replace(
            kept.case, student_hidden=strided(kept.case.student_hidden), student_weight=strided(kept.case.student_weight)
        )
        found = replace(kept, case=case, ids=strided(kept.ids), log_probs=strided(kept.log_probs)).run()
        assert_close(found, kept.run(), 1e-6)

    @both_tails
    @every_divergence
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_finite_differences(self, reduction: str, name: str, tail: str) -> None:
        case = dressed(draw(tokens=(4,), vocab=7, dims=(3, 5), dtype=torch.float64))
        case = replace(case, student_softcap=8.0, options=Options(name, temperature=1.5, ce_weight=0.5, kd_weight=2.0))
        kept = keep(case, 3, tail, torch.float64)

        def loss(*leaves: Tensor) -> Tensor:
            return kept.loss(dict(zip(kept.learned(), leaves, strict=True)), reduction=reduction)

        assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in kept.learned().values()])


@both_tails
@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_keeps_its_contract(dtype: torch.dtype, metrics: bool, tail: str) -> None:
    kept = full(tail, dtype)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in kept.learned().items()}
    with Recorder() as recorder:
        kept.loss(leaves, return_metrics=metrics)
    torch.library.opcheck(torch.ops.kdkernels.linear_topk_kd.default, recorder.calls["linear_topk_kd"])


# PyTorch warns of what PyTorch does: its tracer makes an instance of every autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_graph_has_no_breaks(reduction: str) -> None:
    kept, graphs = full("bucket", divergence="jsd"), []
    inner = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return inner(graph, inputs)

    def stepped(leaves: dict[str, Tensor], t: Tensor) -> Any:
        loss, metrics = kept.loss(leaves, t=t, reduction=reduction, return_metrics=True)
        return (loss * 1.5).sum(), metrics

    compiled = torch.compile(stepped, fullgraph=True, backend=counting)
    for t in (1.0, 0.4):
        results = []
        for function in (stepped, compiled):
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in kept.learned().items()}
            loss, metrics = function(leaves, torch.tensor(t))
            loss.backward()
            results.append([loss.detach(), *metrics.values(), *(leaf.grad for leaf in leaves.values())])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)
    assert len(graphs) == 1, "t is a tensor: another value must not compile again"
