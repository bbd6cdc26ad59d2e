"""The CPU backend in C++ (csrc): loads the extension, which registers the low-level operators for CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kdkernels.backends import operators  # the schemas must exist before the extension registers for them
from kdkernels.backends.base import Backend
from kdkernels.backends.dtypes import FAST_DTYPES

NOT_BUILT = "the C++ extension is not built"


def _load() -> str:
    """Why the extension does not serve here; "" where it does."""
    assert operators.library is not None
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not found:
        return NOT_BUILT
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the C++ extension cannot be loaded ({error})"
    return ""


missing = _load()


def available() -> bool:
    """Whether the extension was built and loaded."""
    return not missing


BACKEND = Backend(
    name="native",
    operators=lambda: torch.ops.kdkernels,
    device="cpu",
    dtypes=FAST_DTYPES,
    usable=available,
    missing=missing,
    get_it="install g++ or clang++, and kdkernels again from its sources: pip install --no-build-isolation --force-reinstall "
    "--no-deps .",
    row_copies=3,
)


def instruction_sets() -> tuple[str, ...]:
    """Instruction sets of this build that this processor has; the one in use comes first. Empty without the extension."""
    return tuple(torch.ops.kdkernels.instruction_set_names().split(",")) if available() else ()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the row operations in another usable instruction set, for tests and comparisons; process-wide."""
    before = instruction_sets()[0]
    torch.ops.kdkernels.use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.kdkernels.use_instruction_set(before)
