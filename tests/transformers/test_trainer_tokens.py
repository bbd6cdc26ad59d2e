"""Tokenizers and heads of the trainer's two models that are not the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from kdkernels.transformers import write_cache
from tests.support.tiny_models import VOCAB, build
from tests.support.training import WORDS, examples, models, trainer, word_tokenizer


def test_padded_vocabularies_are_cut_without_being_told(tmp_path: Path) -> None:
    run = trainer(tmp_path, teacher=build("llama", seed=1, vocab_size=VOCAB + 19).float(), max_steps=1)
    assert run.vocab_size == VOCAB
    run.train()


def test_a_padding_token_that_only_the_student_has_reaches_no_teacher(tmp_path: Path) -> None:
    ours = word_tokenizer()
    ours.pad_token = WORDS[-1]
    teacher = build("llama", seed=1, vocab_size=VOCAB - 1).float()
    data = [{**one, "input_ids": [min(token, VOCAB - 2) for token in one["input_ids"]]} for one in examples()]
    data = [{**one, "labels": [min(label, VOCAB - 2) for label in one["labels"]]} for one in data]
    for name, fraction in (("data", 0.0), ("written", 1.0)):
        run = trainer(
            tmp_path / name,
            teacher=teacher,
            train_dataset=data,
            processing_class=ours,
            teacher_processing_class=word_tokenizer(WORDS[:-1]),
            on_policy_fraction=fraction,
            on_policy_max_new_tokens=4,
        )
        assert run.vocab_size == VOCAB - 1
        run.train()


def test_students_write_no_token_that_no_tokenizer_has(tmp_path: Path) -> None:
    """Both heads are padded, by different numbers of rows."""
    words = WORDS[:-11]
    run = trainer(
        tmp_path,
        teacher=build("llama", seed=1, vocab_size=VOCAB + 3).float(),
        train_dataset=[{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}] * 16,
        processing_class=word_tokenizer(words),
        teacher_processing_class=word_tokenizer(words),
        on_policy_fraction=1.0,
        on_policy_max_new_tokens=12,
        on_policy_temperature=4.0,
    )
    assert run.vocab_size == VOCAB
    batches, _ = run.get_batch_samples(iter(run.get_train_dataloader()), 4, torch.device("cpu"))
    written = torch.cat([batch["input_ids"][batch["labels"] != -100] for batch in batches])
    assert len(written) > 50
    assert int(written.max()) < len(words)


def test_tokenizers_that_number_tokens_differently_are_refused(tmp_path: Path) -> None:
    """Of one size, with one pair of tokens exchanged; whether they are given, lie beside the model or in the cache."""
    ours, theirs = word_tokenizer(), word_tokenizer([*WORDS[:7], WORDS[8], WORDS[7], *WORDS[9:]])
    _, teacher = models(torch.float32)
    message = "disagree on 2 of their tokens, the first: 'w7' is 7 in the student's and 8 in the teacher's"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, processing_class=ours, teacher_processing_class=theirs)
    trainer(tmp_path, processing_class=ours, teacher_processing_class=word_tokenizer())

    teacher.save_pretrained(tmp_path / "teacher")
    theirs.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher=str(tmp_path / "teacher"), processing_class=ours)
    write_cache(teacher, examples(4), tmp_path / "cache", top_k=4)
    theirs.save_pretrained(tmp_path / "cache" / "tokenizer")
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, teacher=tmp_path / "cache", processing_class=ours)


def test_a_token_that_only_the_student_has_is_cut_and_padding_alike_in_both_is_not(tmp_path: Path) -> None:
    theirs = word_tokenizer(WORDS[:-5])
    for count, expected in ((VOCAB, VOCAB - 5), (VOCAB - 5, None)):
        ours = word_tokenizer(WORDS[:count])
        run = trainer(tmp_path, train_dataset=None, processing_class=ours, teacher_processing_class=theirs)
        assert run.vocab_size == expected


def test_renamed_tokens_are_trained_with_a_vocab_size_over_both_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a live teacher and with a cached one; the loss is that of the same tokenizer on both sides."""
    ours, theirs = word_tokenizer(), word_tokenizer([*WORDS[:-2], "<|User|>", "<|Bot|>"])
    _, teacher = models(torch.float32)
    cache = write_cache(teacher, examples(4), tmp_path / "cache", top_k=4).folder
    theirs.save_pretrained(cache / "tokenizer")
    for one, given in ((teacher, theirs), (cache, None)):
        tokenizers = {"processing_class": ours, "teacher_processing_class": given}
        with pytest.raises(ValueError, match=r"disagree on 4 .*; or vocab_size \(--vocab-size\): 61 takes .* and 59 leaves"):
            trainer(tmp_path, teacher=one, **tokenizers)
        caplog.clear()
        renamed = trainer(tmp_path, teacher=one, eval_dataset=examples(4), vocab_size=VOCAB, **tokenizers)
        assert [record.message for record in caplog.records] == [
            "vocab_size=61 takes 2 tokens of student and teacher for one another that have other names: 59 is 'w59' in the "
            "student's and '<|User|>' in the teacher's, 60 is 'w60' in the student's and '<|Bot|>' in the teacher's"
        ]
        (tmp_path / "cache" / "tokenizer").rename(tmp_path / "away")
        same = trainer(tmp_path, teacher=one, eval_dataset=examples(4), processing_class=ours)
        (tmp_path / "away").rename(tmp_path / "cache" / "tokenizer")
        assert renamed.evaluate()["eval_loss"] == same.evaluate()["eval_loss"]


@pytest.mark.parametrize("cached", [False, True])
def test_words_that_the_teacher_has_more_are_named_when_the_heads_are_cut(
    cached: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"w{number}" for number in range(VOCAB + 500)]
    teacher = build("llama", seed=1, vocab_size=len(words)).float()
    one: Any = write_cache(teacher, examples(4), tmp_path / "cache", top_k=4) if cached else teacher
    for count, said in (
        (VOCAB, "the teacher's tokenizer has 500 more tokens than the student's, behind the 61 of both: 'w61' (61), "),
        (
            len(words),
            "both tokenizers have 561 tokens, of which student and teacher have 61 and 561 rows: the loss leaves out 500 ",
        ),
    ):
        caplog.clear()
        tokenizers = {"processing_class": word_tokenizer(words[:count]), "teacher_processing_class": word_tokenizer(words)}
        assert trainer(tmp_path, teacher=one, **tokenizers).vocab_size == VOCAB
        (record,) = caplog.records
        assert record.message.startswith(said)
        caplog.clear()
        assert trainer(tmp_path, teacher=one, vocab_size=VOCAB, **tokenizers).vocab_size == VOCAB
        assert not caplog.records


def test_a_processor_stands_for_its_tokenizer(tmp_path: Path) -> None:
    class Processor(transformers.ProcessorMixin):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def save_pretrained(self, folder: str, **_: Any) -> None:
            self.tokenizer.save_pretrained(folder)

    ours = word_tokenizer(WORDS[:-4])
    ours.eos_token = WORDS[9]
    run = trainer(
        tmp_path,
        train_dataset=[{"input_ids": [token % 50 for token in one["input_ids"]]} for one in examples()],  # that both know
        processing_class=Processor(ours),
        teacher_processing_class=Processor(word_tokenizer()),
        on_policy_fraction=1.0,
        on_policy_max_new_tokens=4,
        max_steps=1,
    )
    assert run.vocab_size == VOCAB - 4
    assert run.on_policy is not None
    assert 9 in run.on_policy.ends
    run.train()
    run.save_model(str(tmp_path / "saved"))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == ours.get_vocab()
