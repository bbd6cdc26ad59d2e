"""What a batch says, by one rule for every path: which tokens are real, where documents begin, which positions count, and what
the models take of it.

A position counts where a label stands behind it, its own token and the next one are real (the attention mask is 1 there), and the
next one does not begin another document. A document begins at a row's first token and wherever position_ids do not rise.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels.transformers.heads import unwrapped

logger = logging.getLogger(__name__)

IGNORED = -100  # a label that does not count
# What says where the documents of a row lie, for kernels that do not read it from position_ids.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# The mask of a batch whose documents position_ids tell apart: not for the models, who would then see one document.
PADDING = "padding_mask"
TARGETS = ("topk_ids", "topk_logprobs", "topk_rest")  # of a cached teacher
LAYOUT = ("input_ids", "attention_mask", PADDING, "labels", "shift_labels", "position_ids", *BOUNDARIES)
LOOKED_AT = 10_000  # examples of a data set that are looked at before training; the others are when they come
GROUP = 64  # of them in a batch
POSITIONS = re.compile("rotary|position|wpe")  # in the names of what makes a token's place known to a model


# ---- what is real, and what counts ----


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
    dropped = [PADDING] + ["position_ids"] * _says_nothing("position_ids", batch.get("position_ids"), batch)
    return {name: value for name, value in batch.items() if name not in dropped}


def _inner_beginnings(batch: Mapping[str, Any]) -> Tensor:
    """(B, S) bool: where a document begins right behind another."""
    real = real_tokens(batch)
    return F.pad((beginnings(batch) & real)[:, 1:] & real[:, :-1], (1, 0))


# ---- what a model takes ----


def takes(model: Any) -> frozenset[str]:
    """Names of what the model's forward reads. What it only swallows as further keyword arguments is not among them."""
    base = unwrapped(model)
    classes: tuple[Any, ...] = type(base), type(getattr(base, "base_model", base))
    return _parameters(*classes)


@lru_cache(maxsize=64)
def _parameters(*classes: type) -> frozenset[str]:
    names: set[str] = set()
    # A forward of **kwargs hands them on: to that of the class above, and to the model below the head.
    known = [one for cls in classes for one in cls.__mro__ if "forward" in vars(one) and one is not nn.Module]
    for one in known:
        parameters = inspect.signature(vars(one)["forward"]).parameters.values()
        names |= {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)} - {"self"}
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            return frozenset(names)
    return frozenset({*names, *BOUNDARIES})


def numbers_positions(model: Any) -> bool:
    """Whether the model numbers its tokens 0, 1, 2, ... from a row's start, unless it is given position_ids that say otherwise."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    if "position_ids" not in takes(model) or getattr(config, "is_encoder_decoder", False):
        return False
    if getattr(config, "model_type", None) in ("opt", "paligemma"):  # by the mask; from 1
        return False
    own = getattr(type(base), "_prepare_position_ids_for_generation", None)
    if own is not None and own.__module__ != "transformers.generation.utils":  # rotary embeddings in three dimensions
        return False
    # RoBERTa and its kin number from the padding's id on, and find the padding themselves.
    return not any(hasattr(module, "create_position_ids_from_input_ids") for module in base.modules())


def most_positions(model: Any) -> int | None:
    """How many tokens a sequence may have by the model's configuration; None where nothing bounds it (ALiBi, recurrence)."""
    base = unwrapped(model)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1 or getattr(text, "alibi", False):
        return None
    named = (name for part in (base.named_modules(), base.named_buffers(), base.named_parameters()) for name, _ in part)
    if not any(POSITIONS.search(name.rpartition(".")[2] or name) or ".wpe" in name for name in named):
        return None
    kinds = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for kind in (kinds, *(one for one in kinds.values() if isinstance(one, Mapping))):
        if kind.get("rope_type", kind.get("type")) == "dynamic":
            return None
        factor, original = kind.get("factor"), kind.get("original_max_position_embeddings")
        if isinstance(factor, (int, float)) and isinstance(original, int):
            found = max(found, int(factor * original))
    return found


