"""What goes wrong in a run, told as the command's own errors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from kdkernels.console import files
from kdkernels.errors import CommandError
from kdkernels.transformers.config import KDConfig


@contextmanager
def refused() -> Iterator[None]:
    """The library's errors about what it was given, as the command's."""
    try:
        yield
    except CommandError:
        raise
    except torch.OutOfMemoryError as error:
        raise CommandError(
            "the GPU's memory is too small: try a smaller --batch-size (and more --gradient-accumulation), --max-length or "
            "--memory-budget, --gradient-checkpointing, or --bf16"
        ) from error
    except (ValueError, TypeError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise CommandError(
            "this machine's memory is too small: try a smaller --batch-size, --max-length or --memory-budget"
        ) from error


@contextmanager
def reporting(config: KDConfig) -> Iterator[None]:
    """Errors of where the log is sent to, such as of an account that is not logged in, as the command's."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in (config.report_to or ()):
            raise
        raise CommandError(f"--report-to {library}: {' '.join(str(error).split())}") from error


def of_option(option: str, load: Callable[..., Any], name: str | Path, *arguments: Any, **options: Any) -> Any:
    """What ``load`` makes of an option's value; its error names the option."""
    try:
        return load(name, *arguments, **options)
    except CommandError as error:
        raise CommandError(f"--{option.replace('_', '-')}: {error}") from error


def unreadable(error: Exception) -> bool:
    """Whether it is of a reader of a checkpoint's files: of safetensors, pickles, torch's archives or JSON."""
    kinds = (SafetensorError, pickle.UnpicklingError, EOFError, OSError, json.JSONDecodeError)
    return isinstance(error, kinds) or "PytorchStreamReader" in str(error)


def json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise files.damaged(path, str(error)) from error
