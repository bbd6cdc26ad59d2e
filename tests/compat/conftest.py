"""What holds for the tests of patched libraries."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports each trainer that is made, except where it is told that these are tests."""
    monkeypatch.setenv("CI", "1")
