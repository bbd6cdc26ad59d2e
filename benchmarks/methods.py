"""The methods of the papers side by side, from students that were trained before, at two gaps between teacher and student.

    python -m benchmarks.methods --quick        # the wider gap, three seeds: about half an hour
    python -m benchmarks.methods                # both gaps, five seeds: one to two hours; it says how many once steps are timed
    python -m benchmarks.methods --only taid --fresh   # these runs again, the others kept

A teacher is trained once on the Python sources of the interpreter. For each gap and seed a student, initialised by the seed, learns
from the text alone first; then each method takes it further from the same weights by the same number of steps on the same windows,
through ``KDTrainer``, from the teacher's distribution alone ("cross-entropy": from the text alone). Each method is tried with the
same three learning rates, on a seed that is not counted, and takes the one whose loss is lowest on held-out files that no figure is
of; all else is published or default settings. The figures are of further held-out files: loss, accuracy and calibration, and what
the student writes from held-out prompts, at temperature 1: the teacher's loss on it, ROUGE-L against how the text goes on, and
distinct 3-grams. A step's time is measured apart, in turn with steps of cross-entropy, so that the rest may run on a busy machine.

Results go to benchmarks/results/methods.json after each run, and a later call does what is missing, in the same order: what --quick
runs is a part of the whole. From there go ``python -m benchmarks.plots`` and ``python -m benchmarks.readme``. Trained models are
kept in demo-output/methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.methods_report import NARROW, WIDE, best_rate, methods_table
from benchmarks.methods_runs import SEARCH_SEED, Bench, Plan
from benchmarks.rows import RESULTS
from kdkernels.console import files, info
from kdkernels.demo.settings import AGAINST, ModelSize, Settings

CACHE = Path("demo-output") / "methods"
PLAN = Plan(
    # Models take their planned steps however long they last, so that weights do not depend on the machine's speed.
    settings=Settings(
        vocab=4096,
        teacher=ModelSize(width=128, layers=3, heads=4),
        teacher_steps=3000,
        teacher_seconds=1e9,
        student_steps=1000,
        student_seconds=1e9,
        prompts=192,
        checkpoint_seconds=60.0,
    ),
    students={WIDE: ModelSize(width=28, layers=3, heads=2), NARROW: ModelSize(width=60, layers=3, heads=2)},
    methods={
        AGAINST: {"kd_weight": 0.0, "ce_weight": 1.0},
        "forward KL": {"method": "forward_kl"},
        "reverse KL": {"method": "reverse_kl"},
        "JSD": {"method": "jsd"},
        "skew forward KL": {"method": "skew_forward_kl"},
        "skew reverse KL": {"method": "skew_reverse_kl"},
        "total variation": {"method": "total_variation"},
        "TAID": {"method": "taid"},
        "OKD": {"method": "okd", "okd_learning_rate": 1e-3},
        "GKD": {"method": "jsd", "on_policy_fraction": 0.5, "on_policy_max_new_tokens": 64},
        # From 0, where its authors start, the fraction would hardly grow in a run this short, nor would a longer buffer be filled.
        "DistiLLM": {
            "method": "skew_reverse_kl",
            "on_policy_fraction": 0.5,
            "on_policy_schedule": "adaptive",
            "on_policy_max_new_tokens": 64,
            "replay_buffer_size": 64,
        },
    },
    steps=300,
    rates=(4e-3, 9e-3, 2e-2),  # from the one of the students' first steps upwards; below it, every loss tried was higher
    seeds=5,
)
QUICK_GAPS, QUICK_SEEDS = 1, 3


class Job(NamedTuple):
    """A run that is counted, or one of the search where there is a rate."""

    gap: str
    name: str
    seed: int
    rate: float | None = None

    def place(self, results: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Where its figures stand, and under which key."""
        kind, key = ("runs", str(self.seed)) if self.rate is None else ("search", f"{self.rate:g}")
        return results[kind].setdefault(self.gap, {}).setdefault(self.name, {}), key


def jobs(plan: Plan, gaps: Sequence[str], seeds: int, names: Sequence[str]) -> Iterator[Job]:
    """In the order in which they are run: a call with fewer gaps and seeds does the first part of one with more."""
    for gap in gaps:
        for seed in range(seeds):
            for name in names:
                if seed == 0:
                    yield from (Job(gap, name, SEARCH_SEED, rate) for rate in plan.rates)
                yield Job(gap, name, seed)


