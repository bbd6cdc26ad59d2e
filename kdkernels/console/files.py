"""Files that a command makes: written whole or not at all, and read back only if they are what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdkernels.errors import CommandError

# of a write that began well; what cannot be opened for writing at all also has a name
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def marker(folder: Path, command: str) -> Path:
    """The file by which a folder is known to be made by ``command``."""
    return folder / f"kdkernels-{command}.json"


def check(folder: Path, command: str, argument: str = "--out") -> None:
    """Refuse an output folder that holds anything but an earlier run of the same command; nothing is written.

    command: its name, as the messages and the marker file kdkernels-COMMAND.json have it. argument: what the messages call the
    folder.
    """
    mark = marker(folder, command)
    accepted = f"accepted: a folder of an earlier {command}, an empty one, or a new name"
    try:
        if folder.exists() and not folder.is_dir():
            raise CommandError(f"{argument} {folder} is a file; {accepted}")
        if folder.exists() and not mark.exists() and any(folder.iterdir()):
            hint = f"; the {command} that it is a part of is in {folder.parent}" if marker(folder.parent, command).exists() else ""
            raise CommandError(f"{argument} {folder} holds other files (there is no {mark.name}){hint}; {accepted}")
    except OSError as error:
        raise CommandError(f"{argument} {folder} cannot be read: {error.strerror}") from error


def claim(folder: Path, command: str, argument: str = "--out") -> None:
    """Make the output folder, or take an earlier one of the same command; what ``check`` refuses is left alone."""
    check(folder, command, argument)
    mark = marker(folder, command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("*.tmp"):
            left_over.unlink()
        write(mark, f'{{"made_by": "python -m kdkernels {command}"}}\n'.encode())
    except OSError as error:
        raise CommandError(f"{argument} {folder} cannot be written: {error.strerror}") from error


@contextmanager
def writing(folder: Path, then: str, argument: str = "--out") -> Iterator[None]:
    """Inside, a file of the folder that cannot be written, as on a full disk, is a CommandError, whichever library was writing it.

    then: what can be done about it, for the message.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        reason = _unwritable(error, folder)
        if reason is None:
            raise
        raise CommandError(f"{argument} {folder} cannot be written: {reason}; {then}") from error


def _unwritable(error: BaseException | None, folder: Path) -> str | None:
    """Why a file could not be written, if that is what the error, or one that it hides, is about.

    safetensors and tokenizers raise classes of their own with the system's words in them; torch's writer has lost these.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, OSError):
            names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
            within = any(
                folder.absolute() in (here := Path(name).absolute()).parents or here == folder.absolute() for name in names
            )
            if error.errno in UNWRITABLE or (within and not isinstance(error, FileExistsError)):
                return error.strerror
        for number in UNWRITABLE:
            if f"{os.strerror(number)} (os error {number})" in text:
                return os.strerror(number)
        # a writer that could not finish; a reader says PytorchStreamReader
        if isinstance(error, RuntimeError) and any(sign in text for sign in ("StreamWriter", "unexpected pos", "iostream error")):
            return "torch.save could not write a whole file, as where the disk is full"
        error = error.__cause__ or error.__context__
    return None


def write(path: Path, content: bytes) -> None:
    """Replace the file in one move: a run that is killed leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # room for what comes after
        raise
    os.replace(temporary, path)


def save(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Tensors and a description in one safetensors file, with a digest of both, which is returned.

    The same content makes the same bytes in every process.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    found = digest(tensors, text)
    # One entry: of several the library leaves the order to chance.
    write(path, safetensors.torch.save(tensors, {"kdkernels": json.dumps({"about": text, "digest": found})}))
    return found


def seal(path: Path) -> str:
    """The digest that ``save`` returned, as the file has it; ``load`` is what compares it with the content."""
    with safe_open(path, "pt") as file:
        return str(json.loads(file.metadata()["kdkernels"])["digest"])


def load(path: Path, expected: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save`` wrote. A file that is cut short or changed is a CommandError that names it.

    expected: the digest that ``save`` returned; then a whole file of other content is an error too.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["kdkernels"])
            # Cloned: memory of our own, aligned as torch aligns it, so that a resumed run computes the same bits.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata["digest"] != digest(tensors, metadata["about"]):
            raise ValueError("its digest does not match")
        if expected not in (None, metadata["digest"]):
            raise ValueError("it is another file than the one that was written here")
        about: dict[str, Any] = json.loads(metadata["about"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return tensors, about


def damaged(path: Path, reason: str) -> CommandError:
    return CommandError(f"{path} is damaged ({' '.join(reason.split())}); delete it and run again: what it held is made anew")


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of names, dtypes, shapes and contents, wherever the tensors are, and of the text: 32 hexadecimal digits of BLAKE2b."""
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
