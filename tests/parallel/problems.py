"""Problems whose vocabulary is spread over processes, and calls that every rank has to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from tests.support import okd
from tests.support.cases import (
    MAIN,
    REDUCTIONS,
    Case,
    draw,
    dressed,
    keywords,
)
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
        options = {**keywords(self.case.options), "token_weight": self.case.token_weight, **self.options, **more}
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
            for reduction in REDUCTIONS:
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
            for name in MAIN:
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
