"""The command line."""

from kdkernels.cli.commands import main

__all__ = ["main"]
