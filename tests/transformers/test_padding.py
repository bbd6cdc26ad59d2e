"""``shared_rows``: what a loop of one's own cuts both heads to is what the Trainer does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from kdkernels.transformers import KDConfig, KDTrainer, shared_rows
from tests.support.tiny_models import build


def words(letter: str, count: int) -> Any:
    vocabulary = {f"{letter}{number}": number for number in range(count)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary)))


# rows of both heads, tokens of both tokenizers, what is compared
CASES = {
    "alike": ((61, 61), (61, 61), 61),
    "both padded alike": ((64, 64), (61, 61), 64),
    "the teacher's padded": ((61, 64), (61, 61), 61),
    "the student's padded": ((72, 64), (61, 61), 64),
    "the teacher has more tokens": ((64, 64), (59, 61), 59),
    "the student has more tokens, and is padded": ((72, 64), (61, 59), 59),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rows_are_those_that_the_trainer_compares(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, tokens, expected = CASES[name]
    student, teacher = (build("llama", vocab_size=count, seed=seed) for seed, count in enumerate(rows))
    ours, theirs = (words("w", count) for count in tokens)
    assert shared_rows(student, teacher, ours, theirs) == expected
    options = KDConfig(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no")
    trainer = KDTrainer(student, options, processing_class=ours, teacher=teacher, teacher_processing_class=theirs)
    assert (trainer.vocab_size or rows[0]) == expected


def test_tokenizers_that_disagree_are_refused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="no token in common"):
        shared_rows(model, model, words("w", 61), words("v", 61))


def test_tokenizers_are_looked_for_beside_the_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = build("llama", vocab_size=72), build("llama", vocab_size=64)
    assert shared_rows(student, teacher) == 64
    assert [record.message for record in caplog.records] == [
        "The vocabularies of teacher and student were not compared: give shared_rows both tokenizers."
    ]
    caplog.clear()
    for name, model, count in (("student", student, 61), ("teacher", teacher, 59)):
        words("w", count).save_pretrained(tmp_path / name)
        model.config._name_or_path = str(tmp_path / name)
    assert shared_rows(student, teacher) == 59
    assert shared_rows(student, teacher, teacher_tokenizer=words("w", 60)) == 60
    assert all("more tokens than the teacher's" in record.message for record in caplog.records)  # they were compared
