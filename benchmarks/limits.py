"""What one processor can still do: the largest step under a memory limit, memory against N and V, the strategies' break-even.

    python -m benchmarks.limits                       # everything; about 25 minutes on 2 quiet cores that multiply bfloat16
    python -m benchmarks.limits --only break-even     # these cases again, the other results kept
    python -m benchmarks.limits --quick --out FOLDER  # toy sizes, in about a minute, to see that it runs

Each case in a process of its own, measured as measure.py says:

- largest: forward KL at the vocabulary of Gemma 3, 262,144, with 32,768 tokens in bfloat16: loss and both gradients, once. Both
  strategies, and under the same limit the eager formula and torch.compile of it, whose error message is their result, and the
  eager formula in checkpointed chunks.
- tokens and vocab: peak memory of a float32 step against N and against V. What grows with both are logits, whatever the hidden
  sizes; those are a few dozen here, so that a step takes seconds. A contender that failed is not run at larger sizes of that sweep.
- break-even: time of ``tokens`` over time of ``vocab``, interleaved in one process, with budgets from the logits of a few tokens to
  those of hundreds; beside it what ``kd.plan`` predicts from the rates it measures here, and which one ``strategy="auto"`` takes.

The limit on the memory of a process is set before the inputs are made and holds for all that it has: interpreter, libraries,
inputs, gradients. An allocation that would pass it fails as one does where memory is used up.

The largest step is checked whole, against float64. Its tokens are ``DISTINCT`` different ones, each as often as the others, in a
random order of which no contender knows. So the loss, every row of dH and all of dW follow from losses and gradients of the
different ones.

Results go to limits.json. Linux only, for the limit and the high-water mark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import exact
from benchmarks.cases import GIB, MIB, Case, Head, Problem, problem
from benchmarks.contenders import STRATEGIES, loss_of
from benchmarks.exact import Exact
from benchmarks.measure import measured, stepped
from benchmarks.rows import Row, alone, growing, options, run

FILES = dict.fromkeys(("largest", "tokens", "vocab", "break-even"), "limits.json")
CONTENDERS = ("tokens", "vocab", "eager", "compiled")
DISTINCT = 128


@dataclass(frozen=True)
class Extent:
    """How much is measured. largest, growth, even: head and tokens. limit: bytes of a process. budget: of ours in it.

    tokens, vocab: sizes that take the place of the growth's own. pairs, budgets: dtypes and losses of the break-even, and its bytes
    of scratch for logits.
    """

    limit: int
    budget: int
    largest: tuple[Head, int]
    growth: tuple[Head, int]
    tokens: tuple[int, ...]
    vocab: tuple[int, ...]
    even: tuple[Head, int]
    pairs: tuple[tuple[str, str], ...]
    budgets: tuple[int, ...]


FULL = Extent(
    limit=8 * GIB,
    budget=512 * MIB,
    largest=(Head("gemma3", "Gemma-3-1B", "Gemma-3-4B", 262_144, 262_144, 1152, 2560), 32_768),
    growth=(Head("slim", "slim", "slim", 262_144, 262_144, 16, 32), 4096),
    tokens=(1024, 2048, 4096, 8192, 16_384, 32_768),
    vocab=(16_384, 32_768, 65_536, 131_072, 262_144),
    even=(Head("32k", "a 32k model", "a wider one", 32_768, 32_768, 512, 1024), 1024),
    pairs=(("fp32", "forward_kl"), ("fp32", "jsd"), ("bf16", "forward_kl")),
    budgets=tuple(size * MIB for size in (1, 2, 4, 8, 16, 32, 64)),
)
TOY = Extent(
    limit=GIB,
    budget=16 * MIB,
    largest=(Head("gemma3", "toy", "toy", 65_536, 65_536, 16, 24), 2048),
    growth=(Head("slim", "slim", "slim", 65_536, 65_536, 8, 8), 256),
    tokens=(256, 4096),
    vocab=(4096, 65_536),
    even=(Head("32k", "toy", "toy", 2048, 2048, 32, 48), 128),
    pairs=(("fp32", "forward_kl"), ("bf16", "jsd")),
    budgets=(MIB // 16, MIB),
)


def cases(extent: Extent) -> list[Case]:
    """All of them, in the order in which they run: a contender's growth from small to large."""

    def limited(part: str, head: Head, tokens: int, dtype: str, contender: str) -> Case:
        budget = extent.budget if contender in STRATEGIES else None
        return Case(part, head, tokens, dtype, contender, budget=budget, limit=extent.limit)

    listed = [limited("largest", *extent.largest, "bf16", contender) for contender in (*CONTENDERS, "checkpointed")]
    head, tokens = extent.growth
    for contender in CONTENDERS:
        listed += [limited("tokens", head, size, "fp32", contender) for size in extent.tokens]
    for contender in CONTENDERS:
        listed += [limited("vocab", head.cut(size), tokens, "fp32", contender) for size in extent.vocab]
    head, tokens = extent.even
    pairs = [Case("break-even", head, tokens, dtype, "tokens", loss) for dtype, loss in extent.pairs]
    return listed + [replace(case, budget=budget) for case in pairs for budget in extent.budgets]


def repeating(case: Case) -> tuple[Problem, Callable[[], Exact]]:
    """A problem of few different tokens in a random order, each as often as the others; and what makes its float64 results."""
    different = problem(replace(case, tokens=math.gcd(case.tokens, DISTINCT)))
    count = len(different.hidden)
    places = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(1)) % count
    hidden = different.hidden.detach()[places].requires_grad_()

    def known() -> Exact:
        rows = torch.arange(different.vocab)
        return exact.tokens(different, case.loss, rows).mean(different, rows).repeated(places)

    return replace(different, hidden=hidden, teacher_hidden=different.teacher_hidden[places]), known


def break_even(case: Case, repeats: int) -> Row:
    """Time of "tokens" over "vocab", what is planned of the latter, how both cut the work, and which one "auto" takes."""
    tokens, vocab, auto = (case.plan(strategy) for strategy in STRATEGIES)
    given = problem(case)
    found = measured(case, given, repeats=repeats, yardstick=stepped(loss_of(replace(case, contender="vocab")), given))
    cut = {"chunk_rows": tokens.chunk_rows, "block_columns": vocab.block_columns, "auto": auto.strategy}
    return found | cut | {"planned_yardstick_seconds": vocab.seconds}


def planned_ratio(row: Row) -> float:
    """That of a break-even."""
    return float(row["planned_seconds"] / row["planned_yardstick_seconds"])


def measure(case: Case, repeats: int) -> Row:
    if case.part == "break-even":
        return break_even(case, repeats)
    if case.part == "largest":
        given, known = repeating(case)
        return measured(case, given, exact=known)
    return measured(case, problem(case))


def rows(chosen: list[Case], repeats: int) -> Iterator[Row]:
    return growing(chosen, lambda case: alone(case, measure, repeats))


def main() -> int:
    parser = options(__doc__)
    chosen = parser.parse_args()
    return run(parser, chosen, cases(TOY if chosen.quick else FULL), FILES, lambda some: rows(some, chosen.repeats))


if __name__ == "__main__":
    raise SystemExit(main())
