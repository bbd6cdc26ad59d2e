"""The error that the command line shows in one line."""


class CommandError(Exception):
    """Something that the person who started the command can put right; its text is one line that says how."""
