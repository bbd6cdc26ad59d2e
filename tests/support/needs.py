"""What a machine may lack that runs the library all the same, and the tests that are then skipped. CI has all of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.support.cxx import CXX

needs_compiler = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler to compile the kernel for a CPU with")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="peak memory is read by /proc/self/clear_refs, which is not there",
)