@dataclass(frozen=True)
class Limits:
    """What sequences both models can read.

    tokens: how many ids are accepted (None: any), and of whom. positions: the longest sequence, and whose it is.
    """

    tokens: int | None = None
    of_whom: str = ""
    positions: int | None = None
    whose: str = ""

    @classmethod
    def of(cls, models: Mapping[str, Any], shared: int | None = None) -> Limits:
        """models: by the name of the argument. shared: how many ids mean the same to both tokenizers, if known."""
        tokens = [(shared, "the tokens that both models know")] if shared is not None else []
        positions = []
        for name, model in models.items():
            base = unwrapped(model)
            embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
            rows = getattr(embeddings, "num_embeddings", None)
            if isinstance(rows, int):
                tokens.append((rows, f"the embeddings of the {name} ({type(base).__name__})"))
            if (most := most_positions(model)) is not None:
                positions.append((most, f"the {name} ({type(base).__name__})"))
        return cls(*min(tokens, default=(None, "")), *min(positions, default=(None, "")))

    def check(self, what: str, low: int, high: int, length: int, accepted: str = "") -> None:
        """what: has the tokens low to high, length of them in a sequence. accepted: the way out for a long one, with its {}."""
        if low < 0 or (self.tokens is not None and high >= self.tokens):
            most = "any" if self.tokens is None else f"0 to {self.tokens - 1}, {self.of_whom}"
            raise ValueError(f"{what} the token {low if low < 0 else high}; accepted: {most}")
        if self.positions is not None and length > self.positions:
            accepted = accepted or "up to {}, or a larger max_position_embeddings in the configuration of a model that can take it"
            raise ValueError(
                f"{what} {length:,} tokens in a sequence, and {self.whose} takes {self.positions:,}; accepted: "
                f"{accepted.format(self.positions)}"
            )


# ---- a batch for two models ----


@dataclass
class Inputs:
    """Makes of a collated batch what both models read, or refuses it.

    readers: by the name of the argument, the class of a model and what its forward takes. limits: of tokens and positions.

    A column that both take is passed on. One that neither takes is left out and named once where it is about whole examples (a
    text, a number), and where it says nothing (token_type_ids of 0, position_ids that count from 0); any other is refused, and so
    is one that only one of the two takes. Raises ValueError with the column, the models, and what is accepted.
    """

    readers: Mapping[str, tuple[str, frozenset[str]]]
    limits: Limits = Limits()
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
            elif (
                name == "position_ids" and len(taking) < len(self.readers) and not told_apart and _says_nothing(name, value, batch)
            ):
                kept[name] = value  # for the model that takes it
            elif value is None:
                continue
            elif len(taking) == len(self.readers):
                kept[name] = _tensors(name, value)
            elif _says_nothing(name, value, batch) or (not taking and _about_examples(value)):
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


def _about_examples(value: Any) -> bool:
    """A text, a number, and other things that are no input of a model."""
    if isinstance(value, Tensor):
        return value.dim() < 2 or not value.numel()
    return not (isinstance(value, Sequence) and any(isinstance(one, Tensor) and one.dim() and one.numel() for one in value))


def _says_nothing(name: str, value: Any, batch: Mapping[str, Any]) -> bool:
    if not isinstance(value, Tensor):
        return False
    if name == "token_type_ids":
        return not value.any()
    real = real_tokens(batch)
    return name == "position_ids" and value.shape == real.shape and bool((value == positions_of(real))[real].all())


def _tensors(name: str, value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(one, Tensor) or one is None for one in value):
        shapes = ", ".join("none" if one is None else str(tuple(one.shape)) for one in value[:4])
        raise ValueError(
            f"the column {name} has entries of several shapes ({shapes}{', ...' if len(value) > 4 else ''}); accepted: one shape "
            "in all of a batch, a number for each token, or a data_collator of your own"
        )
    return value


# ---- a data set, before anything is done with it ----


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
