"""The scripts of examples/ run as they are, and what they train learns."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "tiny")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs_and_learns(script: Path, tmp_path: Path) -> None:
    for library in re.findall(r"^from (trl|peft|datasets|transformers)", script.read_text(), re.MULTILINE):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"(?:'loss': '|cross-entropy )([\d.]+)", done.stdout + done.stderr)]
    assert len(losses) > 1
    assert losses[-1] < losses[0]
    assert re.search(r"\n\nHow to read it: (?:.+\n)+\Z", done.stdout), "what its figures mean is said at the end"
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
