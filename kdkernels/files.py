"""Files that a command makes: written whole or not at all, and read back only if they are what was written."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdkernels.errors import CommandError


def claim(folder: Path, command: str) -> None:
    """Make the output folder, or take an earlier one of the same command; anything else that stands there is left alone.

    command: its name, as the messages and the marker file kdkernels-COMMAND.json have it.
    """
    marker = folder / f"kdkernels-{command}.json"
    accepted = f"accepted: a folder of an earlier {command}, an empty one, or a new name"
    try:
        if folder.exists() and not folder.is_dir():
            raise CommandError(f"--out {folder} is a file; {accepted}")
        if folder.exists() and not marker.exists() and any(folder.iterdir()):
            raise CommandError(f"--out {folder} holds other files (there is no {marker.name}); {accepted}")
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.tmp"):
            left_over.unlink()
        write(marker, f'{{"made_by": "python -m kdkernels {command}"}}\n'.encode())
    except OSError as error:
        raise CommandError(f"--out {folder} cannot be written: {error.strerror}") from error


def write(path: Path, content: bytes) -> None:
    """Replace the file in one move: a run that is killed leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Tensors and a description in one safetensors file, with a digest of both."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    write(path, safetensors.torch.save(tensors, {"about": text, "digest": _digest(tensors, text)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save`` wrote. A file that is cut short or changed is a CommandError that names it."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            # Cloned: memory of our own, aligned as torch aligns it, so that a resumed run computes the same bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata["digest"] != _digest(tensors, metadata["about"]):
            raise ValueError("its digest does not match")
        about: dict[str, Any] = json.loads(metadata["about"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return tensors, about


def damaged(path: Path, reason: str) -> CommandError:
    return CommandError(f"{path} is damaged ({' '.join(reason.split())}); delete it and run again: what it held is made anew")


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
