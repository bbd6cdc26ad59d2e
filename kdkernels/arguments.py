"""Types of command-line arguments. Their errors say what came and what is accepted; argparse puts the argument's name before."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


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
