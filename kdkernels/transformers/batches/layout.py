"""What a batch says, by one rule for every path: which tokens are real, where documents begin, and which positions count.

A position counts where a label stands behind it, its own token and the next one are real (the attention mask is 1 there), and the
next one does not begin another document. A document begins at a row's first token and wherever position_ids do not rise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that does not count
# What says where the documents of a row lie, for kernels that do not read it from position_ids.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# The mask of a batch whose documents position_ids tell apart: not for the models, who would then see one document.
PADDING = "padding_mask"
TARGETS = ("topk_ids", "topk_logprobs", "topk_rest")  # of a cached teacher
LAYOUT = ("input_ids", "attention_mask", PADDING, "labels", "shift_labels", "position_ids", *BOUNDARIES)


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """(B, S) bool. Of a mask (B, heads, S, S) a token is real where it may attend to itself."""
    mask: Tensor | None = batch.get(PADDING, batch.get("attention_mask"))
    if mask is None:
        return torch.ones_like(_tokens(batch), dtype=torch.bool)
    return mask != 0 if mask.dim() == 2 else _allowed(mask).diagonal(dim1=1, dim2=2)


def beginnings(batch: Mapping[str, Any]) -> Tensor:
    """(B, S) bool: where a document begins."""
    tokens = _tokens(batch)
    inside = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if positions is not None and positions.shape == tokens.shape:
        inside = positions[:, 1:] > positions[:, :-1]
    if mask is not None and mask.dim() == 4:
        inside = inside & _allowed(mask).diagonal(-1, dim1=1, dim2=2)
    return F.pad(~inside, (1, 0), value=True)


def next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """The token to predict at each position (B, S), -100 where it does not count.

    batch: {"input_ids", "attention_mask", "position_ids", "labels"}, the labels (B, S) as transformers has them, one for each
    input token, or "shift_labels", one for each position.
    """
    shifted: Tensor | None = batch.get("shift_labels")
    if shifted is None:
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    real = real_tokens(batch)
    counts = real[:, :-1] & real[:, 1:] & ~beginnings(batch)[:, 1:]
    return shifted.where(F.pad(counts, (0, 1)), IGNORED)


def positions_of(mask: Tensor) -> Tensor:
    """mask (B, S), 0 at padding -> position_ids (B, S): 0, 1, 2, ... over the real tokens, going on over padding at the end."""
    real = mask != 0
    behind = real.flip(-1).cummax(-1).values.flip(-1)  # whether a real token stands here or later
    return (torch.arange(mask.shape[-1], device=mask.device) - (behind & ~real).cumsum(-1)).clamp(min=0)


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """Something of shape (B, S)."""
    found: Tensor = next(batch[name] for name in ("input_ids", "labels", "shift_labels") if batch.get(name) is not None)
    return found


def _allowed(mask: Tensor) -> Tensor:
    """A mask (B, heads, S, S), of truth values or added to scores -> (B, S, S): may a head look from here to there?"""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.any(1)


# ---- one layout for all ----


class Prepared(dict[str, Any]):
    """A batch that has been through ``Inputs``."""


def laid_out(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its documents told in one way: by position_ids that restart and no attention_mask, as transformers reads it.

    attention_mask: (B, S), 1 (or True) where a token is real and 0 at padding; or numbers from 1 on that change from document to
        document; or (B, heads, S, S), as it is given to the attention, which is left as it is.
    position_ids: (B, S), which restart where a document begins; others (of rotary embeddings in three dimensions) are left alone.
    Where there are none, cu_seq_lens_q (of one row) or seq_idx say the same.

    Labels of padding, and of tokens that begin a document of several, become -100. Raises ValueError for masks and positions of
    another form, and where the two disagree.
    """
    made = dict(batch)
    if made.get("input_ids") is None or made["input_ids"].dim() != 2:
        return made
    shape, mask, positions = made["input_ids"].shape, made.get("attention_mask"), made.get("position_ids")
    if mask is not None:
        _check_mask(mask, shape)
        if mask.dim() == 4:
            return made
    real = real_tokens(made)
    begins = _told_otherwise(made)
    if positions is None and begins is not None:
        positions = _from_beginnings(begins)
    if positions is not None and positions.shape == (1, shape[1]):
        positions = positions.expand(shape)
    if positions is None or positions.shape != shape:
        return _without_padding_labels(made, real)
    made["position_ids"] = positions
    together, step = real[:, 1:] & real[:, :-1], positions.diff(dim=-1)
    if begins is not None and bool((begins[:, 1:] & together & (step > 0)).any()):
        raise ValueError("position_ids run on where attention_mask, cu_seq_lens_q or seq_idx begin a document; accepted: a restart")
    if not bool((together & (step <= 0)).any()):
        if mask is None and bool((step != 1).any()):  # else transformers would take a gap for the end of a document
            made["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=positions.device)
        return _without_padding_labels(made, real)
    if bool((together & (step > 1)).any()):
        raise ValueError("position_ids both restart and skip, which transformers cannot tell apart; accepted: 0, 1, 2, ... each")
    made["position_ids"] = positions.where(real, 0)  # each padding token is a document of its own
    made[PADDING] = real.long()
    made.pop("attention_mask", None)
    if made.get("labels") is not None:
        before = F.pad(together & (step > 0), (1, 0))
        made["labels"] = made["labels"].where(before, IGNORED)
    return made


def _without_padding_labels(made: dict[str, Any], real: Tensor) -> dict[str, Any]:
    if made.get("labels") is not None:
        made["labels"] = made["labels"].where(real, IGNORED)
    return made


def _check_mask(mask: Any, shape: torch.Size) -> None:
    accepted = f"{tuple(shape)}, 1 at real tokens and 0 at padding, or {(shape[0], 1, shape[1], shape[1])}"
    if not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; accepted: a tensor {accepted}")
    if mask.shape != shape and not (mask.dim() == 4 and mask.shape[0] in (1, shape[0]) and mask.shape[2:] == (shape[1],) * 2):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; accepted: {accepted}")
    if mask.dim() == 2 and (bool((mask < 0).any()) or bool((mask != mask.long()).any())):
        held = f"{float(mask.min()):g} to {float(mask.max()):g}"
        raise ValueError(f"attention_mask holds {held}; accepted: {accepted}, or numbers of documents from 1")


def _told_otherwise(batch: Mapping[str, Any]) -> Tensor | None:
    """(B, S) bool, where documents begin by what says it besides position_ids; None where nothing does."""
    tokens, mask = batch["input_ids"], batch.get("attention_mask")
    numbers = batch.get("seq_idx")
    if numbers is None and mask is not None and mask.dtype != torch.bool and bool((mask > 1).any()):
        numbers = mask
    if numbers is not None and numbers.shape == tokens.shape:
        return F.pad(numbers.diff(dim=-1) != 0, (1, 0), value=True)
    ends = batch.get("cu_seq_lens_q")
    if ends is None:
        return None
    if len(tokens) != 1 or int(ends[-1]) != tokens.shape[1]:
        raise ValueError(
            f"cu_seq_lens_q ends at {int(ends[-1])}, input_ids has shape {tuple(tokens.shape)}; accepted: one row of all"
        )
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[0, ends[:-1].long()] = True
    return begins


def _from_beginnings(begins: Tensor) -> Tensor:
    """(B, S) bool -> position_ids (B, S) that count from each of them."""
    place = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    return place - place.where(begins, 0).cummax(-1).values


def documents(batch: Mapping[str, Any]) -> list[tuple[int, Tensor, dict[str, Tensor]]]:
    """The documents of a batch that is ``laid_out``: row, places of the real tokens (n,), and what further columns say of it.

    Of a further column (B, S) that are its values at those places, of another its row. Position ids that count 0, 1, 2, ... say
    nothing further.
    """
    rows, real, begins = batch["input_ids"].cpu(), real_tokens(batch).cpu(), _inner_beginnings(batch).cpu()
    further = {name: value.cpu() for name, value in batch.items() if name not in LAYOUT or name == "position_ids"}
    for name, value in further.items():
        if value.dim() == 0 or len(value) != len(rows):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, which is not one entry for each of {len(rows)} rows: a cache cannot tell "
                "to which example it belongs; accepted: the default data_collator, or the teacher itself"
            )
    of_tokens = {name for name, value in further.items() if value.shape == rows.shape}
    if bool(begins.any()) and len(of_tokens) < len(further):
        raise ValueError(
            f"{', '.join(further.keys() - of_tokens)}: several documents in a row go with columns of one entry for each token only"
        )
    found = []
    for row in range(len(rows)):
        ends = [*begins[row].nonzero().flatten().tolist(), rows.shape[1]]
        for first, end in zip([0, *ends], ends, strict=False):
            places = first + real[row, first:end].nonzero().flatten()
            held = {name: value[row, places] if name in of_tokens else value[row] for name, value in further.items()}
            if "position_ids" in held and torch.equal(held["position_ids"], torch.arange(len(places))):
                del held["position_ids"]
            found.append((row, places, held))
    return [one for one in found if len(one[1])]


def document_numbers(batch: Mapping[str, Any]) -> Tensor:
    """(B, S): of which document of the batch, from 0, a token is."""
    begins = F.pad(_inner_beginnings(batch)[:, 1:], (1, 0), value=True)
    return begins.flatten().cumsum(0).view(begins.shape) - 1


def plain(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without position_ids that count 0, 1, 2, ... over its real tokens, and without the mask of one that has others."""
    dropped = [PADDING] + ["position_ids"] * says_nothing("position_ids", batch.get("position_ids"), batch)
    return {name: value for name, value in batch.items() if name not in dropped}


def _inner_beginnings(batch: Mapping[str, Any]) -> Tensor:
    """(B, S) bool: where a document begins right behind another."""
    real = real_tokens(batch)
    return F.pad((beginnings(batch) & real)[:, 1:] & real[:, :-1], (1, 0))


def says_nothing(name: str, value: Any, batch: Mapping[str, Any]) -> bool:
    """Whether a column says no more than a model assumes without it."""
    if not isinstance(value, Tensor):
        return False
    if name == "token_type_ids":
        return not value.any()
    real = real_tokens(batch)
    return name == "position_ids" and value.shape == real.shape and bool((value == positions_of(real))[real].all())
