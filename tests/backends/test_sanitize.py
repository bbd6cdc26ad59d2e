"""What ``make sanitize`` rests on: the extension that runs is the sanitized one, and a mistake in it ends the process.

The rest of that target are other tests, run in that build. Here they are skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kdkernels as kd
from kdkernels.backends import native

pytestmark = pytest.mark.skipif(
    os.environ.get("KDKERNELS_SANITIZE") != "1", reason="needs the sanitized extension: make sanitize builds it and runs these"
)

# A tensor over memory that is twice as long as its allocation: no check of shapes can see that, only a look at each access.
TOO_LONG = """
import ctypes, sys, torch
import kdkernels
from kdkernels.backends import native

with native.instruction_set(sys.argv[1]):
    owner = torch.zeros(1024)
    x = torch.frombuffer((ctypes.c_float * 2048).from_address(owner.data_ptr()), dtype=torch.float32).view(4, 512)
    z, t = torch.zeros(4, 512), torch.ones(())
    {call}
"""
CALLS = {
    "read": "torch.ops.kdkernels.block_stats(x, z, None, None, None, t, 1.0, [1.0, 0.0, 1.0, 0.0], '', False, False)",
    "written": (
        "torch.ops.kdkernels.row_loss(z, z.clone(), None, None, None, torch.zeros(4), t, 'jsd', 0.5, 1.0, 1.0, 0.0, "
        "[1.0, 0.0, 1.0, 0.0], True, False, x)"
    ),
}


def test_the_sanitized_extension_runs() -> None:
    (extension,) = Path(kd.__file__).parent.glob("_C*.so")
    mapped = Path("/proc/self/maps").read_text()
    assert str(extension) in mapped
    assert "libubsan" in mapped
    assert b"__asan_report" in extension.read_bytes()


@pytest.mark.parametrize("access", CALLS)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_memory_that_is_not_there_is_neither_read_nor_written(instruction_set: str, access: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TOO_LONG.format(call=CALLS[access])), instruction_set],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert ("WRITE of size" if access == "written" else "READ of size") in done.stderr
    assert "rows.h" in done.stderr
