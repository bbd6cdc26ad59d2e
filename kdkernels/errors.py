"""The error that the command line shows in one line."""


class CommandError(ValueError):
    """Something that whoever gave the input can put right; its text is one line that says how.

    For a program that calls the library it is a ValueError like the others.
    """
