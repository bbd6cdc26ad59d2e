"""What the commands have in common: their parser, types of arguments whose errors say what came and what is accepted, and what
is done where one ends early."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import takewhile
from pathlib import Path
from typing import Any

MEMORY = "a number of bytes, such as 1000000000, 1GB (powers of 1,000), 512MiB or 2g (powers of 1,024)"
_MEMORY = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e[0-9]{1,2})?) ?(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """argparse's, where what a command does not know is told with that command's usage and the nearest option that it knows."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # before what is missing: a mistyped option is often why
            flags = [text.partition("=")[0] for text in takewhile(lambda text: text != "--", given) if text.startswith("--")]
            self._refuse([flag for flag in flags if not self._known(flag)])
        found, unknown = super().parse_known_args(given, namespace)
        self._refuse(unknown)
        return found, []

    def _known(self, flag: str) -> bool:
        return any(option.startswith(flag) for option in self._option_string_actions)

    def _refuse(self, unknown: list[str]) -> None:
        unknown = [text for text in unknown if text != "--"]
        if not unknown:
            return
        flag = next((text for text in unknown if text.startswith("-")), None)
        if flag is None:
            self.error(f"got {' '.join(map(repr, unknown))}, which belongs to no option")
        name = flag.partition("=")[0]
        near = difflib.get_close_matches(name.replace("_", "-"), self._option_string_actions, n=1, cutoff=0.0)[0]
        self.error(f"{name} is not known; the nearest is {near}")


def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type out of a function whose ValueError says what came and what is accepted."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


def number(kind: Callable[[str], Any], accepted: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: what ``kind`` makes of the text, where that is ``allowed``."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"got {text!r}; accepted: {accepted}")
        return value

    return read


def memory(text: Any) -> int:
    """Bytes, of a text such as 512MiB, 1GB, 2g or 1000000000, or of an integer.

    KB, MB, GB and TB are powers of 1,000; KiB, MiB, GiB, TiB and the bare letters are powers of 1,024. ValueError for another text,
    for 0, and for parts of a byte.
    """
    found = _MEMORY.fullmatch(str(text).strip())
    if found is None:
        raise ValueError
    scale = (1000 if (found[3] or "").lower() == "b" else 1024) ** " kmgt".index((found[2] or " ").lower())
    size = Decimal(found[1].replace("_", "")) * scale
    if size != int(size) or not 1 <= size <= 2**50:
        raise ValueError
    return int(size)


def drop_output() -> None:
    """What is still to be printed goes nowhere: whoever read it has gone, as in ``| head``."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard output is no file, closed, or none
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def how_to_go_on(folder: Path | None, command: str) -> str:
    """What whoever interrupted a command with --resume can do; folder: its --out, None where that was not known yet."""
    if folder is not None and (folder.expanduser() / f"kdkernels-{command}.json").exists():
        return "the same command with --resume continues from the last checkpoint"
    return "nothing was written yet: the same command begins anew"
