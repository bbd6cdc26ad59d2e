"""CPU tensors on the path of a GPU, through Triton's interpreter: for tests, counts of traffic, and the GPU suite at toy size.

TRITON_INTERPRET=1 must be set before Triton is imported. Triton 3.7's interpreter multiplies the bit patterns of bfloat16, cuts
float32 off instead of rounding, and leaves products to NumPy's matrix library, whose roundings depend on the processor and on an
entry's place in the tile; all three are put right here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype, _patch_lang, _patch_lang_tensor

from kdkernels import backends
from kdkernels.backends.triton.blocks import Entry, Matrix, Row
from kdkernels.engine.scratch import row_stride

# What is chosen for a GPU, whatever this CPU would choose: dtypes of products and their results, and rows with room behind them.
GPU_CHOICES: dict[str, Any] = {
    "kdkernels.backends.dtypes.cpu_multiplies": lambda _: True,
    **{
        f"kdkernels.{module}.row_stride": lambda columns, _: row_stride(columns, torch.device("cuda"))
        for module in ("engine.cut", "engine.scratch")
    },
    **{f"kdkernels.backends.{module}.keeps_sums": lambda _: True for module in ("dtypes", "products")},
}
_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_patched: set[Any] = set()
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
_numpy_types: dict[str, Any] = {}
_numbers: dict[tuple[Any, ...], Any] = {}
_cast = InterpreterBuilder.cast_impl
_init_block = tl.block_type.__init__
_operands, _broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value


def _create_dot_repaired(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """The tile's sum in float64, rounded before it is added: a matrix library may round an entry by its place in the tile, and a
    matrix unit does not. Logits that are made again in another tile must be the same ones."""
    left, right = ((_cast(builder, side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side).data for side in (a, b))
    product = np.matmul(left, right, dtype=np.float64).astype(d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _cast_repaired(builder: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        bits = source.data.view(np.uint32)
        nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = np.where(np.isnan(source.data), (bits >> 16) | 0x40, nearest_even)
        return TensorHandle(kept.astype(np.uint16), to.scalar)
    return _cast(builder, source, to)


def _patch_tensor_repaired(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one entry here, which Triton 3.6 leaves to NumPy to take for a number; NumPy 2.5 does not."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))


def _call_device_function(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """Replaces triton.language under a function once, not at each of its calls: half of the interpreter's time goes there."""
    if function.fn not in _patched:
        _patch_lang(function.fn)
        _patched.add(function.fn)
    return function.rewrite()(*arguments, **keywords)


# Types, sizes and numbers are made once: three quarters of the interpreter's time went into making them for each operation.


def _init_block_once(block: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
    if key not in _blocks:
        _init_block(block, element_ty, shape)
        _blocks[key] = vars(block)
    vars(block).update(_blocks[key])


@functools.cache
def _sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def _init_tensor(tensor: Any, handle: Any, kind: Any) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    tensor.shape, tensor.numel = _sizes(tuple(kind.shape.values) if kind.is_block() else ())


def _numpy_type_once(kind: Any) -> Any:
    name = kind.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _get_np_dtype(kind)
    return _numpy_types[name]


def _operands_once(semantic: Any, left: Any, right: Any, *flags: bool) -> Any:
    """Tiles of one type stay as they are, but for divisions (the fourth flag); a number beside a tile becomes a tile once."""
    tiles = isinstance(left, tl.tensor), isinstance(right, tl.tensor)
    if tiles[0] == tiles[1]:
        same = all(tiles) and len(flags) < 4 and left.type.name == right.type.name and not left.dtype.is_ptr()
        return (left, right) if same else _operands(semantic, left, right, *flags)
    tile, number = (left, right) if tiles[0] else (right, left)
    key = tile.type.name, repr(number), flags
    if key not in _numbers:
        made = _operands(semantic, left, right, *flags)
        if made[tiles[1]] is not tile:  # beside that number it is of another type
            return made
        _numbers[key] = made[tiles[0]]
    return (left, _numbers[key]) if tiles[0] else (_numbers[key], right)


def _broadcast_different(semantic: Any, left: Any, right: Any) -> Any:
    shapes = [side.type.shape.values if side.type.is_block() else [] for side in (left, right)]
    return (left, right) if shapes[0] == shapes[1] else _broadcast(semantic, left, right)


def _assert_no_overflow(_: Any, left: Any, right: Any, operation: Any) -> None:
    """Of indices. Triton makes five tiles of it, and looks at them only where kernels are debugged."""
    if left.handle.data.itemsize < 8:
        exact = _EXACT[operation.__name__](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        limits = np.iinfo(left.handle.data.dtype)
        assert limits.min <= exact.min() <= exact.max() <= limits.max, f"{left.dtype} overflows in {operation.__name__}"


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    if dtype == left.dtype:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    assert dtype == torch.float32, "torch's products give 16-bit operands no other"
    product = torch.mm(left.float(), right.float())
    return product if out is None else out.copy_(product)


def _add_multiplied(left: Tensor, right: Tensor, out: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.addmm(out, left, right, out=out)
    else:
        out.add_(_multiply(left, right, out.dtype))


@contextmanager
def as_on_a_gpu(
    backend: str = "triton", blocks: tuple[int, int, int] = (16, 32, 16), row: int = 128, programs: int = 2
) -> Iterator[None]:
    """Everything inside runs on ``backend`` as it would on a GPU: 16-bit products, added up and kept in float32; padded rows of
    logits; small blocks.

    blocks: of tokens, vocabulary and hidden size in kernels that multiply. row: columns of the row kernel's tile. programs: how
    many should run side by side, which decides the splits of the vocabulary.
    """
    matrix = Matrix(*blocks, num_warps=4, num_stages=1, group=2)
    entry = Entry(*(matrix, matrix, matrix), row=Row(num_warps=1, entries=row // 32), offsets=matrix, dressed_offsets=matrix)
    replaced: dict[str, Any] = {
        **GPU_CHOICES,
        "kdkernels.backends.products.multiply": _multiply,
        "kdkernels.backends.products.add_multiplied": _add_multiplied,
        "kdkernels.backends.triton.blocks.entry": lambda *_: entry,
        "kdkernels.backends.triton.vocabulary.PROGRAMS": programs,
        "triton.runtime.interpreter._patch_lang_tensor": _patch_tensor_repaired,
        "triton.runtime.interpreter.InterpreterBuilder.create_dot": _create_dot_repaired,
        "triton.runtime.interpreter.InterpreterBuilder.cast_impl": _cast_repaired,
        "triton.runtime.interpreter.InterpretedFunction.__call__": _call_device_function,
        "triton.runtime.interpreter._get_np_dtype": _numpy_type_once,
        "triton.language.block_type.__init__": _init_block_once,
        "triton.language.tensor.__init__": _init_tensor,
        "triton.language.semantic.TritonSemantic.binary_op_type_checking_impl": _operands_once,
        "triton.language.semantic.TritonSemantic.broadcast_impl_value": _broadcast_different,
        "triton.language.semantic.TritonSemantic.binary_op_sanitize_overflow_impl": _assert_no_overflow,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(backends.use(backend))
        yield
