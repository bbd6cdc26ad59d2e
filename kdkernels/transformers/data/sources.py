"""Raw records: from files, folders and names of the ``datasets`` library, each checked to be of a known kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from kdkernels.errors import CommandError
from kdkernels.transformers import hub
from kdkernels.transformers.data.conversations import turns
from kdkernels.transformers.data.conversations import what as _what

KINDS = (
    '"text" (a string), "messages" (a list of {"role", "content"}), or "prompt" and "completion" (two strings, or two such lists)'
)
ALONE = '; a "prompt" alone only to learn from, where the student writes every batch (--on-policy-fraction 1)'
TABLES = (".csv", ".tsv", ".parquet", ".arrow")
# a missing file of these names is not looked for on the hub
FILES = (".txt", ".md", ".json", ".jsonl", ".ndjson", *TABLES)


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
        return [checked_record(_json(line, f"{path}, line {number}"), f"{path}, line {number}", prompts) for number, line in lines]
    if suffix == ".json":
        records = _json(text, str(path))
        if not isinstance(records, list):
            raise CommandError(f"{path} holds {_what(records)}; accepted in a .json file: a list of records")
        return [checked_record(record, f"{path}, record {number}", prompts) for number, record in enumerate(records, 1)]
    return [{"text": text}]


def is_pair(record: Mapping[str, Any]) -> bool:
    return record.get("prompt") is not None and record.get("completion") is not None


def is_prompt(record: Mapping[str, Any]) -> bool:
    """Whether it is a prompt alone."""
    return record.get("prompt") is not None and all(record.get(name) is None for name in ("completion", "messages", "text"))


def checked_record(record: Any, where: str, prompts: bool = False) -> Mapping[str, Any]:
    """The record, if it is of a known kind; where several are there, messages come before prompts, and prompts before text."""
    if not isinstance(record, Mapping):
        raise CommandError(f"{where}: holds {_what(record)}; accepted: a record with {KINDS}")
    messages = record.get("messages")
    pair = [record["prompt"], record["completion"]] if is_pair(record) else []
    if messages is not None:
        known = is_list(messages)
        if known:
            turns(messages, f"{where}, message")
    elif pair:
        known = all(isinstance(part, str) for part in pair) or all(map(is_list, pair))
        for name, part in zip(("prompt", "completion"), pair, strict=True):
            if known and not isinstance(part, str):
                turns(part, f"{where}, {name} message")
    elif prompts and is_prompt(record):
        known = isinstance(record["prompt"], str) or is_list(record["prompt"])
        if known and not isinstance(record["prompt"], str):
            turns(record["prompt"], f"{where}, prompt message")
    else:
        known = isinstance(record.get("text"), str)
    if not known:
        held = ", ".join(f'"{name}" ({_what(value)})' for name, value in record.items()) or "nothing"
        hint = '; "conversations" as ShareGPT has them are to be named so' if "conversations" in record else ""
        raise CommandError(f"{where}: holds {held}; accepted: {KINDS}{ALONE if is_prompt(record) else hint}")
    return record


def is_list(value: Any) -> bool:
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
