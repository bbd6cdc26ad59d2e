"""The meter of memory traffic counts the bytes that one counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.meter import metered, rows_over

pytest.importorskip("triton")
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
