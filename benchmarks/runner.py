"""How the benchmarks run: parts in processes of their own, each item under a deadline, every result sent as soon as it is known.

A part that hangs is killed, and one that dies, or whose device no longer answers, has ended; either costs the item that it was at.
The items after that go on in a new process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from benchmarks.cases import Case, key
from benchmarks.peers import NotOfferedError

START_S = 60.0  # for a process to import what it needs and to make its inputs, before its first item
MOST_PROCESSES = 16
FOREVER_S = 1e6
_SPAWN = multiprocessing.get_context("spawn")  # a forked process cannot use the device

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What one process does: ``opened(*arguments)`` once, and what that returns for each item, which yields results.

    limit: seconds for one item. together: may run beside others of its stage, as many as ``side_by_side`` says; else alone.
    around: what is to hold in the process meanwhile.
    """

    name: str
    opened: Callable[..., Callable[..., Iterator[Result]]]
    arguments: tuple[Any, ...]
    items: tuple[tuple[Any, ...], ...]
    limit: float
    together: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def named(self, item: tuple[Any, ...]) -> str:
        return " ".join([self.name, *(str(part) for part in item if part is not None)])


def why(error: BaseException) -> str:
    """An error on one line: its first line, and its last, where Triton's compiler says what it did not like."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *(line[:400] for line in dict.fromkeys(lines[:1] + lines[-1:]))])


def told(facts: Result, measure: Callable[[], Result]) -> Result:
    """The facts with what was measured, or with why it was not: whatever is raised is what there is to say."""
    try:
        return {**facts, **measure()}
    except NotOfferedError as error:
        return {**facts, "skipped": str(error)}
    except Exception as error:
        return {**facts, "failed": why(error)}


def freed() -> None:
    """Gives back what was left behind on a GPU; raises if it no longer answers."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _end_with(parent: Any) -> None:
    """A process that hangs would hold the device after the suite was killed."""
    parent.join()
    os.killpg(0, signal.SIGKILL)


def work(part: Part, sender: Connection) -> None:
    """Sends an item's place when it begins, its results as they are known, and why it ends if it cannot go on."""
    os.setsid()  # a kill then takes the compiler's processes along
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    if part.together:
        torch.set_num_threads(1)
    with sender:
        try:
            with part.around():
                run = part.opened(*part.arguments)
                for at, item in enumerate(part.items):
                    sender.send(at)
                    for result in run(*item):
                        sender.send(result)
                    freed()
        except Exception as error:
            sender.send(why(error))
            raise SystemExit(1) from None


class _Job:
    """A part's process. at: the item that it is at, None before the first."""

    def __init__(self, part: Part, slower: float) -> None:
        self.part, self.slower, self.at, self.reason = part, slower, None, ""
        self.receiver, sender = _SPAWN.Pipe(duplex=False)
        self.process = _SPAWN.Process(target=work, args=(part, sender), daemon=True)
        self.process.start()
        sender.close()  # so that the process holds the only end, and its death is the end of the results
        self._allow(START_S)

    at: int | None

    def _allow(self, seconds: float) -> None:
        self.limit = seconds * self.slower
        self.deadline = time.monotonic() + self.limit

    def received(self) -> Result | None:
        """The next result, if that is what came. Raises EOFError after the last."""
        try:
            message = self.receiver.recv()
        except (OSError, pickle.UnpicklingError):  # killed while it was sending
            raise EOFError from None
        if isinstance(message, int):
            self.at = message
            self._allow(self.part.limit)
        elif isinstance(message, str):
            self.reason = message
        else:
            found: Result = message
            return found
        return None

    def ended(self) -> str:
        """Why it ended before its last item was done; empty if it did not."""
        self.process.join(10)
        status = self.process.exitcode
        if status is None:
            self.kill()
            return "the process had done its work and did not end"
        if status < 0:
            return f"the process ended by signal {signal.Signals(-status).name}"
        return (self.reason or f"the process ended with exit status {status}") if status else ""

    def strike(self) -> None:
        with suppress(ProcessLookupError):  # before it leads a group
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()

    def kill(self) -> None:
        self.strike()
        self.process.join(5)  # what hangs in a driver may not end
        self.receiver.close()

    def left(self) -> Part:
        """The items behind the one that it was at, or was to begin with."""
        return replace(self.part, items=self.part.items[(self.at or 0) + 1 :])

    def broken(self, reason: str) -> Result:
        """What is said about the item that it was at, or was to begin with."""
        return {"part": self.part.named(self.part.items[self.at or 0]), "broken": reason}


def side_by_side() -> int:
    """How many processes may share the device: one for each processor, as compilers take most of the time, while memory lasts."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(processors, MOST_PROCESSES)


def results(parts: Sequence[Part], limit: float, done: set[Part], slower: float = 1.0) -> Iterator[Result]:
    """What the parts have to say within ``limit`` seconds, in their order; the last result is what there was no time for.

    done: parts that ended well; they are not run again, and those that do are added. slower: factor of each item's limit.
    """
    begin = time.monotonic()
    waiting = [part for part in parts if part not in done]
    running: list[_Job] = []
    unfinished: list[Part] = []
    while (waiting or running) and time.monotonic() < begin + limit:
        while waiting and (not running or (waiting[0].together and running[0].part.together and len(running) < side_by_side())):
            running.append(_Job(waiting.pop(0), slower))
        patience = min([begin + limit, *(job.deadline for job in running)]) - time.monotonic()
        wait([job.receiver for job in running], max(0.0, patience))
        for job in list(running):
            try:
                if job.receiver.poll():
                    result = job.received()
                    if result is not None:
                        yield result
                    continue
                if time.monotonic() < job.deadline:
                    continue
                job.kill()
                reason = f"not done after {job.limit:.0f} s"
            except EOFError:
                reason = job.ended()
            running.remove(job)
            if not reason:
                done.add(job.part)
                continue
            yield job.broken(reason)
            if job.at is None:  # another process would fare no better
                unfinished.append(job.left())
            elif job.left().items:
                waiting.insert(0, job.left())
    for job in running:
        job.strike()
    for job in running:
        job.kill()
        yield job.broken(f"the stage's {limit:.0f} s were over")
        unfinished.append(job.left())
    yield {
        "seconds": round(time.monotonic() - begin, 1),
        "limit_s": limit,
        "not_run": [part.named(item) for part in (*unfinished, *waiting) for item in part.items],
    }


def rows(part: Part) -> Iterator[Result]:
    """A row for each case of a part, whose items they are; of those at which its process ended, why it did."""
    cases: dict[str, Case] = {part.named(item): item[0] for item in part.items}
    known: set[Any] = set()
    reason = ""
    for result in results([part], FOREVER_S, set()):
        reason = result.get("broken", reason)
        lost = [result["part"]] if "broken" in result else result.get("not_run")
        found = [result] if lost is None else [{**cases[name].facts, "failed": reason} for name in lost]
        yield from (row for row in found if key(row) not in known)
        known |= set(map(key, found))
