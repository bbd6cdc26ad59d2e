"""``check_labels=False``: the host reads nothing, and what comes out is what it is with the check.

Dropped positions are then worked on as the others are, so they hold NaN here, which must not come through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from tests.support import okd
from tests.support.cases import Case, assert_close, draw, dressed, keywords, parameters, running
from tests.support.oracle import Options
from tests.support.topk import Kept

# By the way that a step is cut, sums come in another order; of float64 nothing else is left.
ROUNDING = 1e-12
NAMES = ("forward_kl", "jsd", "reverse_kl")
REDUCTIONS = ("mean", "sum", "none")
Run = Callable[[Case, dict[str, Any]], dict[str, Tensor]]


def holed(name: str = "forward_kl", tokens: int = 9) -> Case:
    """Everything that a batch can have; positions that do not count hold NaN in both models."""
    case = dressed(draw(tokens=(tokens,), dtype=torch.float64))
    assert case.labels is not None
    assert case.token_weight is not None
    dropped = (case.labels == -100) | (case.token_weight == 0)
    assert 0 < dropped.sum() < tokens
    hidden = [one.masked_fill(dropped[:, None], torch.nan) for one in (case.student_hidden, case.teacher_hidden)]
    options = Options(divergence=name, temperature=2.0, t=0.6, ce_weight=0.5)
    return replace(case, student_hidden=hidden[0], teacher_hidden=hidden[1], options=options)


def _with_metrics(made: Any, leaves: dict[str, Tensor], metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(made.sum(), list(leaves.values()))
    return {"loss": made.detach(), **dict(zip(leaves, grads, strict=True)), **metrics}


def of_heads(case: Case, more: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    made, metrics = case.loss(leaves, return_metrics=True, **more)
    return _with_metrics(made, leaves, metrics)


def of_both(case: Case, more: dict[str, Any]) -> dict[str, Tensor]:
    leaves = okd.leaves_of(case)
    made = okd.call(case, leaves, return_metrics=True, **more)
    return _with_metrics(made.student + 2 * made.teacher, leaves, made.metrics)


def of_known(case: Case, more: dict[str, Any]) -> dict[str, Tensor]:
    known = torch.randn(len(case.student_hidden), 37, generator=torch.Generator().manual_seed(5)).log_softmax(-1).topk(4)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    made, metrics = Kept(case, known.indices, known.values, "bucket").loss(leaves, return_metrics=True, **more)
    return _with_metrics(made, leaves, metrics)


def of_logits(case: Case, more: dict[str, Any]) -> dict[str, Tensor]:
    x, z = case.logits()
    leaves = {"student_logits": x.requires_grad_()}
    options = {**keywords(case.options), "token_weight": case.token_weight}
    made, metrics = kd.kd_loss(x, z, case.labels, return_metrics=True, **options, **more)
    return _with_metrics(made, leaves, metrics)


CUTS = ({"strategy": "tokens"}, {"strategy": "vocab"}, {"strategy": "tokens", "memory_budget": 1500},
        {"strategy": "vocab", "memory_budget": 1500})  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
class TestAsWithTheCheck:
    @pytest.mark.parametrize("cut", CUTS, ids=str)
    @pytest.mark.parametrize("run", [of_heads, of_both, of_known])
    def test_from_hidden_states(self, run: Run, cut: dict[str, Any], name: str, reduction: str) -> None:
        case, more = holed(name), {**cut, "reduction": reduction}
        right = run(case, more)
        assert all(value.isfinite().all() for value in right.values())
        assert_close(run(case, {**more, "check_labels": False}), right, ROUNDING)

    def test_from_logits(self, name: str, reduction: str) -> None:
        case = holed(name)
        right = of_logits(case, {"reduction": reduction})
        assert right["student_logits"].isfinite().all()
        assert_close(of_logits(case, {"reduction": reduction, "check_labels": False}), right, ROUNDING)


@pytest.mark.parametrize("variant", parameters(("native", "native-vocab", "triton", "triton-vocab")))
def test_other_backends(variant: str) -> None:
    """In float32, within a few of its roundings of the largest entry."""
    case = holed()
    case = replace(
        case, **{name: part.float() for name, part in vars(case).items() if isinstance(part, Tensor) and part.is_floating_point()}
    )
    with running(variant):
        right, found = (of_heads(case, {"check_labels": check}) for check in (True, False))
    assert all(value.isfinite().all() for value in right.values())
    assert_close(found, right, 1e-5)


@pytest.mark.parametrize("run", [of_heads, of_both, of_known, of_logits])
@pytest.mark.parametrize("wrong", [37, -1, 2**40])
def test_a_label_out_of_range_is_a_loss_that_is_no_number(run: Run, wrong: int) -> None:
    case = holed()
    assert case.labels is not None
    case = replace(case, labels=case.labels.index_fill(0, torch.tensor([4]), wrong))
    with pytest.raises(ValueError, match="labels holds"):
        run(case, {})
    found = run(case, {"check_labels": False})
    assert found["loss"].isnan()
    per_token = run(case, {"check_labels": False, "reduction": "none"})["loss"]
    assert torch.equal(per_token == 0, (case.labels == -100) | (case.token_weight == 0))


@pytest.mark.parametrize("ids", [[0, 37], [-1, 1], [3, 3]])
def test_tokens_of_a_teacher_out_of_range_or_twice(ids: list[int]) -> None:
    case = replace(holed(), labels=None, token_weight=None, student_hidden=draw(tokens=(9,), dtype=torch.float64).student_hidden)
    case = replace(case, options=replace(case.options, ce_weight=0.0))
    kept = Kept(case, torch.tensor([[5, 6]] * 8 + [ids]), torch.full((9, 2), -1.0))
    with pytest.raises(ValueError, match="topk_ids holds"):
        kept.loss()
    assert kept.loss(check_labels=False).isnan()
    unused = replace(kept, log_probs=kept.log_probs.index_fill(1, torch.tensor([0 if ids[0] < 0 else 1]), -torch.inf))
    torch.testing.assert_close(unused.loss(check_labels=False), unused.loss())


def test_no_token_counts() -> None:
    case = holed()
    assert case.labels is not None
    case = replace(case, labels=torch.full_like(case.labels, -100))
    found = of_heads(case, {"check_labels": False})
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


def test_it_is_a_flag() -> None:
    with pytest.raises(TypeError, match="check_labels is True or False, got int"):
        holed().loss(check_labels=0)
