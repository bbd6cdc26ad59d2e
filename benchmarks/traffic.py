"""Bytes that a loss moves through global memory: counted, not timed, so that no GPU is needed.

    python -m benchmarks.traffic            # a minute or two on 2 cores; writes benchmarks/results/traffic.json
    python -m benchmarks.traffic --quick    # the smallest shape, prints only; part of ``make static``

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

"Logit traffic" is kernel, operator and product logits together: what fusion can avoid. The least possible is a formula, not a
measurement, of the same kinds; s bytes for an entry of dx, and a logit kept in float32 (float64 for float64 models):

- through library products, with both models' logits in memory: x and z written once and read once, dx written once and read by
  two products. 4 * 4 + 3 s.
- with the products inside the kernels (``vocab``): dx written once and read by two products. 3 s.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkernels as kd
from kdkernels.engine.cut import Strategy

RESULTS = Path(__file__).parent / "results" / "traffic.json"

Kind = Literal["kernel", "kernel operands", "operator", "product", "product logits"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LOGIT_TRAFFIC: tuple[Kind, ...] = ("kernel", "operator", "product logits")

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


# What is measured


def _inputs(tokens: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Student's hidden states and head, with gradients, then the teacher's."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, student_dim), (vocab, student_dim), (tokens, teacher_dim), (vocab, teacher_dim))
    tensors = [torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(index < 2) for index, tensor in enumerate(tensors)]


def liger_fused_linear_jsd(tokens: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype) -> Meter:
    """Bytes of Liger's ``LigerFusedLinearJSD`` (liger-kernel 0.8.5, Triton): beta 0.5, no labels, loss and both student gradients.

    For each logit, with s the bytes of ``dtype``: 112 (float32) or 114 (16 bits) through its kernel, its operators and its
    products' logits. The rest of its products is s (4 D_s + D_t) / C + s (3 D_s + D_t) / V, with C rows in a chunk, the power of 2
    from N D_s / V up: for every chunk the student's head passes twice, the teacher's once, and dW is read and written; and
    s D_s / N + 3 s D_s / V more to fill the gradients with zeros and copy dH into place.

    Its chunks are those of a GPU before Blackwell. On a GPU its 16-bit products give float32 logits straight away, while on a CPU
    it multiplies in 16 bits and widens; here the product that a GPU runs is put in its place, which is the smaller count.
    Raises ImportError where liger-kernel or Triton is missing.
    """
    try:
        from liger_kernel.ops import fused_linear_jsd
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as error:
        raise ImportError(f"{error}. To measure Liger: pip install --no-deps liger-kernel==0.8.5") from error

    def product(hidden: Tensor, weight: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            return torch.mm(hidden, weight.t())
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    hidden, head, teacher_hidden, teacher_head = _inputs(tokens, vocab, student_dim, teacher_dim, dtype)
    with (
        mock.patch.object(fused_linear_jsd, "_project_to_float32", product),
        mock.patch.object(fused_linear_jsd, "_max_capability", return_value=0),
        # Liger's other kernels (CuTe, cuTile) would be taken where their compilers are installed.
        mock.patch.dict(os.environ, LIGER_KERNEL_IMPL="nvidia-triton"),
        metered(operators=True, logits=rows_over(vocab), operands=(hidden, head, teacher_hidden, teacher_head)) as meter,
    ):
        LigerFusedLinearJSD(jsd_beta=0.5)(hidden, head, teacher_hidden, teacher_head, None).backward()
    return meter


def eager_jsd(tokens: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype) -> Meter:
    """Bytes of the same loss as one writes it in torch: whole logits in ``dtype``, everything after them in float32."""
    tensors = _inputs(tokens, vocab, student_dim, teacher_dim, dtype)
    hidden, head, teacher_hidden, teacher_head = tensors
    with metered(operators=True, logits=rows_over(vocab), operands=tensors) as meter:
        lq = (hidden @ head.t()).float().log_softmax(-1)
        lp = (teacher_hidden @ teacher_head.t()).float().log_softmax(-1)
        lm = torch.logsumexp(torch.stack([lp, lq]), dim=0) - math.log(2)
        teacher, student = (torch.nn.functional.kl_div(lm, each, reduction="sum", log_target=True) for each in (lp, lq))
        ((teacher + student) / (2 * tokens)).backward()
    return meter


# Chunks of the tokens strategy, or blocks of the vocab strategy. A step that is worth cutting has about so many.
PARTS = 4


def ours(strategy: Strategy, tokens: int, vocab: int, student_dim: int, teacher_dim: int, dtype: torch.dtype) -> Meter:
    """Bytes of the same loss by this library on the path of a GPU, in PARTS chunks or blocks, with the tiles of an H100.

    The vocabulary is split in two, as it is where tokens are many; with the few of these shapes there would be as many splits as
    tiles, and their partial sums would count for more than they do.
    """
    from kdkernels.backends import products
    from kdkernels.backends.triton import blocks
    from tests.support.interpreter import as_on_a_gpu

    table, add_multiplied = blocks.entry, products.add_multiplied
    tensors = _inputs(tokens, vocab, student_dim, teacher_dim, dtype)
    hidden, head, teacher_hidden, teacher_head = tensors

    def multiply(left: Tensor, right: Tensor, to: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The product that a GPU runs: see products.multiply."""
        different: dict[str, Any] = {} if to == left.dtype else {"out_dtype": to}
        return torch.mm(left, right, **different) if out is None else torch.mm(left, right, out=out, **different)

    logit = max(4, dtype.itemsize)
    chunk, columns = math.ceil(tokens / PARTS), math.ceil(vocab / PARTS)
    gradient_apart = dtype.itemsize if dtype.itemsize < logit else 0
    budget = chunk * vocab * (2 * logit + gradient_apart) if strategy == "tokens" else tokens * columns * dtype.itemsize
    programs = 2 * math.ceil(tokens / table(hidden.device, dtype).statistics.block_n)
    with (
        as_on_a_gpu(programs=programs),
        mock.patch.object(blocks, "entry", table),
        mock.patch("kdkernels.backends.products.multiply", multiply),
        mock.patch("kdkernels.backends.products.add_multiplied", add_multiplied),
        metered(operators=True, logits=rows_over(vocab, columns), operands=tensors) as meter,
    ):
        loss = kd.linear_kd_loss(
            hidden, head, teacher_hidden, teacher_head, divergence="jsd", strategy=strategy, memory_budget=budget
        )
        loss.backward()
    return meter


