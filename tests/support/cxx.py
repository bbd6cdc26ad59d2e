"""A C++ compiler for kernels in CUDA C++ that run on a CPU, and a folder for what it makes."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
HERE = Path(__file__).parent
# setjmp's checked form knows of one stack only.
OPTIONS = ("-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", f"-I{HERE}")


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def folder() -> Path:
    """A new one, until the process ends."""
    return Path(tempfile.mkdtemp(dir=_kept().name))


def compile(*arguments: str) -> None:
    assert CXX is not None
    done = subprocess.run([*shlex.split(CXX), *OPTIONS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
