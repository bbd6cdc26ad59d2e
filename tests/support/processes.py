"""Code in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_apart(code: str, *arguments: list[str]) -> None:
    """In processes of their own, one for each list of arguments."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen([sys.executable, "-c", code, *given], env=found) for given in arguments or [[]]]
    try:
        assert [process.wait(timeout=300) for process in started] == [0] * len(started)
    finally:
        for process in started:
            process.kill()
