"""Examples to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.transformers.batches.layout import IGNORED


class Collator:
    """Examples to a batch: input_ids, attention_mask and labels, int64 (B, S), padded on the right to the longest of them.

    pad_token_id: stands in input_ids at padding, where attention_mask is 0 and labels are -100; what it is does not matter then,
        and None is 0.
    An example has "input_ids", and may have "labels" (else they are the ids, where the mask is not 0) and "attention_mask" (else
    all 1), of the same length. Further columns go along: numbers of the length of input_ids padded with 0, others stacked where
    they have one shape (as transformers' default_data_collator does), and as a list where they have not, or are no numbers. Where
    no example has a token, one of padding stands for each. Raises ValueError where lengths differ and for an empty batch.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not batch:
            raise ValueError("a batch has at least one example, got none")
        rows = [self._row(example) for example in batch]
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        made: dict[str, Any] = {name: _padded([row[name] for row in rows], value) for name, value in padding.items()}
        for name in dict.fromkeys(name for example in batch for name in example if name not in padding):
            values = [_numbers(example.get(name)) for example in batch]
            if all(value is None for value in values):
                continue
            if not all(isinstance(value, Tensor) for value in values):
                made[name] = values
            elif all(value.dim() and value.shape[:1] == row["input_ids"].shape for value, row in zip(values, rows, strict=True)):
                made[name] = _padded(values, 0) if len({value.shape[1:] for value in values}) == 1 else values
            else:
                made[name] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
        return made

    def _row(self, example: Mapping[str, Any]) -> dict[str, Tensor]:
        if not isinstance(example, Mapping):
            raise ValueError(f"an example is a mapping with input_ids, got {type(example).__name__}")
        if example.get("input_ids") is None:
            raise ValueError(f"an example has no input_ids; it has {', '.join(map(str, example)) or 'nothing'}")
        ids = torch.as_tensor(example["input_ids"], dtype=torch.int64)
        mask, labels = example.get("attention_mask"), example.get("labels")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        mask = mask.long() if mask.dtype == torch.bool else mask
        labels = ids.where(mask != 0, IGNORED) if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if not ids.shape == mask.shape == labels.shape or ids.dim() != 1:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("attention_mask", mask), ("labels", labels)))
            raise ValueError(f"an example's lists have one length: input_ids {tuple(ids.shape)}, {shapes}")
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _padded(values: list[Tensor], value: float) -> Tensor:
    made = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)
    # models take no sequence of no tokens
    return made if made.shape[1] else made.new_full((len(values), 1, *made.shape[2:]), value)


def _numbers(value: Any) -> Any:
    """A tensor, where there is one to be made."""
    if value is None or isinstance(value, (str, bytes, Mapping, Tensor)):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value
