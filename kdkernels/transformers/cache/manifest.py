"""The files of a cache by their names, and its manifest: what it was made from, sealed by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdkernels.console import files
from kdkernels.errors import CommandError

COMMAND = "cache"
MANIFEST, INDEX, TOKENIZER = "manifest.json", "index.safetensors", "tokenizer"
VERSION = 2
READABLE = (1, VERSION)  # of version 1 the log-probability of the others was not kept


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(as_json(content).encode(), digest_size=16).hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files.write(folder / MANIFEST, (as_json({**content, "digest": _seal(content)}) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise missing(path)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content.pop("digest") != _seal(content):
            raise ValueError("its digest does not match")
        if content["version"] not in READABLE:
            readable = " and ".join(map(str, READABLE))
            raise ValueError(f"it is of version {content['version']}, and this library reads versions {readable}")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise files.damaged(path, str(error)) from error
    return content


def missing(path: Path) -> CommandError:
    return CommandError(f"{path} is missing: make the cache with the same arguments again, which makes what is missing")
