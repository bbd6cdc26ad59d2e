"""A vocabulary over two and three gloo processes: what one process computes, and refusals instead of ranks that wait for ever.

The processes are started once for each number of them. They run every problem of PROBLEMS, every call of REFUSED and the other
functions named in ALSO, and leave what they found in files; the tests compare.
"""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import reference
from kdkernels.backends.merge import merged
from kdkernels.backends.operators import STATS_COLUMNS
from kdkernels.engine.cut import column_bytes
from tests.losses import test_okd as okd
from tests.support.cases import Case, InsideOperators, assert_as_good_as_eager, draw, dressed, ratios
from tests.support.oracle import Options

SIZES = (2, 3)
VOCAB, TOKENS = 37, 9
# Rows of each rank: uneven, none a multiple of a block.
SPLITS = {2: (17, 20), 3: (5, 20, 12)}
HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
HIDDEN = ("student_hidden", "teacher_hidden")
STRATEGIES = ("tokens", "vocab")
# Three tokens of nine for the rank with most rows, or eight columns of a rank's: logits take that many bytes.
SMALL = {torch.float64: 7000, torch.float32: 500, torch.bfloat16: 500, torch.float16: 500}

Found = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A loss to call on ranks and in one process.

    online: linear_okd_loss. learn: what takes a gradient. options: of the call, besides those of the case. padded: rows that the
    last rank's teacher head has more.
    """

    case: Case
    online: bool = False
    learn: tuple[str, ...] = okd.OF_STUDENT
    options: dict[str, Any] = field(default_factory=dict)
    splits: dict[int, tuple[int, ...]] = field(default_factory=lambda: SPLITS)
    autocast: bool = False

    def on(self, rank: int, size: int) -> Problem:
        """What that rank is called with; the last one has whatever rows there are beyond the splits."""
        rows = self.splits[size]
        begin = sum(rows[:rank])
        cut = slice(begin, None if rank == size - 1 else begin + rows[rank])
        parts = {name: part[cut] for name in HEADS if (part := getattr(self.case, name)) is not None}
        return replace(self, case=replace(self.case, **parts))

    def run(self, **more: Any) -> Found:
        """Losses, metrics and gradients, with a factor of its own for each token's loss where there are several."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            if self.online:
                return okd.run(self.case, self.learn, **{**self.options, **more})
            leaves = okd.leaves_of(self.case, self.learn)
            made = self.loss(leaves, **more)
            loss, metrics = made if isinstance(made, tuple) else (made, {})
        asked = [name for name in self.learn if name in leaves]
        grads = torch.autograd.grad(loss, [leaves[name] for name in asked], okd.upstream(loss, 2.0)) if asked else ()
        return {"loss": loss.detach(), **metrics, **dict(zip(asked, grads, strict=True))}

    def loss(self, leaves: dict[str, Tensor], **more: Any) -> Any:
        student, teacher = okd.heads(self.case, leaves)
        options = {**okd.keywords(self.case.options), "token_weight": self.case.token_weight, **self.options, **more}
        return kd.linear_kd_loss(leaves["student_hidden"], student, leaves["teacher_hidden"], teacher, self.case.labels, **options)


def full(dtype: torch.dtype = torch.float64, seed: int = 0, spread: float = 3.0, **options: Any) -> Case:
    """Nine tokens, one of them ignored and one of weight 0, with everything that heads can have."""
    made = dressed(draw(seed, (TOKENS,), VOCAB, spread=spread, dtype=dtype))
    return replace(made, options=Options(**{"temperature": 1.5, "ce_weight": 0.5, **options}))


def banned(columns: slice, where: tuple[str, ...] = ("student_bias", "teacher_bias")) -> Case:
    case = full()
    for name in where:
        bias = getattr(case, name).clone()
        bias[columns] = -torch.inf
        case = replace(case, **{name: bias})
    # no label is banned
    free = [token for token in range(VOCAB) if token not in range(VOCAB)[columns]]
    labels = torch.tensor(free)[torch.arange(TOKENS) % len(free)]
    return replace(case, labels=labels, student_softcap=None, teacher_softcap=None)


