"""Result files of rows, and the command that fills them: what benchmarks.compare, limits, linear and training share.

A file is {"machine": …, "rows": [...]}, written after each row. A row has the facts of its case and what was measured, or says why
there is nothing in "failed" or "skipped".
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.cases import MIB, Case, key, name
from benchmarks.measure import LIBRARIES, limit_memory, machine, planned
from benchmarks.runner import Part, told
from kdkernels.console import files

RESULTS = Path(__file__).parent / "results"
TIMEOUT = 3600.0  # seconds for a case
Row = dict[str, Any]


class File:
    """order: the cases as they are listed, in whose order the rows stand; others, kept from an earlier run, come last.

    keeps: whether the rows that are there stay until there are new ones; ValueError if they are of another machine. A library that
    it does not know had no part in them.
    """

    def __init__(self, path: Path, order: list[Case], keeps: bool) -> None:
        self.path, self.machine = path, machine()
        self.places = {key(case.facts): place for place, case in enumerate(order)}
        self.rows: list[Row] = []
        if keeps and path.exists():
            found = json.loads(path.read_text())
            no_part = {"date", *(set(LIBRARIES) - found["machine"].keys())}
            known = {fact: found["machine"].get(fact) for fact in self.machine if fact not in no_part}
            other = [f"{fact} {value!r}" for fact, value in known.items() if value != self.machine[fact]]
            if other:
                raise ValueError(f"{path} is of another machine ({', '.join(other)}); --only adds to results of this one: run all")
            self.rows = found["rows"]

    def add(self, row: Row) -> None:
        rows = [*(one for one in self.rows if key(one) != key(row)), row]
        self.rows = sorted(rows, key=lambda one: self.places.get(key(one), len(self.places)))
        files.write(self.path, (json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n").encode())


Measure = Callable[[Case, int], Row]


def opened(measure: Measure, repeats: int) -> Callable[[Case], Iterator[Row]]:
    """What a process does for a case: it holds no more than the limit, and plans before it measures."""

    def run(case: Case) -> Iterator[Row]:
        facts = case.facts | planned(case)
        if case.limit is not None:
            limit_memory(case.limit)
        yield told(facts, lambda: measure(case, repeats))

    return run


def alone(case: Case, measure: Measure, repeats: int) -> Iterator[Row]:
    """The row of a case, from a process of its own."""
    return runner.rows(Part("case", opened, (measure, repeats), ((case,),), TIMEOUT))


SWEEPS = {"tokens": "N", "vocab": "V"}  # parts that are named by what grows in them, and its letter


def growing(chosen: list[Case], measured: Callable[[Case], Iterable[Row]]) -> Iterator[Row]:
    """A row for each case; none of a sweep is run behind one at which the same contender failed."""
    failed: dict[tuple[str, str], Row] = {}
    for case in chosen:
        before = failed.get((case.part, case.contender))
        if before is not None:
            yield case.facts | {"skipped": f"not run: it failed at {SWEEPS[case.part]} = {before[case.part]:,}"}
            continue
        for row in measured(case):
            if "failed" in row and case.part in SWEEPS:
                failed[case.part, case.contender] = row
            yield row


def line(row: Row) -> str:
    """A row, for the terminal."""
    for reason in ("failed", "skipped"):
        if reason in row:
            return f"{name(row)}  {reason}: {row[reason]}"
    parts = []
    if "ratio" in row:
        parts.append(f"{row['ratio']:.3f}x ({min(row['ratios']):.3f}-{max(row['ratios']):.3f} of {len(row['ratios'])})")
    parts += [f"{row['seconds']:.2f} s", f"{row['peak_bytes'] / MIB:.0f} MiB, {row['returned_bytes'] / MIB:.0f} of them gradients"]
    if "planned_peak_bytes" in row:
        parts.append(f"planned {row['planned_seconds']:.2f} s, {row['planned_peak_bytes'] / MIB:.0f} MiB")
    errors = [f"{row[f'{of}_error']:.0e}" for of in ("value", "hidden_grad", "head_grad") if f"{of}_error" in row]
    if errors:
        parts.append(f"errors {' '.join(errors)}")
    return "  ".join([name(row), *parts])


def options(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="run the cases whose name contains this, keep the other results")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a row (default 3)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go (default benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs; needs --out")
    return parser


def run(
    parser: argparse.ArgumentParser,
    chosen: argparse.Namespace,
    listed: list[Case],
    files_of: dict[str, str],
    measure: Callable[[list[Case]], Iterable[Row]],
) -> int:
    """Measures the cases that --only names. files_of: where the rows of each part go."""
    if chosen.quick and chosen.out is None:
        parser.error("--quick needs --out FOLDER: toy figures are no results")
    if chosen.repeats < 1:
        parser.error(f"--repeats {chosen.repeats}: accepted is 1 or more")
    folder: Path = chosen.out or RESULTS
    if not folder.is_dir():
        parser.error(f"--out {folder} is no folder")
    cases = [case for case in listed if chosen.only in str(case)]
    if not cases:
        parser.error(f"--only {chosen.only!r} is part of no name; there are: {', '.join(map(str, listed))}")
    try:
        into = {
            file: File(folder / file, [case for case in listed if files_of[case.part] == file], keeps=bool(chosen.only))
            for file in dict.fromkeys(files_of[case.part] for case in cases)
        }
    except ValueError as error:
        parser.error(str(error))
    for row in measure(cases):
        into[files_of[row["part"]]].add(row)
        print(line(row), flush=True)
    print(f"wrote {' and '.join(str(file.path) for file in into.values())}")
    return 0
