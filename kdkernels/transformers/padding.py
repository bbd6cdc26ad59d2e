"""Heads of different height, as padded vocabularies have them: Qwen2.5-0.5B's has 151,936 rows, Qwen2.5-7B's 152,064."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kdkernels.transformers.heads import lm_head, unwrapped
from kdkernels.transformers.vocabularies import shared_vocabulary, token_ids

logger = logging.getLogger(__name__)


def shared_rows(student: Any, teacher: Any, student_tokenizer: Any = None, teacher_tokenizer: Any = None) -> int:
    """``vocab_size`` for a loss of these two models, as ``KDTrainer`` takes it: the rows that both heads have, or the leading ids
    that mean the same to both tokenizers, where one of these has tokens behind them.

    Rows behind all tokens, alike in both heads, stay: a student has to learn that they mean nothing. student, teacher: as for
    ``lm_head``. Where a tokenizer is not given, the one saved with its model is looked for; without both, one warning says that the
    tokens were not compared. Raises ValueError as ``lm_head`` does, and where the tokenizers disagree.
    """
    rows = [lm_head(model).weight.shape[0] for model in (student, teacher)]
    given = (student_tokenizer, student), (teacher_tokenizer, teacher)
    ours, theirs = (tokenizer_of(model) if tokenizer is None else tokenizer for tokenizer, model in given)
    if ours is None or theirs is None:
        logger.warning("The vocabularies of teacher and student were not compared: give shared_rows both tokenizers.")
        return min(rows)
    agreed = shared_vocabulary(ours, theirs)
    last = max(*token_ids(ours, "student_tokenizer").values(), *token_ids(theirs, "teacher_tokenizer").values())
    return min(*rows, agreed) if agreed <= last else min(rows)


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