class Results:
    """The result file, written after each run. fresh: names of methods whose runs are done again."""

    def __init__(self, path: Path, plan: Plan, corpus: dict[str, Any], fresh: Sequence[str] = ()) -> None:
        self.path = path
        made_of = json.loads(json.dumps({"plan": dataclasses.asdict(plan), "corpus": corpus}))
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if found and any(found.get(key) != value for key, value in made_of.items()):
            kept = path.replace(path.with_suffix(".old.json"))
            print(f"other settings or another text: all is run anew, what there was is now {kept}")
            found = {}
        self.content = found or {**made_of, "asked": "", "parameters": {}, "references": {}, "before": {}}
        for kind in ("times", "search", "runs"):
            for of_gap in self.content.setdefault(kind, {}).values():
                for name in fresh:
                    of_gap.pop(name, None)

        self.content.setdefault("machine", {**info.facts(), "threads": torch.get_num_threads()})

    def write(self) -> None:
        self.content["machine"]["date"] = datetime.date.today().isoformat()
        files.write(self.path, (json.dumps(self.content, indent=1) + "\n").encode())

    def has(self, job: Job) -> bool:
        place, key = job.place(self.content)
        return key in place


def measure(
    bench: Bench,
    path: Path,
    *,
    gaps: Sequence[str],
    seeds: int,
    names: Sequence[str],
    asked: str = "the whole measurement",
    fresh: bool = False,
) -> dict[str, Any]:
    """Everything of these gaps, seeds and methods that is not in the results yet. asked: which measurement this is, in words."""
    plan = bench.plan
    results = Results(path, plan, bench.corpus.facts, names if fresh else ())
    content = results.content
    content["asked"] = asked
    content["parameters"] = {"teacher": bench.teacher.num_parameters()}
    content["parameters"] |= {gap: bench.untrained(gap).num_parameters() for gap in plan.students}
    begun = time.perf_counter()
    content["references"] = {"teacher": bench.judge.scores(bench.teacher, 0), "text": bench.judge.text()}
    scoring = time.perf_counter() - begun
    for gap in gaps:
        time_steps(bench, results, gap, names)
    planned = [job for job in jobs(plan, gaps, seeds, names) if not results.has(job)]
    print(estimate(content, planned, plan.steps, scoring), flush=True)
    for job in planned:
        figures = run(bench, results, job)
        place, key = job.place(content)
        place[key] = figures if job.rate is None else figures["loss"]
        results.write()
        what = f"rate {job.rate:g}" if job.rate else f"seed {job.seed}"
        print(
            f"{job.gap}  {what:12} {job.name:16} " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()), flush=True
        )
    results.write()
    return content


def time_steps(bench: Bench, results: Results, gap: str, names: Sequence[str]) -> None:
    """The seconds of a step of each method. None of one whose schedule changes what a step does."""
    of_gap = results.content["times"].setdefault(gap, {})
    for name in names:
        if name not in of_gap and bench.plan.methods[name].get("on_policy_schedule") != "adaptive":
            of_gap[name] = bench.step_times(gap, name)
            results.write()
            ratios = of_gap[name]["ratios"]
            print(f"{gap}  {name:16} {of_gap[name]['seconds']:.4f} s a step, {min(ratios):.2f} to {max(ratios):.2f} of {AGAINST}'s")


def estimate(content: dict[str, Any], planned: Sequence[Job], steps: int, scoring: float) -> str:
    """How long the runs will last. scoring: seconds that it takes to judge a student."""
    seconds = 0.0
    for job in planned:
        times = content["times"][job.gap]
        step = times[job.name]["seconds"] if job.name in times else max((one["seconds"] for one in times.values()), default=0.0)
        seconds += steps * step + scoring
    return f"{len(planned)} runs to do, about {seconds / 3600:.1f} hours, besides the students' first steps"


def run(bench: Bench, results: Results, job: Job) -> dict[str, float]:
    """The figures of a student, trained from where its seed's stands; of the search its validation loss alone."""
    start = bench.student(job.gap, job.seed)
    if job.rate is not None:
        return {"loss": bench.validation_loss(bench.further(start, job.name, job.rate, job.seed, bench.plan.steps))}
    before = results.content["before"].setdefault(job.gap, {})
    if str(job.seed) not in before:
        before[str(job.seed)] = bench.judge.scores(start, job.seed)
    rate = best_rate(results.content["search"][job.gap][job.name])
    return bench.judge.scores(bench.further(start, job.name, rate, job.seed, bench.plan.steps), job.seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK_SEEDS} seeds of the wider gap: half an hour")
    parser.add_argument("--only", default="", metavar="TEXT", help="methods whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="run again what the results have of these methods")
    arguments = parser.parse_args()
    names = tuple(name for name in PLAN.methods if arguments.only.lower() in name.lower())
    if not names:
        parser.error(f"--only {arguments.only!r} is in no name; accepted: parts of {', '.join(PLAN.methods)}")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)  # models this small are hardly faster with more
    gaps, seeds = tuple(PLAN.students), PLAN.seeds
    if arguments.quick:
        gaps, seeds = gaps[:QUICK_GAPS], QUICK_SEEDS
    asked = "`--quick`" if arguments.quick else "the whole measurement"
    results = measure(
        Bench(PLAN, CACHE), RESULTS / "methods.json", gaps=gaps, seeds=seeds, names=names, asked=asked, fresh=arguments.fresh
    )
    print(methods_table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
