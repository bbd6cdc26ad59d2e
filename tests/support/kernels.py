"""Problems of many tiles for the kernels that multiply, and their steps and sweeps as the launcher takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels.backends.base import Needs, Step, Terms
from kdkernels.backends.columns import STATS_COLUMNS
from kdkernels.divergences import resolve
from kdkernels.engine.step import Inputs, prepare
from kdkernels.engine.step import Options as Asked
from tests.support.cases import Case, draw, dressed
from tests.support.oracle import Options

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import vocabulary

EPS = torch.finfo(torch.float32).eps
AT = {name: column for column, name in enumerate(STATS_COLUMNS)}
# With blocks of 16 tokens and 32 columns two tiles by five; the programs side by side decide how the five are split.
TOKENS, VOCAB, DIMS = 20, 150, (24, 40)
SPLITS = {1: 1, 5: 3, 16: 5}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def large(name: str = "jsd", dims: tuple[int, int] = DIMS, dtype: torch.dtype = torch.float32) -> Case:
    case = dressed(draw(tokens=(TOKENS,), vocab=VOCAB, dims=dims, dtype=dtype))
    return replace(case, options=Options(name, t=0.6, temperature=2.0, ce_weight=0.5))


def run(case: Case, **more: Any) -> dict[str, Tensor]:
    """Loss, metrics if asked for, and gradients, in strategy "vocab" in two blocks of columns."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in case.learned().items()}
    memory = 80 * case.student_hidden.shape[0] * case.student_hidden.element_size()
    made = case.loss(leaves, **{"strategy": "vocab", "memory_budget": memory, **more})
    loss, metrics = made if isinstance(made, tuple) else (made, {})
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **metrics, **dict(zip(leaves, grads, strict=True))}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], terms: int = VOCAB) -> None:
    """Within what regrouping sums of ``terms`` terms can change."""
    assert set(found) == set(right)
    for name, value in right.items():
        tolerance = terms * EPS * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda text, of=name: f"{of}: {text}")


def step_of(case: Case, name: str, metrics: bool = False, dtype: torch.dtype = torch.float32) -> Step:
    options = case.options
    return prepare(
        Inputs(case.student_hidden, case.student_weight, case.student_bias),
        Inputs(case.teacher_hidden, case.teacher_weight, case.teacher_bias),
        case.token_weight,
        torch.tensor(options.t),
        Terms(name, resolve(name).a, options.temperature, options.kd_weight, options.ce_weight, [1.0, 0.0, 1.0, 0.0]),
        Asked(
            labels=case.labels,
            ignore_index=-100,
            vocab=case.student_weight.shape[0],
            dtypes=(dtype, dtype),
            needs=(Needs(True, True, True),),
            metrics=metrics,
            budget=2**30,
            grad_scale=torch.ones(()),
            lift=None,
        ),
    )


def sweeps_of(step: Step, tile: Tensor | None = None) -> Any:
    tile = torch.empty(step.count, step.vocab, dtype=step.student.dtype) if tile is None else tile
    index = step.index(0, step.count)
    return vocabulary.LearnerSweeps(step, (step.student.rows(index), step.teacher.rows(index)), tile, torch.empty(0))


def of_logits(x: Tensor, z: Tensor, **more: Any) -> Case:
    """A case with exactly these logits [N, V]: hidden states are the rows of an identity, padded to a multiple of 4."""
    hidden = torch.eye(x.shape[0], -(-x.shape[0] // 4) * 4)
    weights = [torch.nn.functional.pad(side.t(), (0, hidden.shape[1] - x.shape[0])).contiguous() for side in (x, z)]
    return Case(hidden, weights[0], hidden, weights[1], **more)
