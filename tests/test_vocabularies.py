"""Claims about which tokenizers a student and its teacher may have."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from kdkernels.transformers.vocabularies import shared_vocabulary

WORDS = [f"w{number}" for number in range(50)]


def wrapped(vocabulary: dict[str, int], *added: str, kind: str = "level", cls: Any = None, **special: str) -> Any:
    """kind: of the model that holds the vocabulary; added: tokens behind it."""
    if kind == "bpe":
        made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel()
    else:
        made = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_tokens(list(added))
    return (cls or transformers.PreTrainedTokenizerFast)(tokenizer_object=made, **special)


def numbered(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


@pytest.mark.parametrize("kind", ["level", "bpe"])
def test_the_same_tokens_agree_whatever_holds_them_and_in_whatever_order_they_are_listed(kind: str) -> None:
    backwards = dict(reversed(numbered(WORDS).items()))
    assert shared_vocabulary(wrapped(numbered(WORDS)), wrapped(backwards, kind=kind)) == 50


def test_a_slow_tokenizer_agrees_with_a_fast_one_of_the_same_tokens() -> None:
    class Slow(transformers.PreTrainedTokenizer):  # type: ignore[misc]
        vocab_size = 50

        def get_vocab(self) -> dict[str, int]:
            return numbered(WORDS)

        def _tokenize(self, text: str) -> list[str]:
            return text.split()

        def _convert_token_to_id(self, token: str) -> int:
            return WORDS.index(token)

        def _convert_id_to_token(self, index: int) -> str:
            return WORDS[index]

    slow = Slow()
    assert not slow.is_fast
    assert shared_vocabulary(slow, wrapped(numbered(WORDS))) == shared_vocabulary(wrapped(numbered(WORDS)), slow) == 50


def test_tokens_behind_all_shared_ones_may_be_there_for_one_only() -> None:
    plain, more = wrapped(numbered(WORDS)), wrapped(numbered(WORDS), "<image>", pad_token="<pad>", eos_token="</s>")
    assert len(more) == 53
    assert shared_vocabulary(plain, more) == shared_vocabulary(more, plain) == 50
    # the same ones added on both sides are shared, in whatever way each came to them
    listed = wrapped(numbered([*WORDS, "<image>", "</s>", "<pad>"]))
    assert shared_vocabulary(listed, more) == 53


def test_ids_that_neither_uses_are_no_difference() -> None:
    holes = {"a": 0, "b": 7, "c": 30}
    assert shared_vocabulary(wrapped(holes), wrapped({**holes, "d": 31})) == 31


@pytest.mark.parametrize(
    ("student", "teacher", "count", "first"),
    [
        # sizes are equal: two tokens have changed places
        ([*WORDS[:7], "w8", "w7", *WORDS[9:]], WORDS, 2, "'w7' is 8 in the student's and 7 in the teacher's"),
        # one more in front moves all the others
        (["<s>", *WORDS], WORDS, 51, "'w0' is 1 in the student's and 0 in the teacher's"),
        # one token replaced by another: two tokens, one of each side
        ([*WORDS[:20], "other", *WORDS[21:]], WORDS, 2, "20 is 'other' in the student's and 'w20' in the teacher's"),
        # other tokens at the same ids behind the shared ones
        ([*WORDS, "<pad>"], [*WORDS, "<image>"], 2, "50 is '<image>' in the teacher's and '<pad>' in the student's"),
    ],
)
def test_vocabularies_that_differ_are_refused_with_how_much_and_where_first(
    student: list[str], teacher: list[str], count: int, first: str
) -> None:
    with pytest.raises(ValueError, match=r"^the tokenizers of student \(\d+ tokens\) and teacher \(\d+\) disagree on") as raised:
        shared_vocabulary(wrapped(numbered(student)), wrapped(numbered(teacher)))
    assert f"disagree on {count} of their tokens, the first: {first};" in str(raised.value)


def test_a_token_of_one_side_alone_among_the_shared_ones_is_refused() -> None:
    holes = {"a": 0, "b": 1, "d": 3}
    for pair in ((holes, {**holes, "c": 2}), ({**holes, "c": 2}, holes)):
        with pytest.raises(
            ValueError,
            match=r"disagree on 1 of their tokens, the first: 'c' is 2 in the (student|teacher)'s and in the .* not there",
        ):
            shared_vocabulary(*map(wrapped, pair))


def test_vocabularies_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(ValueError, match="have no token in common"):
        shared_vocabulary(wrapped(numbered(WORDS)), wrapped(numbered(["x", "y"])))


def test_one_token_moved_in_a_large_vocabulary_is_found_with_its_ids() -> None:
    words = [f"t{number}" for number in range(20_000)]
    moved = [*words[:12_345], "new", *words[12_346:], "t12345"]
    with pytest.raises(
        ValueError, match=r"\(20,001 tokens\).*disagree on 2 of their tokens, the first: 12345 is 'new'|'t12345' is 20000"
    ):
        shared_vocabulary(wrapped(numbered(moved)), wrapped(numbered(words)))