def spoiled(value: float, name: str = "student_bias", at: int = 20) -> Case:
    """One entry of a row of a head is ``value``, on the second rank of two and of three."""
    case = full()
    bias = getattr(case, name).clone()
    bias[at] = value
    return replace(case, **{name: bias}, student_softcap=None, teacher_softcap=None)


def tied() -> Case:
    """Equal largest entries on different ranks: the first place wins, and with the teacher's at that place every token agrees."""
    x, z = torch.zeros(2, TOKENS, VOCAB, dtype=torch.float64)
    x[:, [3, 18, 30]], z[:, 3] = 5.0, 4.0
    z[4, 2] = 6.0  # here it does not
    eye = torch.eye(TOKENS, dtype=torch.float64)
    return Case(eye, x.t().contiguous(), eye, z.t().contiguous())


def padded() -> Case:
    """The teacher's head has four rows more, all of which the last rank holds."""
    case, more = full(), torch.full((4, 12), 7.0, dtype=torch.float64)
    assert case.teacher_bias is not None
    labels = None if case.labels is None else case.labels % 20
    longer = {"teacher_weight": torch.cat([case.teacher_weight, more]), "teacher_bias": torch.cat([case.teacher_bias, more[:, 0]])}
    return replace(case, **longer, labels=labels)


def _problems() -> Iterator[tuple[str, Problem]]:
    for strategy in STRATEGIES:
        small: dict[str, Any] = {"strategy": strategy, "memory_budget": SMALL[torch.float64]}
        for name in kd.divergences():
            for reduction in okd.REDUCTIONS:
                asked = {**small, "reduction": reduction}
                yield f"{name} {reduction} {strategy}", Problem(full(divergence=name, t=0.7), options=asked)
                yield f"okd {name} {reduction} {strategy}", Problem(full(divergence=name), True, okd.EVERYTHING, asked)
            yield f"{name} metrics {strategy}", Problem(full(divergence=name), options={**small, "return_metrics": True})
        measured = {**small, "return_metrics": True}
        yield f"okd metrics {strategy}", Problem(full(), True, okd.EVERYTHING, measured)
        for t in (0.0, 0.4, 1.0):
            yield f"taid {t} {strategy}", Problem(full(t=t), options=measured)
        yield f"one chunk or block {strategy}", Problem(full(), options={"strategy": strategy})
        yield f"okd one chunk or block {strategy}", Problem(full(), True, okd.EVERYTHING, {"strategy": strategy})
        yield f"normalizer {strategy}", Problem(full(normalizer=5.0), options=small)
        yield f"no labels {strategy}", Problem(draw(0, (3, 3), VOCAB, dtype=torch.float64), options=small)
        yield f"cross-entropy alone {strategy}", Problem(full(kd_weight=0.0, divergence="jsd"), options=small)
        nothing = replace(full(), labels=torch.full((TOKENS,), -100))
        yield f"everything masked {strategy}", Problem(nothing, options=measured)
        yield f"okd everything masked {strategy}", Problem(nothing, True, okd.EVERYTHING, small)
        yield f"no tokens {strategy}", Problem(dressed(draw(0, (0,), VOCAB, dtype=torch.float64)), options=small)
        for name in ("student_hidden", "student_weight"):
            yield f"{name} alone learns {strategy}", Problem(full(), learn=(name,), options=small)
        yield f"nothing learns {strategy}", Problem(full(), learn=(), options=measured)
        yield f"okd frozen heads {strategy}", Problem(full(), True, HIDDEN, small)
        yield f"ties {strategy}", Problem(tied(), options=measured)
        yield f"padded {strategy}", Problem(padded(), options={**measured, "vocab_size": 33})
        # with the rest of the vocabulary beyond the cut, the last rank of two, and the last two of three, have no row
        for online in (False, True):
            learn = okd.EVERYTHING if online else okd.OF_STUDENT
            few = {2: (25, 12), 3: (25, 2, 10)}
            cut = Problem(padded(), online, learn, {**measured, "vocab_size": 24}, few)
            yield f"{'okd ' * online}a rank without rows {strategy}", cut
        for name in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
            options = Options(name, ce_weight=0.5)
            rows = {
                "the first rank": slice(0, 5),
                "the second rank": slice(5, 25),
                "all but the first rank": slice(17, None),
                "some": slice(3, 30, 4),
            }
            for what, columns in rows.items():
                yield f"{name} {what} banned {strategy}", Problem(replace(banned(columns), options=options), options=measured)
            alone = replace(banned(slice(0, 17), ("teacher_bias",)), options=options)
            yield f"{name} the teacher bans the first rank {strategy}", Problem(alone, options=small)
            for value in (torch.nan, torch.inf):
                yield f"{name} student {value} {strategy}", Problem(replace(spoiled(value), options=options), options=small)
                teacher = replace(spoiled(value, "teacher_bias", 3), options=options)
                yield f"{name} teacher {value} {strategy}", Problem(teacher, options=small)
        small = {"strategy": strategy, "memory_budget": SMALL[torch.float32]}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for name in okd.MAIN:
                yield f"{name} {dtype} {strategy}", Problem(full(dtype, divergence=name), options=small)
            yield f"okd {dtype} {strategy}", Problem(full(dtype), True, okd.EVERYTHING, small)
        mixed = full(torch.float32)
        mixed = replace(mixed, student_hidden=mixed.student_hidden.bfloat16(), teacher_hidden=mixed.teacher_hidden.bfloat16())
        yield f"autocast {strategy}", Problem(mixed, options=small, autocast=True)
        other = replace(full(torch.float32), **{name: getattr(full(), name) for name in ("teacher_hidden", *HEADS[2:])})
        yield f"two dtypes {strategy}", Problem(other, options=small)
    yield "auto", Problem(full(torch.float32), options={"memory_budget": SMALL[torch.float32]})
    yield "okd auto", Problem(full(torch.float32), True, okd.EVERYTHING)


