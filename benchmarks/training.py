"""Whole training steps, end to end: tokens per second and peak memory of trainers and loops with the same loss.

    python -m benchmarks.training                       # about 20 minutes on 2 quiet cores
    python -m benchmarks.training --only "TRL GKD"      # the cases whose name contains this; the other results stay
    python -m benchmarks.training --quick --out FOLDER  # toy sizes

Who takes part, and the loss that all of them train with, is in trainers.py. Student and teacher are Qwen2 models of two narrow
layers with the vocabulary of Qwen2.5, 151,936, and tied embeddings as there; their weights are random, their logits spread as in
cases.py. So it is the loss that differs. A batch is one sequence of random tokens, of which N are predicted: all but the first, so
that chunks and tiles of a power of two come out even. A shorter one is the beginning of a longer one.

Each case runs in a process of its own, which may hold ``--memory`` GiB of data; who failed is not run at longer ones. Its
first step has ``SHORT`` tokens and is not counted. A step is all that a loop does for a batch: forwards, loss, backward, clipping,
optimizer. Beside each one the bare work is timed, which no loop can do without: the forwards of both bodies, the backward of the
student's, and the four products with the heads; a ratio is step / mean of the two around it (measure.py). No step is begun after
``PATIENCE`` seconds.

Memory: how far a step rises above what the process held before it, models and optimizer state among them; ``returned_bytes`` of
that are the gradients of the parameters. Error: of the first counted step's loss, whose weights are those given, against float64
models. The losses of all steps are in ``losses``: each later one shows the gradients before it.

Results: training.json. Needs Linux, for /proc.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks import runner
from benchmarks.cases import GIB, SPREAD, Case, Head, Problem
from benchmarks.contenders import products
from benchmarks.measure import seconds
from benchmarks.rows import TIMEOUT, Row, alone, growing, options, run
from benchmarks.runner import Part, Result
from benchmarks.trainers import TRAINERS, Run, Watch
from tests.support import oracle

FILES = {"tokens": "training.json"}
SHORT = 64
PATIENCE = 20.0  # seconds


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    head: Head
    tokens: tuple[int, ...]


FULL = Extent(Head("152k", "a Qwen2 of 2 layers", "a wider one", 151_936, 151_936, 256, 512), (256, 1024, 2048, 4096))
TOY = Extent(Head("152k", "toy", "toy", 640, 640, 16, 32), (80, 96))


def cases(extent: Extent, memory: float = 8.0) -> list[Case]:
    """A contender's from short to long. memory: GiB that a process may hold."""
    limit = int(memory * GIB)
    return [Case("tokens", extent.head, tokens, "fp32", name, limit=limit) for name in TRAINERS for tokens in extent.tokens]


def models(head: Head) -> tuple[Any, Any]:
    """The student and its teacher, the same ones at every call."""

    def made(dim: int, seed: int) -> Any:
        torch.manual_seed(seed)
        heads = max(1, dim // 64)
        config = Qwen2Config(
            vocab_size=head.vocab,
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            initializer_range=SPREAD * dim**-0.5,
            tie_word_embeddings=True,
        )
        return Qwen2ForCausalLM(config)

    return made(head.student_dim, 0), made(head.teacher_dim, 1).eval().requires_grad_(False)


def example(head: Head, tokens: int, seed: int) -> Tensor:
    """Token ids [N + 1], int64."""
    ids = torch.randint(1, head.vocab, (max(FULL.tokens) + 1,), generator=torch.Generator().manual_seed(seed))
    return ids[: tokens + 1]


@torch.no_grad()
def exact(head: Head, tokens: list[int]) -> dict[int, float]:
    """The loss of the first counted step, in float64, by its N."""
    ids = example(head, max(tokens), seed=1)[None]
    student, teacher = (model.double() for model in models(head))
    hidden, target = (model.model(ids).last_hidden_state[0, :-1] for model in (student, teacher))
    some = max(1, 2**24 // head.vocab)
    losses = [
        oracle.divergence(rows @ student.lm_head.weight.T, others @ teacher.lm_head.weight.T, oracle.Options("forward_kl"))
        for rows, others in zip(hidden.split(some), target.split(some), strict=True)
    ]
    means = torch.cat(losses).cumsum(0) / torch.arange(1, len(hidden) + 1)
    return {count: float(means[count - 1]) for count in tokens}


def bare_seconds(student: Any, teacher: Any, ids: Tensor) -> float:
    """Of the work that no step can do without; it leaves no gradients. ids: [N + 1]."""
    found: list[Tensor] = []

    def bodies() -> None:
        with torch.no_grad():
            found.append(teacher.model(ids[None], use_cache=False).last_hidden_state[0])
        hidden = student.model(ids[None], use_cache=False).last_hidden_state[0]
        hidden.backward(found[0][:, : hidden.shape[1]])  # a gradient is as random
        found.append(hidden.detach())

    took = seconds(bodies)
    student.zero_grad()
    target, hidden = (each[:-1] for each in found)
    return took + seconds(products(Problem(hidden, student.lm_head.weight.detach(), target, teacher.lm_head.weight)))


def measure(case: Case, repeats: int, exact_losses: dict[int, float]) -> Row:
    """What a row says about a loop that runs."""
    warnings.simplefilter("ignore")  # TRL's, of what is experimental and what will be another default
    logging.disable(logging.WARNING)  # of tokenizers, which have nothing to do here
    student, teacher = models(case.head)
    examples = [example(case.head, SHORT, seed=0), *(example(case.head, case.tokens, seed) for seed in range(1, repeats + 1))]
    watch = Watch(partial(bare_seconds, student, teacher, examples[1]), repeats, PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        losses = TRAINERS[case.contender](Run(student, teacher, examples, watch, Path(folder)))
    expected = exact_losses[case.tokens]
    return {
        "peak_bytes": max(watch.peaks),
        "process_bytes": watch.process,
        "returned_bytes": sum(each.nbytes for each in student.parameters()),
        "losses": losses,
        "value_error": abs(losses[1] - expected) / expected,
        "ratio": statistics.median(watch.timed.ratios),
        "ratios": watch.timed.ratios,
        "seconds": statistics.median(watch.timed.steps),
        "yardstick_seconds": statistics.median(watch.timed.yardsticks),
    }


def opened() -> Callable[..., Iterator[Result]]:
    """Float64 losses, before any contender runs: their memory is not its."""

    def run(*some: Case) -> Iterator[Result]:
        yield {"losses": exact(some[0].head, sorted({case.tokens for case in some}))}

    return run


def rows(chosen: list[Case], repeats: int) -> Iterator[Row]:
    """A row for each case, each from a process of its own."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer that is made
    known, *_ = runner.results([Part("float64", opened, (), (tuple(chosen),), TIMEOUT)], TIMEOUT, set())
    if "broken" in known:
        return (case.facts | {"failed": f"no float64 losses: {known['broken']}"} for case in chosen)
    return growing(chosen, lambda case: alone(case, partial(measure, exact_losses=known["losses"]), repeats))


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--memory", type=float, default=8.0, metavar="GIB", help="data that a process may hold (default 8)")
    chosen = parser.parse_args()
    listed = cases(TOY if chosen.quick else FULL, chosen.memory)
    return run(parser, chosen, listed, FILES, lambda some: rows(some, chosen.repeats))


if __name__ == "__main__":
    raise SystemExit(main())
