"""Ranks that share a vocabulary: what they say to each other, and how they check that they were asked for the same.

Each rank of a torch.distributed group holds some consecutive rows of both heads, and works on these columns of the logits alone.
What a row of logits needs of the other ranks is a few numbers, merged by all-reduce; engine states how. ``ALONE`` stands for one
process: then every collective is the identity, and there is one statement of what is merged.

A collective that not all ranks take part in waits for ever. So before anything else all ranks exchange one table of numbers, and
everything that decides about later collectives is read from it. Where they disagree, each raises the same error; a rank whose own
input is refused before that says so in the same table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.scalars import vocabulary

# Numbers of a rank in the table. A rank that refuses its own input does not know how many the others have to say.
COLUMNS = 64
# Which loss the ranks call, for a rank that calls another one.
LOSSES = ("linear_kd_loss", "linear_okd_loss")
# The first columns: whether the rank refuses its own input, its rows of both heads, its memory budget.
_REFUSES, _STUDENT_ROWS, _TEACHER_ROWS, _BUDGET, _SAME = range(5)
# No option is that large, and as the bits of a number it is -0.0.
_NONE = -(2**63)


def group_name(process_group: Any) -> str:
    """The name of the group, by which an operator takes it; "" for None. Raises TypeError and ValueError."""
    if process_group is None:
        return ""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            "process_group is given, but torch.distributed is not initialised; call init_process_group first, or pass None"
        )
    if isinstance(process_group, torch.distributed.ProcessGroup):
        return str(process_group.group_name)
    if isinstance(process_group, int) and process_group == torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this rank is not in process_group; call the loss on the group's ranks only")
    raise TypeError(
        f"process_group is a torch.distributed.ProcessGroup or None, got {type(process_group).__name__}; of a DeviceMesh pass "
        "mesh.get_group(name)"
    )


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on every rank.

    name: as the caller knows it. value: a number, None, or a 0-dim tensor that is read with the table. words: what an integer
    stands for.
    """

    name: str
    value: int | float | Tensor | None
    words: tuple[str, ...] = ()

    def code(self) -> Any:
        """As an integer; the bits of a number that is none."""
        if isinstance(self.value, Tensor):
            return self.value.double().view(torch.int64) if self.value.is_floating_point() else self.value.to(torch.int64)
        if isinstance(self.value, float):
            return struct.unpack("<q", struct.pack("<d", self.value))[0]
        return _NONE if self.value is None else int(self.value)

    def text(self, code: int) -> str:
        if code == _NONE:
            return "None"
        if self.words:
            return self.words[code]
        exact = isinstance(self.value, float) or (isinstance(self.value, Tensor) and self.value.is_floating_point())
        return str(struct.unpack("<d", struct.pack("<q", code))[0] if exact else code)


def whether(name: str, value: bool) -> Fact:
    return Fact(f"whether {name}", int(value), ("no", "yes"))


def one_of(name: str, word: str, words: Sequence[str]) -> Fact:
    return Fact(name, list(words).index(word), tuple(words))


@dataclass(frozen=True)
class Ranks:
    """The ranks that the vocabulary is split over.

    group: None for one process. begin: the place of this rank's first row in the whole vocabulary. widest: the most rows, after the
    cut to the vocabulary, that one of them holds.
    """

    group: Any = None
    begin: int = 0
    widest: int = 0

    @property
    def alone(self) -> bool:
        return self.group is None

    def max(self, tensor: Tensor) -> Tensor:
        """Entry by entry over the ranks, in place where ``tensor`` is contiguous. NaN may be lost."""
        return self._reduced(tensor, "MAX")

    def min(self, tensor: Tensor) -> Tensor:
        """As ``max``."""
        return self._reduced(tensor, "MIN")

    def sum(self, tensor: Tensor) -> Tensor:
        """As ``max``, and NaN comes through."""
        return self._reduced(tensor, "SUM")

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        if self.group is None:
            return tensor
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how), group=self.group)
        return tensor


ALONE = Ranks()


def _resolved(name: str) -> Any:
    c10d: Any = torch.distributed.distributed_c10d
    return c10d._resolve_process_group(name)


