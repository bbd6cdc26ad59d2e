"""Which rows of a step count, and whether what is known of them is in range."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# So many slots are looked at together.
SLOTS = 2**22
# The k tokens that an offline teacher kept of each row and their log-probabilities, [N, K] each, -inf where a slot is not used, and
# the log-probability of all others, [N], where it is known.
Known = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Kept:
    """Which rows of a step are worked on.

    rows: their indices, None for all. counts: [N], which of them count; None where all that are worked on do. right: 0-dim, whether
    their labels and tokens are in range; None where they are.
    """

    rows: Tensor | None = None
    counts: Tensor | None = None
    right: Tensor | None = None

    def weights(self, token_weight: Tensor | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Token weights [N]: 0 for rows that do not count, NaN for the others where they are not right."""
        found = torch.ones(tokens, dtype=dtype, device=device) if token_weight is None else token_weight.to(dtype)
        if self.right is not None:
            found = found.where(self.right, torch.nan)
        return found if self.counts is None else found.where(self.counts, 0.0)


def kept_rows(
    labels: Tensor | None, weight: Tensor | None, ignore_index: int, vocab: int, known: Known | None = None, check: bool = True
) -> Kept:
    """The rows that count. Raises ValueError if a label of theirs, or a token that the teacher kept for them, is out of range, or
    if it kept one twice.

    On a GPU this is the call's one host sync. Without ``check`` there is none, and all rows are worked on.
    """
    if labels is None and weight is None and known is None:
        return Kept()
    keep, labelled = keep_of(labels, weight, ignore_index)
    if keep is None:
        assert known is not None
        keep = torch.ones_like(known[0][:, 0], dtype=torch.bool)
    if keep.numel() == 0:
        return Kept()
    # (fact, what it has to be below)
    facts = [] if labels is None or labelled is None else _facts_of_labels(labels.where(labelled, 0), vocab)
    if known is not None:
        facts += _facts_of_slots(keep, *known[:2], vocab)
    if not check:
        right = [fact < bound for fact, bound in facts]
        return Kept(counts=keep, right=torch.stack(right).all() if right else None)
    count, *found = torch.stack([keep.sum(), *(fact for fact, _ in facts)]).tolist()
    if labels is not None:
        largest, below, *found = found
        check_labels(largest, -below, vocab, ignore_index)
    if known is not None:
        largest, below, twice = found
        if largest >= vocab or below > 0:
            wrong = largest if largest >= vocab else -below
            raise ValueError(
                f"topk_ids holds {wrong}; accepted: 0 to {vocab - 1}, or anything where topk_logprobs is -inf (an unused slot)"
            )
        if twice >= 0:
            raise ValueError(
                f"topk_ids holds {twice} twice in one row; accepted: distinct tokens in each row, and topk_logprobs of -inf for "
                "slots that are not used"
            )
    return Kept(places(keep, count))


def keep_of(labels: Tensor | None, weight: Tensor | None, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """[N] bool, None for all: rows that count, and rows whose label is not ignored."""
    keep = None if weight is None else weight != 0
    if labels is None:
        return keep, None
    labelled = labels != ignore_index
    return labelled if keep is None else keep & labelled, labelled


def check_labels(largest: int, least: int, vocab: int, ignore_index: int) -> None:
    if largest >= vocab or least < 0:
        wrong = largest if largest >= vocab else least
        raise ValueError(f"labels holds {wrong}; accepted: 0 to {vocab - 1}, or ignore_index={ignore_index}")


def places(keep: Tensor, count: int) -> Tensor | None:
    return None if count == keep.numel() else torch.nonzero_static(keep, size=count)[:, 0]


def _facts_of_labels(counted: Tensor, vocab: int) -> list[tuple[Tensor, int]]:
    """The largest, and the negative of the least."""
    return [(counted.max(), vocab), (-counted.min(), 1)]


def _facts_of_slots(keep: Tensor, ids: Tensor, log_probs: Tensor, vocab: int) -> list[tuple[Tensor, int]]:
    """The largest token of the used slots of kept rows, the negative of the least, and one that a row holds twice (-1 if none)."""
    # Slots that are not used get numbers of their own, which no token has.
    alone = -2 - torch.arange(ids.shape[1], device=ids.device)
    found = []
    for rows in zip(*(part.split(max(1, SLOTS // ids.shape[1])) for part in (keep, ids, log_probs)), strict=True):
        used = rows[0][:, None] & (rows[2] != -torch.inf)
        counted, ordered = rows[1].where(used, 0), rows[1].where(used, alone).sort(1).values
        twice = ordered[:, :-1].where(ordered[:, 1:] == ordered[:, :-1], -1).amax() if len(alone) > 1 else counted.new_full((), -1)
        found.append(torch.stack([counted.amax(), -counted.amin(), twice]))
    return list(zip(torch.stack(found).amax(0).unbind(), (vocab, 1, 0), strict=True))


def checksum(counted: Tensor, labelled: Tensor) -> Tensor:
    """Of labels and which of them are ignored; it tells orders apart."""
    # An odd factor loses no bits; the shift brings the upper ones down, so that sums of labels do not add up to the same.
    mixed = (counted + labelled) * 0x2545F4914F6CDD1D
    return ((mixed ^ (mixed >> 29)) * (2 * torch.arange(len(mixed), device=mixed.device) + 1)).sum()
