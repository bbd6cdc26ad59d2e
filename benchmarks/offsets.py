"""What logits kept in 16 bits do to a gradient, simulated in float64: ``python -m benchmarks.offsets [--quick --out FOLDER]``.

Student and teacher logits of a given spread, the teacher's independent of the student's or the student's plus noise, are kept as
GPUs may keep them: as float32 products are, as offsets from the largest of each tile's row in float16
(kdkernels/backends/triton/offsets.py), and in bfloat16, as plain PyTorch has them. The divergence's gradient of each is made in
float64, so that nothing but the logits differs, and rounded to bfloat16, as the products that follow take it. An error is the norm
of the difference to the gradient of the logits themselves, before it is rounded, over its norm.

Writes offsets.json into benchmarks/results; exit status 1 if offsets cost a gradient more than one more rounding to bfloat16, where
the models are no closer than a tenth of their spread. Total variation's slope is a sign, which any rounding of a logit can turn
where p and q are all but equal: it is shown, and not held to that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.cases import GIB, HEADS, Head
from benchmarks.measure import machine
from benchmarks.rows import RESULTS
from kdkernels.console import files
from tests.support import oracle

SPREADS = (1.0, 3.0, 10.0, 30.0)
NOISES = (None, 0.1, 0.01)  # of a teacher that is the student plus that, of the spread; None for an independent one
WITHIN = 0.1  # where the bound is to hold
SIGN = "total_variation"
TILE = 256  # columns, as blocks.TABLE has them
ROWS, VOCAB, DRAWS = 32, 32_768, 4
Row = dict[str, Any]


def of_offsets(logits: Tensor) -> Tensor:
    """float32 logits [rows, vocab] as they come back."""
    tiles = logits.view(len(logits), -1, TILE)
    less = tiles.amax(-1, keepdim=True) - 1.0
    return ((tiles - less).half().float() + less).view_as(logits)


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda logits: logits,
    "offsets": of_offsets,
    "bfloat16": lambda logits: logits.bfloat16().float(),
}


def gradient(name: str, x: Tensor, z: Tensor) -> Tensor:
    x = x.double().requires_grad_()
    (dx,) = torch.autograd.grad(oracle.divergence(x, z.double(), oracle.Options(name)).sum(), x)
    return dx


def measured(rows: int, vocab: int, draws: int) -> Iterator[Row]:
    for spread, noise, name in itertools.product(SPREADS, NOISES, kd.divergences()):
        wrong, whole = dict.fromkeys(KEPT, 0.0), 0.0
        for seed in range(draws):
            x, other = torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread
            z = other if noise is None else x + noise * other
            exact = gradient(name, x, z)
            whole += float(exact.square().sum())
            for kept, keep in KEPT.items():
                made = gradient(name, keep(x), keep(z)).bfloat16().double()
                wrong[kept] += float((made - exact).square().sum())
        yield {
            "spread": spread,
            "noise": noise,
            "divergence": name,
            **{f"{kept}_error": (square / whole) ** 0.5 for kept, square in wrong.items()},
        }


def within(row: Row) -> bool:
    """Whether offsets cost no more than one rounding to bfloat16, which is all that float32 logits cost."""
    return bool(row["offsets_error"] <= 2 * row["float32_error"])


def error_table(results: dict[str, Any]) -> str:
    """The largest error over the divergences but total variation. results: what offsets.json holds."""
    of: dict[tuple[float, float | None], list[Row]] = {}
    for row in results["rows"]:
        if row["divergence"] != SIGN:
            of.setdefault((row["spread"], row["noise"]), []).append(row)
    lines = ["| spread of the logits | teacher | float32 logits | 16-bit offsets | bfloat16 logits |", "|---|---|---|---|---|"]
    for (spread, noise), rows in of.items():
        teacher = "independent" if noise is None else f"student + {noise:g} of the spread"
        errors = " | ".join(f"{max(row[f'{kept}_error'] for row in rows):.1e}" for kept in KEPT)
        lines.append(f"| {spread:g} | {teacher} | {errors} |")
    return "\n".join(lines) + "\n"


def predicted_table(device: str = "H100", tokens: int = 8192) -> str:
    """What ``kd.plan`` says of both ways to keep logits: milliseconds, over the bare products, and scratch."""

    def cell(head: Head, loss: str, logits: str) -> str:
        sizes = head.vocab, head.student_dim, head.teacher_dim
        with mock.patch.dict(os.environ, KDKERNELS_LOGITS=logits):
            plan = kd.plan(tokens, *sizes, torch.bfloat16, device=device, strategy="tokens", divergence=loss)  # type: ignore[arg-type]
        assert plan.seconds is not None
        assert plan.products_seconds is not None
        ratio = plan.seconds / plan.products_seconds
        chunks = f"{plan.chunks} chunk{'s' * (plan.chunks > 1)}"
        return f"{plan.seconds * 1e3:.1f} ms, {ratio:.2f}; {plan.scratch_bytes / GIB:.1f} GiB in {chunks}"

    lines = [
        f"Predicted for an {device}, {tokens:,} tokens, bfloat16.",
        "",
        "| | float32 logits | 16-bit offsets |",
        "|---|---|---|",
    ]
    for head, loss in itertools.product(HEADS.values(), ("forward_kl", "jsd")):
        cells = " | ".join(cell(head, loss, logits) for logits in ("float32", "offsets"))
        lines.append(f"| {head.student} ← {head.teacher}, {loss} | {cells} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offsets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the result goes (default benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; needs --out")
    chosen = parser.parse_args(argv)
    if chosen.quick and chosen.out is None:
        parser.error("--quick needs --out FOLDER: toy figures are no results")
    sizes = (4, 2 * TILE, 1) if chosen.quick else (ROWS, VOCAB, DRAWS)
    rows = []
    for row in measured(*sizes):
        rows.append(row)
        errors = "  ".join(f"{kept} {row[f'{kept}_error']:.1e}" for kept in KEPT)
        print(f"{row['divergence']:17} {row['spread']:4g} {row['noise']!s:5} {errors}{'' if within(row) else '  more'}", flush=True)
    path = (chosen.out or RESULTS) / "offsets.json"
    files.write(path, (json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n").encode())
    print(f"wrote {path}")
    held = [row for row in rows if (row["noise"] is None or row["noise"] >= WITHIN) and row["divergence"] != SIGN]
    return 0 if all(map(within, held)) else 1


if __name__ == "__main__":
    sys.exit(main())
