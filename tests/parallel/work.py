"""What each of the processes runs and leaves in files, and how they are started."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kdkernels as kd
from tests.parallel.problems import REFUSED, SMALL, SPLITS, STRATEGIES, TOKENS, Found, Problem, full, fused_problems, problems
from tests.support import okd
from tests.support.cases import (
    REDUCTIONS,
    Case,
    Recorder,
)
from tests.support.counting import Products
from tests.support.oracle import Options


@contextmanager
def counted() -> Iterator[list[tuple[str, tuple[int, ...], torch.dtype]]]:
    """(operation, shape, dtype) of every all-reduce."""
    seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    whole = torch.distributed.all_reduce

    def counting(tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None) -> None:
        seen.append((str(op).rpartition(".")[2], tuple(tensor.shape), tensor.dtype))
        whole(tensor, op, group=group)

    with mock.patch("torch.distributed.all_reduce", counting):
        yield seen


def collectives(group: Any, rank: int, size: int) -> dict[str, Any]:
    """The all-reduces of a loss and its backward, by strategy and what is asked for."""
    found = {}
    for strategy in STRATEGIES:
        for name, more, learn in (
            ("one sweep", {}, okd.OF_STUDENT),
            ("frozen", {}, ("student_weight",)),
            ("metrics", {"return_metrics": True}, okd.OF_STUDENT),
            ("masked", {"token_weight": torch.zeros(TOKENS)}, okd.OF_STUDENT),
        ):
            with counted() as seen:
                Problem(full(torch.float32), learn=learn, options={"strategy": strategy, **more}).on(rank, size).run(
                    process_group=group
                )
            found[f"{name} {strategy}"] = list(seen)
    small = Problem(full(torch.float32), options={"strategy": "tokens", "memory_budget": SMALL[torch.float32]}).on(rank, size)
    with counted() as seen:
        small.run(process_group=group)
    found["small tokens"] = list(seen)
    return found


def products(group: Any, rank: int, size: int) -> dict[str, int]:
    """In units of one token and one row of the rank's heads, with hidden sizes 8 and 12: Us is 2 * 8, Ut is 2 * 12."""
    found = {}
    for strategy in STRATEGIES:
        problem = Problem(replace(full(torch.float32), labels=None, token_weight=None, options=Options("jsd")))
        with Products() as seen:
            problem.on(rank, size).run(process_group=group, strategy=strategy, memory_budget=200)
        found[strategy] = seen.flops // (TOKENS * SPLITS[size][rank])
    return found


def twice(group: Any, rank: int, size: int) -> bool:
    """Whether two backwards through one graph give the same, for losses of each kind, and so do two runs."""
    same = True
    for reduction in REDUCTIONS:
        for problem in (Problem(full(torch.float32)), Problem(full(torch.float32), True, okd.EVERYTHING)):
            mine = problem.on(rank, size)
            leaves = okd.leaves_of(mine.case, mine.learn)
            call: Callable[..., Any] = partial(okd.call, mine.case) if mine.online else mine.loss
            asked = {"process_group": group, "reduction": reduction, "strategy": "vocab", "memory_budget": SMALL[torch.float32]}
            runs = []
            for _ in range(2):
                made = call(leaves, **asked)
                total = made.student.sum() + made.teacher.sum() if mine.online else made.sum()
                learned = [leaf for leaf in leaves.values() if leaf.requires_grad]
                runs += [torch.autograd.grad(total, learned, retain_graph=True) for _ in range(2)]
            same &= all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
    return same


def compiled(group: Any, rank: int, size: int) -> dict[str, Any]:
    """One graph without breaks, its results beside the eager ones'."""
    case, graphs = Problem(full(torch.float32, divergence="jsd")).on(rank, size), []
    inner = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return inner(graph, inputs)

    def step(leaves: dict[str, Tensor], t: Tensor) -> Any:
        loss, metrics = case.loss(leaves, t=t, process_group=group, return_metrics=True)
        return loss * 1.5, metrics

    # PyTorch warns of what PyTorch does: its tracer makes an instance of every autograd.Function
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*should not be instantiated")
    pairs = []
    for function in (step, torch.compile(step, fullgraph=True, backend=counting)):
        for t in (1.0, 0.4):
            leaves = okd.leaves_of(case.case, okd.OF_STUDENT)
            loss, metrics = function(leaves, torch.tensor(t))
            loss.backward()
            pairs.append([loss.detach(), *metrics.values(), *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)])
    return {"graphs": len(graphs), "eager": pairs[:2], "compiled": pairs[2:]}