LIGER = "Liger fused_linear_jsd"
MEASURED: dict[str, Callable[[int, int, int, int, torch.dtype], Meter]] = {
    "kdkernels tokens": partial(ours, "tokens"),
    "kdkernels vocab": partial(ours, "vocab"),
    LIGER: liger_fused_linear_jsd,
    "eager JSD": eager_jsd,
}
# The only one without logits in memory.
WITHOUT_LOGITS = ("kdkernels vocab",)
# tokens, vocabulary, student's and teacher's hidden size: bytes for each logit do not depend on the first two
Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((128, 2048, 64, 96), (256, 2048, 64, 96), (128, 4096, 64, 96))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEANINGS = {
    "bytes_per_token, bytes_per_logit, loaded_and_stored_per_logit": "measured: counted by the meter while the loss ran",
    "logit_traffic": "measured: kernel, operator and product logits together",
    "kdkernels": f"in {PARTS} chunks or blocks, with the tiles of an H100",
    "least_possible": "formula: the least logit traffic there can be, with the logits in memory or without",
}


def least_possible(measured: str, dtype: torch.dtype) -> int:
    """Bytes for each logit, as the head of this file defines them."""
    written_and_read = 0 if measured in WITHOUT_LOGITS else 2 * 2 * max(4, dtype.itemsize)
    return written_and_read + 3 * dtype.itemsize


