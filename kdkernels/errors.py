"""The error that the command line shows in one line, and the way out of a library that is missing."""


class CommandError(ValueError):
    """Something that whoever gave the input can put right; its text is one line that says how.

    For a program that calls the library it is a ValueError like the others.
    """


def to_install(extra: str) -> str:
    """How the libraries of an extra of pyproject.toml are installed: this package is on no index."""
    return f"in a checkout of kdkernels, pip install --no-build-isolation '.[{extra}]'"
