"""Claims about which tokenizers a student and its teacher may have."""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from kdkernels.transformers.vocabularies import shared_vocabulary, token_ids

WORDS = [f"w{number}" for number in range(50)]


def wrapped(vocabulary: dict[str, int], *added: str, kind: str = "level", cls: Any = None, **special: Any) -> Any:
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


def test_tokens_behind_all_shared_ones_may_be_there_for_one_only(caplog: pytest.LogCaptureFixture) -> None:
    special = {"additional_special_tokens": ["<image>"], "pad_token": "<pad>", "eos_token": "</s>"}
    plain, more = wrapped(numbered(WORDS)), wrapped(numbered(WORDS), **special)
    assert len(more) == 53
    assert shared_vocabulary(plain, more) == shared_vocabulary(more, plain) == 50
    # the same ones added on both sides are shared, in whatever way each came to them
    listed = wrapped(dict(more.get_vocab()))
    assert shared_vocabulary(listed, more) == 53
    assert not caplog.records  # special tokens are each model's own


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


@pytest.mark.parametrize(("name", "other"), [("teacher", "student"), ("student", "teacher")])
def test_words_that_one_side_has_behind_the_shared_ones_are_cut_with_a_word_unless_that_is_confirmed(
    name: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether they are of the vocabulary itself or were added to it; special tokens among them are not counted."""
    plain = wrapped(numbered(WORDS))
    for more in (
        wrapped(numbered([*WORDS, *(f"x{number}" for number in range(500))]), eos_token="</s>"),
        wrapped(numbered(WORDS), *(f"x{number}" for number in range(500)), eos_token="</s>"),
    ):
        pair = (plain, more) if name == "teacher" else (more, plain)
        caplog.clear()
        assert shared_vocabulary(*pair) == 50
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"the {name}'s tokenizer has 500 more tokens than the {other}'s, behind the 50 of both: 'x0' (" in record.message
        assert "(vocab_size=50, or --vocab-size, says that this is meant)" in record.message
        caplog.clear()
        assert shared_vocabulary(*pair, vocab_size=50) == 50
        assert not caplog.records


RENAMED = [*WORDS[:45], "<|User|>", "<|Bot|>", *WORDS[47:]]  # as a model's own markers of turns


def test_renamed_tokens_are_refused_with_the_vocab_size_that_takes_them_for_one_another(caplog: pytest.LogCaptureFixture) -> None:
    pair = wrapped(numbered(WORDS)), wrapped(numbered(RENAMED), "<image>")
    with pytest.raises(ValueError, match=r"or vocab_size \(--vocab-size\): 50 takes the tokens at one id .* 45 leaves them out$"):
        shared_vocabulary(*pair)
    assert shared_vocabulary(*pair, vocab_size=45) == 45
    assert not caplog.records
    assert shared_vocabulary(*pair, vocab_size=50) == 50
    (record,) = caplog.records
    assert "takes 2 tokens of student and teacher for one another that have other names: 45 is" in record.message
    for said in (
        "'w45' in the student's",
        "'<|User|>' in the teacher's",
        "46 is",
        "'w46' in the student's",
        "'<|Bot|>' in the tea",
    ):
        assert said in record.message


def test_with_a_vocab_size_tokens_of_one_side_alone_below_it_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Rows that pad one head where the other's have a meaning."""
    assert shared_vocabulary(wrapped(numbered(WORDS)), wrapped(numbered([*WORDS, "x", "y"])), vocab_size=52) == 50
    (record,) = caplog.records
    assert "below vocab_size=52 2 tokens are known to one tokenizer only: 'x' is 50 in the teacher's and" in record.message


def test_a_vocab_size_confirms_no_token_that_has_two_ids_and_no_other_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    swapped = wrapped(numbered([*WORDS[:40], "w41", "w40", *WORDS[42:]]))
    for size in (41, 50, 60):
        with pytest.raises(ValueError, match=rf"disagree on 2 of their tokens below vocab_size={size}, the first: 'w40' .*: 40 le"):
            shared_vocabulary(wrapped(numbered(WORDS)), swapped, vocab_size=size)
    assert shared_vocabulary(wrapped(numbered(WORDS)), swapped, vocab_size=40) == 40
    with pytest.raises(ValueError, match="have no token in common below vocab_size=5"):
        shared_vocabulary(wrapped(numbered(WORDS)), wrapped(numbered(["x", "y"])), vocab_size=5)
    assert not caplog.records


def test_the_tokenizer_of_a_processor_is_compared() -> None:
    class Processor(transformers.ProcessorMixin):  # type: ignore[misc]
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer, self.image_processor = tokenizer, None

    one, other = wrapped(numbered(WORDS)), wrapped(numbered(WORDS[:30]))
    assert shared_vocabulary(Processor(one), Processor(other), vocab_size=30) == 30
    with pytest.raises(ValueError, match="disagree on 2 of their tokens"):
        shared_vocabulary(Processor(one), wrapped(numbered(["w1", "w0", *WORDS[2:]])))


class Listing:
    """Any tokenizer, of which only the list of tokens is known."""

    def __init__(self, listed: Any) -> None:
        self.listed = listed

    def get_vocab(self) -> Any:
        if isinstance(self.listed, Exception):
            raise self.listed
        return self.listed


def test_a_listed_token_without_an_id_is_no_token() -> None:
    assert token_ids(Listing({"a": 0, "b": None, "c": 7}), "teacher") == {"a": 0, "c": 7}
    assert shared_vocabulary(Listing({"a": 0, "b": None, "c": 7}), wrapped({"a": 0, "c": 7})) == 8


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, "got a NoneType"),
        ("Qwen/Qwen2.5-0.5B", TypeError, "got the text 'Qwen/Qwen2.5-0.5B'"),
        (transformers.PreTrainedTokenizerFast, TypeError, "got the class "),
        (transformers.AutoTokenizer, TypeError, "got the class AutoTokenizer"),
        (Listing(NotImplementedError()), TypeError, r"\(Listing\) does not list its tokens"),
        (Listing(["a"]), TypeError, "a mapping; Listing gives list"),
        (Listing({}), ValueError, "has no tokens"),
        (Listing({"a": None}), ValueError, "has no tokens"),
    ],
)
def test_what_is_no_tokenizer_is_named_with_its_argument(given: Any, error: type[Exception], message: str) -> None:
    for place, pair in (("student", (given, wrapped(numbered(WORDS)))), ("teacher", (wrapped(numbered(WORDS)), given))):
        with pytest.raises(error, match=f"^{place}.*{message}"):
            shared_vocabulary(*pair)
