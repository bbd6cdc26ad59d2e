"""Bytes that a loss moves through global memory: counted, not timed, so that no GPU is needed.

Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported), where every load and store passes
through a few functions; the meter stands there. torch's operators are seen by a dispatch mode.

What is counted, in bytes, by kind:

- kernel: a kernel's load or store, the distinct addresses of its lanes whose mask is true, times the element size. A row broadcast
  over a block, or a scalar, counts once for each load of each program. A second load of the same address counts again: a
  vocabulary's row is larger than what a processor keeps. An atomic counts as a load and a store.
- kernel operands: those of a kernel's loads that read hidden states and heads, for a product inside the kernel. Counted like all
  loads, once for each tile; on a GPU most of them come from the last-level cache.
- operator: each distinct input region once and each output once, as if it were one perfect pass. That is the least it can be:
  torch's softmax reads rows that do not fit on the chip up to three times. Views and empty tensors cost nothing, zeros one write.
- product logits: the logits, and their gradient, among a library product's operands and results; alike for everybody.
- product: its other operands and its result, once, and what operators do to tensors as wide as a hidden state: sums, copies and
  zeros of the gradients of hidden states and heads.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["kernel", "kernel operands", "operator", "product", "product logits"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "_int_mm", "_scaled_mm"}
# These never read the tensor that they write.
_OVERWRITING = {"copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "scatter_", "index_copy_", "index_put_"}
# Of their first tensor these read, or write, only the elements that an index names.
_INDEXED_READS = {"gather", "index_select", "index", "embedding", "take"}
_INDEXED_WRITES = {"scatter_", "scatter_add_", "index_put_", "index_add_", "index_copy_"}
# These look at sizes and strides only.
_METADATA = {"is_same_size", "is_pinned", "_has_compatible_shallow_copy_type"}


class Meter:
    """Bytes counted so far.

    loaded, stored: bytes by the name of a Triton kernel ("copy_kernel") or an operator ("aten::mul"). kinds: both, by kind.
    """

    def __init__(self, logits: Callable[[Tensor], bool], operands: Sequence[Tensor]) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.kinds: Counter[Kind] = Counter()
        self.logits = logits
        self.hidden = rows_over(*(tensor.shape[-1] for tensor in operands))
        self.operands = [(tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes()) for tensor in operands]
        self.kernel: str | None = None  # the Triton kernel that is running

    def load(self, name: str, kind: Kind, count: int) -> None:
        self.loaded[name] += count
        self.kinds[kind] += count

    def store(self, name: str, kind: Kind, count: int) -> None:
        self.stored[name] += count
        self.kinds[kind] += count

    def total(self, *kinds: Kind) -> int:
        """Bytes loaded and stored by ``kinds``, by default all of them."""
        return sum(self.kinds[kind] for kind in kinds or KINDS)


@contextlib.contextmanager
def metered(
    operators: bool = False, logits: Callable[[Tensor], bool] = lambda tensor: False, operands: Sequence[Tensor] = ()
) -> Iterator[Meter]:
    """Counts the bytes that the Triton kernels run inside load and store; with ``operators``, those of torch's operators too.

    logits says which operands and results of matrix products are logits: see :func:`rows_over`. operands: hidden states and heads.
    What kernels that multiply load of them is a kind of its own, and operators on tensors as wide count to the products.
    Raises RuntimeError where Triton's interpreter is off.
    """
    meter = Meter(logits, operands)
    with _kernels(meter), _Operators(meter) if operators else contextlib.nullcontext():
        yield meter


def rows_over(*widths: int) -> Callable[[Tensor], bool]:
    """Tells logits [tokens, width], transposed or not, from heads [width, hidden]: their elements run along the vocabulary, all of
    it or a block."""

    def told(tensor: Tensor) -> bool:
        return tensor.dim() > 1 and any(
            size in widths and stride == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )

    return told


# Triton's interpreter


def _distinct(pointers: Any, mask: Any) -> tuple[int, int]:
    """How many different addresses the lanes under ``mask`` touch, and the first of them."""
    import numpy as np

    touched = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel()
    if touched.size == 0:
        return 0, 0
    if not (touched[1:] > touched[:-1]).all():  # the usual block needs no sort
        touched = np.unique(touched)
    return int(touched.size), int(touched[0])


@contextlib.contextmanager
def _kernels(meter: Meter) -> Iterator[None]:
    import triton
    from triton.runtime import interpreter

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are metered in Triton's interpreter: set TRITON_INTERPRET=1 before triton is imported")
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    exchange, update = builder.create_atomic_cas, builder.create_atomic_rmw

    def count(pointers: Any, mask: Any, *actions: Callable[[str, Kind, int], None]) -> None:
        assert meter.kernel is not None
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        found, first = _distinct(pointers, mask)
        kind: Kind = "kernel operands" if any(begin <= first < end for begin, end in meter.operands) else "kernel"
        for action in actions:
            action(meter.kernel, kind, element * found)

    def metered_launch(self: Any, *arguments: Any, **keywords: Any) -> Any:
        meter.kernel = self.fn.__name__
        try:
            return launch(self, *arguments, **keywords)
        finally:
            meter.kernel = None

    # Unmasked accesses, block pointers and tensor descriptors all arrive here.
    def metered_load(self: Any, pointers: Any, mask: Any, *rest: Any, **keywords: Any) -> Any:
        count(pointers, mask, meter.load)
        return load(self, pointers, mask, *rest, **keywords)

    def metered_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, meter.store)
        return store(self, pointers, value, mask, *rest)

    def metered_exchange(self: Any, pointers: Any, *rest: Any) -> Any:
        everywhere = interpreter.TensorHandle(pointers.data != 0, triton.language.int1)
        count(pointers, everywhere, meter.load, meter.store)
        return exchange(self, pointers, *rest)

    def metered_update(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, meter.load, meter.store)
        return update(self, how, pointers, value, mask, *rest)

    with (
        mock.patch.object(executor, "__call__", metered_launch),
        mock.patch.multiple(
            builder,
            create_masked_load=metered_load,
            create_masked_store=metered_store,
            create_atomic_cas=metered_exchange,
            create_atomic_rmw=metered_update,
        ),
    ):
        yield


# torch's operators


def _region(tensor: Tensor) -> tuple[Hashable, int]:
    """What reading all of ``tensor`` touches: a name that equal regions share however they are viewed, and the bytes."""
    if tensor.numel() == 0:
        return (), 0
    merged: list[tuple[int, int]] = []  # (stride, size), innermost first, without the dimensions that add no address
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1 or stride == 0:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    span = 1 + sum(stride * (size - 1) for stride, size in merged)
    elements = min(span, math.prod(size for _, size in merged))  # windows of as_strided overlap
    return (tensor.data_ptr(), tensor.element_size(), *merged), elements * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Operators(TorchDispatchMode):
    def __init__(self, meter: Meter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.meter.kernel is not None:  # the interpreter's own copies
            return func(*args, **kwargs)
        if func.namespace not in ("aten", "prims", "prim"):
            return self._another_library(func, args, kwargs)
        with self:  # inside another library's operator, composite ones arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        storages = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        if func in (torch.ops.aten.mm.dtype, torch.ops.aten.mm.dtype_out) and args[0].device.type == "cpu":
            # 16-bit operands and a float32 result in one product: a GPU has it, a CPU does not.
            result = torch.mm(args[0].to(args[2]), args[1].to(args[2]), out=kwargs.get("out"))
        elif func is torch.ops.aten.addmm.dtype_out and args[0].device.type == "cpu":
            result = torch.addmm(args[0], args[1].to(args[3]), args[2].to(args[3]), **kwargs)
        else:
            result = func(*args, **kwargs)
        self._count(func, args, kwargs, result, storages)
        return result

    def _another_library(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Counts what an operator of another library calls; one that calls nothing we see, as one pass over what it takes."""
        tensors = _tensors((args, kwargs))
        storages, before = {_storage(tensor) for tensor in tensors}, self.meter.kinds.copy()
        device = tensors[0].device.type if tensors else "cpu"
        key = torch._C._parse_dispatch_key(device.upper())
        assert key is not None
        with self:
            result = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        if self.meter.kinds == before:
            self._count(func, args, kwargs, result, storages)
        return result

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, storages: set[int]) -> None:
        name: str = func._schema.name
        short = name.split("::")[1]
        if torch.Tag.inplace_view in func.tags or short in _METADATA or short.startswith("empty") or short == "new_empty":
            return
        bound = {
            argument.name: args[index] if index < len(args) else kwargs.get(argument.name)
            for index, argument in enumerate(func._schema.arguments)
        }
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        outputs = [tensor for tensor in _tensors(result) if _storage(tensor) not in storages]
        if _tensors(result) and not outputs and not written:  # a view
            return

        if not (short.endswith("_like") or short.startswith("new_")):
            for where, count in self._reads(func, short, bound, outputs).values():
                self.meter.load(name, self._kind(short, where), count)
        for argument in written:
            for tensor in _tensors(bound[argument.name]):
                self.meter.store(name, self._kind(short, tensor), self._touched(short, tensor, bound))
        for tensor in outputs:
            self.meter.store(name, self._kind(short, tensor), _region(tensor)[1])

    def _reads(self, func: Any, short: str, bound: dict[str, Any], outputs: list[Tensor]) -> dict[Hashable, tuple[Tensor, int]]:
        regions: dict[Hashable, tuple[Tensor, int]] = {}
        for index, argument in enumerate(func._schema.arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            overwritten = is_written and short in _OVERWRITING and not bound.get("accumulate")
            # addmm with beta = 0 ignores what it would add to.
            unused = argument.name == "self" and bound.get("beta") == 0
            if argument.is_out or overwritten or unused:
                continue
            for tensor in _tensors(bound[argument.name]):
                region, count = _region(tensor)
                if index == 0 and short in _INDEXED_READS:
                    count = min(count, sum(_region(output)[1] for output in outputs))
                elif is_written:
                    count = self._touched(short, tensor, bound)
                regions.setdefault(region, (tensor, count))
        return regions

    def _touched(self, short: str, tensor: Tensor, bound: dict[str, Any]) -> int:
        """Bytes of a written ``tensor`` that are written."""
        count = _region(tensor)[1]
        if short not in _INDEXED_WRITES:
            return count
        others = [other.numel() for name, value in bound.items() if name != "self" for other in _tensors(value)]
        return min(count, max(others, default=0) * tensor.element_size())

    def _kind(self, short: str, tensor: Tensor) -> Kind:
        if short.rstrip("_") not in _PRODUCTS:
            return "product" if self.meter.hidden(tensor) else "operator"
        return "product logits" if self.meter.logits(tensor) else "product"
