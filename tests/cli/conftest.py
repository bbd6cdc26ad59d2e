"""A run of the demo, once for its tests in each process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in fresh processes, whose start is slow; one test does it for real."""
    from kdkernels.demo import loss_step  # what it takes may not be installed

    monkeypatch.setattr(loss_step, "_peak_in_fresh_process", lambda name, scratch: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """An uninterrupted run: its folder, results and screen."""
    from kdkernels.demo import loss_step
    from tests.support.demo import run

    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_step, "_peak_in_fresh_process", lambda name, scratch: None)
        results, screen = run(folder)
    return folder, results, screen


@pytest.fixture
def folder(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> Path:
    """A copy of the finished run's folder, to do harm to."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))