def _exchanged(group: Any, own: Sequence[Any], device: torch.device) -> list[list[int]]:
    """The table, [rank][column]; numbers that are tensors come last in ``own``. On a GPU this is the call's one host sync."""
    numbers = [number for number in own if not isinstance(number, Tensor)]
    row = torch.zeros(COLUMNS, dtype=torch.int64, device="cpu")
    row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    row = row.to(device, non_blocking=True)
    if len(numbers) < len(own):
        row[len(numbers) : len(own)] = torch.stack(list(own[len(numbers) :]))
    table = row.new_zeros((group.size(), COLUMNS))
    table[group.rank()] = row
    torch.distributed.all_reduce(table, group=group)
    read: list[list[int]] = table.tolist()
    return read


def _refuse(group: Any, devices: Sequence[torch.device]) -> None:
    """Tells the other ranks, which wait in ``agree``. devices: of this rank's tensors; the table is on the first that serves."""
    candidates = [*devices, torch.device("cpu"), *group._device_types]
    _exchanged(group, [1], next(device for device in candidates if _serves(group, device)))


def _serves(group: Any, device: torch.device) -> bool:
    return device.type in {one.type for one in group._device_types}


@contextmanager
def told(name: str, *arguments: Any) -> Iterator[None]:
    """Where the checks inside refuse this rank's input, the other ranks of the group learn of it. arguments: some that may be
    tensors."""
    try:
        yield
    except (TypeError, ValueError):
        if name:
            _refuse(_resolved(name), [one.device for one in arguments if isinstance(one, Tensor)])
        raise


def _by_rank(texts: Sequence[str]) -> str:
    """Such as: 1.0 on ranks 0, 2; 2.0 on rank 1."""
    where: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        where.setdefault(text, []).append(str(rank))
    return "; ".join(f"{text} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" for text, ranks in where.items())


class Agreed(NamedTuple):
    """What the ranks came to.

    vocab: rows of the whole vocabulary; held: how many of them this rank holds. budget: the least of the ranks'. codes: of the
    facts.
    """

    ranks: Ranks
    vocab: int
    held: int
    budget: int
    codes: list[int]


def agree(
    name: str, device: torch.device, rows: tuple[int, int], vocab_size: int | None, budget: int, same: Sequence[Fact]
) -> Agreed:
    """All ranks exchange what they were called with; raises the same ValueError on each where they may not go on together.

    name: of the group. rows: this rank's rows of both heads. vocab_size: of the whole vocabulary, None for all rows. budget: bytes
    of scratch. same: facts that must be alike; those whose value is a tensor come last.
    """
    group = _resolved(name)
    if not _serves(group, device):
        _refuse(group, [])
        raise ValueError(
            f"process_group serves no tensors on {device.type}, where student_hidden is; its backend is "
            f"{torch.distributed.get_backend(group)}"
        )
    table = _exchanged(group, [0, *rows, budget, *(fact.code() for fact in same)], device)
    if refusing := [rank for rank, row in enumerate(table) if row[_REFUSES]]:
        raise ValueError(
            f"rank{'s' * (len(refusing) > 1)} {', '.join(map(str, refusing))} of process_group refused the input, and the error "
            "raised there says why; all ranks must call the loss with the same options"
        )
    for column, fact in enumerate(same, _SAME):
        codes = [row[column] for row in table]
        if len(set(codes)) > 1:
            raise ValueError(
                f"{fact.name} must be the same on every rank of process_group, got {_by_rank([fact.text(code) for code in codes])}"
            )
    student_rows, teacher_rows = ([row[column] for row in table] for column in (_STUDENT_ROWS, _TEACHER_ROWS))
    vocab = vocabulary(sum(student_rows), sum(teacher_rows), vocab_size)
    student, teacher = _cut(student_rows, vocab), _cut(teacher_rows, vocab)
    if student != teacher:
        held = [
            f"{one[0]}:{one[1]} and {other[0]}:{other[1]} (rank {rank})"
            for rank, (one, other) in enumerate(zip(student, teacher, strict=True))
        ]
        raise ValueError(
            "student_head and teacher_head must be split alike over process_group: of the vocabulary's "
            f"{vocab} rows the ranks hold {', '.join(held)}"
        )
    begin, end = student[group.rank()]
    widest = max(last - first for first, last in student)
    budget = min(row[_BUDGET] for row in table)
    return Agreed(Ranks(group, begin, widest), vocab, end - begin, budget, table[0][_SAME : _SAME + len(same)])


def _cut(rows: Sequence[int], vocab: int) -> list[tuple[int, int]]:
    """The places of each rank's rows in the vocabulary, without those beyond it."""
    ends = [sum(rows[: rank + 1]) for rank in range(len(rows))]
    return [(min(end - count, vocab), min(end, vocab)) for end, count in zip(ends, rows, strict=True)]
