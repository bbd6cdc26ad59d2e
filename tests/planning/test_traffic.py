"""The bytes that kernels move, in closed form, are those that the meter counts in Triton's interpreter."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.engine.cut import block_columns
from kdkernels.engine.scratch import ROW_ELEMENTS
from kdkernels.planning import traffic as closed
from kdkernels.planning.traffic import Tiling, Traffic
from tests.support.cases import draw
from tests.support.meter import Meter, metered

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import scaling
from kdkernels.backends.triton.arch import ENTRIES
from kdkernels.backends.triton.blocks import Matrix
from kdkernels.backends.triton.vocabulary import shares
from tests.support.interpreter import as_on_a_gpu

BLOCKS, ROW_BLOCK = (16, 32, 16), 64  # a row of 32 parts
MATRIX = Tiling(*BLOCKS[:2])


class Step(NamedTuple):
    """A loss with gradients. student, teacher: hidden sizes; budget: bytes of scratch; biases: of both heads."""

    tokens: int = 32
    vocab: int = 128
    student: int = 32
    teacher: int = 48
    dtype: torch.dtype = torch.float32
    divergence: str = "forward_kl"
    labels: bool = False
    metrics: bool = False
    biases: bool = False
    budget: int = 2**20

    @property
    def logit(self) -> int:
        return max(4, self.dtype.itemsize)

    def run(self, strategy: str) -> Meter:
        drawn = draw(0, (self.tokens,), self.vocab, (self.student, self.teacher), dtype=self.dtype)
        hidden, head = drawn.student_hidden.requires_grad_(), drawn.student_weight.requires_grad_()
        tensors = (hidden, head, drawn.teacher_hidden, drawn.teacher_weight)
        teacher_hidden, teacher_head = tensors[2:]
        heads: list[Any] = [head, teacher_head]
        if self.biases:
            heads = [kd.LMHead(weight, torch.zeros(self.vocab, dtype=self.dtype)) for weight in heads]
        labels = torch.arange(self.tokens) % self.vocab if self.labels else None
        with as_on_a_gpu(blocks=BLOCKS, row=ROW_BLOCK), metered(operands=tensors) as meter:
            found = kd.linear_kd_loss(
                *(hidden, heads[0], teacher_hidden, heads[1], labels),
                divergence=self.divergence,
                ce_weight=0.5 if self.labels else 0.0,
                strategy=strategy,
                memory_budget=self.budget,
                return_metrics=self.metrics,
            )
            (found[0] if self.metrics else found).backward()
        return meter

    def scaled(self) -> dict[str, Traffic]:
        """Each program reads the factor. It is 1, but for the hidden states of float16, whose gradients are made large."""
        sizes = self.tokens * self.student, self.vocab * self.student
        block, most = scaling.cut(torch.device("cpu"))
        programs = sum(min(-(-size // block), most) for size in sizes)
        moved = 2 * sizes[0] if self.dtype == torch.float16 else 0
        return {"scale_kernel": Traffic(programs * closed.FLOAT + moved, moved)}

    def tokens_traffic(self) -> dict[str, Traffic]:
        """Chunks of rows add up to all rows, whatever their number."""
        swept = closed.sweeps(self.divergence, metrics=self.metrics, beside=True)
        return {
            **self.scaled(),
            "row_loss_kernel": closed.row_loss(
                *(self.tokens, self.vocab, (self.logit, self.logit), self.dtype.itemsize),
                sweeps=swept,
                labels=self.labels,
                biases=2 * self.biases,
                reach=ROW_BLOCK // 32 if self.vocab >= ROW_ELEMENTS else 1,  # shorter rows of the scratch have no room behind them
            ),
        }

    def offsets_traffic(self) -> dict[str, Traffic]:
        of = closed.Products(
            *(self.tokens, self.vocab, ((self.student, 2), (self.teacher, 2))),
            biases=2 * self.biases,
        )
        tiles = of.token_blocks(MATRIX) * -(-self.vocab // MATRIX.block_v)
        return {
            **self.scaled(),
            "offsets_product_kernel": closed.offsets_product(of, MATRIX, programs=min(tiles, 3)),
            "offsets_row_kernel": closed.offsets_row(
                *(self.tokens, self.vocab, MATRIX.block_v, 2),
                sweeps=0 if self.divergence == "forward_kl" else 1,
                reach=ROW_BLOCK // 32,
                labels=self.labels,
                metrics=self.metrics,
            ),
        }

    def vocab_traffic(self) -> dict[str, Traffic]:
        of = closed.Products(
            *(self.tokens, self.vocab, tuple((dim, self.dtype.itemsize) for dim in (self.student, self.teacher))),
            biases=2 * self.biases,
        )
        with as_on_a_gpu(blocks=BLOCKS, row=ROW_BLOCK):
            splits = replace(MATRIX, splits=shares(self.tokens, self.vocab, Matrix(*BLOCKS, 4, 1))[1])
            width = block_columns(self.tokens, self.vocab, self.dtype.itemsize, self.budget, torch.device("cpu"))
        found = {**self.scaled(), "statistics_kernel": closed.statistics(of, splits, labels=self.labels)}
        if closed.sweeps(self.divergence, metrics=self.metrics) == 2:
            found["sums_kernel"] = closed.sums(of, splits)
        gradients = [
            closed.gradient(
                *(of, MATRIX, begin, min(begin + width, self.vocab), self.dtype.itemsize),
                labels=self.labels,
                reach=ENTRIES if width >= ROW_ELEMENTS else 1,
            )
            for begin in range(0, self.vocab, width)
        ]
        found["gradient_kernel"] = functools.reduce(operator.add, gradients)
        return found


STEPS = {
    "two sweeps before the gradient": Step(divergence="jsd"),
    "one sweep": Step(),
    "one sweep, weighed by the student": Step(divergence="reverse_kl"),
    "labels": Step(labels=True),
    "labels and two sweeps": Step(divergence="jsd", labels=True),
    "metrics beside the gradient of forward KL": Step(metrics=True),
    "metrics want a second sweep": Step(divergence="reverse_kl", metrics=True, labels=True),
    "16 bits": Step(dtype=torch.bfloat16, divergence="jsd"),
    "16 bits, one sweep": Step(dtype=torch.bfloat16, labels=True),
    "biases": Step(biases=True, divergence="jsd"),
    "no size is a multiple of a block": Step(37, 101, 20, 28, labels=True, divergence="jsd"),
    "rows that no descriptor takes": Step(19, 75, 13, 21),
    "one token": Step(1, 45),
    "several chunks and blocks": Step(50, 200, budget=50 * 48 * 4, labels=True),
    "several chunks and blocks, 16 bits": Step(50, 200, budget=50 * 48 * 4, dtype=torch.bfloat16, divergence="reverse_kl"),
}


def assert_within(meter: Meter, found: dict[str, Traffic]) -> None:
    """2 % is what is promised; nothing that is done now is off by a byte."""
    assert set(meter.loaded) == set(found)
    for kernel, form in found.items():
        assert meter.loaded[kernel] == pytest.approx(form.loaded, rel=0.02), kernel
        assert meter.stored[kernel] == pytest.approx(form.stored, rel=0.02), kernel
    operands = sum(form.operands for form in found.values())
    assert meter.kinds["kernel operands"] == pytest.approx(operands, rel=0.02)
    assert meter.total() == pytest.approx(sum(form.total for form in found.values()), rel=0.001)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_kernels_move_what_their_closed_forms_say(strategy: str, name: str) -> None:
    step = STEPS[name]
    assert_within(step.run(strategy), step.tokens_traffic() if strategy == "tokens" else step.vocab_traffic())


@pytest.mark.parametrize(
    "step",
    [
        Step(dtype=torch.bfloat16),
        Step(37, 101, 20, 28, dtype=torch.bfloat16, labels=True, divergence="jsd"),
        Step(19, 75, 13, 21, dtype=torch.float16, biases=True),
        Step(dtype=torch.bfloat16, metrics=True),
        Step(dtype=torch.bfloat16, metrics=True, labels=True, divergence="jsd"),
    ],
)
def test_logits_of_16_bits(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_LOGITS", "offsets")
    assert_within(step.run("tokens"), step.offsets_traffic())


@pytest.mark.parametrize("labels", [True, False])
def test_a_value_alone_takes_no_gradient_sweep(labels: bool) -> None:
    step = Step(divergence="jsd", labels=labels)
    with torch.no_grad(), mock.patch.object(Tensor, "backward"):
        tokens, vocab = step.run("tokens"), step.run("vocab")
    form = closed.row_loss(step.tokens, step.vocab, (4, 4), sweeps=2, labels=labels)
    assert_within(tokens, {"row_loss_kernel": form})
    found = step.vocab_traffic()
    del found["gradient_kernel"], found["scale_kernel"]
    assert_within(vocab, found)


def test_a_loss_without_divergence_sweeps_once() -> None:
    """Cross-entropy alone: the student stands for the teacher, in the row kernel as in the kernels that multiply."""
    step = Step(labels=True, divergence="jsd")
    with mock.patch("kdkernels.linear_kd_loss", functools.partial(kd.linear_kd_loss, kd_weight=0.0)):
        tokens, vocab = step.run("tokens"), step.run("vocab")
    assert closed.sweeps("jsd", kd=False) == 1
    assert_within(tokens, {**step.scaled(), "row_loss_kernel": closed.row_loss(32, 128, (4, 4), 4, sweeps=1, labels=True)})
    of = closed.Products(step.tokens, step.vocab, ((step.student, 4),))
    splits = replace(MATRIX, splits=1)
    kernels = {
        **step.scaled(),
        "statistics_kernel": closed.statistics(of, splits, labels=True),
        "gradient_kernel": closed.gradient(of, MATRIX, 0, 128, 4, labels=True),
    }
    assert_within(vocab, kernels)


def test_an_extra_sweep_is_noticed() -> None:
    """The bound means something: reverse KL in two sweeps, as if running sums did not give its value."""
    step = Step(divergence="reverse_kl")
    with mock.patch("kdkernels.backends.triton.rows.resolve", return_value=replace(kd.reverse_kl(), one_sweep="")):
        meter = step.run("tokens")
    with pytest.raises(AssertionError):
        assert_within(meter, step.tokens_traffic())


def test_one_block_of_everything_loads_each_operand_once() -> None:
    of = closed.Products(40, 300, ((16, 2), (24, 4)), biases=1)
    whole = Tiling.whole(40, 300)
    once = (40 + 300) * (16 * 2 + 24 * 4)
    for form in (closed.statistics(of, whole), closed.sums(of, whole), closed.gradient(of, whole, 0, 300, 2)):
        assert form.operands == once
    assert closed.gradient(of, whole, 0, 300, 2).stored == 40 * 300 * 2
    assert closed.statistics(of, whole).loaded == once + 300 * 4 + 4
