"""Bytes that a loss moves through global memory: counted, not timed, so that no GPU is needed.

    python -m benchmarks.traffic            # a minute or two on 2 cores; writes benchmarks/results/traffic.json
    python -m benchmarks.traffic --quick    # the smallest shape, prints only; part of ``make static``

Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported). What is counted, by kind, is in
tests/support/meter.py.

"Logit traffic" is kernel, operator and product logits together: what fusion can avoid. The least possible is a formula, not a
measurement, of the same kinds; s bytes for an entry of dx, and a logit kept in float32 (float64 for float64 models):

- through library products, with both models' logits in memory: x and z written once and read once, dx written once and read by
  two products. 4 * 4 + 3 s.
- with the products inside the kernels (``vocab``): dx written once and read by two products. 3 s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import DTYPES, Case, Head, problem
from benchmarks.measure import version
from kdkernels.engine.cut import Strategy
from tests.support.meter import KINDS, Kind, Meter, metered, rows_over

RESULTS = Path(__file__).parent / "results" / "traffic.json"
LOGIT_TRAFFIC: tuple[Kind, ...] = ("kernel", "operator", "product logits")


def _operands(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's hidden states and head, with gradients, then the teacher's."""
    given = problem(case, spread=1.0)
    return given.hidden, given.head, given.teacher_hidden, given.teacher_head


def liger_fused_linear_jsd(case: Case) -> Meter:
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

    hidden, head, teacher_hidden, teacher_head = tensors = _operands(case)
    with (
        mock.patch.object(fused_linear_jsd, "_project_to_float32", product),
        mock.patch.object(fused_linear_jsd, "_max_capability", return_value=0),
        # Liger's other kernels (CuTe, cuTile) would be taken where their compilers are installed.
        mock.patch.dict(os.environ, LIGER_KERNEL_IMPL="nvidia-triton"),
        metered(operators=True, logits=rows_over(len(head)), operands=tensors) as meter,
    ):
        LigerFusedLinearJSD(jsd_beta=0.5)(hidden, head, teacher_hidden, teacher_head, None).backward()
    return meter


def eager_jsd(case: Case) -> Meter:
    """Bytes of the same loss as one writes it in torch: whole logits in the dtype, everything after them in float32."""
    hidden, head, teacher_hidden, teacher_head = tensors = _operands(case)
    with metered(operators=True, logits=rows_over(len(head)), operands=tensors) as meter:
        lq = (hidden @ head.t()).float().log_softmax(-1)
        lp = (teacher_hidden @ teacher_head.t()).float().log_softmax(-1)
        lm = torch.logsumexp(torch.stack([lp, lq]), dim=0) - math.log(2)
        teacher, student = (torch.nn.functional.kl_div(lm, each, reduction="sum", log_target=True) for each in (lp, lq))
        ((teacher + student) / (2 * case.tokens)).backward()
    return meter


# Chunks of the tokens strategy, or blocks of the vocab strategy. A step that is worth cutting has about so many.
PARTS = 4


def ours(strategy: Strategy, case: Case) -> Meter:
    """Bytes of the same loss by this library on the path of a GPU, in PARTS chunks or blocks, with the tiles of an H100.

    The vocabulary is split in two, as it is where tokens are many; with the few of these shapes there would be as many splits as
    tiles, and their partial sums would count for more than they do.
    """
    from kdkernels.backends import products
    from kdkernels.backends.triton import blocks
    from tests.support.interpreter import as_on_a_gpu

    table, add_multiplied = blocks.entry, products.add_multiplied
    hidden, head, teacher_hidden, teacher_head = tensors = _operands(case)
    tokens, vocab, dtype = case.tokens, case.head.vocab, head.dtype

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
MEASURED: dict[str, Callable[[Case], Meter]] = {
    "kdkernels tokens": partial(ours, "tokens"),
    "kdkernels vocab": partial(ours, "vocab"),
    LIGER: liger_fused_linear_jsd,
    "eager JSD": eager_jsd,
}
# The only one without logits in memory.
WITHOUT_LOGITS = ("kdkernels vocab",)
# Bytes for each logit do not depend on the first two.
SHAPES = ((128, 2048, 64, 96), (256, 2048, 64, 96), (128, 4096, 64, 96))  # tokens, vocabulary, both hidden sizes
COUNTED = ("fp32", "bf16")
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


def summary(measured: str, case: Case, meter: Meter) -> dict[str, Any]:
    """Bytes for each token and each logit (one of a token's V), by kind; for each logit also by kernel and operator."""
    tokens, vocab = case.tokens, case.head.vocab
    logits = tokens * vocab
    names = sorted({*meter.loaded, *meter.stored}, key=lambda name: -meter.loaded[name] - meter.stored[name])
    avoidable = meter.total(*LOGIT_TRAFFIC)
    least = least_possible(measured, DTYPES[case.dtype])
    return {
        "bytes_per_token": {kind: meter.kinds[kind] / tokens for kind in KINDS},
        "bytes_per_logit": {kind: meter.kinds[kind] / logits for kind in KINDS},
        "logit_traffic_bytes_per_token": avoidable / tokens,
        "logit_traffic_bytes_per_logit": avoidable / logits,
        "least_possible_bytes_per_token": least * vocab,
        "least_possible_bytes_per_logit": least,
        "loaded_and_stored_per_logit": {name: [meter.loaded[name] / logits, meter.stored[name] / logits] for name in names},
    }


def cases(shapes: Sequence[tuple[int, int, int, int]]) -> list[Case]:
    return [
        Case("traffic", Head("small", "small", "small", vocab, vocab, student_dim, teacher_dim), tokens, dtype, loss="jsd")
        for tokens, vocab, student_dim, teacher_dim in shapes
        for dtype in COUNTED
    ]


def called(case: Case, measured: str) -> str:
    """What the results file calls it."""
    head = case.head
    return f"{measured} {case.dtype} N={case.tokens} V={head.vocab} D={head.student_dim},{head.teacher_dim}"


def _recorded(called: str) -> tuple[dict[str, Any], str]:
    """The case of the results file, and where it is from; an empty one where it is not there."""
    if not RESULTS.is_file():
        return {}, ""
    results = json.loads(RESULTS.read_text())
    found = results["cases"].get(called, {})
    version = results["versions"].get("liger-kernel", "unknown")
    return ({}, "") if "failed" in found else (found, f"recorded, liger-kernel {version}")


HEADINGS = (*LOGIT_TRAFFIC, "logit traffic", "least possible", "product", "kernel operands")


def _heading(case: Case) -> str:
    return f"{called(case, 'bytes a token,'):58}" + "".join(f"{heading:>16}" for heading in HEADINGS)


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
    versions = {name: version(name) or "not installed" for name in ("torch", "triton", "liger-kernel")}
    # It computes in NumPy, which warns where a kernel means inf - inf to be NaN.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    results: dict[str, Any] = {"versions": versions, "meanings": MEANINGS, "cases": {}}
    missing: list[str] = []
    for case in cases(SHAPES[:1] if quick else SHAPES):
        print(_heading(case))
        for measured, run in MEASURED.items():
            name, source = called(case, measured), "measured"
            try:
                result = summary(measured, case, run(case))
                results["cases"][name] = result
            except ImportError as error:
                results["cases"][name] = {"failed": str(error)}
                missing.append(str(error))
                result, source = _recorded(name)
            print(_line(f"{measured} ({source})", result) if result else f"  {measured}: not measured", flush=True)
    print(NOTE)
    for reason in dict.fromkeys(missing):
        print(f"not measured here: {reason}")
    if not quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
