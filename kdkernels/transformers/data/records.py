"""Training data: from files, folders and names of the ``datasets`` library to token ids with labels.

A record is a text, a conversation, or a prompt with its completion, which may be conversations too. Only what the model is to write
counts as a label: all of a text, the assistant's turns of a conversation or of its completion, the completion of a text and the
end-of-sequence token after it. Labels stand at their own
token's position, as transformers has them; the trainer shifts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from kdkernels.errors import CommandError
from kdkernels.transformers.batches.layout import IGNORED
from kdkernels.transformers.data.conversations import Unusable, Written, asked, tools_of, turns, without_nulls, written
from kdkernels.transformers.data.conversations import what as _what
from kdkernels.transformers.data.sources import checked_record, is_pair, is_prompt, read

# of a record, what is conversations or belongs to them
CONVERSED = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Prepared:
    """What is learned from, and what was left out.

    examples: with tokens to learn. prompts: without any, for the student to go on from; the last token of each only stands for what
    the student writes: its label says where the prompt ends.
    cut: how many conversations and completions were cut to their first max_length tokens. filled: how many were left out because
    what comes before their first token to learn fills these already, and prompts because they are longer. dropped: how many records
    and windows have no token to learn at all. unusable: how many conversations were left out because the chat template cannot write
    them. partial: of how many not all answers are learned. notes: sentences on these and on what the template leaves out, with how
    many and which first.
    """

    examples: list[Example]
    prompts: list[Example]
    cut: int
    filled: int
    dropped: int
    unusable: int = 0
    partial: int = 0
    notes: tuple[str, ...] = ()

    def left_out(self, max_length: int) -> str:
        """For whoever gave the data; empty where all of it is used."""
        said = (
            (self.cut, f"cut at {max_length} tokens (--max-length)"),
            (self.filled, f"left out, whose prompt fills the {max_length} tokens of --max-length"),
            (self.dropped, "left out without a token to learn"),
        )
        return "; ".join(f"{count:,} example{'s' if count > 1 else ''} {what}" for count, what in said if count)


def examples(
    source: str | Path, tokenizer: Any, *, max_length: int, split: str = "train", limit: int | None = None
) -> list[Example]:
    """``prepare(...).examples``: input_ids and labels, two lists of one length for each example."""
    return prepare(source, tokenizer, max_length=max_length, split=split, limit=limit).examples


def prepare(
    source: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    split: str = "train",
    limit: int | None = None,
    prompts: bool = False,
) -> Prepared:
    """Read a source and tokenize it. Labels are -100 where nothing is learned.

    - text: every token counts, and an EOS after each text where the tokenizer has one. A text of more than max_length tokens
      becomes several windows. Each begins with the last token of the one before it, since the first token of a sequence is
      never predicted: so each token after a text's first is predicted exactly once. Empty texts are dropped.
    - messages: through the tokenizer's chat template; the assistant's tokens count, as it marks them ({% generation %}) or else
      with what it closes a turn with, and without what it opens one with (its generation prompt). What follows the last
      assistant's turn is left out, and a turn of "weight" 0 does not count. The template is given the record's "tools" and
      "chat_template_kwargs" too. Of a template that writes earlier turns anew when later ones come (as those do that leave out the
      thinking), only turns count that stand as they would when a model wrote them: the last, in most cases.
    - prompt and completion: tokenized as one text; the completion and EOS count. A token that has characters of both counts. Two
      lists of messages are one conversation, of which the assistant's turns in the completion count.

    Conversations and completions are cut at max_length. An example in which no label counts is dropped; the first's never does.
    Only where ``prompts`` says so, prompts without completions and conversations without an assistant's turn are taken too.

    tokenizer: of transformers, one of the ``tokenizers`` library ("fast"), or a processor that has one.
    max_length: tokens of an example, at least 2. limit: the most examples; reading stops there.

    A conversation that the template refuses, or whose tool calls it does not write, is left out, counted and told in the notes.

    Raises CommandError for a source that ``read`` refuses, a record of no known kind or with content other than text, messages
    without a template for them, and where no example is left; ValueError for a wrong argument.
    """
    if max_length < 2:
        raise ValueError(f"max_length is at least 2 (the first token is never predicted), got {max_length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is at least 1, or None, got {limit}")
    template = getattr(tokenizer, "chat_template", None)
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        template = getattr(tokenizer, "chat_template", None) or template
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer is one of the tokenizers library (is_fast), got {type(tokenizer).__name__}")
    records = read(source, split=split, prompts=prompts)
    count = {"cut": 0, "filled": 0, "dropped": 0}
    notes = _Notes()
    kept = _kept(records, source, tokenizer, template, max_length=max_length, prompts=prompts, count=count, notes=notes)
    found = list(islice(kept, limit))
    said = notes.sentences()
    result = Prepared(
        examples=[each for alone, each in found if not alone],
        prompts=[each for alone, each in found if alone],
        **count,
        unusable=notes.left_out,
        partial=notes.partial,
        notes=said,
    )
    if not found:
        why = f" ({result.left_out(max_length)})" if result.filled else ""
        raise CommandError(
            f"{source} (split {split!r}): no example is left in {len(records):,} records that has a token to learn{why}"
            + "".join(f"; {sentence}" for sentence in said)
        )
    return result


def _kept(
    records: Sequence[Mapping[str, Any]],
    source: str | Path,
    tokenizer: Any,
    template: Any,
    *,
    max_length: int,
    prompts: bool,
    count: dict[str, int],
    notes: _Notes,
) -> Iterator[tuple[bool, Example]]:
    """Each example, and whether it is a prompt alone; others go into count and notes."""
    for number, record in enumerate(records, 1):
        where = f"{source}, record {number}"
        if not isinstance(records, list):
            record = {name: without_nulls(value) if name in CONVERSED else value for name, value in record.items()}
        try:
            question = _asked(record, tokenizer, template, where) if prompts else None
            parts = [] if question is not None else list(_tokenized(record, tokenizer, template, max_length, where, notes))
        except Unusable as error:
            notes.unusable(where, str(error))
            continue
        if question is not None:
            if 0 < len(question) <= max_length:
                stand_in = question[-1] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
                yield True, {"input_ids": [*question, stand_in], "labels": [*[IGNORED] * len(question), stand_in]}
            else:
                count["filled" if question else "dropped"] += 1
            continue
        count["dropped"] += not parts  # an empty text
        for example in parts:
            long = len(example["input_ids"]) > max_length  # never a window of a text
            counted = _counts(example)
            if long:
                example = {name: values[:max_length] for name, values in example.items()}
            if _counts(example):
                count["cut"] += long
                yield False, example
            else:
                count["filled" if counted else "dropped"] += 1


def _counts(example: Example) -> bool:
    return any(label != IGNORED for label in example["labels"][1:])


@dataclass
class _Notes:
    """What became of conversations, told once for all of them: how many, and the first."""

    left_out: int = 0
    partial: int = 0
    answers: list[int] = field(default_factory=lambda: [0, 0])  # of the partial ones: learned, and all
    first: dict[str, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def unusable(self, where: str, reason: str) -> None:
        self.left_out += 1
        self.first.setdefault("left_out", f"{where}: {reason}")

    def add(self, where: str, conversation: Written) -> None:
        for note in conversation.notes:
            self.first.setdefault(note, where)
            self.others[note] = self.others.get(note, 0) + 1
        if conversation.learned < conversation.answers:
            self.partial += 1
            self.first.setdefault("partial", where)
            self.answers = [self.answers[0] + conversation.learned, self.answers[1] + conversation.answers]

    def sentences(self) -> tuple[str, ...]:
        found = []
        if self.left_out:
            found.append(f"conversations left out: {self.left_out:,}, the first: {self.first['left_out']}")
        if self.partial:
            found.append(
                f"conversations learned in part: {self.partial:,}, {self.answers[0]:,} of their {self.answers[1]:,} answers, since "
                "the chat template writes earlier turns anew when later ones come, or does not mark them (a record for each answer "
                "keeps all), the first: "
                f"{self.first['partial']}"
            )
        found += [f"conversations {note}: {count:,}, the first: {self.first[note]}" for note, count in self.others.items()]
        return tuple(found)


def _tokenized(
    record: Mapping[str, Any], tokenizer: Any, template: Any, max_length: int, where: str, notes: _Notes
) -> Iterator[Example]:
    checked_record(record, where)
    if record.get("messages") is not None or (is_pair(record) and not isinstance(record["prompt"], str)):
        yield _conversation(record, tokenizer, template, where, notes)
    elif is_pair(record):
        yield _completion(record["prompt"], record["completion"], tokenizer)
    elif record["text"]:
        ids = _ended(tokenizer(record["text"], verbose=False)["input_ids"], tokenizer)
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            window = ids[start : start + max_length]
            yield {"input_ids": window, "labels": list(window)}


def _asked(record: Mapping[str, Any], tokenizer: Any, template: Any, where: str) -> list[int] | None:
    """The tokens of a record that only asks, with what the template opens the answer with; None for one that has an answer."""
    checked_record(record, where, prompts=True)
    messages = record.get("messages")
    alone = is_prompt(record)
    if alone and isinstance(record["prompt"], str):
        text, special = record["prompt"], True
    elif (alone and record["prompt"]) or (messages and all(message["role"] != "assistant" for message in messages)):
        turns_of, _, given = _written_by(record, tokenizer, template, where)
        text, special = asked(turns_of, **given), False
    else:
        return None
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    while ids and encoded["offset_mapping"][len(ids) - 1] == (0, 0):  # what the tokenizer ends a text with: this one goes on
        ids = ids[:-1]
    return ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With an EOS, where the tokenizer has one and has not put it there itself."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _completion(prompt: str, completion: str, tokenizer: Any) -> Example:
    ids, labels = _labelled(prompt + completion, [(len(prompt), len(prompt + completion))], tokenizer, add_special_tokens=True)
    ids = _ended(ids, tokenizer)
    labels += [IGNORED] * (len(ids) - len(labels))
    if ids[-1] == tokenizer.eos_token_id:
        labels[-1] = ids[-1]
    return {"input_ids": ids, "labels": labels}


def _conversation(record: Mapping[str, Any], tokenizer: Any, template: Any, where: str, notes: _Notes) -> Example:
    messages, first, given = _written_by(record, tokenizer, template, where)
    answers = [
        turn
        for turn, message in enumerate(messages)
        if turn >= first and message["role"] == "assistant" and message.get("weight") != 0
    ]
    conversation = written(messages, answers, **given)
    notes.add(where, conversation)
    # the template has written the special tokens
    ids, labels = _labelled(conversation.text, conversation.spans, tokenizer, add_special_tokens=False)
    return {"input_ids": ids, "labels": labels}


def _written_by(record: Mapping[str, Any], tokenizer: Any, template: Any, where: str) -> tuple[list[Any], int, dict[str, Any]]:
    """A record's messages, how many of them are its prompt, and what else the functions of conversations.py take."""
    if not template:
        raise CommandError(
            f"{where}: messages need a chat template, and this tokenizer has none; "
            'set tokenizer.chat_template and save it, or give "text" or "prompt" and "completion"'
        )
    given, first = record.get("messages"), 0
    if given is None:
        given, first = [*record["prompt"], *(record.get("completion") or ())], len(record["prompt"])
    messages, tools = turns(given, f"{where}, message"), tools_of(record.get("tools"), where)
    options = record.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise CommandError(f"{where}: chat_template_kwargs is {_what(options)}; accepted: an object")
    chosen = tokenizer.get_chat_template(template, tools)
    return messages, first, {"tokenizer": tokenizer, "template": chosen, "tools": tools, "options": options}


def _labelled(text: str, spans: list[tuple[int, int]], tokenizer: Any, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
    """Ids of the text, and labels where a token has characters of a span. Special tokens around the text have none."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    labels = [IGNORED] * len(ids)
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        if any(start < last and end > first for first, last in spans):
            labels[place] = ids[place]
    return ids, labels
