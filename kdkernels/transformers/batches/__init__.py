"""Batches as every path here has them: how they are laid out, what models take of them, and what both models of a run read."""

from kdkernels.transformers.batches.inputs import Collated, Inputs, check_examples, looked_at
from kdkernels.transformers.batches.layout import (
    IGNORED,
    PADDING,
    TARGETS,
    Prepared,
    document_numbers,
    documents,
    laid_out,
    next_tokens,
    plain,
    positions_of,
)
from kdkernels.transformers.batches.reading import Limits, most_positions, numbers_positions, takes

__all__ = [
    "IGNORED",
    "PADDING",
    "TARGETS",
    "Collated",
    "Inputs",
    "Limits",
    "Prepared",
    "check_examples",
    "document_numbers",
    "documents",
    "laid_out",
    "looked_at",
    "most_positions",
    "next_tokens",
    "numbers_positions",
    "plain",
    "positions_of",
    "takes",
]
