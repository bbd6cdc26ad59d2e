"""Commands of ``python -m kdkernels``, and what they say where they end badly."""

from __future__ import annotations

import pytest

from kdkernels.cli import main


def ending(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, list[str]]:
    """Exit status and the lines on standard error."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stop:  # argparse's own way out
        status = int(stop.code or 0)
    return status, capsys.readouterr().err.strip().splitlines()


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """Exit status and the last line on standard error."""
    status, lines = ending(capsys, arguments)
    return status, lines[-1] if lines else ""


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line of a refused command."""
    status, lines = ending(capsys, arguments)
    (line,) = (line for line in lines if not line.startswith(("[transformers]", "usage:", " ")))
    assert status == 2
    return line
