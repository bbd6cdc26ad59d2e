"""Types of command-line arguments. Their errors say what came and what is accepted; argparse puts the argument's name before."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

MEMORY = "a number of bytes, such as 1000000000, 1GB (powers of 1,000), 512MiB or 2g (powers of 1,024)"
_MEMORY = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e[0-9]{1,2})?) ?(?:([kmgt])(i?b)?|b)?", re.IGNORECASE)


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
