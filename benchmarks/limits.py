"""What one processor can still do: the largest step under a memory limit, memory against N and V, the strategies' break-even.

    python -m benchmarks.limits                       # everything; about 25 minutes on 2 quiet cores that multiply bfloat16
    python -m benchmarks.limits --only break-even     # these cases again, the other results kept
    python -m benchmarks.limits --quick --out FOLDER  # toy sizes, in about a minute, to see that it runs

Three parts, each case in a process of its own:

- largest: forward KL at the vocabulary of Gemma 3, 262,144, with 32,768 tokens in bfloat16: loss and both gradients, once. Both
  strategies, and under the same limit the eager formula and torch.compile of it, whose error message is their result, and the
  eager formula in checkpointed chunks.
- growth: peak memory of a float32 step against N and against V. What grows with both are logits, whatever the hidden sizes; those
  are a few dozen here, so that a step takes seconds. A contender that failed is not run at larger sizes of that sweep.
- break-even: time of ``tokens`` over time of ``vocab``, interleaved in one process, with budgets from the logits of a few tokens to
  those of hundreds; beside it what ``kd.plan`` predicts from the rates it measures here, and which one ``strategy="auto"`` takes.

The limit is on the private memory that a process may write to (RLIMIT_DATA: heap, stacks and anonymous mappings, touched or not;
code and files do not count). It is set before the inputs are made and holds for all that the process has: interpreter, libraries,
inputs, gradients. An allocation that would pass it fails as one does where memory is used up.

The largest step is checked whole, against float64. Its tokens are ``DISTINCT`` different ones, each as often as the others, in a
random order of which no contender knows. So the loss, every row of dH and all of dW follow from losses and gradients of the
different ones; those are computed in float64 by the textbook formula, a block of the vocabulary at a time. Errors of gradients are
norms of differences over the norm of the float64 gradient. Logits have standard deviation 3: a few entries of the vocabulary then
hold most of the probability, as in a trained model. With nearly equal probabilities errors would hardly show.

Peaks are the resident high-water mark of the step above the inputs, returned gradients included. Results go to
benchmarks/results/limits.json after each case, from there by ``python -m benchmarks.plots`` into limits.png, and by
``limits_table`` into the README. Linux only, for the limit and the high-water mark.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from benchmarks.contenders import CONTENDERS, Problem
from benchmarks.linear import DTYPES
from benchmarks.measure import MIB, in_own_process, interleaved, limit_memory, machine, seconds, why
from kdkernels.console import files
from tests.support.memory import peak_above, status

RESULTS = Path(__file__).parent / "results" / "limits.json"
GIB = 2**30
STRATEGIES = ("tokens", "vocab")
OTHERS = ("eager", "compiled")
SPREAD = 3.0
DISTINCT = 128


@dataclass(frozen=True)
class Case:
    """What one process measures.

    part: "largest", "growth" or "break-even". contender: a strategy or a name of ``CONTENDERS``; "" for the break-even. sweep:
    "tokens" or "vocab", what the growth is against. limit: of the process, in bytes; None for the break-even. budgets: bytes of
    logits scratch, one but for the break-even.
    """

    part: str
    tokens: int
    vocab: int
    student_dim: int
    teacher_dim: int
    dtype: str
    budgets: tuple[int, ...]
    limit: int | None = None
    contender: str = ""
    sweep: str = ""
    divergence: Any = "forward_kl"
    repeats: int = 3

    @property
    def name(self) -> str:
        """What reports and ``--only`` call it."""
        who = [self.part, f"in {self.sweep}"] if self.sweep else [self.part]
        what = self.contender or self.divergence
        return " ".join([*who, what, self.dtype, f"N={self.tokens}", f"V={self.vocab}"])

    @property
    def sizes(self) -> tuple[int, int, int, int, torch.dtype]:
        """As ``kd.plan`` takes them."""
        return self.tokens, self.vocab, self.student_dim, self.teacher_dim, DTYPES[self.dtype]

    def fields(self) -> dict[str, Any]:
        """What a row of the results says of its case."""
        left_out = {"part", "budgets", "repeats", *(() if self.sweep else ("sweep",))}
        return {key: value for key, value in asdict(self).items() if key not in left_out}


@dataclass(frozen=True)
class Scale:
    """The sizes of a run. swept: tokens and vocabularies that take the place of the growth's own."""

    largest: Case
    growth: Case
    swept: tuple[tuple[int, ...], tuple[int, ...]]
    break_even: Case
    pairs: tuple[tuple[str, str], ...]  # dtype and divergence of each break-even


