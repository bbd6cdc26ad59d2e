"""The CPU backend in C++ (csrc): loads the extension, which registers the low-level operators for CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kdkernels.backends import operators  # the schemas must exist before the extension registers for them


def _load() -> bool:
    assert operators.library is not None
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not found:
        return False
    torch.ops.load_library(found[0])
    return True


_loaded = _load()


def available() -> bool:
    """Whether the extension was built and loaded."""
    return _loaded


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of this build that this processor has; the one in use comes first. Empty without the extension."""
    return tuple(torch.ops.kdkernels.instruction_set_names().split(",")) if _loaded else ()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the row operations in another usable instruction set, for tests and comparisons; process-wide."""
    before = instruction_sets()[0]
    torch.ops.kdkernels.use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.kdkernels.use_instruction_set(before)
