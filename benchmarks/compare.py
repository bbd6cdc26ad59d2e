"""Every way to compute a distillation loss, side by side: time over the bare products, peak memory, and error against float64.

    python -m benchmarks.compare                       # about an hour on 2 quiet cores
    python -m benchmarks.compare --only "heads: 32k"   # the cases whose name contains this; the other results stay
    python -m benchmarks.compare --all                 # every loss and mask, at every head in each dtype: some hours
    python -m benchmarks.compare --quick --out FOLDER  # toy sizes

The contenders are those of contenders.py: both strategies of ``linear_kd_loss``, PyTorch as one writes it, the same compiled or in
checkpointed chunks, Liger-Kernel's chunked loss as it is and compiled, TRL's tiles, torchtune's chunks, and the formula of TAID's
authors; losses whose kernels are Triton's alone have a row that says so. Each goes through the cases that share inputs in one
process of its own; a case at which it ends is a failed row. How is in measure.py.

heads: the output heads of four models and of a larger sibling as teacher. Each gets every loss with and without mask, in bfloat16,
the 32k model in float32; ``COVERED`` says which are there in float32 too, where a step takes longer. Tokens are few, so that the
four products take half a second to three; the memory of logits, which grows with N, is small beside the head's gradient there.
tokens and vocab: forward KL against N and against V, at narrow hidden states, where memory shows.

With a mask half of the tokens count, and the products are theirs alone: who computes the others too pays for them. No repeat is
begun after ``PATIENCE`` seconds, and a step longer than ``SLOW`` is timed once, the first time. A process may hold ``--memory`` GiB
of data; more is an allocation that fails. Of dW ``SAMPLE`` rows are compared with the float64 ones, evenly spread. Student and
teacher are independent, and a few tokens hold most of the probability: near-uniform logits would hide errors.

Results: compare.json (heads) and growth.json (tokens, vocab). Needs Linux, for /proc.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import exact, runner
from benchmarks.cases import GIB, LOSSES, Case, Head, Problem, half_masked, problem
from benchmarks.contenders import ONLY, TRITON
from benchmarks.exact import Exact
from benchmarks.measure import limit_memory, measured
from benchmarks.rows import Row, options, run
from benchmarks.runner import Part, Result, told

FILES = {"heads": "compare.json", "tokens": "growth.json", "vocab": "growth.json"}
NAMES = (
    *("tokens", "vocab", "eager", "compiled", "checkpointed", "liger", "liger compiled", "liger kl_div", "trl", "fla", "torchtune"),
    "taid published",
)
SAMPLE = 512
SLOW = {"heads": 5.0, "tokens": 2.0, "vocab": 2.0}  # seconds
PATIENCE = 8.0  # seconds
TIMEOUT = 1200.0  # seconds for a case


@dataclass(frozen=True)
class Extent:
    """How much is measured. heads: and N of each. narrow: the head of the sweeps, cut to the sizes that they name."""

    heads: dict[Head, int]
    narrow: Head
    sweep_tokens: tuple[int, ...]
    sweep_tokens_vocab: int
    sweep_vocab: tuple[int, ...]
    sweep_vocab_tokens: int


FULL = Extent(
    {
        Head("qwen2.5", "Qwen2.5-0.5B", "Qwen2.5-1.5B", 151_936, 151_936, 896, 1536): 256,
        Head("llama3.2", "Llama-3.2-1B", "Llama-3.2-3B", 128_256, 128_256, 2048, 3072): 128,
        Head("gemma3", "Gemma-3-1B", "Gemma-3-4B", 262_144, 262_208, 1152, 2560): 128,
        Head("32k", "a 32k model", "a wider one", 32_000, 32_000, 512, 1024): 512,
    },
    Head("narrow", "narrow", "narrow", 262_144, 262_144, 256, 512),
    (256, 1024, 4096, 16_384),
    32_000,
    (16_384, 65_536, 262_144),
    1024,
)
TOY = Extent(
    {Head("qwen2.5", "toy", "toy", 200, 208, 12, 20): 16, Head("32k", "toy", "toy", 96, 96, 8, 16): 24},
    Head("narrow", "narrow", "narrow", 192, 192, 8, 8),
    (8, 16),
    64,
    (64, 192),
    16,
)
EVERY = tuple(itertools.product(LOSSES, (False, True)))
# Losses and masks of a head in a dtype; --all takes every one of them.
COVERED = {
    ("qwen2.5", "fp32"): (("forward_kl", False), ("taid", False)),
    ("qwen2.5", "bf16"): EVERY,
    ("llama3.2", "fp32"): (("forward_kl", False),),
    ("llama3.2", "bf16"): EVERY,
    ("gemma3", "fp32"): (("forward_kl", False),),
    ("gemma3", "bf16"): EVERY,
    ("32k", "fp32"): EVERY,
}


def problems(extent: Extent, everything: bool = False) -> list[list[Case]]:
    """Those that share a head, or a sweep, together; everything: each loss with and without mask at each head."""
    heads = {head.name: head for head in extent.heads}
    found = [
        [
            Case("heads", heads[name], extent.heads[heads[name]], dtype, loss=loss, masked=masked)
            for loss, masked in (EVERY if everything else covered)
        ]
        for (name, dtype), covered in COVERED.items()
        if name in heads
    ]
    one = extent.narrow.cut(extent.sweep_tokens_vocab)
    found.append([Case("tokens", one, tokens, "fp32") for tokens in extent.sweep_tokens])
    found.append([Case("vocab", extent.narrow.cut(vocab), extent.sweep_vocab_tokens, "fp32") for vocab in extent.sweep_vocab])
    return found


def cases(extent: Extent, everything: bool = False, memory: float = 16.0) -> list[Case]:
    """What is measured, in order. ``ONLY`` says of whom one loss is measured."""
    return [
        replace(case, contender=contender, limit=int(memory * GIB))
        for some in problems(extent, everything)
        for contender in NAMES
        for case in some
        if case.loss == ONLY.get(contender, case.loss)
    ]


_made = functools.lru_cache(maxsize=1)(problem)


def given_of(case: Case) -> Problem:
    """Its problem, whose tensors are made once for the cases that follow each other with other losses, masks and contenders."""
    plain = Case("", case.head, case.tokens, case.dtype)
    return replace(_made(plain), labels=half_masked(case.tokens) if case.masked else None)


def _alike(case: Case) -> Case:
    """The case of the same inputs and loss, whoever computes it."""
    return Case("", case.head, case.tokens, case.dtype, loss=case.loss, masked=case.masked)


def truth(some: list[Case]) -> dict[Case, Exact]:
    """The float64 results of the cases, by ``_alike``; masked or not, the losses of the tokens are the same."""
    found: dict[Case, Exact] = {}
    for _, of_loss in itertools.groupby(dict.fromkeys(map(_alike, some)), lambda case: (case.head, case.tokens, case.loss)):
        alike = list(of_loss)
        rows = exact.sampled(alike[0].head.vocab, SAMPLE)
        each = exact.tokens(given_of(alike[0]), alike[0].loss, rows)
        found |= {case: each.mean(given_of(case), rows) for case in alike}
    return found


def prepare(file: str) -> Callable[..., Iterator[Result]]:
    """Float64 results into a file, before any contender runs: their memory is not its."""

    def run(*some: Case) -> Iterator[Result]:
        torch.save(truth(list(some)), file)
        yield {}

    return run


def opened(file: str, repeats: int) -> Callable[[Case], Iterator[Row]]:
    """The row of a case, whose float64 results are in the file."""
    results: dict[Case, Exact] = torch.load(file, weights_only=False)

    def run(case: Case) -> Iterator[Row]:
        def measure() -> Row:
            assert case.limit is not None
            limit_memory(case.limit)
            given, known = given_of(case), results[_alike(case)]
            return measured(case, given, exact=lambda: known, repeats=repeats, slow=SLOW[case.part], patience=PATIENCE)

        yield told(case.facts, measure)

    return run


def rows(chosen: list[Case], repeats: int) -> Iterator[Row]:
    """The contenders one after another, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for _, of_inputs in itertools.groupby(chosen, lambda case: (case.part, case.head.name, case.dtype)):
            some, file = list(of_inputs), str(Path(folder) / "exact")
            ended, *_ = runner.results([Part("float64", prepare, (file,), (tuple(some),), TIMEOUT)], TIMEOUT, set())
            for _, of_contender in itertools.groupby(some, lambda case: case.contender):
                of_process = list(of_contender)
                if of_process[0].contender in TRITON:
                    yield from (case.facts | {"skipped": "its kernels are Triton's alone: timed on a GPU"} for case in of_process)
                elif "broken" in ended:
                    yield from (case.facts | {"failed": f"no float64 results: {ended['broken']}"} for case in of_process)
                else:
                    items = tuple((case,) for case in of_process)
                    yield from runner.rows(Part("contender", opened, (file, repeats), items, TIMEOUT))


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--memory", type=float, default=16.0, metavar="GIB", help="data that a contender may hold (default 16)")
    parser.add_argument("--all", action="store_true", help="every loss, with and without mask, at every head in each dtype")
    chosen = parser.parse_args()
    listed = cases(TOY if chosen.quick else FULL, chosen.all, chosen.memory)
    return run(parser, chosen, listed, FILES, lambda some: rows(some, chosen.repeats))


if __name__ == "__main__":
    raise SystemExit(main())
