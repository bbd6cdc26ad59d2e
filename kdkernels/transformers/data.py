"""Training data: from files, folders and names of the ``datasets`` library to token ids with labels.

A record is a text, a conversation, or a prompt with its completion, which may be conversations too. Only what the model is to write
counts as a label: all of a text, the assistant's turns of a conversation or of its completion, the completion of a text and the
end-of-sequence token after it. Labels stand at their own
token's position, as transformers has them; the trainer shifts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor

from kdkernels.errors import CommandError
from kdkernels.transformers import hub
from kdkernels.transformers.batches import IGNORED
from kdkernels.transformers.conversations import Unusable, Written, asked, tools_of, turns, without_nulls, written
from kdkernels.transformers.conversations import what as _what

KINDS = (
    '"text" (a string), "messages" (a list of {"role", "content"}), or "prompt" and "completion" (two strings, or two such lists)'
)
ALONE = '; a "prompt" alone only to learn from, where the student writes every batch (--on-policy-fraction 1)'
# of a record, what is conversations or belongs to them
CONVERSED = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
# a missing file of these names is not looked for on the hub
FILES = (".txt", ".md", ".json", ".jsonl", ".ndjson", *TABLES)

Example = dict[str, list[int]]


def read(source: str | Path, *, split: str = "train", prompts: bool = False) -> Sequence[Mapping[str, Any]]:
    """The raw records of a source, each with "text", "messages", or "prompt" and "completion".

    source: one of
        - a text file in UTF-8, of any name: one record, the whole file;
        - a .jsonl or .ndjson file: one record a line, empty lines skipped; a .json file: a list of records;
        - a folder that ``datasets`` saved with ``save_to_disk``, of a Dataset or of a DatasetDict;
        - a name that ``datasets.load_dataset`` knows, as NAME or NAME:CONFIGURATION.
    split: of the last two. What has no splits has only "train". prompts: a "prompt" may stand alone.

    Raises CommandError where the source is missing or cannot be read, with file and line where there are such.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _saved(path, split)
    if not path.exists():
        return _named(str(source), split)
    if split != "train":
        raise CommandError(f"{path} has no split {split!r}: a file is all one split, train")
    suffix = path.suffix.lower()
    if suffix in TABLES:
        raise CommandError(f"{path} is a table; accepted: text, .jsonl, .json, or a folder that datasets saved")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as it stands: text mode would change line ends
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not text in UTF-8 (byte {error.start:,}); accepted: text, .jsonl, .json") from error
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    if suffix in (".jsonl", ".ndjson"):
        # by "\n" alone: splitlines would also cut at separators that JSON lets stand inside a string
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return [_checked(_json(line, f"{path}, line {number}"), f"{path}, line {number}", prompts) for number, line in lines]
    if suffix == ".json":
        records = _json(text, str(path))
        if not isinstance(records, list):
            raise CommandError(f"{path} holds {_what(records)}; accepted in a .json file: a list of records")
        return [_checked(record, f"{path}, record {number}", prompts) for number, record in enumerate(records, 1)]
    return [{"text": text}]


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

    def kept() -> Iterator[tuple[bool, Example]]:
        """Each example, and whether it is a prompt alone."""
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

    found = list(islice(kept(), limit))
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


