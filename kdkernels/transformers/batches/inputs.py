"""One batch for two models: what both read of it, and a data set held against that before anything is done with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdkernels.transformers.batches.layout import (
    BOUNDARIES,
    IGNORED,
    LAYOUT,
    PADDING,
    TARGETS,
    Prepared,
    laid_out,
    next_tokens,
    positions_of,
    real_tokens,
    says_nothing,
)
from kdkernels.transformers.batches.reading import Limits, takes
from kdkernels.transformers.heads import unwrapped

logger = logging.getLogger(__name__)

LOOKED_AT = 10_000  # examples of a data set that are looked at before training; the others are when they come
GROUP = 64  # of them in a batch


@dataclass
class Inputs:
    """Makes of a collated batch what both models read, or refuses it.

    readers: by the name of the argument, the class of a model and what its forward takes. limits: of tokens and positions.

    A column that both take is passed on. One that neither takes is left out and named once where it is about whole examples (a
    text, a number), and where it says nothing (token_type_ids of 0, position_ids that count from 0); any other is refused, and so
    is one that only one of the two takes. Raises ValueError with the column, the models, and what is accepted.
    """

    readers: Mapping[str, tuple[str, frozenset[str]]]
    limits: Limits = field(default_factory=Limits)
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, models: Mapping[str, Any], shared: int | None = None) -> Inputs:
        readers = {name: (type(unwrapped(model)).__name__, takes(model)) for name, model in models.items()}
        return cls(readers, Limits.of(models, shared))

    def __call__(self, batch: Mapping[str, Any], what: str = "the batch has") -> Prepared:
        made = Prepared(self._columns(laid_out(batch)))
        ids = made.get("input_ids")
        if ids is None or ids.dim() != 2 or not ids.numel():
            return made
        real = real_tokens(made)
        if (~real).any() and self.limits.tokens is not None:  # padding may be the id of one tokenizer only
            made["input_ids"] = ids = ids.where(real | ((ids >= 0) & (ids < self.limits.tokens)), 0)
        positions = made.get("position_ids")
        if positions is None or positions.shape != ids.shape:
            positions = positions_of(real)
        self.limits.check(what, int(ids.min()), int(ids.max()), int(positions.max()) + 1)
        return made

    def readable(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a prepared batch by which a cache finds its examples."""
        return {name: value for name, value in batch.items() if name not in ("labels", "shift_labels", *BOUNDARIES)}

    def to(self, name: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a prepared batch that is for the forward of one of the models."""
        taken = self.readers[name][1]
        own = ("position_ids", *BOUNDARIES)  # without them, a model that has no positions is told nothing less
        return {key: value for key, value in batch.items() if key != PADDING and (key not in own or key in taken)}

    def _columns(self, batch: dict[str, Any]) -> dict[str, Any]:
        told_apart = PADDING in batch
        kept, dropped = {}, []
        for name, value in batch.items():
            taking = [reader for reader, (_, taken) in self.readers.items() if name in taken]
            if name in (*LAYOUT, *TARGETS) and name != "position_ids":
                kept[name] = value
            elif name == "position_ids" and len(taking) < len(self.readers) and not told_apart and says_nothing(name, value, batch):
                kept[name] = value  # for the model that takes it
            elif value is None:
                continue
            elif len(taking) == len(self.readers):
                kept[name] = _tensors(name, value)
            elif says_nothing(name, value, batch) or (not taking and _about_examples(value)):
                dropped.append(name)
            else:
                raise ValueError(self._refused(name, value, taking))
        self._say(dropped)
        return kept

    def _refused(self, name: str, value: Any, taking: Sequence[str]) -> str:
        classes = {reader: f"the {reader} ({cls})" for reader, (cls, _) in self.readers.items()}
        does = "do" if len(self.readers) - len(taking) > 1 else "does"
        lacking = [words for reader, words in classes.items() if reader not in taking]
        given = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        common = frozenset.intersection(*(taken for _, taken in self.readers.values()))
        accepted = [one for one in ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids") if one in common]
        also = f", though {' and '.join(classes[reader] for reader in taking)} does" if taking else ""
        return (
            f"the column {name} ({given}) would be ignored: {' and '.join(lacking)} {does} not take it{also}; accepted: what "
            f"{'both take' if len(classes) > 1 else 'it takes'} ({', '.join(accepted)}, ...), or data without it"
        )

    def _say(self, dropped: Iterable[str]) -> None:
        new = [name for name in dropped if name not in self.said]
        if not new:
            return
        self.said.update(new)
        worker = torch.utils.data.get_worker_info()
        if worker is None or worker.id == 0:
            names = " and ".join(cls for cls, _ in self.readers.values())
            logger.warning("Columns of the data that %s do not take are left out: %s.", names, ", ".join(new))


class Collated:
    """A collator whose batches are what both models read, and carry a cached teacher's log-probabilities.

    cache: a TopKCache, or None.
    """

    def __init__(self, collator: Callable[[Any], Any], inputs: Inputs, cache: Any) -> None:
        self.collator, self.inputs, self.cache = collator, inputs, cache

    def __call__(self, features: Any) -> Prepared:
        return self.prepared(self.collator(features))

    def prepared(self, batch: Mapping[str, Any]) -> Prepared:
        if isinstance(batch, Prepared):
            return batch
        made = self.inputs(batch)
        if self.cache is not None and "topk_ids" not in made:
            made.update(self.cache.batch(**self.inputs.readable(made)))
        return made


def _about_examples(value: Any) -> bool:
    """A text, a number, and other things that are no input of a model."""
    if isinstance(value, Tensor):
        return value.dim() < 2 or not value.numel()
    return not (isinstance(value, Sequence) and any(isinstance(one, Tensor) and one.dim() and one.numel() for one in value))


def _tensors(name: str, value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(one, Tensor) or one is None for one in value):
        shapes = ", ".join("none" if one is None else str(tuple(one.shape)) for one in value[:4])
        raise ValueError(
            f"the column {name} has entries of several shapes ({shapes}{', ...' if len(value) > 4 else ''}); accepted: one shape "
            "in all of a batch, a number for each token, or a data_collator of your own"
        )
    return value


def looked_at(dataset: Any) -> Sequence[int]:
    """Numbers of the first LOOKED_AT examples of a data set that is a list in memory or a Dataset of datasets; of another one none,
    as reading may cost much or draw random numbers."""
    if not isinstance(dataset, (list, tuple)):
        formatted: Any = getattr(dataset, "format", None)
        if (
            not (type(dataset).__module__.startswith("datasets.") and isinstance(formatted, Mapping))
            or formatted["type"] == "custom"
        ):
            return []
    return range(min(len(dataset), LOOKED_AT))


def check_examples(
    name: str, dataset: Any, numbers: Sequence[int], collate: Callable[[list[Any]], Mapping[str, Any]], inputs: Inputs
) -> bool:
    """Hold examples of a data set, collated, against what the models read; whether one of them has a token to learn.

    Raises ValueError as ``inputs`` does, with the name of the data set and the number of the example.
    """
    learns = False
    for first in range(0, len(numbers), GROUP):
        group = [dataset[number] for number in numbers[first : first + GROUP]]
        try:
            batches = [inputs(collate(group))]
        except ValueError:
            batches = [_checked(f"{name}[{number}]", one, collate, inputs) for number, one in enumerate(group, first)]
        learns = learns or any(bool((next_tokens(batch) != IGNORED).any()) for batch in batches)
    return learns


def _checked(where: str, example: Any, collate: Callable[[list[Any]], Mapping[str, Any]], inputs: Inputs) -> Prepared:
    try:
        return inputs(collate([example]), "it has")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
