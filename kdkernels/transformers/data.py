"""Training data: from files, folders and names of the ``datasets`` library to token ids with labels.

A record is a text, a conversation, or a prompt with its completion. Only what the model is to write counts as a label: all of a
text, the assistant's turns of a conversation, the completion and the end-of-sequence token after it. Labels stand at their own
token's position, as transformers has them; the trainer shifts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.errors import CommandError

IGNORED = -100
KINDS = '"text" (a string), "messages" (a list of {"role", "content"}), or "prompt" and "completion" (strings)'
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
# a missing file of these names is not looked for on the hub
FILES = (".txt", ".md", ".json", ".jsonl", ".ndjson", *TABLES)

Example = dict[str, list[int]]


def read(source: str | Path, *, split: str = "train") -> Sequence[Mapping[str, Any]]:
    """The raw records of a source, each with "text", "messages", or "prompt" and "completion".

    source: one of
        - a text file in UTF-8, of any name: one record, the whole file;
        - a .jsonl or .ndjson file: one record a line, empty lines skipped; a .json file: a list of records;
        - a folder that ``datasets`` saved with ``save_to_disk``, of a Dataset or of a DatasetDict;
        - a name that ``datasets.load_dataset`` knows, as NAME or NAME:CONFIGURATION.
    split: of the last two. What has no splits has only "train".

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
        return [_checked(_json(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines]
    if suffix == ".json":
        records = _json(text, str(path))
        if not isinstance(records, list):
            raise CommandError(f"{path} holds {_what(records)}; accepted in a .json file: a list of records")
        return [_checked(record, f"{path}, record {number}") for number, record in enumerate(records, 1)]
    return [{"text": text}]


@dataclass(frozen=True)
class Prepared:
    """examples: what is learned from. cut: conversations and completions of which only the first max_length tokens are kept.
    dropped: records and windows left out because no label counts in them."""

    examples: list[Example]
    cut: int
    dropped: int


def examples(
    source: str | Path, tokenizer: Any, *, max_length: int, split: str = "train", limit: int | None = None
) -> list[Example]:
    """``prepare(...).examples``: input_ids and labels, two lists of one length for each example."""
    return prepare(source, tokenizer, max_length=max_length, split=split, limit=limit).examples


def prepare(source: str | Path, tokenizer: Any, *, max_length: int, split: str = "train", limit: int | None = None) -> Prepared:
    """Read a source and tokenize it. Labels are -100 where nothing is learned.

    - text: every token counts, and an EOS after each text where the tokenizer has one. A text of more than max_length tokens
      becomes several windows. Each begins with the last token of the one before it, since the first token of a sequence is
      never predicted: so each token after a text's first is predicted exactly once. Empty texts are dropped.
    - messages: through the tokenizer's chat template; the assistant's tokens count, with what the template closes a turn with,
      and without what it opens one with (its generation prompt). What follows the last assistant's turn is left out.
    - prompt and completion: tokenized as one text; the completion and EOS count. A token that has characters of both counts.

    Conversations and completions are cut at max_length. An example in which no label counts is dropped; the first's never does.

    tokenizer: of transformers, one of the ``tokenizers`` library ("fast").
    max_length: tokens of an example, at least 2. limit: the most examples; reading stops there.

    Raises CommandError for a source that ``read`` refuses, a record of no known kind, a conversation that the tokenizer has no
    template for or whose template changes earlier turns, and where no example is left; ValueError for a wrong argument.
    """
    if max_length < 2:
        raise ValueError(f"max_length is at least 2 (the first token is never predicted), got {max_length}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is at least 1, or None, got {limit}")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer is one of the tokenizers library (is_fast), got {type(tokenizer).__name__}")
    records = read(source, split=split)
    count = {"cut": 0, "dropped": 0}

    def kept() -> Iterator[Example]:
        for number, record in enumerate(records, 1):
            parts = list(_tokenized(record, tokenizer, max_length, f"{source}, record {number}"))
            count["dropped"] += not parts  # an empty text
            for example in parts:
                if len(example["input_ids"]) > max_length:  # never a window of a text
                    count["cut"] += 1
                    example = {name: values[:max_length] for name, values in example.items()}
                if any(label != IGNORED for label in example["labels"][1:]):
                    yield example
                else:
                    count["dropped"] += 1

    found = list(islice(kept(), limit))
    if not found:
        raise CommandError(f"{source} (split {split!r}): no example is left in {len(records):,} records that has a token to learn")
    return Prepared(found, **count)


class Collator:
    """Examples to a batch: input_ids, attention_mask and labels, int64 (B, S), padded on the right to the longest of them.

    pad_token_id: stands in input_ids at padding, where attention_mask is 0 and labels are -100; what it is does not matter then,
        and None is 0.
    An example has "input_ids", and may have "labels" (else they are the ids, where the mask is not 0) and "attention_mask" (else
    all 1), of the same length. Further columns go along: numbers of the length of input_ids padded with 0, others stacked where
    they have one shape (as transformers' default_data_collator does), and as a list where they have not, or are no numbers.
    Raises ValueError where lengths differ and for an empty batch.
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
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)


def _numbers(value: Any) -> Any:
    """A tensor, where there is one to be made."""
    if value is None or isinstance(value, (str, bytes, Mapping, Tensor)):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _tokenized(record: Mapping[str, Any], tokenizer: Any, max_length: int, where: str) -> Iterator[Example]:
    _checked(record, where)
    if record.get("messages") is not None:
        yield _conversation(record["messages"], tokenizer, where)
    elif _is_pair(record):
        yield _completion(record["prompt"], record["completion"], tokenizer)
    elif record["text"]:
        ids = _ended(tokenizer(record["text"], verbose=False)["input_ids"], tokenizer)
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            window = ids[start : start + max_length]
            yield {"input_ids": window, "labels": list(window)}


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


def _conversation(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str) -> Example:
    if not tokenizer.chat_template:
        raise CommandError(
            f"{where}: messages need a chat template, and this tokenizer has none; "
            'set tokenizer.chat_template and save it, or give "text" or "prompt" and "completion"'
        )
    text, spans = "", []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _templated(messages[:turn], tokenizer, where, prompt=True) if turn else ""
        through = _templated(messages[: turn + 1], tokenizer, where, prompt=False)
        if not (before.startswith(text) and through.startswith(before)):
            raise CommandError(
                f"{where}: the chat template writes earlier turns anew when message {turn + 1} is added, so the assistant's tokens "
                "cannot be told from the rest; accepted: a template that only appends, or one answer for each conversation"
            )
        spans.append((len(before), len(through)))
        text = through
    ids, labels = _labelled(text, spans, tokenizer, add_special_tokens=False)  # the template has written them
    return {"input_ids": ids, "labels": labels}


def _templated(messages: Sequence[Mapping[str, Any]], tokenizer: Any, where: str, *, prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template raises what it likes
        raise CommandError(f"{where}: the chat template refuses it: {' '.join(str(error).split())}") from error
    return text


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


def _checked(record: Any, where: str) -> Mapping[str, Any]:
    """The record, if it is of a known kind; where several are there, messages come before prompts, and prompts before text."""
    if not isinstance(record, Mapping):
        raise CommandError(f"{where}: holds {_what(record)}; accepted: a record with {KINDS}")
    messages = record.get("messages")
    if messages is not None:
        known = isinstance(messages, Sequence) and all(
            isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            for message in messages
        )
    elif _is_pair(record):
        known = isinstance(record["prompt"], str) and isinstance(record["completion"], str)
    else:
        known = isinstance(record.get("text"), str)
    if not known:
        held = ", ".join(f'"{name}" ({_what(value)})' for name, value in record.items()) or "nothing"
        raise CommandError(f"{where}: holds {held}; accepted: {KINDS}")
    return record


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CommandError(f"{where}: not JSON ({error})") from error


def _what(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null", bool: "a truth value"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _saved(path: Path, split: str) -> Sequence[Mapping[str, Any]]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise CommandError(f"{path} is a folder that datasets' save_to_disk did not write; accepted: such a folder, or a file")
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
    if Path(name).is_absolute() or name[:1] in ("", ".", "~") or name.count("/") > 1 or Path(name).suffix.lower() in FILES:
        raise CommandError(f"{source!r}: there is no such file or folder")
    datasets = _datasets(source)
    try:
        records: Sequence[Mapping[str, Any]] = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # of the network, the hub, or the files' format
        reason = " ".join(str(error).split())
        raise CommandError(f"{source!r} is no file or folder here, and datasets cannot load it: {reason}") from error
    return records


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CommandError(f"{source!r} needs the datasets library, not installed here: pip install datasets") from error
    return datasets
