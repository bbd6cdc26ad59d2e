"""The error that the command line shows in one line, and what errors say of a library that is missing and of a misspelt name."""

import difflib
from collections.abc import Iterable


class CommandError(ValueError):
    """Something that whoever gave the input can put right; its text is one line that says how.

    For a program that calls the library it is a ValueError like the others.
    """


def to_install(extra: str) -> str:
    """How the libraries of an extra of pyproject.toml are installed: this package is on no index."""
    return f"in a checkout of kdkernels, pip install --no-build-isolation '.[{extra}]'"


def nearest(given: str, known: Iterable[str]) -> str:
    """The end of an error about a name that is not known: the names that begin so, or else the one most like it, if any."""
    names = {name.lower(): name for name in known}
    found = [name for name in names if name.startswith(given.lower())] if given else []
    found = found or difflib.get_close_matches(given.lower(), names, n=1)
    return f"; the nearest {'are' if len(found) > 1 else 'is'} {', '.join(names[name] for name in found)}" if found else ""
