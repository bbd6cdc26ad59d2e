"""Heads of different height, as padded vocabularies have them: Qwen2.5-0.5B's has 151,936 rows, Qwen2.5-7B's 152,064."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdkernels.transformers.heads import lm_head, unwrapped
from kdkernels.transformers.vocabularies import compare, real_tokens, token_ids

logger = logging.getLogger(__name__)


class Common(NamedTuple):
    """rows: how many rows of both heads a loss compares. agreed: how many leading ids mean the same to both tokenizers, None where
    they were not compared. notes: what a person should know of the rest, in sentences."""

    rows: int
    agreed: int | None
    notes: tuple[str, ...]


def common_rows(heads: Sequence[int], tokenizers: Sequence[Any], names: Sequence[str], vocab_size: int | None = None) -> Common:
    """What student and teacher have in common, by the heights of their heads and their tokenizers, in that order.

    Compared are the rows that both heads have, or the leading ids that mean the same to both tokenizers, where one of these has
    tokens behind them. Rows behind all tokens, alike in both heads, stay: a student has to learn that they mean nothing. names: of
    the arguments that the tokenizers are, for errors; a tokenizer may be None. vocab_size: these rows instead, as for ``compare``.

    Raises ValueError where the tokenizers disagree, and TypeError where one is none.
    """
    rows = min(heads)
    if any(tokenizer is None for tokenizer in tokenizers):
        return Common(rows if vocab_size is None else vocab_size, None, ())
    student, teacher = tokenizers
    agreed, notes = compare(student, teacher, vocab_size)
    ours, theirs = token_ids(student, names[0]), token_ids(teacher, names[1])
    if vocab_size is not None:
        return Common(vocab_size, agreed, notes)
    without = real_tokens(student, {token: at for token, at in ours.items() if rows <= at < agreed})
    if without:
        notes += (
            f"both tokenizers have {agreed:,} tokens, of which student and teacher have {heads[0]:,} and {heads[1]:,} rows: the "
            f"loss leaves out {len(without):,} tokens from {without[0][1]!r} ({without[0][0]}) on",
        )
    last = max(*ours.values(), *theirs.values())
    return Common(min(rows, agreed) if agreed <= last else rows, agreed, notes)


def shared_rows(student: Any, teacher: Any, student_tokenizer: Any = None, teacher_tokenizer: Any = None) -> int:
    """``vocab_size`` for a loss of these two models, as ``KDTrainer`` takes it: the rows that both heads have, or the leading ids
    that mean the same to both tokenizers, where one of these has tokens behind them.

    student, teacher: as for ``lm_head``. Rows behind all tokens, alike in both heads, stay. Where a tokenizer is not given, the one
    saved with its model is looked for; without both, one warning says that the tokens were not compared. Raises
    ValueError as ``lm_head`` does, and where the tokenizers disagree.
    """
    heads = [lm_head(model).weight.shape[0] for model in (student, teacher)]
    given = (student_tokenizer, student), (teacher_tokenizer, teacher)
    tokenizers = [tokenizer_of(model) if tokenizer is None else tokenizer for tokenizer, model in given]
    found = common_rows(heads, tokenizers, ("student_tokenizer", "teacher_tokenizer"))
    if found.agreed is None:
        logger.warning("The vocabularies of teacher and student were not compared: give shared_rows both tokenizers.")
    for note in found.notes:
        logger.warning(note)
    return found.rows


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that lies beside the model's weights, or None."""
    return tokenizer_at(getattr(getattr(unwrapped(model), "config", None), "_name_or_path", ""))


def tokenizer_at(place: str | Path) -> Any:
    """A folder, or the name of what was downloaded before; None where there is no tokenizer."""
    from transformers import AutoTokenizer

    if not str(place):
        return None
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None
