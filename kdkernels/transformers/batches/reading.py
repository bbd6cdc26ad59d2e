"""What a model takes of a batch: the columns that its forward reads, how it numbers positions, and how long a sequence may be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from kdkernels.transformers.batches.layout import BOUNDARIES
from kdkernels.transformers.families import families_of
from kdkernels.transformers.heads import unwrapped

POSITIONS = re.compile("rotary|position|wpe")  # in the names of what makes a token's place known to a model


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
    if any(family.own_positions for family in families_of(str(getattr(config, "model_type", "")))):
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
