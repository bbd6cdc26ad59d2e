"""The processes that benchmarks run in (benchmarks/runner.py): what hangs, dies or cannot begin costs its own item alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import runner
from benchmarks.runner import Part
from tests.support import ROOT

Record = dict[str, Any]


def misbehaves(folder: str) -> Callable[[str], Iterator[Record]]:
    """What a part's process runs: each item does what it is called."""

    def run(what: str) -> Iterator[Record]:
        if what == "hang":
            # with a process of its own, as a compiler would have
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (Path(folder) / "pids").write_text(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "leave":
            os._exit(3)
        if what == "raise":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if what in ("left", "right"):  # returns when the other one is there
            (Path(folder) / what).touch()
            other = Path(folder) / {"left": "right", "right": "left"}[what]
            while not other.exists():
                time.sleep(0.05)
        yield {"did": what}

    return run


def not_opened(_: str) -> Callable[[str], Iterator[Record]]:
    raise LookupError("no such head")


def part(folder: Path, *items: str, limit: float = 30.0, together: bool = False, opened: Any = misbehaves) -> Part:
    return Part("part", opened, (str(folder),), tuple((item,) for item in items), limit, together)


def gone(pid: int) -> bool:
    """Whether a process has ended; what is left of it until its parent asks counts as ended."""
    try:
        return ") Z" in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestParts:
    def told(self, *parts: Part, limit: float = 300.0, done: set[Part] | None = None) -> tuple[list[Record], Record]:
        *results, last = runner.results(parts, limit, set() if done is None else done)
        return results, last

    def test_a_hang_costs_its_item_alone_and_leaves_no_process(self, tmp_path: Path) -> None:
        results, last = self.told(part(tmp_path, "first", "hang", "last", limit=3))
        assert results == [{"did": "first"}, {"part": "part hang", "broken": "not done after 3 s"}, {"did": "last"}]
        assert last["not_run"] == []
        for pid in map(int, (tmp_path / "pids").read_text().split()):
            wait_until(lambda pid=pid: gone(pid))

    @pytest.mark.parametrize(
        ("what", "reason"),
        [
            ("die", "the process ended by signal SIGSEGV"),
            ("leave", "the process ended with exit status 3"),
            ("raise", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ],
    )
    def test_a_process_that_ends_costs_its_item_alone(self, what: str, reason: str, tmp_path: Path) -> None:
        results, last = self.told(part(tmp_path, what, "next"))
        assert results == [{"part": f"part {what}", "broken": reason}, {"did": "next"}]
        assert last["not_run"] == []

    def test_a_part_that_cannot_begin_is_not_tried_again(self, tmp_path: Path) -> None:
        done: set[Part] = set()
        broken, other = part(tmp_path, "one", "two", opened=not_opened), part(tmp_path, "other")
        results, last = self.told(broken, other, done=done)
        assert done == {other}
        assert results == [{"part": "part one", "broken": "LookupError: no such head"}, {"did": "other"}]
        assert last["not_run"] == ["part two"]

    def test_a_stage_ends_in_time_and_lists_what_it_did_not_run(self, tmp_path: Path) -> None:
        start = time.monotonic()
        results, last = self.told(part(tmp_path, "hang", "second"), part(tmp_path, "third"), limit=1)
        assert time.monotonic() - start < 10
        assert results == [{"part": "part hang", "broken": "the stage's 1 s were over"}]
        assert last["not_run"] == ["part second", "part third"]

    def test_a_part_that_ran_before_is_not_run_again(self, tmp_path: Path) -> None:
        before = part(tmp_path, "one")
        results, last = self.told(before, done={before})
        assert results == []
        assert last["not_run"] == []

    def test_parts_run_side_by_side_where_they_may(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "side_by_side", lambda: 2)
        both = [part(tmp_path, side, together=True) for side in ("left", "right")]
        results, _ = self.told(*both)
        assert sorted(result["did"] for result in results) == ["left", "right"]

    @pytest.mark.parametrize("together", [(False, True), (True, False)])
    def test_a_part_that_must_be_alone_is(self, together: tuple[bool, bool], tmp_path: Path) -> None:
        one_by_one = [part(tmp_path, side, limit=3, together=may) for side, may in zip(("left", "right"), together, strict=True)]
        results, _ = self.told(*one_by_one)
        assert results == [{"part": "part left", "broken": "not done after 3 s"}, {"did": "right"}]

    def test_a_part_ends_with_the_suite(self, tmp_path: Path) -> None:
        code = f"""
from pathlib import Path
from benchmarks.runner import results
from tests.benchmarks.test_runner import part
if __name__ == "__main__":
    list(results([part(Path({str(tmp_path)!r}), "hang", limit=600)], 600, set()))
"""
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        pids = tmp_path / "pids"
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        parent.kill()
        parent.wait()
        for pid in map(int, pids.read_text().split()):
            wait_until(lambda pid=pid: gone(pid))