def checked(group: Any, rank: int, size: int) -> bool:
    """torch.library's own checks of both operators with a group."""
    for problem in (Problem(full(torch.float32)), Problem(full(torch.float32), True, okd.EVERYTHING)):
        with Recorder() as recorder:
            problem.on(rank, size).run(process_group=group)
        name = "linear_okd" if problem.online else "linear_kd"
        torch.library.opcheck(getattr(torch.ops.kdkernels, name).default, recorder.calls[name])
    return True


def fused(group: Any, rank: int, size: int) -> dict[str, Found]:
    """The kernels that multiply themselves, in the interpreter; with both strategies, and on a rank that is left without a row."""
    from tests.support.interpreter import as_on_a_gpu

    found = {}
    with as_on_a_gpu():
        for name, problem in fused_problems().items():
            found[name] = problem.on(rank, size).run(process_group=group)
    return found


def part_of_the_world(group: Any, rank: int, size: int) -> dict[str, Any]:
    """A group of the last rank and one of the others: each with a vocabulary of its own."""
    last = torch.distributed.new_group([size - 1])
    others = torch.distributed.new_group(list(range(size - 1)))
    problem = Problem(full())
    if rank == size - 1:
        return {"found": problem.run(process_group=last), "error": str(refusal(lambda: problem.run(process_group=others)))}
    mine = problem if size == 2 else replace(problem, splits=SPLITS).on(rank, 2)
    return {"found": mine.run(process_group=others), "error": str(refusal(lambda: problem.run(process_group=last)))}


def refusal(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except (TypeError, ValueError) as error:
        return error
    return None


def refusals(group: Any, rank: int, size: int) -> dict[str, tuple[str, str]]:
    found = {}
    parts = set(Case.__dataclass_fields__)
    for name, (different, _) in REFUSED.items():
        changed = different(rank)
        mine = Problem(full()).on(rank, size)
        shorter = {part: getattr(mine.case, part)[:-1] for part in changed.pop("without", ())}
        case = replace(mine.case, **shorter, **{part: changed.pop(part) for part in list(changed) if part in parts})
        mine = replace(mine, case=case, online=changed.pop("online", False), learn=changed.pop("learn", mine.learn))
        error = refusal(lambda: mine.run(**{"process_group": group, **changed}))  # noqa: B023
        found[name] = (type(error).__name__, str(error))
    mine = Problem(full()).on(rank, size)
    weights = mine.case.student_weight, mine.case.teacher_weight

    def listed() -> None:
        kd.linear_kd_loss([1.0], weights[0], [1.0], weights[1], process_group=group)  # type: ignore[arg-type]

    error = refusal(listed if rank == 0 else lambda: mine.run(process_group=group))
    found["one rank's tensors"] = (type(error).__name__, str(error))
    # a backend that serves no tensors of this device, as NCCL on a CPU
    serves = mock.patch("kdkernels.parallel.ranks._serves", side_effect=[False, True]) if rank == 0 else nullcontext()
    with serves:
        error = refusal(lambda: mine.run(process_group=group))
    found["one rank's device"] = (type(error).__name__, str(error))
    # and they can go on together
    found["afterwards"] = ("", str(mine.run(process_group=group)["loss"].isfinite().item()))
    return found


ALSO = (collectives, products, twice, compiled, checked, fused, part_of_the_world, refusals)


def work(rank: int, size: int, folder: Path) -> None:
    """What one of the processes does."""
    warnings.simplefilter("error")
    # the interpreter computes in NumPy, which warns where a kernel means inf - inf to be NaN
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
    # a rank that waits for another one raises
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=30))
    group = torch.distributed.group.WORLD
    done: dict[str, Any] = {name: problem.on(rank, size).run(process_group=group) for name, problem in problems().items()}
    done |= {function.__name__: function(group, rank, size) for function in ALSO}
    torch.save(done, folder / f"{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    # gloo's threads may abort a process that ends while they live
    os._exit(0)


START = """
import sys
from pathlib import Path

from tests.parallel.work import work

work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""