FULL = Scale(
    # Gemma 3 of 1B, with its sibling of 4B as teacher
    largest=Case("largest", 32_768, 262_144, 1152, 2560, "bf16", (512 * MIB,), limit=8 * GIB),
    growth=Case("growth", 4_096, 262_144, 16, 32, "fp32", (512 * MIB,), limit=8 * GIB),
    swept=((1_024, 2_048, 4_096, 8_192, 16_384, 32_768), (16_384, 32_768, 65_536, 131_072, 262_144)),
    break_even=Case("break-even", 1_024, 32_768, 512, 1024, "fp32", tuple(size * MIB for size in (1, 2, 4, 8, 16, 32, 64))),
    pairs=(("fp32", "forward_kl"), ("fp32", "jsd"), ("bf16", "forward_kl")),
)
QUICK = Scale(
    largest=Case("largest", 2_048, 65_536, 16, 24, "bf16", (32 * MIB,), limit=GIB),
    growth=Case("growth", 256, 65_536, 8, 8, "fp32", (16 * MIB,), limit=GIB),
    swept=((256, 4_096), (4_096, 65_536)),
    break_even=Case("break-even", 128, 2_048, 32, 48, "fp32", (MIB // 16, MIB), repeats=2),
    pairs=(("fp32", "forward_kl"), ("bf16", "jsd")),
)


def cases(scale: Scale) -> list[Case]:
    """All of them, in the order in which they run: a contender's growth from small to large."""
    listed = [replace(scale.largest, contender=contender) for contender in (*STRATEGIES, *OTHERS, "checkpointed")]
    for sweep, sizes in zip(("tokens", "vocab"), scale.swept, strict=True):
        for contender in (*STRATEGIES, *OTHERS):
            swept = replace(scale.growth, sweep=sweep, contender=contender)
            listed += [replace(swept, tokens=size) if sweep == "tokens" else replace(swept, vocab=size) for size in sizes]
    return listed + [replace(scale.break_even, dtype=dtype, divergence=divergence) for dtype, divergence in scale.pairs]


class Inputs:
    """Random hidden states and heads of a case, the same ones at every call.

    distinct: [K, D_s] and [K, D_t], float64, the different tokens; places: [N], which of them each token is; problem: what is run.
    """

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = DTYPES[case.dtype]

        def normal(rows: int, dim: int, scale: float) -> Tensor:
            return torch.randn(rows, dim, generator=generator, dtype=dtype).mul_(scale)

        count = math.gcd(case.tokens, DISTINCT)
        self.places = torch.randperm(case.tokens, generator=generator) % count
        hidden, teacher_hidden = normal(count, case.student_dim, SPREAD), normal(count, case.teacher_dim, SPREAD)
        self.distinct = hidden.double(), teacher_hidden.double()
        self.problem = Problem(
            hidden[self.places].requires_grad_(),
            normal(case.vocab, case.student_dim, case.student_dim**-0.5).requires_grad_(),
            teacher_hidden[self.places],
            normal(case.vocab, case.teacher_dim, case.teacher_dim**-0.5),
        )

    @property
    def returned_bytes(self) -> int:
        """Of both gradients."""
        return self.problem.hidden.nbytes + self.problem.head.nbytes

    def step(self, loss: Callable[[Problem], Tensor]) -> Tensor:
        """Loss, detached; its gradients are in the leaves."""
        self.problem.hidden.grad = self.problem.head.grad = None
        value = loss(self.problem)
        value.backward()
        return value.detach()


def loss_of(case: Case, contender: Any, budget: int) -> Callable[[Problem], Tensor]:
    """The contender's mean loss; only the strategies have a budget."""
    if contender not in STRATEGIES:
        return CONTENDERS[contender](case.divergence)

    def run(given: Problem) -> Tensor:
        value: Tensor = kd.linear_kd_loss(
            *(given.hidden, given.head, given.teacher_hidden, given.teacher_head),
            divergence=case.divergence,
            strategy=contender,
            memory_budget=budget,
        )
        return value

    return run


def errors(inputs: Inputs, value: Tensor, block: int = 4096) -> dict[str, float]:
    """Relative errors of a forward KL and of the gradients in the leaves, against float64; ``block`` columns at a time."""
    given, (hidden, teacher_hidden) = inputs.problem, inputs.distinct
    hidden_grad, head_grad = given.hidden.grad, given.head.grad
    assert hidden_grad is not None
    assert head_grad is not None
    count = len(hidden)

    def heads(begin: int) -> tuple[Tensor, Tensor]:
        return given.head.detach()[begin : begin + block].double(), given.teacher_head[begin : begin + block].double()

    log_sums = [torch.full((count, 1), -torch.inf, dtype=torch.float64) for _ in range(2)]
    for begin in range(0, given.vocab, block):
        for at, (rows, head) in enumerate(zip((hidden, teacher_hidden), heads(begin), strict=True)):
            log_sums[at] = torch.logaddexp(log_sums[at], (rows @ head.mT).logsumexp(1, keepdim=True))
    loss, true_hidden_grad = 0.0, torch.zeros_like(hidden)
    wrong, whole = 0.0, 0.0
    for begin in range(0, given.vocab, block):
        head, teacher_head = heads(begin)
        lq, lp = hidden @ head.mT - log_sums[0], teacher_hidden @ teacher_head.mT - log_sums[1]
        loss += float((lp.exp() * (lp - lq)).sum()) / count
        slope = (lq.exp() - lp.exp()) / count
        true_hidden_grad += slope @ head
        true_head_grad = slope.mT @ hidden
        wrong += float((head_grad[begin : begin + block].double() - true_head_grad).square().sum())
        whole += float(true_head_grad.square().sum())
    # Each of the N tokens weighs 1 / N, each of the K different ones 1 / K.
    of_tokens = true_hidden_grad[inputs.places] * (count / len(inputs.places))
    return {
        "value_error": abs(float(value) - loss) / abs(loss),
        "hidden_grad_error": float((hidden_grad.double() - of_tokens).norm() / of_tokens.norm()),
        "head_grad_error": math.sqrt(wrong / whole),
    }


def planned(case: Case, returned: int) -> dict[str, Any]:
    """What ``kd.plan`` says of the case: peak above the inputs, and seconds."""
    ours = case.contender in STRATEGIES
    strategy: Any = case.contender if ours else "auto"
    plan = kd.plan(*case.sizes, memory_budget=case.budgets[0], strategy=strategy, divergence=case.divergence)
    # Nothing is counted for torch.compile, which chooses by itself what it keeps, and for checkpointed chunks.
    if not ours and case.contender != "eager":
        return {}
    scratch, took = (plan.scratch_bytes, plan.seconds) if ours else (plan.eager_scratch_bytes, plan.eager_seconds)
    return {"planned_peak_bytes": scratch + returned, "planned_seconds": took}


def one_step(case: Case) -> dict[str, Any]:
    """A contender's time, memory and, for the largest case, errors; {"failed": why} where it does not get through."""
    (budget,) = case.budgets
    if case.contender in STRATEGIES:
        # What the libraries keep for good is paid by a small step, outside the measurement.
        small = replace(case, tokens=64, vocab=512)
        Inputs(small).step(loss_of(small, case.contender, budget))
        kd.free_scratch()
    if case.limit is not None:
        limit_memory(case.limit)
    inputs = Inputs(case)
    found: dict[str, Any] = {"memory_budget": budget} if case.contender in STRATEGIES else {}
    found |= {"returned_bytes": inputs.returned_bytes, **planned(case, inputs.returned_bytes)}
    values: list[Tensor] = []
    took: list[float] = []
    try:
        loss = loss_of(case, case.contender, budget)
        if case.contender == "compiled":
            inputs.step(loss)  # compiles: neither its time nor its memory is the step's
            inputs.problem.hidden.grad = inputs.problem.head.grad = None
        peak = peak_above(lambda: took.append(seconds(lambda: values.append(inputs.step(loss)))))
    except (RuntimeError, MemoryError) as error:
        return {**found, "failed": why(error)}
    found |= {"seconds": took[0], "peak_bytes": peak}
    if case.part == "largest":
        # not getrusage's maximum, which a process has from the one that started it
        found |= {"process_bytes": status("VmHWM"), **errors(inputs, values[0])}
    return found


def break_even(case: Case) -> dict[str, Any]:
    """Both strategies at every budget: time of "tokens" over "vocab", measured and predicted, and which one "auto" takes."""
    inputs = Inputs(case)

    def step(strategy: str, budget: int) -> Callable[[], object]:
        loss = loss_of(case, strategy, budget)
        return lambda: inputs.step(loss)

    points = []
    strategies: tuple[Any, ...] = (*STRATEGIES, "auto")
    for budget in case.budgets:
        plans = {
            strategy: kd.plan(*case.sizes, memory_budget=budget, strategy=strategy, divergence=case.divergence)
            for strategy in strategies
        }
        tokens, vocab = (step(strategy, budget) for strategy in STRATEGIES)
        tokens()
        timed = interleaved(tokens, vocab, case.repeats)
        points.append(
            {
                "memory_budget": budget,
                "chunk_rows": plans["tokens"].chunk_rows,
                "block_columns": plans["vocab"].block_columns,
                "ratio": timed["ratio"],
                "ratios": timed["ratios"],
                "tokens_seconds": timed["seconds"],
                "vocab_seconds": timed["yardstick_seconds"],
                "planned_tokens_seconds": plans["tokens"].seconds,
                "planned_vocab_seconds": plans["vocab"].seconds,
                "auto": plans["auto"].strategy,
            }
        )
    return {"points": points, **crossings(points)}


def crossings(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Budgets in bytes at which both strategies take as long, measured and predicted, and between which two "auto" changes.

    None where one strategy is ahead at all of them.
    """
    budgets = [point["memory_budget"] for point in points]
    predicted = [point["planned_tokens_seconds"] / point["planned_vocab_seconds"] for point in points]
    changes = [
        [one["memory_budget"], two["memory_budget"]] for one, two in itertools.pairwise(points) if one["auto"] != two["auto"]
    ]
    return {
        "crossing": crossing(budgets, [point["ratio"] for point in points]),
        "planned_crossing": crossing(budgets, predicted),
        "auto_changes": changes[0] if changes else None,
    }


def crossing(budgets: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Where the ratios first pass 1, between two budgets on straight lines of both logarithms; None where they do not."""
    steps = list(zip(budgets, map(math.log, ratios), strict=True))
    for (left, above), (right, below) in itertools.pairwise(steps):
        if above == 0:
            return float(left)
        if above * below <= 0:
            return float(left * (right / left) ** (above / (above - below)))
    return None


def measure(case: Case) -> dict[str, Any]:
    return break_even(case) if case.part == "break-even" else one_step(case)


def _failed_before(rows: list[dict[str, Any]], case: Case) -> str | None:
    """Why a case of the growth is not run: the same contender failed at a smaller size of the same sweep."""
    for row in rows:
        if "failed" in row and (row["sweep"], row["contender"]) == (case.sweep, case.contender):
            smaller = row[case.sweep]
            if smaller < asdict(case)[case.sweep]:
                return f"not run: it failed at {'N' if case.sweep == 'tokens' else 'V'} = {smaller:,}"
    return None


def run(scale: Scale, path: Path, only: str = "") -> dict[str, Any]:
    """Every case whose name contains ``only``, each in its own process; the results are written after each.

    Other results that are in the file stay if there is an ``only``; ValueError if they are of another machine or other versions.
    """
    here = machine()
    results: dict[str, Any] = {"machine": here, "largest": [], "growth": [], "break_even": {}}
    listed = cases(scale)
    if only and path.exists():
        results |= json.loads(path.read_text())
        if other := [key for key in here if key != "date" and results["machine"].get(key) != here[key]]:
            raise ValueError(f"{path} is of another machine: other {', '.join(other)}; --only adds to results of this one, run all")
    order = [case.fields() for case in listed]
    for case in listed:
        if only not in case.name:
            continue
        if case.part == "break-even":
            found = in_own_process("benchmarks.limits", asdict(case))
            results["break_even"][f"{case.dtype} {case.divergence}"] = {**case.fields(), **found}
        else:
            fields = case.fields()
            rows = [row for row in results[case.part] if any(row.get(key) != value for key, value in fields.items())]
            reason = _failed_before(rows, case) if case.sweep else None
            found = {"skipped": reason} if reason else in_own_process("benchmarks.limits", asdict(case))
            rows.append({**fields, **found})
            results[case.part] = sorted(rows, key=lambda row: _place(order, row))
        results["machine"] = here
        files.write(path, (json.dumps(results, indent=1) + "\n").encode())
        print(report(case, found), flush=True)
    return results


def _place(order: list[dict[str, Any]], row: dict[str, Any]) -> int:
    """Where a row's case stands in the order; rows of other sizes, kept from an earlier run, come last."""
    return next((at for at, fields in enumerate(order) if all(row.get(key) == value for key, value in fields.items())), len(order))


def report(case: Case, found: dict[str, Any]) -> str:
    """One line on a case that has run."""
    if "failed" in found or "skipped" in found:
        return f"{case.name}: {found.get('skipped') or 'failed: ' + found['failed']}"
    if "points" in found:
        pairs = "  ".join(f"{point['memory_budget'] / MIB:g}: {point['ratio']:.2f} ({point['auto']})" for point in found["points"])
        even = f"even at {_budget(found['crossing'])}, planned {_budget(found['planned_crossing'])}"
        return f"{case.name}: tokens over vocab by MiB {pairs}; {even}"
    parts = [f"{found['seconds']:.1f} s", f"{found['peak_bytes'] / MIB:.0f} MiB above the inputs"]
    if "planned_peak_bytes" in found:
        parts.append(f"(planned {found['planned_seconds']:.1f} s, {found['planned_peak_bytes'] / MIB:.0f} MiB)")
    if "value_error" in found:
        parts.append("errors " + " ".join(f"{found[f'{of}_error']:.1e}" for of in ("value", "hidden_grad", "head_grad")))
    return f"{case.name}: {'  '.join(parts)}"


def _budget(size: float | None) -> str:
    return "none of them" if size is None else f"{size / MIB:.1f} MiB"


def reason(row: dict[str, Any]) -> str:
    """Why a row has no figures, without the place in the allocator's source that its message starts with."""
    if "failed" not in row:
        return str(row["skipped"])
    text = re.sub(r"\[enforce fail at [^\]]*\]\s*(err == 0\.)?\s*", "", row["failed"])
    text = re.sub(r"\d{7,}", lambda size: f"{int(size[0]):,}", text)
    return f"failed: {text if len(text) <= 160 else text[:157] + '...'}"


def limits_table(results: dict[str, Any]) -> str:
    """What limits.json holds as Markdown, for the README between its marks: the largest step, and the break-even."""
    known = results["machine"]
    where = f"{known['processor']}, {known['threads']} threads, {known['instruction_sets'][0]}"
    lines = [f"{where}, torch {known['torch']}, {known['date']}."]
    if results["largest"]:
        lines += ["", *_largest_table(results["largest"])]
    if results["break_even"]:
        lines += ["", *_break_even_table(results["break_even"])]
    return "\n".join(lines) + "\n"


def _largest_table(rows: list[dict[str, Any]]) -> list[str]:
    row = rows[0]
    lines = [
        f"Forward KL, {row['dtype']}, N = {row['tokens']:,}, V = {row['vocab']:,}, D_s = {row['student_dim']:,}, "
        f"D_t = {row['teacher_dim']:,}; the whole process may hold {row['limit'] / GIB:g} GiB. Planned values in parentheses.",
        "",
        "| | seconds | GiB above inputs, gradients included | GiB of the process | error of the loss | of dH | of dW |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "seconds" not in row:
            wanted = f"({row['planned_peak_bytes'] / GIB:.1f})" if "planned_peak_bytes" in row else ""
            lines.append(f"| {row['contender']} | {reason(row)} | {wanted} | | | | |")
            continue
        cells = [
            row["contender"],
            f"{row['seconds']:.0f} ({row['planned_seconds']:.0f})" if "planned_seconds" in row else f"{row['seconds']:.0f}",
            f"{row['peak_bytes'] / GIB:.2f}" + (f" ({row['planned_peak_bytes'] / GIB:.2f})" if "planned_peak_bytes" in row else ""),
            f"{row['process_bytes'] / GIB:.2f}",
            *(f"{row[f'{of}_error']:.1e}" for of in ("value", "hidden_grad", "head_grad")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _break_even_table(found: dict[str, Any]) -> list[str]:
    measured = [case for case in found.values() if "points" in case]
    lines: list[str] = []
    if measured:
        case, budgets = measured[0], [point["memory_budget"] for point in measured[0]["points"]]
        lines += [
            f"Time of `tokens` over `vocab` by `memory_budget`, N = {case['tokens']:,}, V = {case['vocab']:,}, "
            f"D_s = {case['student_dim']:,}, D_t = {case['teacher_dim']:,}: measured (planned); bold where `auto` takes `vocab`.",
            "",
            "| | " + " | ".join(f"{budget / MIB:g} MiB" for budget in budgets) + " | even at (planned) |",
            "|---|" + "---|" * (len(budgets) + 1),
        ]
    for case in measured:
        cells = [f"{case['divergence']}, {case['dtype']}"]
        for point in case["points"]:
            mark = "**" if point["auto"] == "vocab" else ""
            cells.append(
                f"{mark}{point['ratio']:.2f} ({point['planned_tokens_seconds'] / point['planned_vocab_seconds']:.2f}){mark}"
            )
        cells.append(f"{_budget(case['crossing'])} ({_budget(case['planned_crossing'])})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [f"{case['divergence']}, {case['dtype']}: {reason(case)}" for case in found.values() if "points" not in case]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run cases whose name contains this, and keep the other results")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where limits.json goes (default benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; needs --out")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return 0
    if arguments.quick and arguments.out is None:
        parser.error("--quick needs --out FOLDER: toy figures are no results")
    path = RESULTS if arguments.out is None else arguments.out / RESULTS.name
    if not path.parent.is_dir():
        parser.error(f"--out {path.parent} is no folder")
    scale = QUICK if arguments.quick else FULL
    if not any(arguments.only in case.name for case in cases(scale)):
        parser.error(f"--only {arguments.only!r} is in no case; accepted: parts of {', '.join(case.name for case in cases(scale))}")
    try:
        results = run(scale, path, arguments.only)
    except ValueError as error:
        parser.error(str(error))
    print(limits_table(results))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
