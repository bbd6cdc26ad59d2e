"""Whether two tokenizers number the same tokens alike, which is what distilling over a vocabulary rests on.

Two heads of one height are no proof: vocabularies of one size can hold other tokens, or the same in another order. A loss over
them would be computed without complaint and teach nonsense. So what is compared is the tokens themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SHOWN = 8  # tokens that a message lists


class Comparison(NamedTuple):
    """size: how many leading ids both tokenizers have a token for. notes: what a person should know of the rest, in sentences."""

    size: int
    notes: tuple[str, ...]


def shared_vocabulary(student: Any, teacher: Any, *, vocab_size: int | None = None) -> int:
    """How many leading ids mean the same to both tokenizers: what both heads are cut to (``vocab_size`` of the losses).

    student, teacher: tokenizers of transformers, or processors that have one; ``get_vocab()`` is read, added tokens included, and
    their classes do not matter. Ids that neither has a token for count where they stand below the last shared one; the padding of a
    head is no part of this.

    Tokens that only one of the two has are accepted behind all that both have. Then they are cut off, and sequences that contain
    one cannot be given to the other model. A warning names them, unless all are special tokens, of which each model may have some.

    vocab_size: only the first so many ids are compared, and those of them whose tokens have other names on the two sides (as a
    model's own markers of turns) are taken for one another, with a warning that lists them; so are tokens that one side lacks.

    Raises ValueError where a token has two ids and, without vocab_size, where an id has two tokens or a token that only one has
    stands among the shared ones: with the number of such tokens, the first of them, and the vocab_size that is accepted. TypeError
    where an argument is no tokenizer.
    """
    size, notes = compare(student, teacher, vocab_size)
    for note in notes:
        logger.warning(note)
    return size


def compare(student: Any, teacher: Any, vocab_size: int | None = None) -> Comparison:
    """``shared_vocabulary`` without the warnings, which are returned."""
    ids = {"student": token_ids(student, "student"), "teacher": token_ids(teacher, "teacher")}
    ours, theirs = ids.values()
    sizes = f"the tokenizers of student ({len(ours):,} tokens) and teacher ({len(theirs):,})"
    end = 1 + max(*ours.values(), *theirs.values()) if vocab_size is None else vocab_size
    both = {token for token in ours.keys() & theirs.keys() if min(ours[token], theirs[token]) < end}
    if not both:
        raise ValueError(f"{sizes} have no token in common{'' if vocab_size is None else f' below vocab_size={vocab_size:,}'}")

    # (id, what is wrong) for each token
    moved = [
        (min(ours[token], theirs[token]), f"{token!r} is {ours[token]} in the student's and {theirs[token]} in the teacher's")
        for token in both
        if ours[token] != theirs[token]
    ]
    last = 1 + max(max(ours[token], theirs[token]) for token in both)
    meant = {ours[token] for token in both}
    renamed: list[tuple[int, str]] = []  # each from both sides
    alone: list[tuple[int, str]] = []
    behind: dict[str, dict[str, int]] = {"student": {}, "teacher": {}}
    for name, other in (("student", "teacher"), ("teacher", "student")):
        taken = {number: token for token, number in ids[other].items()}
        for token, number in ids[name].items():
            if token in both or number in meant or number >= end:  # in meant: a second spelling of a token that both have
                continue
            if number in taken:
                text = f"{number} is {token!r} in the {name}'s and {taken[number]!r} in the {other}'s"
                renamed.append((number, text))
            elif number < last or vocab_size is not None:
                alone.append((number, f"{token!r} is {number} in the {name}'s and in the {other}'s not there"))
            else:
                behind[name][token] = number

    wrong = moved if vocab_size is not None else [*moved, *renamed, *((at, f"{text}, before shared tokens") for at, text in alone)]
    if wrong:
        raise ValueError(_refusal(sizes, ids, wrong, vocab_size, confirmable=not moved))
    if vocab_size is None:
        return Comparison(last, tuple(_cut_off(behind, last, {"student": student, "teacher": teacher})))
    notes = []
    if renamed:
        texts = dict(reversed(renamed))  # the student's come first, and stay
        notes.append(
            f"vocab_size={vocab_size:,} takes {len(texts):,} tokens of student and teacher for one another that have other names: "
            f"{_listed(texts[number] for number in sorted(texts))}"
        )
    if alone:
        notes.append(
            f"below vocab_size={vocab_size:,} {len(alone):,} tokens are known to one tokenizer only: "
            f"{_listed(text for _, text in sorted(alone))}"
        )
    known = set(ours.values()) & set(theirs.values())
    return Comparison(1 + max(number for number in known if number < vocab_size), tuple(notes))


class Known:
    """Which tokens of examples both models know, by their tokenizers. size: how many leading ids may be learned.

    teacher: None where only the height of its head is known. rows: of the teacher's, cached. vocab_size: as for ``compare``, which
    raises what this raises.
    """

    def __init__(self, student: Any, teacher: Any = None, *, rows: int | None = None, vocab_size: int | None = None) -> None:
        self.rows = rows
        self.tokens = {"student": _by_id(student, "student")}
        sizes = [1 + max(self.tokens["student"]), rows, vocab_size]
        if teacher is not None:
            self.tokens["teacher"] = _by_id(teacher, "teacher")
            sizes.append(compare(student, teacher, vocab_size).size)
        self.size = min(size for size in sizes if size is not None)

    def problem(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> str | None:
        """What is wrong with examples of "input_ids" and "labels", if anything is, for an error that says whose they are.

        A token from ``size`` on may only be read, and only where it is the same to both.
        """
        found = [max(outside) for example in examples if (outside := self._outside(example))]
        if not found:
            return None
        number = max(found)
        lacking = [name for name, tokens in self.tokens.items() if number not in tokens]
        if len(lacking) == len(self.tokens):
            why = "which no tokenizer here knows"
        elif lacking:
            why = f"which the {lacking[0]} does not know"
        elif self.rows is not None and number >= self.rows:
            why = f"which the cached teacher, with {self.rows:,} tokens, does not know"
        else:
            why = "which vocab_size cuts off"
        token = next((repr(tokens[number]) for tokens in self.tokens.values() if number in tokens), "without a name")
        return (
            f"the token {token} ({number}) in {len(found):,} of {len(examples):,} examples, {why}: both know the first "
            f"{self.size:,}; accepted: examples without such tokens"
        )

    def _outside(self, example: Mapping[str, Sequence[int]]) -> list[int]:
        ids, labels = example["input_ids"], example["labels"]
        if max(ids) < self.size:
            return []
        learned = {label for label in labels[1:] if label >= self.size}
        return [number for number in ids if number >= self.size and (number in learned or not self._same(number))]

    def _same(self, number: int) -> bool:
        names = [tokens.get(number) for tokens in self.tokens.values()]
        return len(names) == 2 and names[0] is not None and names[0] == names[1]


def _by_id(given: Any, name: str) -> dict[int, str]:
    return {number: token for token, number in token_ids(given, name).items()}


def tokenizer_of(given: Any, name: str) -> Any:
    """What an argument is, or where it is a processor for text and images, its tokenizer. Raises TypeError that names it."""
    found = given if hasattr(given, "get_vocab") else getattr(given, "tokenizer", None)
    if isinstance(given, type) or not callable(getattr(found, "get_vocab", None)):
        came = f"a {type(given).__name__}"
        if isinstance(given, (str, type)):
            came = f"the text {given!r}" if isinstance(given, str) else f"the class {given.__name__}"
        raise TypeError(
            f"{name} is a tokenizer of transformers (AutoTokenizer.from_pretrained), or a processor that has one (.tokenizer), got "
            f"{came}"
        )
    return found


def token_ids(given: Any, name: str) -> dict[str, int]:
    """The tokens of a tokenizer, or of a processor's, with their ids; a token without an id stands in no text and is left out.

    name: of the argument. Raises TypeError where it is no tokenizer or does not list its tokens, ValueError where it has none.
    """
    tokenizer = tokenizer_of(given, name)
    try:
        listed = tokenizer.get_vocab()
    except NotImplementedError as error:  # of transformers' base classes, where a class of one's own does not override it
        raise TypeError(f"{name} ({type(tokenizer).__name__}) does not list its tokens: get_vocab() fails") from error
    if not isinstance(listed, Mapping):
        kind = type(listed).__name__
        raise TypeError(f"{name}.get_vocab() gives tokens and their ids, a mapping; {type(tokenizer).__name__} gives {kind}")
    found = {token: int(number) for token, number in listed.items() if number is not None}
    if not found:
        raise ValueError(f"{name} ({type(tokenizer).__name__}) has no tokens")
    return found


def real_tokens(given: Any, tokens: Mapping[str, int]) -> list[tuple[int, str]]:
    """(id, token) of those that are not special tokens of the tokenizer, in order."""
    tokenizer = tokenizer_of(given, "tokenizer")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*getattr(tokenizer, "all_special_tokens", ()), *(str(each) for each in added.values() if each.special)}
    return sorted((number, token) for token, number in tokens.items() if token not in special)


def _cut_off(behind: Mapping[str, Mapping[str, int]], size: int, tokenizers: Mapping[str, Any]) -> Iterable[str]:
    """What is lost with the tokens behind those that both have."""
    lost = {
        "teacher": "the student cannot learn them",
        "student": "the teacher cannot teach them",
    }
    for name, other in (("teacher", "student"), ("student", "teacher")):
        found = real_tokens(tokenizers[name], behind[name])
        if found:
            yield (
                f"the {name}'s tokenizer has {len(found):,} more tokens than the {other}'s, behind the {size:,} of both: "
                f"{_listed(f'{token!r} ({number})' for number, token in found)}; both heads are cut to the first {size:,}, so "
                f"{lost[name]} (vocab_size={size}, or --vocab-size, says that this is meant)"
            )


def _refusal(
    sizes: str, ids: Mapping[str, Mapping[str, int]], wrong: list[tuple[int, str]], vocab_size: int | None, *, confirmable: bool
) -> str:
    """How many tokens differ, which first, and the vocab_size that would do, unless the tokenizers are altogether different."""
    last = 1 + min(max(each.values()) for each in ids.values())
    first, text = min(wrong)
    ways = []
    if confirmable:
        ways.append(f"{last} takes the tokens at one id for one another")
    if 2 * first > last:
        ways.append(f"{first} leaves them out")
    way = f"; or vocab_size (--vocab-size): {' and '.join(ways)}" if ways else ""
    below = "" if vocab_size is None else f" below vocab_size={vocab_size:,}"
    return (
        f"{sizes} disagree on {len(wrong):,} of their tokens{below}, the first: {text}; a student learns only from a "
        f"teacher whose tokens have the same ids{way}"
    )


def _listed(texts: Iterable[str]) -> str:
    texts = list(texts)
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
