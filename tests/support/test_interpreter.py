"""The interpreter that kernels run in finds what a GPU would compute wrongly without a word."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.support.interpreter import as_on_a_gpu


@triton.jit
def twice_kernel(out_ptr, at):
    tl.store(out_ptr, at + at)


def test_an_index_that_overflows_is_an_error() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with as_on_a_gpu():
        twice_kernel[(1,)](out, 2**29)
        assert out.item() == 2**30
        with pytest.raises(InterpreterError, match="int32 overflows in add"):
            twice_kernel[(1,)](out, 2**30)