def summary(measured: str, dtype: torch.dtype, meter: Meter, tokens: int, vocab: int) -> dict[str, Any]:
    """Bytes for each token and each logit (one of a token's ``vocab``), by kind; for each logit also by kernel and operator."""
    logits = tokens * vocab
    names = sorted({*meter.loaded, *meter.stored}, key=lambda name: -meter.loaded[name] - meter.stored[name])
    avoidable = meter.total(*LOGIT_TRAFFIC)
    least = least_possible(measured, dtype)
    return {
        "bytes_per_token": {kind: meter.kinds[kind] / tokens for kind in KINDS},
        "bytes_per_logit": {kind: meter.kinds[kind] / logits for kind in KINDS},
        "logit_traffic_bytes_per_token": avoidable / tokens,
        "logit_traffic_bytes_per_logit": avoidable / logits,
        "least_possible_bytes_per_token": least * vocab,
        "least_possible_bytes_per_logit": least,
        "loaded_and_stored_per_logit": {name: [meter.loaded[name] / logits, meter.stored[name] / logits] for name in names},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _case(measured: str, dtype: str, shape: Shape) -> str:
    return f"{measured} {dtype} N={shape[0]} V={shape[1]} D={shape[2]},{shape[3]}"


def _recorded(case: str) -> tuple[dict[str, Any], str]:
    """The case of the results file, and where it is from; an empty one where it is not there."""
    if not RESULTS.is_file():
        return {}, ""
    results = json.loads(RESULTS.read_text())
    found = results["cases"].get(case, {})
    version = results["versions"].get("liger-kernel", "unknown")
    return ({}, "") if "failed" in found else (found, f"recorded, liger-kernel {version}")


HEADINGS = (*LOGIT_TRAFFIC, "logit traffic", "least possible", "product", "kernel operands")


def _heading(dtype: str, shape: Shape) -> str:
    title = f"bytes a token, N={shape[0]} V={shape[1]} D={shape[2]},{shape[3]} {dtype}"
    return f"{title:58}" + "".join(f"{heading:>16}" for heading in HEADINGS)


def _line(name: str, result: dict[str, Any]) -> str:
    of_token = result["bytes_per_token"]
    numbers = [*(of_token[kind] for kind in LOGIT_TRAFFIC), result["logit_traffic_bytes_per_token"]]
    numbers += [result["least_possible_bytes_per_token"], of_token["product"], of_token["kernel operands"]]
    return f"  {name:56}" + "".join(f"{number:>16,.0f}" for number in numbers)


NOTE = """JSD, loss and both gradients. All measured, but for "least possible", which is a formula: of logit traffic, for vocab
without logits in memory, for the others with them. "product" is what else library products move, each operand once, and "kernel
operands" what kernels that multiply load of hidden states and heads, as issued: most of it comes from a GPU's cache."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest shape; prints, and writes no file")
    quick = parser.parse_args(argv).quick
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    versions = {name: _version(name) for name in ("torch", "triton", "liger-kernel")}
    # It computes in NumPy, which warns where a kernel means inf - inf to be NaN.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    results: dict[str, Any] = {"versions": versions, "meanings": MEANINGS, "cases": {}}
    missing: list[str] = []
    for shape in SHAPES[:1] if quick else SHAPES:
        for dtype in DTYPES:
            print(_heading(dtype, shape))
            for measured, run in MEASURED.items():
                case, source = _case(measured, dtype, shape), "measured"
                try:
                    result = summary(measured, DTYPES[dtype], run(*shape, DTYPES[dtype]), *shape[:2])
                    results["cases"][case] = result
                except ImportError as error:
                    results["cases"][case] = {"failed": str(error)}
                    missing.append(str(error))
                    result, source = _recorded(case)
                print(_line(f"{measured} ({source})", result) if result else f"  {measured}: not measured", flush=True)
    print(NOTE)
    for reason in dict.fromkeys(missing):
        print(f"not measured here: {reason}")
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