@cache
def problems() -> dict[str, Problem]:
    return dict(_problems())


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


class Products(InsideOperators):
    """Multiplications of a call, and their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("aten::mm", "aten::addmm"):
            left, right = args[-2:] if name == "aten::addmm" else args[:2]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]


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
    for reduction in okd.REDUCTIONS:
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
        with okd.Recorder() as recorder:
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


def fused_problems() -> dict[str, Problem]:
    case = full(torch.float32, divergence="forward_kl")
    # a label of the next rank must not be taken for a column beyond this one's
    case = replace(case, labels=torch.tensor([17, 18, 5, 6, 25, 26, 16, 36, 0]))
    few = {2: (30, 7), 3: (25, 5, 7)}
    return {
        "vocab": Problem(case, options={"strategy": "vocab", "memory_budget": SMALL[torch.float32]}),
        "auto": Problem(case, options={"return_metrics": True}),
        "tokens": Problem(replace(case, options=Options("jsd")), options={"strategy": "tokens", "memory_budget": 500}),
        "okd": Problem(case, True, okd.EVERYTHING, {"strategy": "vocab"}),
        "without rows": Problem(replace(case, labels=torch.arange(TOKENS)), options={"vocab_size": 25}, splits=few),
    }


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


def _other_labels(rank: int) -> dict[str, Any]:
    labels = full().labels
    assert labels is not None
    order = torch.arange(TOKENS)
    if rank == 1:  # the same labels at other tokens
        order[[4, 5]] = order[[5, 4]]
    return {"labels": labels[order]}


# What each rank does differently, and what the error of all of them says. Options of the call, or parts of the case.
REFUSED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "labels": (
        _other_labels,
        r"labels \(a checksum\) must be the same on every rank of process_group, got -?\d+ on ranks? 0.*; -?\d+ on rank 1",
    ),
    "no labels": (
        lambda rank: {"labels": None if rank else full().labels, "ce_weight": 0.0},
        "whether labels are given .* yes on rank 0; no",
    ),
    "weights": (
        lambda rank: {"token_weight": torch.ones(TOKENS).index_fill(0, torch.arange(2, rank + 3), 0.0)},
        "the number of tokens that labels and token_weight keep must be .* 7 on rank 0; 6",
    ),
    "as many weights": (
        lambda rank: {
            **{"labels": None, "ce_weight": 0.0, "reduction": "sum"},
            "token_weight": torch.ones(TOKENS).index_fill(0, torch.tensor(2 + min(rank, 1)), 0.0),
        },
        r"which tokens token_weight keeps \(a checksum\) must be .* on rank 0; ",
    ),
    "a frozen head": (
        lambda rank: {"learn": okd.OF_STUDENT if rank else ("student_hidden",)},
        "whether student_head requires grad must be .* no on rank 0; yes on rank",
    ),
    "a teacher's frozen head": (
        lambda rank: {"online": True, "learn": (*okd.OF_STUDENT, "teacher_hidden", *(["teacher_weight"] if rank else []))},
        "whether teacher_head requires grad must be .* no on rank 0; yes on rank",
    ),
    "values of weights": (
        lambda rank: {"token_weight": torch.full((TOKENS,), 1.0 + rank)},
        "what the mean divides by .* on rank 0; ",
    ),
    "temperature": (lambda rank: {"temperature": 1.0 + rank}, r"temperature must be .* 1\.0 on rank 0; 2\.0 on rank 1"),
    "divergence": (
        lambda rank: {"divergence": "jsd" if rank else "forward_kl"},
        "divergence must be .* forward_kl on rank 0; jsd on rank",
    ),
    "parameter": (lambda rank: {"divergence": kd.jsd(0.5 - rank / 8)}, r"divergence's parameter .* 0\.5 on rank 0; 0\.375 on"),
    "t": (lambda rank: {"t": torch.tensor(1.0 - rank / 8)}, r"t must be .* 1\.0 on rank 0; 0\.875 on rank 1"),
    "kd_weight": (lambda rank: {"kd_weight": 1.0 + rank}, "kd_weight .*must be the same"),
    "ce_weight": (lambda rank: {"ce_weight": 1.0 + rank}, "ce_weight must be the same"),
    "strategy": (lambda rank: {"strategy": STRATEGIES[min(rank, 1)]}, "strategy must be .* tokens on rank 0; vocab on rank"),
    "metrics": (lambda rank: {"return_metrics": rank == 0}, "whether metrics are asked for must be the same"),
    "vocab_size": (lambda rank: {"vocab_size": None if rank else 36}, "vocab_size must be .* 36 on rank 0; None on rank"),
    "softcap": (lambda rank: {"student_softcap": None if rank else 20.0}, "student_head.softcap .*must be the same"),
    "bias": (lambda rank: {} if rank else {"student_bias": None}, "whether student_head has a bias .* no on rank 0; yes on rank"),
    "tokens": (
        lambda rank: {"labels": None, "ce_weight": 0.0, "token_weight": None, **_fewer(rank, HIDDEN)},
        "the number of tokens in student_hidden .* 9 on rank 0; 8 on rank",
    ),
    "loss": (lambda rank: {"online": rank > 0}, "the loss must be .* linear_kd_loss on rank 0; linear_okd_loss on rank"),
    "one rank's own": (
        lambda rank: {"temperature": float(rank > 0)},
        "temperature is a positive number|rank 0 of process_group refused",
    ),
    "one rank's dtype": (
        lambda rank: {} if rank else {"student_hidden": full().student_hidden.float()},
        "must have one dtype|rank 0 of process_group refused",
    ),
    "misaligned": (
        lambda rank: _fewer(rank, ("teacher_weight", "teacher_bias")),
        "student_head has 37 rows and teacher_head 3[56].* pass vocab_size=",
    ),
    "misaligned under a cut": (
        lambda rank: {"vocab_size": 30, **_fewer(1 - rank, ("teacher_weight", "teacher_bias"))},
        r"split alike over process_group: of the vocabulary's 30 rows .*\(rank 0\), .*\(rank 1\)",
    ),
    "a cut that is too long": (lambda _: {"vocab_size": 38}, "vocab_size=38; accepted: 1 to 37, the rows that both heads have"),
    "a cut to nothing": (lambda _: {"vocab_size": 0}, "vocab_size=0; accepted: 1 to 37"),
    "a cut of no int64": (lambda _: {"vocab_size": 2**70}, "vocab_size=1180591620717411303424; accepted: 1 to the rows"),
    "the type of a cut": (lambda _: {"vocab_size": 3.0}, "vocab_size is an integer, got float"),
    "a label": (lambda _: {"labels": torch.full((TOKENS,), VOCAB)}, "labels holds 37; accepted: 0 to 36"),
    "the group's type": (
        lambda _: {"process_group": "world"},
        "process_group is a torch.distributed.ProcessGroup or None, got str",
    ),
}


def _fewer(rank: int, names: tuple[str, ...]) -> dict[str, Any]:
    """A row less of these on the other ranks than the first."""
    return {"without": names if rank == 1 or (rank > 1 and names == HIDDEN) else ()}


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
    torch.set_num_threads(1)
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

from tests.parallel.test_ranks import work

work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """[size][rank]: what the processes found."""
    found = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", START, str(rank), str(size), str(folder)],
                env={**os.environ, **shared, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for rank in range(size)
        ]
        try:
            assert [process.wait(timeout=240) for process in started] == [0] * size
        finally:
            for process in started:
                process.kill()
        found[size] = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return found


def whole(found: list[Found]) -> Found:
    """The ranks' results side by side: gradients of heads are of their own rows."""
    return {name: torch.cat([one[name] for one in found]) if name in HEADS else value for name, value in found[0].items()}


