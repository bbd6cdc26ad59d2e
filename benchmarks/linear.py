"""Time and memory of ``linear_kd_loss`` and ``linear_okd_loss`` alone, at more tokens, against their bare matrix products.

    python -m benchmarks.linear                       # everything; about 25 minutes on 2 cores
    python -m benchmarks.linear --only 32k --repeats 3
    python -m benchmarks.linear --only okd
    python -m benchmarks.linear --quick --out FOLDER  # toy sizes

How is in measure.py. A step with half of its labels ignored is held against the step with all of them instead.

Where the processor has no 16-bit matrix path, torch's bfloat16 products are many times slower than its float32 ones. The products
that bfloat16 cases are held against are then the float32 ones (the stricter yardstick), and the bfloat16 ones are timed once, on
the first eighth of the vocabulary, and reported beside them.

Each case runs in its own process; the result goes to linear.json.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cases import DTYPES, MIB, ONLINE, Case, Head, problem
from benchmarks.contenders import loss_of, products
from benchmarks.measure import measured, seconds, stepped
from benchmarks.rows import Row, alone, options, run
from kdkernels.backends.dtypes import product_dtype

FILES = {"time": "linear.json", "memory": "linear.json"}
FULL = (
    Head("152k", "a Qwen2.5 of 0.5B", "one of 1.5B", 151_936, 151_936, 896, 1536),
    Head("32k", "a 32k model", "a wider one", 32_000, 32_000, 512, 1024),
)
TOY = Head("152k", "toy", "toy", 640, 640, 16, 24), Head("32k", "toy", "toy", 320, 320, 8, 16)
LOSSES = ("forward_kl", "reverse_kl", "taid", "jsd", ONLINE)
TIMED = {dtype: DTYPES[dtype] for dtype in ("fp32", "bf16")}
BUDGET = 128 * MIB


def cases(heads: tuple[Head, ...] = FULL) -> list[Case]:
    listed = [Case("time", head, 1024, dtype, loss=loss) for head in heads for dtype in TIMED for loss in LOSSES]
    for head in heads:
        one = Case("time", head, 1024, "fp32")
        listed += [replace(one, budget=BUDGET), replace(one, contender="eager"), replace(one, masked=True)]
    one = Case("memory", heads[0], 1024, "fp32")
    some = (one, replace(one, tokens=8192), replace(one, budget=BUDGET), replace(one, loss=ONLINE))
    return listed + [replace(case, dtype=dtype) for dtype in TIMED for case in some]


def measure(case: Case, repeats: int) -> Row:
    given, dtype = problem(case), DTYPES[case.dtype]
    if case.part == "memory":
        return measured(case, given)
    yardstick = stepped(loss_of(case), replace(given, labels=None)) if case.masked else None
    found = measured(case, given, repeats=repeats, yardstick=yardstick)
    if product_dtype(dtype, torch.device("cpu")) != dtype and case.loss == "forward_kl":
        found["own_dtype_products_seconds"] = 8 * seconds(products(given.first(case.tokens, given.vocab // 8), dtype=dtype))
    return found


def main() -> int:
    parser = options(__doc__)
    chosen = parser.parse_args()
    listed = cases(TOY if chosen.quick else FULL)
    return run(parser, chosen, listed, FILES, lambda some: (row for case in some for row in alone(case, measure, chosen.repeats)))


if __name__ == "__main__":
    raise SystemExit(main())
