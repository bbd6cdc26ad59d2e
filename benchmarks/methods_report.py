"""The tables of benchmarks.methods: what each method reached, and a verdict on each of the papers' claims, from the figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdkernels.demo.settings import AGAINST

Results = dict[str, Any]
WIDE, NARROW = "8:1", "3:1"
# Figures of a run: what they are called, how they are shown, and whether less is better.
FIGURES = {
    "loss": ("held-out loss, nats", "{:.3f}", True),
    "accuracy": ("accuracy", "{:.1%}", False),
    "teacher_loss": ("teacher's loss on samples, nats", "{:.3f}", True),
    "rouge_l": ("ROUGE-L", "{:.3f}", False),
    "distinct": ("distinct 3-grams", "{:.3f}", False),
    "ece": ("ECE", "{:.3f}", True),
}
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}
HOLDS, FAILS, UNSEEN = "holds", "does not hold", "cannot be seen here"


def best_rate(losses: dict[str, float]) -> float:
    """The learning rate with the lowest validation loss. losses: by rate, as a result file has them."""
    return float(min(losses, key=losses.__getitem__))


@dataclass(frozen=True)
class Mean:
    """Of ``count`` values; the true mean is within ``spread`` of it with 95 % confidence, if they are normal (infinite for one)."""

    value: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        if len(values) < 2:
            return cls(values[0] if values else math.nan, math.inf, len(values))
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.mean(values), T95[len(values) - 1] * error, len(values))

    def verdict(self, least: float = -math.inf, most: float = math.inf) -> str:
        """Whether the mean is above ``least`` and below ``most``; not to be seen where a bound is within the spread."""
        if self.value - self.spread > least and self.value + self.spread < most:
            return HOLDS
        if self.value + self.spread < least or self.value - self.spread > most:
            return FAILS
        return UNSEEN if self.count > 1 else f"{UNSEEN}: too few runs"


@dataclass(frozen=True)
class Claim:
    """What a source says, put as a comparison of two methods here.

    values: of each seed (of times: of each round), from the results; none where a side was not run. They are to lie above ``least``
    and below ``most``.
    """

    source: str
    text: str
    compared: str
    values: Callable[[Results], list[float]]
    least: float = 0.0
    most: float = math.inf
    unit: str = ""


def lead(results: Results, figure: str, ahead: str, behind: str, gap: str) -> list[float]:
    """By how much the one method's figure is better than the other's, seed by seed: these start from the same weights."""
    runs = results["runs"].get(gap, {})
    one, other = runs.get(ahead, {}), runs.get(behind, {})
    sign = -1.0 if FIGURES[figure][2] else 1.0
    return [sign * (one[seed][figure] - other[seed][figure]) for seed in one if seed in other]


def times_as_long(results: Results, method: str, other: str, gap: str) -> list[float]:
    """A step of the method over one of the other, round by round; each was timed beside steps of cross-entropy."""
    times = results["times"].get(gap, {})
    if method not in times or other not in times:
        return []
    return [own / base for own, base in zip(times[method]["ratios"], times[other]["ratios"], strict=True)]


def _ahead(source: str, text: str, figure: str, ahead: str, behind: str) -> Claim:
    compared = f"{ahead} against {behind}: {FIGURES[figure][0]}"
    return Claim(source, text, compared, lambda results: lead(results, figure, ahead, behind, WIDE))


def _price(text: str, method: str, other: str, **bounds: float) -> Claim:
    def values(results: Results) -> list[float]:
        return times_as_long(results, method, other, WIDE)

    return Claim("OKD", text, f"{method} over {other}: time of a step", values, unit=" times", **bounds)


def _growth(figure: str) -> Claim:
    def values(results: Results) -> list[float]:
        leads = (lead(results, figure, "TAID", "forward KL", gap) for gap in (WIDE, NARROW))
        return [wide - narrow for wide, narrow in zip(*leads, strict=False)]

    text = "TAID's lead grows with the gap"
    return Claim("TAID", text, f"its lead over forward KL at {WIDE} less that at {NARROW}: {FIGURES[figure][0]}", values)


# The published times: of forward KD, OKD and GKD, in the units of OKD's paper.
FORWARD_KD, OKD, GKD = 2.6, 4.2, 10.5
CLAIMS = (
    _ahead("Hinton et al.", "a teacher's distribution teaches more than the text", "loss", "forward KL", AGAINST),
    *(_ahead("TAID", "better than KL under a gap", each, "TAID", "forward KL") for each in ("loss", "teacher_loss", "rouge_l")),
    *map(_growth, ("loss", "teacher_loss", "rouge_l")),
    _ahead("TAID", "no mode collapse", "distinct", "TAID", "reverse KL"),
    *(_ahead("OKD", "better than a fixed teacher", each, "OKD", "forward KL") for each in ("loss", "teacher_loss", "rouge_l")),
    _ahead("OKD", "better than GKD", "rouge_l", "OKD", "GKD"),
    _price(
        f"at most {OKD} : {FORWARD_KD} = {OKD / FORWARD_KD:.2f} times forward KD's time", "OKD", "forward KL", most=OKD / FORWARD_KD
    ),
    _price(
        f"GKD takes {GKD} : {FORWARD_KD} = {GKD / FORWARD_KD:.2f} times forward KD's", "GKD", "forward KL", least=GKD / FORWARD_KD
    ),
    _price("OKD takes less time than GKD", "GKD", "OKD", least=1.0),
    *(_ahead("GKD", "its own text teaches a student more", each, "GKD", "JSD") for each in ("teacher_loss", "rouge_l")),
    _ahead("MiniLLM", "reverse KL writes what the teacher finds likely", "teacher_loss", "reverse KL", "forward KL"),
    _ahead("MiniLLM", "forward KL covers more modes", "distinct", "forward KL", "reverse KL"),
    _ahead("DistiLLM", "skew KL better than KL", "rouge_l", "skew forward KL", "forward KL"),
)


def extent(results: Results) -> str:
    """Which measurement it is, and how far it is done."""
    seeds = results["plan"]["seeds"]
    done = (f"{_counted(results, gap)} of {seeds} at {gap}" for gap in results["plan"]["students"])
    return f"Result of {results['asked']}, with these seeds so far: {', '.join(done)}"


def _counted(results: Results, gap: str) -> str:
    counts = [len(seeds) for seeds in results["runs"].get(gap, {}).values()] or [0]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _figures(runs: Sequence[dict[str, float]]) -> list[str]:
    """Means over the seeds; a dash for a figure that there is none of."""
    cells = []
    for key, (_, form, _) in FIGURES.items():
        values = [one[key] for one in runs if key in one]
        cells.append(form.format(statistics.mean(values)).replace("%", " %") if values else "–")
    return cells


def _gap_table(results: Results, gap: str) -> str:
    """What each method reached at a gap; means over its seeds."""
    runs, references, sizes = results["runs"][gap], results["references"], results["parameters"]
    rates = [f"{rate:g}" for rate in results["plan"]["rates"]]
    titles = ["rate", "seeds", *(title for title, _, _ in FIGURES.values()), "seconds a step", f"over {AGAINST}'s"]
    lines = [f"| {gap}, {sizes[gap] / 1e6:.2f} M parameters | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]

    def row(name: str, rate: str, of: Sequence[dict[str, float]], times: Sequence[str] = ("", "")) -> None:
        lines.append(f"| {' | '.join([name, rate, str(len(of)) if rate else '', *_figures(of), *times])} |")

    for name, seeds in runs.items():
        if seeds:
            rate = f"{best_rate(results['search'][gap][name]):g}"
            times = results["times"].get(gap, {}).get(name)
            took = (f"{times['seconds']:.3f}", f"{statistics.median(times['ratios']):.2f}") if times else ("–", "–")
            row(name, f"{rate} (at an end)" if rate in (rates[0], rates[-1]) else rate, list(seeds.values()), took)
    row("the student before", "", list(results["before"][gap].values()))
    row("the teacher", "", [references["teacher"]])
    row("the text itself", "", [references["text"]])
    return "\n".join(lines)


def _by_how_much(claim: Claim, mean: Mean) -> str:
    if mean.count == 0:
        return "not run"
    spread = f" ± {mean.spread:.3f}" if math.isfinite(mean.spread) else ""
    return f"{mean.value:{'' if claim.unit else '+'}.3f}{spread}{claim.unit}"


def claims_table(results: Results) -> str:
    """The papers' claims and what the results say of each."""
    lines = ["| source | claim | compared here | by how much | verdict |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        mean = Mean.of(claim.values(results))
        verdict = mean.verdict(claim.least, claim.most)
        lines.append(f"| {claim.source} | {claim.text} | {claim.compared} | {_by_how_much(claim, mean)} | {verdict} |")
    return "\n".join(lines)


def methods_table(results: Results) -> str:
    """All that the page has of the results: a table for each gap, and the claims. results: what methods.json holds."""
    machine, plan = results["machine"], results["plan"]
    where = f"{machine['processor']}, {machine['threads']} thread, torch {machine['torch']}, {machine['date']}"
    corpus, settings = results["corpus"], plan["settings"]
    title = (
        f"{where}. {extent(results)}. The teacher has {results['parameters']['teacher'] / 1e6:.2f} M parameters and took "
        f"{settings['teacher_steps']:,} steps, students {settings['student_steps']:,} before and {plan['steps']:,} by each method, "
        f"of {settings['batch'] * settings['window']} tokens; {corpus['train_tokens'] / 1e6:.1f} M tokens of text, vocabulary "
        f"{corpus['vocab']:,}. Rates tried: {', '.join(f'{rate:g}' for rate in plan['rates'])}."
    )
    gaps = [gap for gap in plan["students"] if any(results["runs"].get(gap, {}).values())]
    told = (
        f"By how much the first is better than the second, at {WIDE} where no gap is named: the mean over the seeds, pair by pair, "
        "or over the rounds of the times, and its 95 % interval. A claim cannot be seen where that reaches over the bound, which "
        "is 0 or the published time."
    )
    return "\n\n".join([title, *(_gap_table(results, gap) for gap in gaps), told, claims_table(results)]) + "\n"
