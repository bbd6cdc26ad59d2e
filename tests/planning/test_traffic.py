"""The meter of memory traffic counts the bytes that one counts by hand."""

from __future__ import annotations

import functools
import json
import operator
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import traffic
from benchmarks.traffic import Meter, metered, rows_over
from kdkernels.engine.cut import block_columns
from kdkernels.engine.scratch import ROW_ELEMENTS
from kdkernels.planning import traffic as closed
from kdkernels.planning.traffic import Cut, Traffic

pytest.importorskip("triton")

from kdkernels.backends.triton.blocks import Matrix
from kdkernels.backends.triton.launch import ENTRIES
from kdkernels.backends.triton.vocabulary import shares
from tests.support.interpreter import as_on_a_gpu

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tensor_descriptor = pytest.importorskip("triton.tools.tensor_descriptor")


@triton.jit
def masked_copy(source_ptr, target_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def scalar_into_row(scalar_ptr, target_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.zeros([BLOCK], tl.float32) + tl.load(scalar_ptr))


@triton.jit
def row_over_block(row_ptr, target_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    row = tl.load(row_ptr + columns + 0 * rows)  # every row of lanes at the same addresses
    tl.store(target_ptr + rows * COLUMNS + columns, row)


@triton.jit
def row_twice(row_ptr, target_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    biggest = tl.max(tl.load(row_ptr + at))
    tl.store(target_ptr, tl.sum(tl.load(row_ptr + at) - biggest))


@triton.jit
def descriptor_copy(source, target_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    target = tl.make_tensor_descriptor(target_ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[ROWS, COLUMNS])
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    target.store([row, column], source.load([row, column]))


@triton.jit
def atomic_sum(source_ptr, target_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(target_ptr + at // 2, tl.load(source_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def compare_and_swap(target_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_cas(target_ptr + at, at, 2 * at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_only_lanes_under_the_mask_count(dtype: torch.dtype) -> None:
    source, target = torch.arange(37).to(dtype), torch.zeros(37, dtype=dtype)
    with metered() as meter:
        masked_copy[(3,)](source, target, 37, BLOCK=16)
    assert torch.equal(source, target)
    assert meter.loaded == {"masked_copy": 37 * dtype.itemsize}
    assert meter.stored == {"masked_copy": 37 * dtype.itemsize}
    assert meter.total() == meter.total("kernel") == 2 * 37 * dtype.itemsize


def test_a_scalar_counts_once_a_program() -> None:
    target = torch.zeros(5 * 8)
    with metered() as meter:
        scalar_into_row[(5,)](torch.tensor([3.0]), target, BLOCK=8)
    assert (target == 3).all()
    assert meter.loaded["scalar_into_row"] == 5 * 4
    assert meter.stored["scalar_into_row"] == 5 * 8 * 4


def test_a_broadcast_row_counts_once() -> None:
    row, target = torch.arange(16.0), torch.zeros(4, 16)
    with metered() as meter:
        row_over_block[(1,)](row, target, ROWS=4, COLUMNS=16)
    assert torch.equal(target, row.expand(4, 16))
    assert meter.loaded["row_over_block"] == 16 * 4
    assert meter.stored["row_over_block"] == 4 * 16 * 4


def test_a_second_load_counts_again() -> None:
    with metered() as meter:
        row_twice[(1,)](torch.arange(16.0), torch.zeros(1), BLOCK=16)
    assert meter.loaded["row_twice"] == 2 * 16 * 4
    assert meter.stored["row_twice"] == 4


def test_a_tensor_descriptor_counts_what_lies_inside_the_tensor() -> None:
    source, target = torch.randn(13, 20), torch.zeros(13, 20)
    descriptor = tensor_descriptor.TensorDescriptor.from_tensor(source, [8, 16])
    with metered() as meter:
        descriptor_copy[(2, 2)](descriptor, target, 13, 20, ROWS=8, COLUMNS=16)
    assert torch.equal(source, target)
    assert meter.loaded == {"descriptor_copy": 13 * 20 * 4}
    assert meter.stored == {"descriptor_copy": 13 * 20 * 4}


def test_an_atomic_loads_and_stores_each_address() -> None:
    target = torch.zeros(4)
    with metered() as meter:
        atomic_sum[(1,)](torch.ones(8), target, 6, BLOCK=8)
    assert target.tolist() == [2, 2, 2, 0]
    assert meter.loaded["atomic_sum"] == 6 * 4 + 3 * 4  # six lanes of the source, three sums
    assert meter.stored["atomic_sum"] == 3 * 4
    numbers = torch.tensor([0, 1, 9, 3], dtype=torch.int32)
    with metered() as meter:
        compare_and_swap[(1,)](numbers, BLOCK=4)
    assert numbers.tolist() == [0, 2, 9, 6]
    assert meter.loaded == meter.stored == {"compare_and_swap": 4 * 4}


def test_kernels_are_told_apart_and_nothing_counts_outside() -> None:
    source, target = torch.ones(16), torch.zeros(16)
    with metered() as meter:
        masked_copy[(1,)](source, target, 16, BLOCK=16)
        scalar_into_row[(2,)](source, target, BLOCK=8)
        # The interpreter copies arguments with torch's operators: none of them is the kernel's.
        with metered(operators=True) as inner:
            masked_copy[(1,)](source, target, 16, BLOCK=16)
    masked_copy[(1,)](source, target, 16, BLOCK=16)
    assert meter.loaded == {"masked_copy": 2 * 64, "scalar_into_row": 2 * 4}
    assert inner.kinds == {"kernel": 128}


def test_an_error_leaves_the_interpreter_as_it_was() -> None:
    from triton.runtime import interpreter

    before = interpreter.GridExecutor.__call__, dict(vars(interpreter.InterpreterBuilder))
    with pytest.raises(ZeroDivisionError), metered(operators=True):
        _ = 1 // 0
    assert (interpreter.GridExecutor.__call__, dict(vars(interpreter.InterpreterBuilder))) == before


def test_without_the_interpreter_the_meter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), metered():
        pass


# a [6, 10] and row [10] in float32; index [3] in int64
A, ROW, INDEX = 6 * 10 * 4, 10 * 4, 3 * 8
SOURCE = torch.ones(3, 10)
OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], int, int]] = {
    "add": (lambda a, row, index: a + row, A + ROW, A),
    "the same tensor twice": (lambda a, row, index: a * a, A, A),
    "a row and its broadcast": (lambda a, row, index: torch.maximum(row.expand(6, 10), row), ROW, A),
    "overlapping windows": (lambda a, row, index: row.as_strided((4, 4), (2, 1)).exp(), ROW, 4 * 4 * 4),
    "mul_": (lambda a, row, index: a.mul_(row), A + ROW, A),
    "out=": (lambda a, row, index: torch.exp(row, out=a[0]), ROW, ROW),
    "softmax": (lambda a, row, index: a.softmax(-1), A, A),
    "sum": (lambda a, row, index: a.sum(-1), A, 6 * 4),
    "a broadcast input": (lambda a, row, index: row.expand(6, 10).exp(), ROW, A),
    "strided columns": (lambda a, row, index: a[:, ::2].exp(), A // 2, A // 2),
    "to bfloat16": (lambda a, row, index: a.bfloat16(), A, A // 2),
    "copy_": (lambda a, row, index: a.copy_(row), ROW, A),
    "slice assigned": (lambda a, row, index: a[2:4].fill_(1.0), 0, A // 3),
    "cat": (lambda a, row, index: torch.cat([a, row[None]]), A + ROW, A + ROW),
    "a reshape that copies": (lambda a, row, index: a.view(3, 20).t()[1:].unsqueeze(0).detach().reshape(57), 57 * 4, 57 * 4),
    "only views": (lambda a, row, index: a.view(3, 20).t()[1:].unsqueeze(0).detach().expand(4, 19, 3), 0, 0),
    "t_": (lambda a, row, index: a.t_(), 0, 0),
    "contiguous already": (lambda a, row, index: a.contiguous(), 0, 0),
    "empty": (lambda a, row, index: (torch.empty(9), torch.empty_like(a), a.new_empty(7)), 0, 0),
    "zeros": (lambda a, row, index: (torch.zeros(9), torch.zeros_like(a), a.new_zeros(7)), 0, 9 * 4 + A + 7 * 4),
    "item": (lambda a, row, index: a[0, 0].item(), 4, 0),
    "index_select": (lambda a, row, index: a.index_select(0, index), 3 * ROW + INDEX, 3 * ROW),
    "gather": (lambda a, row, index: row.gather(0, index), 3 * 4 + INDEX, 3 * 4),
    "index_put_": (lambda a, row, index: row.index_put_((index,), torch.ones(3)), 3 * 4 + INDEX, 3 * 4 + 3 * 4),
    "index_add_": (lambda a, row, index: a.index_add_(0, index, SOURCE), A // 2 + INDEX + A // 2, A // 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_counts_its_inputs_and_outputs_once(name: str) -> None:
    run, loaded, stored = OPERATORS[name]
    inputs = torch.randn(6, 10), torch.randn(10), torch.tensor([0, 2, 1])
    with metered(operators=True) as meter:
        run(*inputs)
    assert (sum(meter.loaded.values()), sum(meter.stored.values())) == (loaded, stored)
    assert meter.total("operator") == meter.total() == loaded + stored


def test_operators_count_only_when_asked() -> None:
    with metered() as meter:
        torch.ones(3).exp()
    assert meter.total() == 0


def test_products_are_counted_apart_and_their_logits_too() -> None:
    hidden, head = torch.randn(4, 6), torch.randn(10, 6)
    grad = torch.zeros(10, 6)
    with metered(operators=True, logits=rows_over(10)) as meter:
        logits = hidden @ head.t()
        logits @ head
        grad.addmm_(logits.t(), hidden)
        torch.addmm(grad, logits.t(), hidden, beta=0.0, out=grad)
    size_hidden, size_head, size_logits = 4 * 6 * 4, 10 * 6 * 4, 4 * 10 * 4
    assert meter.kinds["product logits"] == 4 * size_logits
    first, second = size_hidden + size_head, size_head + size_hidden
    assert meter.kinds["product"] == first + second + (size_hidden + 2 * size_head) + (size_hidden + size_head)
    assert meter.kinds["operator"] == 0


def test_a_region_seen_through_two_shapes_is_read_once() -> None:
    a = torch.randn(6, 10)
    with metered(operators=True) as meter:
        a @ a.view(10, 6)
    assert meter.loaded["aten::mm"] == A


def test_a_product_of_16_bit_operands_may_be_float32() -> None:
    """A GPU's product, which a CPU does not have."""
    a, b = torch.randn(4, 8).bfloat16(), torch.randn(8, 5).bfloat16()
    with metered(operators=True) as meter:
        product = torch.mm(a, b, out_dtype=torch.float32)
    torch.testing.assert_close(product, a.float() @ b.float())
    assert meter.loaded["aten::mm"] == (4 * 8 + 8 * 5) * 2
    assert meter.stored["aten::mm"] == 4 * 5 * 4


def test_an_operator_of_another_library_is_looked_into() -> None:
    def opened(a: Tensor) -> Tensor:
        return a.exp().diff()  # diff is views and a subtraction

    def closed(a: Tensor) -> Tensor:
        return torch.from_numpy(a.numpy() + 1)

    with torch.library._scoped_library("kdkernels_traffic_test", "DEF") as library:
        for function in (opened, closed):
            library.define(f"{function.__name__}(Tensor a) -> Tensor")
            library.impl(function.__name__, function, "CompositeExplicitAutograd")
        with metered(operators=True) as meter:
            torch.ops.kdkernels_traffic_test.opened(torch.ones(5))
            torch.ops.kdkernels_traffic_test.closed(torch.ones(7))
    assert meter.loaded == {"aten::exp": 5 * 4, "aten::sub": 2 * 4 * 4, "kdkernels_traffic_test::closed": 7 * 4}
    assert meter.stored == {"aten::ones": 12 * 4, "aten::exp": 5 * 4, "aten::sub": 4 * 4, "kdkernels_traffic_test::closed": 7 * 4}


# The closed forms

BLOCKS, ROW = (16, 32, 16), 64  # a row of 32 parts
MATRIX = Cut(*BLOCKS[:2])


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
        tensors = traffic._inputs(self.tokens, self.vocab, self.student, self.teacher, self.dtype)
        hidden, head, teacher_hidden, teacher_head = tensors
        heads: list[Any] = [head, teacher_head]
        if self.biases:
            heads = [kd.LMHead(weight, torch.zeros(self.vocab, dtype=self.dtype)) for weight in heads]
        labels = torch.arange(self.tokens) % self.vocab if self.labels else None
        with as_on_a_gpu(blocks=BLOCKS, row=ROW), metered(operands=tensors) as meter:
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

    def tokens_traffic(self) -> dict[str, Traffic]:
        """Chunks of rows add up to all rows, whatever their number."""
        swept = closed.sweeps(self.divergence, metrics=self.metrics)
        return {
            "row_loss_kernel": closed.row_loss(
                *(self.tokens, self.vocab, (self.logit, self.logit), self.dtype.itemsize),
                sweeps=swept,
                labels=self.labels,
                biases=2 * self.biases,
                reach=ROW // 32 if self.vocab >= ROW_ELEMENTS else 1,  # shorter rows of the scratch have no room behind them
            )
        }

    def vocab_traffic(self) -> dict[str, Traffic]:
        of = closed.Products(
            *(self.tokens, self.vocab, tuple((dim, self.dtype.itemsize) for dim in (self.student, self.teacher))),
            biases=2 * self.biases,
        )
        with as_on_a_gpu(blocks=BLOCKS, row=ROW):
            splits = replace(MATRIX, splits=shares(self.tokens, self.vocab, Matrix(*BLOCKS, 4, 1))[1])
            width = block_columns(self.tokens, self.vocab, self.dtype.itemsize, self.budget, torch.device("cpu"))
        found = {"statistics_kernel": closed.statistics(of, splits, labels=self.labels)}
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
    "metrics want a second sweep": Step(metrics=True),
    "metrics and labels": Step(divergence="reverse_kl", metrics=True, labels=True),
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


@pytest.mark.parametrize("labels", [True, False])
def test_a_value_alone_takes_no_gradient_sweep(labels: bool) -> None:
    step = Step(divergence="jsd", labels=labels)
    with torch.no_grad(), mock.patch.object(Tensor, "backward"):
        tokens, vocab = step.run("tokens"), step.run("vocab")
    form = closed.row_loss(step.tokens, step.vocab, (4, 4), sweeps=2, labels=labels)
    assert_within(tokens, {"row_loss_kernel": form})
    found = step.vocab_traffic()
    del found["gradient_kernel"]
    assert_within(vocab, found)


def test_a_loss_without_divergence_sweeps_once() -> None:
    """Cross-entropy alone: the student stands for the teacher, in the row kernel as in the kernels that multiply."""
    step = Step(labels=True, divergence="jsd")
    with mock.patch("kdkernels.linear_kd_loss", functools.partial(kd.linear_kd_loss, kd_weight=0.0)):
        tokens, vocab = step.run("tokens"), step.run("vocab")
    assert closed.sweeps("jsd", kd=False) == 1
    assert_within(tokens, {"row_loss_kernel": closed.row_loss(32, 128, (4, 4), 4, sweeps=1, labels=True)})
    of = closed.Products(step.tokens, step.vocab, ((step.student, 4),))
    splits = replace(MATRIX, splits=1)
    kernels = {
        "statistics_kernel": closed.statistics(of, splits, labels=True),
        "gradient_kernel": closed.gradient(of, MATRIX, 0, 128, 4, labels=True),
    }
    assert_within(vocab, kernels)


def test_an_extra_sweep_is_noticed() -> None:
    """The bound means something: forward KL in two sweeps, as if running sums did not give its value."""
    step = Step()
    with mock.patch("kdkernels.backends.triton.rows.resolve", return_value=replace(kd.forward_kl(), one_sweep="")):
        meter = step.run("tokens")
    with pytest.raises(AssertionError):
        assert_within(meter, step.tokens_traffic())


def test_one_block_of_everything_loads_each_operand_once() -> None:
    of = closed.Products(40, 300, ((16, 2), (24, 4)), biases=1)
    whole = Cut.whole(40, 300)
    once = (40 + 300) * (16 * 2 + 24 * 4)
    for form in (closed.statistics(of, whole), closed.sums(of, whole), closed.gradient(of, whole, 0, 300, 2)):
        assert form.operands == once
    assert closed.gradient(of, whole, 0, 300, 2).stored == 40 * 300 * 2
    assert closed.statistics(of, whole).loaded == once + 300 * 4 + 4


# What others move


def _liger(*arguments: Any) -> Meter:
    pytest.importorskip("liger_kernel", reason="pip install --no-deps liger-kernel==0.8.5")
    return traffic.liger_fused_linear_jsd(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_bytes_are_those_of_its_source(dtype: torch.dtype) -> None:
    tokens, vocab, student, teacher, size = 48, 256, 16, 24, dtype.itemsize
    meter = _liger(tokens, vocab, student, teacher, dtype)
    logits, chunk = tokens * vocab, 4  # the power of 2 from tokens * student / vocab up
    # log q and log p in, losses and slopes out
    assert (meter.kinds["kernel"], meter.kinds["kernel operands"]) == (logits * 16, 0)
    assert meter.loaded["_jsd_kernel"] == meter.stored["_jsd_kernel"] == logits * 8
    # x and z out in float32, dx in twice
    assert meter.kinds["product logits"] == logits * (8 + 2 * size)
    # every chunk: the student's head twice, the teacher's once, its dW in and out; hidden states three times, the teacher's once
    heads, hiddens = vocab * (4 * student + teacher), tokens * (3 * student + teacher)
    # gradients filled with zeros, dH copied into its place
    gradients = vocab * student + 3 * tokens * student
    assert meter.kinds["product"] == size * (heads * tokens // chunk + hiddens + gradients)
    # 80 bytes for each logit, 6 more to round dx
    passes = logits * (80 + (4 + size if size < 4 else 0))
    few = meter.kinds["operator"] - passes
    assert 0 <= few < 64 * tokens  # sums of rows, the loss


def test_liger_and_the_eager_loss_give_the_same_gradients() -> None:
    """What is compared is the same loss, and metering does not change it."""
    seen: list[list[Tensor]] = []
    inputs = traffic._inputs

    def kept(*arguments: Any) -> list[Tensor]:
        seen.append(inputs(*arguments))
        return seen[-1]

    with mock.patch.object(traffic, "_inputs", kept):
        _liger(12, 64, 8, 12, torch.float32)
        traffic.eager_jsd(12, 64, 8, 12, torch.float32)
    for fused, eager in zip(seen[0][:2], seen[1][:2], strict=True):
        torch.testing.assert_close(fused.grad, eager.grad)


def test_without_liger_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="pip install --no-deps liger-kernel"):
        traffic.liger_fused_linear_jsd(4, 32, 4, 4, torch.float32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A command that measures eager and something that is not there, at one small shape."""
    monkeypatch.setattr(
        traffic, "MEASURED", {"eager JSD": traffic.eager_jsd, traffic.LIGER: mock.Mock(side_effect=ImportError("no x"))}
    )
    monkeypatch.setattr(traffic, "SHAPES", ((8, 32, 4, 4),))
    monkeypatch.setattr(traffic, "RESULTS", tmp_path / "traffic.json")
    return tmp_path / "traffic.json"


def test_the_command_writes_bytes_for_each_token_and_logit(small: Path) -> None:
    assert traffic.main([]) == 0
    cases = json.loads(small.read_text())["cases"]
    result = cases["eager JSD fp32 N=8 V=32 D=4,4"]
    assert result["bytes_per_logit"]["product logits"] == 16  # x, z, and dx twice
    assert result["bytes_per_token"]["operator"] == 32 * result["bytes_per_logit"]["operator"]
    assert result["least_possible_bytes_per_logit"] == 4 * 7
    assert cases[f"{traffic.LIGER} bf16 N=8 V=32 D=4,4"] == {"failed": "no x"}


def test_a_quick_run_shows_what_is_recorded_where_liger_is_missing(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = traffic.summary(traffic.LIGER, torch.bfloat16, traffic.eager_jsd(8, 32, 4, 4, torch.bfloat16), 8, 32)
    content = {"versions": {"liger-kernel": "0.8.5"}, "cases": {f"{traffic.LIGER} bf16 N=8 V=32 D=4,4": recorded}}
    small.write_text(json.dumps(content))
    assert traffic.main(["--quick"]) == 0
    assert json.loads(small.read_text()) == content
    shown = capsys.readouterr().out
    assert f"{traffic.LIGER} (recorded, liger-kernel 0.8.5)" in shown
    assert f"{traffic.LIGER}: not measured" in shown  # fp32 is not recorded
    assert "not measured here: no x" in shown
    assert "eager JSD (measured)" in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_is_close_to_the_least_possible(dtype: torch.dtype) -> None:
    """JSD takes one sweep of the logits more than a divergence whose value needs no log-sum-exps first, and each sweep reads."""
    tokens, vocab, size = 64, 1024, dtype.itemsize
    logits = tokens * vocab
    chunked, streamed = (traffic.ours(strategy, tokens, vocab, 32, 48, dtype) for strategy in ("tokens", "vocab"))
    # x and z out in float32, dx in twice; the row kernel sweeps both three times
    assert chunked.kinds["product logits"] == logits * (8 + 2 * size)
    assert chunked.kinds["kernel"] == pytest.approx(logits * (3 * 8 + size), rel=0.01)
    assert chunked.kinds["kernel operands"] == 0
    assert streamed.kinds["product logits"] == logits * 2 * size
    assert streamed.stored["gradient_kernel"] == logits * size
    assert streamed.kinds["kernel operands"] > 0
    for meter, name in ((chunked, "kdkernels tokens"), (streamed, "kdkernels vocab")):
        assert meter.total(*traffic.LOGIT_TRAFFIC) >= logits * traffic.least_possible(name, dtype)
    # The columns of rows, weights and losses: a few numbers for each token.
    assert chunked.kinds["operator"] < 128 * tokens


def test_the_recorded_results_are_of_the_same_shapes_and_definitions() -> None:
    """benchmarks/results/traffic.json is made again whenever what is measured changes."""
    results = json.loads(traffic.RESULTS.read_text())
    assert set(results["cases"]) == {
        traffic._case(name, dtype, shape) for name in traffic.MEASURED for dtype in traffic.DTYPES for shape in traffic.SHAPES
    }
    for case, found in results["cases"].items():
        assert set(found["bytes_per_token"]) == set(traffic.KINDS), case
        assert found["logit_traffic_bytes_per_token"] > 0
    assert results["meanings"] == traffic.MEANINGS
