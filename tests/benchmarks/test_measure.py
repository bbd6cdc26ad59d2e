"""What is measured is what it is called: times between their yardsticks, peaks, and a row for every case whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, compare, limits, linear, measure, runner
from benchmarks.cases import Case, Head, key, problem
from benchmarks.measure import Timed, interleaved, measured
from benchmarks.peers import NotOfferedError
from benchmarks.rows import File, Row, line, options, run
from benchmarks.runner import Part, told
from tests.support import memory
from tests.support.needs import needs_proc

HEAD = Head("any", "student", "teacher", 97, 101, 8, 12)
CASE = Case("heads", HEAD, 20, "fp32", "eager")


class TestTimes:
    def test_a_step_is_held_against_the_mean_of_the_yardsticks_around_it(self) -> None:
        assert Timed([3.0, 8.0], [1.0, 2.0, 6.0]).ratios == [2.0, 2.0]

    def test_no_repeat_is_begun_out_of_patience(self) -> None:
        found = interleaved(lambda: time.sleep(0.01), lambda: time.sleep(0.005), 5, patience=0.0)
        assert (len(found.steps), len(found.yardsticks)) == (1, 2)
        assert len(interleaved(int, int, 5).steps) == 5

    @needs_proc
    @pytest.mark.parametrize(("slow", "count"), [(1e9, 3), (0.0, 1)])
    def test_a_slow_step_is_timed_once(self, slow: float, count: int) -> None:
        found = measured(CASE, problem(CASE), exact=lambda: compare.truth([CASE]).popitem()[1], repeats=3, slow=slow)
        assert len(found["ratios"]) == count
        assert found["ratio"] > 0
        assert found["seconds"] > 0
        assert found["returned_bytes"] == 4 * (20 * 8 + 97 * 8)
        assert found["head_grad_error"] < 1e-5


def test_memory_freed_before_does_not_hide_a_peak() -> None:
    block, blocks = 2**18, 200  # bytes; small enough for the C library to keep
    kept = 2 * 4096 * blocks  # pages that a block shares with its neighbours

    pins = []  # the last of them stays, and below it the C library keeps what was freed

    def allocate() -> None:
        some = [torch.ones(block // 4) for _ in range(blocks)]
        pins.append(some[-1])

    for _ in range(4):
        assert block * blocks - kept <= memory.peak_above(allocate) < block * blocks * 1.25


def test_the_header_has_the_versions_of_the_contenders() -> None:
    assert measure.machine()["trl"] == measure.version("trl")
    assert measure.version("no such library") is None


def ends(folder: str) -> Callable[[Case], Iterator[Row]]:
    """What a part's process runs: it is killed at a case of four tokens."""

    def row(case: Case) -> Iterator[Row]:
        if case.tokens == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        yield case.facts | {"ratio": 1.5}

    return row


def not_opened() -> Any:
    raise MemoryError("too much")


class TestRows:
    def some(self, *tokens: int) -> tuple[tuple[Case], ...]:
        return tuple((Case("tokens", HEAD, count, "fp32"),) for count in tokens)

    def test_a_case_at_which_its_process_ends_says_why_and_the_others_go_on(self, tmp_path: Path) -> None:
        rows = list(runner.rows(Part("case", ends, (str(tmp_path),), self.some(2, 4, 8), 60.0)))
        assert [row["tokens"] for row in rows] == [2, 4, 8]
        assert [row.get("failed") for row in rows] == [None, "the process ended by signal SIGKILL", None]

    def test_cases_whose_process_does_not_begin_all_say_why(self) -> None:
        rows = list(runner.rows(Part("case", not_opened, (), self.some(2, 4), 60.0)))
        assert [(row["tokens"], row["failed"]) for row in rows] == [(2, "MemoryError: too much"), (4, "MemoryError: too much")]

    @pytest.mark.parametrize(
        ("error", "kind", "reason"),
        [
            (torch.OutOfMemoryError("tried to allocate 9 GiB"), "failed", "OutOfMemoryError: tried to allocate 9 GiB"),
            (ModuleNotFoundError("No module named 'trl'"), "failed", "ModuleNotFoundError: No module named 'trl'"),
            (NotOfferedError("TRL has no TAID"), "skipped", "TRL has no TAID"),
        ],
    )
    def test_who_cannot_run_is_a_row_that_says_why(self, error: Exception, kind: str, reason: str) -> None:
        def fails() -> Row:
            raise error

        row = told(CASE.facts, fails)
        assert row == CASE.facts | {kind: reason}
        assert reason in line(row)


class TestFile:
    def test_results_of_another_machine_are_not_added_to(self, tmp_path: Path) -> None:
        path = tmp_path / "some.json"
        here = measure.machine()
        assert File(path, [CASE], keeps=True).rows == []
        path.write_text(json.dumps({"machine": here | {"date": "long ago"}, "rows": [CASE.facts]}))
        assert File(path, [CASE], keeps=True).rows == [CASE.facts]
        path.write_text(json.dumps({"machine": {fact: here[fact] for fact in here if fact != "trl"}, "rows": [CASE.facts]}))
        assert File(path, [CASE], keeps=True).rows == [CASE.facts], "it was not there, so it had no part in them"
        path.write_text(json.dumps({"machine": here | {"torch": "2"}, "rows": [CASE.facts]}))
        with pytest.raises(ValueError, match=r"torch '2'.*run all"):
            File(path, [CASE], keeps=True)
        assert File(path, [CASE], keeps=False).rows == []

    def test_rows_stand_in_the_order_of_their_cases_and_replace_earlier_ones(self, tmp_path: Path) -> None:
        order = [Case("tokens", HEAD, tokens, "fp32") for tokens in (2, 4, 8)]
        file = File(tmp_path / "some.json", order[:2], keeps=False)
        for at, case in enumerate([order[2], order[1], order[0], order[1]]):
            file.add(case.facts | {"ratio": at})
        assert [(row["tokens"], row["ratio"]) for row in file.rows] == [(2, 2), (4, 3), (8, 0)]
        assert json.loads(file.path.read_text()) == {"machine": measure.machine(), "rows": file.rows}


LISTED = {
    "compare": compare.cases(compare.FULL, everything=True),
    "limits": limits.cases(limits.FULL),
    "limits, toy": limits.cases(limits.TOY),
    "linear": linear.cases(),
}


@pytest.mark.parametrize("listed", LISTED.values(), ids=LISTED)
def test_cases_have_names_and_keys_of_their_own(listed: list[Case]) -> None:
    assert len(set(map(str, listed))) == len(listed)
    assert len({key(case.facts) for case in listed}) == len(listed)
    assert {cases.name(case.facts) for case in listed} == set(map(str, listed))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--quick"], "--quick needs --out FOLDER"),
        (["--repeats", "0"], "1 or more"),
        (["--out", "/does/not/exist"], "--out /does/not/exist is no folder"),
        (["--only", "no such case"], "'no such case' is part of no name; there are: heads: any fp32 eager forward_kl N=20 V=97"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = options("")
    with pytest.raises(SystemExit, match="2"):
        run(parser, parser.parse_args(arguments), [CASE], {"heads": "some.json"}, lambda _: [])
    assert reason in capsys.readouterr().err