def share_of(problem: Problem) -> float:
    """What rounding, and regrouping the sums over a vocabulary, can change of a result's largest entry."""
    dtypes = [getattr(problem.case, name).dtype for name in ("student_hidden", "student_weight", *HIDDEN[1:], "teacher_weight")]
    dtypes += [torch.bfloat16] * problem.autocast
    return VOCAB * max(torch.finfo(dtype).eps for dtype in dtypes)


def differences(found: Found, right: Found, share: float) -> list[str]:
    """What of it is not within that share of its largest finite entry (losses, in nats: of 1 at least), or has another dtype,
    shape, NaN or infinity."""
    wrong = [] if set(found) == set(right) else [f"{sorted(found)} instead of {sorted(right)}"]
    for name in set(found) & set(right):
        largest = right[name].double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if right[name].numel() else 0.0
        if name not in okd.EVERYTHING:
            largest = max(largest, 1.0)
        try:
            torch.testing.assert_close(found[name], right[name], rtol=0, atol=share * largest, equal_nan=True)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    return wrong


sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    """Every problem in one process."""
    return {name: problem.run() for name, problem in problems().items()}


class TestAsOneProcess:
    @sizes
    def test_losses_metrics_and_gradients(self, size: int, ranks: Any, alone: dict[str, Found]) -> None:
        wrong = {
            name: found
            for name, problem in problems().items()
            if (found := differences(whole([rank[name] for rank in ranks[size]]), alone[name], share_of(problem)))
        }
        assert not wrong, "\n".join(f"{name}: {'; '.join(texts)}" for name, texts in wrong.items())

    @sizes
    def test_all_ranks_have_the_same_bit_for_bit(self, size: int, ranks: Any) -> None:
        for name in problems():
            first, *rest = ({key: value for key, value in rank[name].items() if key not in HEADS} for rank in ranks[size])
            for other in rest:
                for key, value in first.items():
                    torch.testing.assert_close(other[key], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: {key}")

    def test_problems_are_what_they_are_called(self, alone: dict[str, Found]) -> None:
        """A test of equality proves nothing of results that are all NaN or 0."""
        for name, found in alone.items():
            spoiled = any(word in name for word in ("nan", "inf"))
            nothing = any(word in name for word in ("masked", "no tokens"))
            for part in ("loss", "student", "teacher", *okd.EVERYTHING):
                if part in found and not (spoiled and part in okd.EVERYTHING):
                    assert found[part].isfinite().all() != spoiled, (name, part)
                    assert (found[part] != 0).any() != nothing, (name, part)
        assert alone["ties tokens"]["agreement"] == pytest.approx((TOKENS - 1) / TOKENS)

    @sizes
    def test_rows_beyond_the_cut_take_no_gradient(self, size: int, ranks: Any) -> None:
        for strategy in STRATEGIES:
            found = whole([rank[f"okd a rank without rows {strategy}"] for rank in ranks[size]])
            for name in HEADS:
                assert (found[name][24:] == 0).all()
                assert (found[name][:24] != 0).any()


@pytest.mark.parametrize("first", [True, False])
def test_the_largest_entry_of_a_block_with_nan_is_found_wherever_it_is(first: bool) -> None:
    """A maximum over ranks may lose NaN, or not: that must decide about nothing."""
    x, z = torch.tensor([[[1.0, torch.nan, 2.0]], [[3.0, 5.0, 4.0]]], dtype=torch.float64)
    parts = [
        reference.block_stats(side, side, None, None, None, torch.ones(()), 1.0, [1.0, 0.0, 1.0, 0.0], "", False, True)
        for side in ((x, z) if first else (z, x))
    ]
    parts[1][:, [STATS_COLUMNS.index(name) for name in ("argmax_x", "argmax_z")]] += 3
    whole = dict(zip(STATS_COLUMNS, merged(torch.stack(parts), "")[0].tolist(), strict=True))
    assert whole["max_x"] == whole["max_z_T"] == torch.inf
    assert math.isnan(whole["log_sum_x"])
    assert math.isnan(whole["log_sum_z_T"])
    assert whole["argmax_x"] == whole["argmax_z"] == (1 if first else 4)


class TestAgainstTheFormulas:
    @sizes
    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("name", kd.divergences())
    def test_in_float64(self, name: str, strategy: str, size: int, ranks: Any) -> None:
        """Against autograd over the plain formulas, which share no code with the library."""
        one = f"{name} mean {strategy}"
        exact = problems()[one].case.plain()
        found = whole([rank[one] for rank in ranks[size]])
        assert not differences(found, {key: exact[key] for key in found}, VOCAB * torch.finfo(torch.float64).eps)
        both = f"okd {name} mean {strategy}"
        exact = _online(problems()[both].case, torch.float64)
        found = whole([rank[both] for rank in ranks[size]])
        expected = {key: exact[key] for key in found}
        assert not differences(found, expected, VOCAB * torch.finfo(torch.float64).eps)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_as_close_as_eager(self, dtype: torch.dtype, ranks: Any) -> None:
        compared = {}
        for size in SIZES:
            for strategy in STRATEGIES:
                for divergence in okd.MAIN:
                    name = f"{divergence} {dtype} {strategy}"
                    case = problems()[name].case
                    found = whole([rank[name] for rank in ranks[size]])
                    compared[name, size] = ratios([found], [case.plain(dtype)], [case.plain()])
        assert_as_good_as_eager(compared)


def _online(case: Case, dtype: torch.dtype) -> Found:
    exact = okd.plain(case, 0.5, dtype)
    return {**{who: exact[who]["loss"] for who in exact}, **exact["student"], **exact["teacher"]}


class TestCost:
    @sizes
    def test_a_rank_multiplies_what_one_process_would_with_its_rows(self, size: int, ranks: Any) -> None:
        """3 Us + Ut, however many chunks; 5 Us + 3 Ut for blocks and two forward sweeps."""
        student, teacher = 2 * 8, 2 * 12
        for rank in ranks[size]:
            assert rank["products"] == {"tokens": 3 * student + teacher, "vocab": 5 * student + 3 * teacher}

    @sizes
    def test_collectives(self, size: int, ranks: Any) -> None:
        table = ("SUM", (size, 64), torch.int64)
        kept = TOKENS - 2
        largest, added = ("MAX", (kept, 4), torch.float64), ("SUM", (kept, 7), torch.float64)
        places, sums = ("MIN", (kept, 2), torch.float64), ("SUM", (kept, 5), torch.float64)
        hidden = ("SUM", (kept, 8), torch.float32)
        for rank in ranks[size]:
            for strategy in STRATEGIES:
                seen = {name.rpartition(" ")[0]: of for name, of in rank["collectives"].items() if name.endswith(strategy)}
                assert seen["one sweep"] == [table, largest, added, hidden]
                assert seen["frozen"] == [table, largest, added]
                assert seen["metrics"] == [table, largest, added, places, sums, hidden]
                assert seen["masked"] == [table]

    @sizes
    def test_every_rank_has_as_many_chunks_as_the_one_with_most_rows(self, size: int, ranks: Any) -> None:
        per_row = max(SPLITS[size]) * column_bytes(torch.float32, torch.float32, torch.device("cpu"))
        most = SMALL[torch.float32] // per_row
        assert 1 <= most < TOKENS - 2
        for rank in ranks[size]:
            seen = [shape[0] for how, shape, _ in rank["collectives"]["small tokens"] if how == "MAX"]
            assert sum(seen) == TOKENS - 2
            assert max(seen) <= most
            assert rank["collectives"] == ranks[size][0]["collectives"]


@sizes
def test_backward_twice_and_two_runs_give_the_same(size: int, ranks: Any) -> None:
    assert all(rank["twice"] for rank in ranks[size])


@sizes
def test_compiled_without_a_break(size: int, ranks: Any) -> None:
    for rank in ranks[size]:
        assert rank["compiled"]["graphs"] == 1
        for eager, found in zip(rank["compiled"]["eager"], rank["compiled"]["compiled"], strict=True):
            for one, other in zip(eager, found, strict=True):
                torch.testing.assert_close(other, one, rtol=2 * torch.finfo(one.dtype).eps, atol=1e-7)


@sizes
def test_operators_keep_the_contracts_of_their_library(size: int, ranks: Any) -> None:
    assert all(rank["checked"] for rank in ranks[size])


@sizes
def test_kernels_that_multiply_themselves(size: int, ranks: Any) -> None:
    for name, problem in fused_problems().items():
        found = whole([rank["fused"][name] for rank in ranks[size]])
        assert not differences(found, problem.run(), VOCAB * torch.finfo(torch.float32).eps), name


@sizes
def test_ranks_outside_of_the_group_take_no_part(size: int, ranks: Any) -> None:
    right = Problem(full()).run()
    *others, last = (rank["part_of_the_world"] for rank in ranks[size])
    for found in (last["found"], whole([other["found"] for other in others])):
        assert not differences(found, right, share_of(Problem(full())))
    assert {found["error"] for found in (*others, last)} == {
        "this rank is not in process_group; call the loss on the group's ranks only"
    }


class TestRefusals:
    @sizes
    @pytest.mark.parametrize("name", REFUSED)
    def test_every_rank_raises_and_says_what_is_wrong(self, name: str, size: int, ranks: Any) -> None:
        said = [rank["refusals"][name] for rank in ranks[size]]
        for kind, text in said:
            assert re.search(REFUSED[name][1], text), text
            assert kind == "TypeError" if re.search("one dtype|is a tensor|got str|got float", text) else "ValueError"
        if not name.startswith("one rank's"):
            assert len(set(said)) == 1

    @sizes
    def test_what_one_rank_cannot_even_place(self, size: int, ranks: Any) -> None:
        for name, said in {
            "one rank's tensors": ("TypeError", "student_hidden is a tensor, got list"),
            "one rank's device": (
                "ValueError",
                "process_group serves no tensors on cpu, where student_hidden is; its backend is gloo",
            ),
        }.items():
            first, *rest = (rank["refusals"][name] for rank in ranks[size])
            assert first == said
            for other in rest:
                assert other[1].startswith("rank 0 of process_group refused the input")

    @sizes
    def test_afterwards_the_ranks_go_on_together(self, size: int, ranks: Any) -> None:
        assert all(rank["refusals"]["afterwards"] == ("", "True") for rank in ranks[size])

    def test_without_torch_distributed(self) -> None:
        for online in (False, True):
            with pytest.raises(ValueError, match=r"torch\.distributed is not initialised; call init_process_group first"):
                Problem(full(), online).run(process_group=object())
            with (
                mock.patch("torch.distributed.is_available", return_value=False),
                pytest.raises(ValueError, match=r"torch\.distributed is not"),
            ):
                Problem(full(), online).run(process_group=object())