class Collator:
    """Examples to a batch: input_ids, attention_mask and labels, int64 (B, S), padded on the right to the longest of them.

    pad_token_id: stands in input_ids at padding, where attention_mask is 0 and labels are -100; what it is does not matter then,
        and None is 0.
    An example has "input_ids", and may have "labels" (else they are the ids, where the mask is not 0) and "attention_mask" (else
    all 1), of the same length. Further columns go along: numbers of the length of input_ids padded with 0, others stacked where
    they have one shape (as transformers' default_data_collator does), and as a list where they have not, or are no numbers. Where
    no example has a token, one of padding stands for each. Raises ValueError where lengths differ and for an empty batch.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not batch:
            raise ValueError("a batch has at least one example, got none")
        rows = [self._row(example) for example in batch]
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        made: dict[str, Any] = {name: _padded([row[name] for row in rows], value) for name, value in padding.items()}
        for name in dict.fromkeys(name for example in batch for name in example if name not in padding):
            values = [_numbers(example.get(name)) for example in batch]
            if all(value is None for value in values):
                continue
            if not all(isinstance(value, Tensor) for value in values):
                made[name] = values
            elif all(value.dim() and value.shape[:1] == row["input_ids"].shape for value, row in zip(values, rows, strict=True)):
                made[name] = _padded(values, 0) if len({value.shape[1:] for value in values}) == 1 else values
            else:
                made[name] = torch.stack(values) if len({value.shape for value in values}) == 1 else values
        return made

    def _row(self, example: Mapping[str, Any]) -> dict[str, Tensor]:
        if not isinstance(example, Mapping):
            raise ValueError(f"an example is a mapping with input_ids, got {type(example).__name__}")
        if example.get("input_ids") is None:
            raise ValueError(f"an example has no input_ids; it has {', '.join(map(str, example)) or 'nothing'}")
        ids = torch.as_tensor(example["input_ids"], dtype=torch.int64)
        mask, labels = example.get("attention_mask"), example.get("labels")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        mask = mask.long() if mask.dtype == torch.bool else mask
        labels = ids.where(mask != 0, IGNORED) if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        if not ids.shape == mask.shape == labels.shape or ids.dim() != 1:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("attention_mask", mask), ("labels", labels)))
            raise ValueError(f"an example's lists have one length: input_ids {tuple(ids.shape)}, {shapes}")
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _padded(values: list[Tensor], value: float) -> Tensor:
    made = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)
    # models take no sequence of no tokens
    return made if made.shape[1] else made.new_full((len(values), 1, *made.shape[2:]), value)


def _numbers(value: Any) -> Any:
    """A tensor, where there is one to be made."""
    if value is None or isinstance(value, (str, bytes, Mapping, Tensor)):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _tokenized(
    record: Mapping[str, Any], tokenizer: Any, template: Any, max_length: int, where: str, notes: _Notes
) -> Iterator[Example]:
    _checked(record, where)
    if record.get("messages") is not None or (_is_pair(record) and not isinstance(record["prompt"], str)):
        yield _conversation(record, tokenizer, template, where, notes)
    elif _is_pair(record):
        yield _completion(record["prompt"], record["completion"], tokenizer)
    elif record["text"]:
        ids = _ended(tokenizer(record["text"], verbose=False)["input_ids"], tokenizer)
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            window = ids[start : start + max_length]
            yield {"input_ids": window, "labels": list(window)}


def _asked(record: Mapping[str, Any], tokenizer: Any, template: Any, where: str) -> list[int] | None:
    """The tokens of a record that only asks, with what the template opens the answer with; None for one that has an answer."""
    _checked(record, where, prompts=True)
    messages = record.get("messages")
    alone = _is_prompt(record)
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


def _is_pair(record: Mapping[str, Any]) -> bool:
    return record.get("prompt") is not None and record.get("completion") is not None


def _is_prompt(record: Mapping[str, Any]) -> bool:
    """Whether it is a prompt alone."""
    return record.get("prompt") is not None and all(record.get(name) is None for name in ("completion", "messages", "text"))


def _checked(record: Any, where: str, prompts: bool = False) -> Mapping[str, Any]:
    """The record, if it is of a known kind; where several are there, messages come before prompts, and prompts before text."""
    if not isinstance(record, Mapping):
        raise CommandError(f"{where}: holds {_what(record)}; accepted: a record with {KINDS}")
    messages = record.get("messages")
    pair = [record["prompt"], record["completion"]] if _is_pair(record) else []
    if messages is not None:
        known = _is_list(messages)
        if known:
            turns(messages, f"{where}, message")
    elif pair:
        known = all(isinstance(part, str) for part in pair) or all(map(_is_list, pair))
        for name, part in zip(("prompt", "completion"), pair, strict=True):
            if known and not isinstance(part, str):
                turns(part, f"{where}, {name} message")
    elif prompts and _is_prompt(record):
        known = isinstance(record["prompt"], str) or _is_list(record["prompt"])
        if known and not isinstance(record["prompt"], str):
            turns(record["prompt"], f"{where}, prompt message")
    else:
        known = isinstance(record.get("text"), str)
    if not known:
        held = ", ".join(f'"{name}" ({_what(value)})' for name, value in record.items()) or "nothing"
        hint = '; "conversations" as ShareGPT has them are to be named so' if "conversations" in record else ""
        raise CommandError(f"{where}: holds {held}; accepted: {KINDS}{ALONE if _is_prompt(record) else hint}")
    return record


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"{where}: not JSON ({error})") from error


def _saved(path: Path, split: str) -> Sequence[Mapping[str, Any]]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        cache = " (a cache has its examples: as --teacher it needs no --data)" if (path / "kdkernels-cache.json").is_file() else ""
        raise CommandError(
            f"{path} is a folder that datasets' save_to_disk did not write{cache}; accepted: such a folder, or a file"
        )
    datasets = _datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of Arrow, JSON or the file system
        raise CommandError(f"{path} cannot be read by datasets: {' '.join(str(error).split())}") from error
    splits = found if isinstance(found, Mapping) else {"train": found}
    if split not in splits:
        raise CommandError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    records: Sequence[Mapping[str, Any]] = splits[split]
    return records


def _named(source: str, split: str) -> Sequence[Mapping[str, Any]]:
    name, _, configuration = source.partition(":")
    if not hub.NAME.fullmatch(name) or Path(name).suffix.lower() in FILES:
        raise CommandError(f"{source!r}: there is no such file or folder")
    datasets = _datasets(source)
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        with hub.asked():
            datasets.config.HF_HUB_OFFLINE = offline or constants.HF_HUB_OFFLINE  # it has a copy
            records: Sequence[Mapping[str, Any]] = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # of the network, the hub, or the files' format
        reason = " ".join(str(error).split())
        raise CommandError(f"{source!r} is no file or folder here, and datasets cannot load it: {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return records


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CommandError(f"{source!r} needs the datasets library, not installed here: pip install datasets") from error
    return datasets
