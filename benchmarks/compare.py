"""Every way to compute a distillation loss, side by side: time over the bare products, peak memory, and error against float64.

    python -m benchmarks.compare                       # about an hour on 2 quiet cores
    python -m benchmarks.compare --only "heads: 32k"   # the processes whose name contains this; the other results stay
    python -m benchmarks.compare --all                 # every loss and mask, at every head in each dtype: some hours
    python -m benchmarks.compare --quick --out FOLDER  # toy sizes

The contenders are those of contenders.py: both strategies of ``linear_kd_loss``, PyTorch as one writes it, the same compiled or in
checkpointed chunks, Liger-Kernel's chunked loss as it is and compiled, TRL's tiles, and the formula of TAID's authors. Each goes
through a sweep's points (loss, mask, N, V) in one process of its own; a process that ends early makes its other points failed rows.

heads: the output heads of four models and of a larger sibling as teacher. Each gets every loss with and without mask, in bfloat16,
the 32k model in float32; ``COVERED`` says which are there in float32 too, where a step takes longer. Tokens are few, so that the
four products take half a second to three; the memory of logits, which grows with N, is small beside the head's gradient there.
tokens and vocab: forward KL against N and against V, at narrow hidden states, where memory shows.

Time. A step is the loss and the gradients of hidden states and head. The yardstick is the four bare products x, z, dH and dW of the
tokens that count (``contenders.products``), in the same process; a ratio is step / mean of the products before and after. With a
mask half of the tokens count, and the products are theirs alone: who computes the others too pays for them. The median is reported,
and every ratio; no repeat is begun after ``PATIENCE`` seconds, and a step longer than ``SLOW`` is timed once, the first time.

Memory. The high-water mark of the resident memory, reset before the first whole step, less what was resident then: above inputs and
libraries, the returned gradients included, and with whatever a library keeps for its next step. Compiled contenders are measured
in their second step. A process may hold ``--memory`` GiB of data (Linux: RLIMIT_DATA); more is an allocation that fails.

Error. The value and the gradients of that step against float64: tests/support/oracle.py over the inputs as rounded to the row's
dtype, a few tokens at a time. Of dW ``SAMPLE`` rows are compared, evenly spread over the vocabulary. Errors are relative: norm of
the difference over norm of the float64 result. Hidden states and heads are random, student and teacher independent, and the logits
have standard deviation 3: a few tokens hold most of the probability, as in a trained model. Near-uniform logits would hide errors.

Results: compare.json (heads) and growth.json (tokens, vocab), each {"machine": …, "rows": [...]}, written after every process. A
row that failed, or whose contender has no such loss, says why in "failed" or "skipped". Needs Linux, for /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks import contenders
from benchmarks.contenders import COMPILED, IGNORED, LOSSES, PUBLISHED, TAID_T, Head, Loss, NotOfferedError, Problem
from benchmarks.measure import in_own_process, interleaved, limit_memory, machine, seconds, why
from kdkernels.backends.dtypes import product_dtype
from kdkernels.console import files
from tests.support import oracle
from tests.support.memory import peak_above

MODULE = "benchmarks.compare"
RESULTS = Path(__file__).parent / "results"
FILES = {"heads": "compare.json", "tokens": "growth.json", "vocab": "growth.json"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# liger triton is for GPUs
NAMES = tuple(name for name in (*contenders.CONTENDERS, *PUBLISHED) if name != "liger triton")
SPREAD = 3.0
SAMPLE = 512
BLOCK = 512  # tokens per block of the bare products
SLOW = {"heads": 5.0, "tokens": 2.0, "vocab": 2.0}  # seconds
PATIENCE = 8.0  # seconds
TIMEOUT = 1200.0  # seconds for a process
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Extent:
    """How much is measured. tokens: N of each head. narrow: the head of the sweeps, cut to the sizes that they name."""

    heads: dict[str, Head]
    tokens: dict[str, int]
    narrow: Head
    sweep_tokens: tuple[int, ...]
    sweep_tokens_vocab: int
    sweep_vocab: tuple[int, ...]
    sweep_vocab_tokens: int


EXTENTS = {
    "full": Extent(
        {
            "qwen2.5": Head("Qwen2.5-0.5B", "Qwen2.5-1.5B", 151_936, 151_936, 896, 1536),
            "llama3.2": Head("Llama-3.2-1B", "Llama-3.2-3B", 128_256, 128_256, 2048, 3072),
            "gemma3": Head("Gemma-3-1B", "Gemma-3-4B", 262_144, 262_208, 1152, 2560),
            "32k": Head("a 32k model", "a wider one", 32_000, 32_000, 512, 1024),
        },
        {"qwen2.5": 256, "llama3.2": 128, "gemma3": 128, "32k": 512},
        Head("narrow", "narrow", 262_144, 262_144, 256, 512),
        (256, 1024, 4096, 16_384),
        32_000,
        (16_384, 65_536, 262_144),
        1024,
    ),
    "toy": Extent(
        {"qwen2.5": Head("toy", "toy", 200, 208, 12, 20), "32k": Head("toy", "toy", 96, 96, 8, 16)},
        {"qwen2.5": 16, "32k": 24},
        Head("narrow", "narrow", 192, 192, 8, 8),
        (8, 16),
        64,
        (64, 192),
        16,
    ),
}
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


@dataclass(frozen=True)
class Point:
    """What one row is measured at. masked: half of the tokens do not count."""

    loss: str
    masked: bool
    tokens: int
    vocab: int


@dataclass(frozen=True)
class Part:
    """The points that share inputs, their head ("narrow" in the sweeps over N and V) and their dtype."""

    sweep: str
    head: str
    dtype: str
    points: tuple[Point, ...]
    size: str

    @property
    def sizes(self) -> Head:
        extent = EXTENTS[self.size]
        return extent.heads.get(self.head, extent.narrow)

    def name(self, contender: str) -> str:
        """What --only looks at."""
        return f"{self.sweep}: {self.head} {self.dtype} {contender}"

    def row(self, point: Point, contender: str) -> dict[str, Any]:
        """What a row says before anything is measured."""
        return {
            **{"sweep": self.sweep, "head": self.head, "dtype": self.dtype, "contender": contender},
            **dataclasses.asdict(point),
            **{"student_dim": self.sizes.student_dim, "teacher_dim": self.sizes.teacher_dim},
        }


def parts(size: str, everything: bool = False) -> list[Part]:
    """What is measured, in order; everything: each loss with and without mask at each head."""
    extent = EXTENTS[size]
    found = []
    for (head, dtype), covered in COVERED.items():
        if head in extent.heads:
            sizes = extent.tokens[head], extent.heads[head].vocab
            points = tuple(Point(loss, masked, *sizes) for loss, masked in (EVERY if everything else covered))
            found.append(Part("heads", head, dtype, points, size))
    along_tokens = tuple(Point("forward_kl", False, tokens, extent.sweep_tokens_vocab) for tokens in extent.sweep_tokens)
    along_vocab = tuple(Point("forward_kl", False, extent.sweep_vocab_tokens, vocab) for vocab in extent.sweep_vocab)
    return [*found, Part("tokens", "narrow", "fp32", along_tokens, size), Part("vocab", "narrow", "fp32", along_vocab, size)]


def contenders_of(part: Part) -> tuple[str, ...]:
    """The contenders of a part. Where there is no TAID to compute, its formula is not among them."""
    taid = any(point.loss == "taid" for point in part.points)
    return tuple(name for name in NAMES if taid or name not in PUBLISHED)


def inputs(part: Part) -> dict[str, Tensor]:
    """The largest problem of the part, whose first tokens and rows are the others."""
    vocab, sizes = max(point.vocab for point in part.points), part.sizes
    if vocab < sizes.vocab:
        sizes = dataclasses.replace(sizes, vocab=vocab, teacher_vocab=vocab)
    given = contenders.problem(sizes, max(point.tokens for point in part.points), DTYPES[part.dtype], "cpu", SPREAD)
    tensors = {"hidden": given.hidden, "head": given.head}
    tensors |= {"teacher_hidden": given.teacher_hidden, "teacher_head": given.teacher_head}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def problem(tensors: dict[str, Tensor], point: Point) -> Problem:
    """A point's share of its part's inputs, with gradients still to be made."""
    whole = point.vocab == len(tensors["head"])
    return Problem(
        tensors["hidden"][: point.tokens].detach().requires_grad_(),
        tensors["head"][: point.vocab].detach().requires_grad_(),
        tensors["teacher_hidden"][: point.tokens],
        tensors["teacher_head"] if whole else tensors["teacher_head"][: point.vocab],
        contenders.half_masked(point.tokens) if point.masked else None,
    )


def sampled(vocab: int) -> Tensor:
    """The rows of dW that are compared, evenly spread: at most ``SAMPLE`` indices below ``vocab``."""
    return torch.linspace(0, vocab - 1, min(SAMPLE, vocab), dtype=torch.float64).round().long()


def truth(tensors: dict[str, Tensor], points: tuple[Point, ...]) -> list[dict[str, Tensor]]:
    """For each point, in float64: value and target_entropy (0-dim), hidden_grad [N, D_s] and head_grad [sampled rows, D_s]."""
    found: dict[Point, dict[str, Tensor]] = {}
    for vocab in {point.vocab for point in points}:
        for loss in {point.loss for point in points if point.vocab == vocab}:
            alike = [point for point in points if (point.vocab, point.loss) == (vocab, loss)]
            rows = per_token(problem(tensors, max(alike, key=lambda point: point.tokens)), loss)
            found |= {point: mean(rows, problem(tensors, point)) for point in alike}
    return [found[point] for point in points]


def per_token(given: Problem, loss: str) -> dict[str, Tensor]:
    """The float64 loss of each token, whatever its label: value and target_entropy [N], its gradients hidden_grad [N, D_s] and
    sampled_dx [N, sampled columns]; from the textbook's formula and autograd at the logits, a few tokens at a time."""
    options = oracle.Options("forward_kl", t=TAID_T) if loss == "taid" else oracle.Options(loss)
    hidden, teacher_hidden = given.hidden.detach().double(), given.teacher_hidden.double()
    head, teacher_head = given.head.detach(), given.cut_teacher_head
    sample = sampled(given.vocab)
    blocks = [slice(begin, begin + 8192) for begin in range(0, given.vocab, 8192)]  # rows that are widened at a time
    some = max(1, 2**24 // given.vocab)
    found: list[tuple[Tensor, ...]] = []
    for begin in range(0, len(hidden), some):
        here = slice(begin, begin + some)
        x = torch.cat([hidden[here] @ head[block].double().T for block in blocks], -1).requires_grad_()
        z = torch.cat([teacher_hidden[here] @ teacher_head[block].double().T for block in blocks], -1)
        y = oracle.target_logits(x, z, options.t)
        values = oracle.divergence(x, y, options)
        (dx,) = torch.autograd.grad(values.sum(), x)
        hidden_grad = torch.zeros_like(hidden[here])
        for block in blocks:
            hidden_grad += dx[:, block] @ head[block].double()
        found.append((values.detach(), torch.special.entr(y.softmax(-1)).sum(-1), hidden_grad, dx[:, sample]))
    names = "value", "target_entropy", "hidden_grad", "sampled_dx"
    return {name: torch.cat(of_chunks) for name, of_chunks in zip(names, zip(*found, strict=True), strict=True)}


def mean(rows: dict[str, Tensor], given: Problem) -> dict[str, Tensor]:
    """Value and gradients of the mean over the tokens of ``given`` that count, from ``per_token`` of at least those."""
    tokens = len(given.hidden)
    counts = (torch.ones(tokens) if given.labels is None else given.labels != IGNORED).double()
    share = counts / counts.sum()
    return {
        "value": share @ rows["value"][:tokens],
        "target_entropy": share @ rows["target_entropy"][:tokens],
        "hidden_grad": share[:, None] * rows["hidden_grad"][:tokens],
        "head_grad": rows["sampled_dx"][:tokens].T @ (share[:, None] * given.hidden.detach().double()),
    }


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm of the exact one, in float64."""
    return float((found.detach().double() - exact).norm() / exact.norm())


def errors(value: Tensor, given: Problem, exact: dict[str, Tensor], of_cross_entropy: bool = False) -> dict[str, float]:
    """Relative errors of a value and of the gradients that ``given`` holds; of_cross_entropy: the value is not the KL alone."""
    grads = given.hidden.grad, given.head.grad
    if grads[0] is None or grads[1] is None or not all(bool(part.isfinite().all()) for part in (value, grads[0], grads[1])):
        raise ArithmeticError("the value or a gradient is missing or not finite")
    expected = exact["value"] + (exact["target_entropy"] if of_cross_entropy else 0.0)
    return {
        "value_error": relative(value, expected),
        "hidden_grad_error": relative(grads[0], exact["hidden_grad"]),
        "head_grad_error": relative(grads[1][sampled(given.vocab)], exact["head_grad"]),
    }


def measured(contender: str, loss: Loss, given: Problem, exact: dict[str, Tensor], repeats: int, slow: float) -> dict[str, Any]:
    """What a row says about a contender that runs. slow: seconds; a step that takes longer is timed once."""

    def step(of: Problem = given) -> Tensor:
        of.hidden.grad = of.head.grad = None
        value = loss(of)
        value.backward()
        return value.detach()

    if contender in COMPILED:
        step()
        given.hidden.grad = given.head.grad = None
    else:  # what the libraries keep for good is paid by a small step
        small = {"hidden": given.hidden[:64], "head": given.head[:1024]}
        small |= {"teacher_hidden": given.teacher_hidden, "teacher_head": given.teacher_head}
        step(problem(small, Point("", False, len(small["hidden"]), len(small["head"]))))
    yardstick = contenders.products(given, BLOCK, product_dtype(given.hidden.dtype, given.hidden.device))
    before = seconds(yardstick)
    kd.free_scratch()
    value, took = torch.empty(()), 0.0

    def first() -> None:
        nonlocal value, took
        begin = time.perf_counter()
        value = step()
        took = time.perf_counter() - begin

    found: dict[str, Any] = {"peak_bytes": peak_above(first)}
    found |= errors(value, given, exact, contender in PUBLISHED)
    found["returned_bytes"] = sum(leaf.grad.nbytes for leaf in (given.hidden, given.head) if leaf.grad is not None)
    if took <= slow:
        return found | interleaved(step, yardstick, repeats, PATIENCE)
    after = seconds(yardstick)
    ratio = 2 * took / (before + after)
    return found | {"ratio": ratio, "ratios": [ratio], "seconds": took, "yardstick_seconds": (before + after) / 2}


def row(part: Part, point: Point, contender: str, given: Problem, exact: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    """A point's row; whatever another library raises is what the row has to say."""
    facts = part.row(point, contender)
    make = (contenders.CONTENDERS | PUBLISHED)[contender]
    try:
        return facts | measured(contender, make(point.loss), given, exact, repeats, SLOW[part.sweep])
    except NotOfferedError as error:
        return facts | {"skipped": str(error)}
    except Exception as error:
        return facts | {"failed": why(error)}


def work(case: dict[str, Any]) -> None:
    """What a process does: the float64 results of a part, or all rows of one contender, each written as it is known."""
    folder = Path(case["folder"])
    part = Part(**{**case["part"], "points": tuple(Point(**point) for point in case["part"]["points"])})
    if part.size == "toy":
        torch.set_num_threads(1)  # the second one has nothing to do
    if case["contender"] is None:
        tensors = inputs(part)
        torch.save({"tensors": tensors, "exact": truth(tensors, part.points)}, folder / "inputs")
        return
    prepared = torch.load(folder / "inputs", weights_only=True)
    limit_memory(int(case["memory"] * GIB))
    with open(folder / "rows", "a") as out:
        for point, exact in zip(part.points, prepared["exact"], strict=True):
            given = problem(prepared["tensors"], point)
            print(json.dumps(row(part, point, case["contender"], given, exact, case["repeats"])), file=out, flush=True)


def rows_of(part: Part, chosen: list[str], repeats: int, memory: float) -> Iterator[list[dict[str, Any]]]:
    """Runs the contenders one after another, each in a process of its own; yields all rows of each."""
    with tempfile.TemporaryDirectory() as folder:
        case = {"part": dataclasses.asdict(part), "folder": folder, "repeats": repeats, "memory": memory}
        prepared = in_own_process(MODULE, case | {"contender": None}, TIMEOUT)
        for contender in chosen:
            written = Path(folder) / "rows"
            written.write_text("")
            if "failed" in prepared:
                ended = {"failed": f"no float64 results: {prepared['failed']}"}
            else:
                ended = in_own_process(MODULE, case | {"contender": contender}, TIMEOUT)
            rows = [json.loads(text) for text in written.read_text().splitlines()]
            yield rows + [part.row(point, contender) | ended for point in part.points[len(rows) :]]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """By which a row replaces an earlier one."""
    return tuple(row[name] for name in ("sweep", "head", "dtype", "contender", "loss", "masked", "tokens", "vocab"))


def line(row: dict[str, Any]) -> str:
    """A row, for the terminal."""
    masked = " masked" if row["masked"] else ""
    about = f"  {row['contender']:15} {row['loss']}{masked} N={row['tokens']} V={row['vocab']}"
    for reason in ("failed", "skipped"):
        if reason in row:
            return f"{about:60} {reason}: {row[reason]}"
    spread = f"({min(row['ratios']):.2f}-{max(row['ratios']):.2f} of {len(row['ratios'])})"
    error = ", ".join(f"{row[name]:.0e}" for name in ("value_error", "hidden_grad_error", "head_grad_error"))
    return f"{about:60} {row['ratio']:6.2f}x {spread}, {row['seconds']:6.2f} s, {row['peak_bytes'] / MIB:6.0f} MiB, errors {error}"


def kept(path: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier file, [] if there is none; a ValueError if it comes from another machine or other versions."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    other = [
        f"{name} {found['machine'].get(name)!r}" for name in here if name != "date" and found["machine"].get(name) != here[name]
    ]
    if other:
        raise ValueError(f"{path} is of another machine ({', '.join(other)}); --only adds to results of this one: run all")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def run(
    chosen: list[tuple[Part, list[str]]], into: dict[str, list[dict[str, Any]]], folder: Path, repeats: int, memory: float
) -> None:
    """Measures what was chosen and keeps the files up to date. into: by file, the rows that there are, which new ones replace."""
    for part, some in chosen:
        rows, path = into[FILES[part.sweep]], folder / FILES[part.sweep]
        print(f"{part.sweep}: {part.head} {part.dtype}", flush=True)
        for new in rows_of(part, some, repeats, memory):
            print("\n".join(map(line, new)), flush=True)
            replaced = set(map(key, new))
            rows[:] = [*(row for row in rows if key(row) not in replaced), *new]
            files.write(path, (json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="run the processes whose name contains this, keep other results")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps per row (default 3)")
    parser.add_argument("--memory", type=float, default=16.0, metavar="GIB", help="data that a contender may hold (default 16)")
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="where the files go (default benchmarks/results)")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--all", action="store_true", help="every loss, with and without mask, at every head in each dtype")
    extent.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; needs --out")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        work(json.loads(arguments.case))
        print("{}")
        return 0
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out FOLDER: toy figures are no results")
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: accepted is 1 or more")
    folder: Path = arguments.out or RESULTS
    if not folder.is_dir():
        parser.error(f"--out {folder} is no folder")
    listed = parts("toy" if arguments.quick else "full", arguments.all)
    chosen = [(part, [name for name in contenders_of(part) if arguments.only in part.name(name)]) for part in listed]
    chosen = [(part, some) for part, some in chosen if some]
    if not chosen:
        every = ", ".join(part.name(name) for part in listed for name in contenders_of(part))
        parser.error(f"--only {arguments.only!r} is part of no name; there are: {every}")
    try:
        into = {FILES[part.sweep]: kept(folder / FILES[part.sweep], machine()) if arguments.only else [] for part, _ in chosen}
    except ValueError as error:
        parser.error(str(error))
    run(chosen, into, folder, arguments.repeats, arguments.memory)
    print(f"wrote {' and '.join(str(folder / name) for name in into)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
