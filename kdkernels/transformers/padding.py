"""Heads of different height, as padded vocabularies have them: Qwen2.5-0.5B's has 151,936 rows, Qwen2.5-7B's 152,064."""

from __future__ import annotations

from typing import Any

from kdkernels.transformers.heads import lm_head
from kdkernels.transformers.vocabularies import shared_vocabulary


def shared_rows(student: Any, teacher: Any, student_tokenizer: Any, teacher_tokenizer: Any) -> int:
    """``vocab_size`` for a loss of these two models, as ``KDTrainer`` takes it: the rows that both heads have, or the leading ids
    that mean the same to both tokenizers, where one of these has tokens behind them.

    Rows behind all tokens, alike in both heads, stay: a student has to learn that they mean nothing. student, teacher: as for
    ``lm_head``. Raises ValueError as ``lm_head`` does, and where the tokenizers disagree.
    """
    rows = [lm_head(model).weight.shape[0] for model in (student, teacher)]
    agreed = shared_vocabulary(student_tokenizer, teacher_tokenizer)
    last = max(number for tokenizer in (student_tokenizer, teacher_tokenizer) for number in tokenizer.get_vocab().values())
    return min(*rows, agreed) if agreed <= last else min(rows)
