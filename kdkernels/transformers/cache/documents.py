"""The examples of a cache as documents, and the key by which each is found again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels.transformers.batches.inputs import Inputs
from kdkernels.transformers.batches.layout import IGNORED, documents
from kdkernels.transformers.data import Collator

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """ids: (L,) int64. counts: (L,) uint8, 1 where the token counts. further: columns that the teacher reads."""

    ids: Tensor
    counts: Tensor
    further: dict[str, Tensor]


class Reader:
    """The examples, checked as they are read, and taken apart where they hold several documents."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], inputs: Inputs) -> None:
        if len(examples) == 0:
            raise ValueError("examples is empty; accepted: at least one example")
        self.examples, self.inputs, self.collate = examples, inputs, Collator(None)
        self.places: list[tuple[int, int]] = []  # of each document: its example, and which one of that it is

    def survey(self) -> Iterator[Document]:
        """All documents, in the order in which ``read`` then numbers them."""
        for example in range(len(self.examples)):
            found = self._documents(example)
            self.places += [(example, one) for one in range(len(found))]
            yield from found

    def read(self, document: int) -> Document:
        example, one = self.places[document]
        return self._documents(example)[one]

    def _documents(self, place: int) -> list[Document]:
        example, name = self.examples[place], f"examples[{place}]"
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise TypeError(f'{name} is {{"input_ids": ..., "labels": ...}}, got {type(example).__name__} without input_ids')
        ids = token_ids(example["input_ids"], f"{name} input_ids")
        if len(ids) == 0:
            raise ValueError(f"{name} has no tokens; accepted: at least one")
        labels = ids if example.get("labels") is None else token_ids(example["labels"], f"{name} labels")
        if labels.shape != ids.shape:
            raise ValueError(f"{name} has {len(ids)} tokens and {len(labels)} labels; accepted: as many")
        mask = torch.ones_like(ids)
        if example.get("attention_mask") is not None:
            mask = token_ids(example["attention_mask"], f"{name} attention_mask")
            if mask.shape != ids.shape or not mask.any():
                held = f"{len(mask)} entries, {int(mask.count_nonzero())} of them not 0"
                raise ValueError(f"{name} attention_mask has {held}; accepted: {len(ids)}, at least one of them not 0")
        try:
            batch = self.inputs(
                self.collate([{**example, "input_ids": ids, "labels": labels, "attention_mask": mask}]), f"{name} holds"
            )
            found = documents(batch)
        except ValueError as error:
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error
        labels = batch["labels"][0]
        wrong = ((labels != IGNORED) & (labels != ids)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(f"{name} has the label {labels[at]} at token {ids[at]}; accepted: the token itself, or {IGNORED}")
        return [Document(ids[places], (labels[places] != IGNORED).to(torch.uint8), further) for _, places, further in found]


class Survey(NamedTuple):
    """What is known of the examples before the teacher runs. keys, lengths: (examples,) int64. digest: of all that is read.
    columns: names of further ones."""

    keys: Tensor
    lengths: Tensor
    digest: str
    columns: list[str]


def survey_of(reader: Reader) -> Survey:
    everything = hashlib.blake2b(digest_size=16)
    keys, lengths, learned = [], [], False
    columns: set[str] = set()
    for ids, counts, further in reader.survey():
        keys.append(key_of(ids, further))
        lengths.append(len(ids))
        columns.update(further)
        learned = learned or bool(counts[1:].any())
        everything.update(len(ids).to_bytes(8, "little") + _bytes(ids) + counts.numpy().tobytes() + _further_bytes(further))
    if not learned:
        logger.warning("No token of the examples counts: a student has nothing to learn from them unless it is given other labels.")
    return Survey(torch.tensor(keys), torch.tensor(lengths), everything.hexdigest(), sorted(columns))


def token_ids(value: Any, name: str) -> Tensor:
    """(L,) int64 on the CPU."""
    try:
        found = value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a sequence of integers, got {type(value).__name__}: {error}") from error
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.dim() != 1 or not (integers or len(found) == 0):
        raise TypeError(f"{name} is a sequence of integers, got shape {tuple(found.shape)}, {found.dtype}")
    return found.to(torch.int64)


def _bytes(ids: Tensor) -> bytes:
    return ids.numpy().astype("<i8").tobytes()


def _further_bytes(further: Mapping[str, Tensor]) -> bytes:
    """Of numbers as they are, whatever integers or floats they came as."""
    parts = []
    for name, value in sorted(further.items()):
        plain = value.to(torch.float64 if value.is_floating_point() else torch.int64).contiguous()
        parts.append(f"{name} {tuple(value.shape)}".encode() + plain.numpy().tobytes())
    return b"".join(parts)


def key_of(ids: Tensor, further: Mapping[str, Tensor]) -> int:
    """A signed number of 64 bits. Two examples may share one: whoever looks one up compares the tokens."""
    digest = hashlib.blake2b(_bytes(ids) + _further_bytes(further), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
