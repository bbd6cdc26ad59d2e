"""Training data: read from its source, tokenized with labels, and collated."""

from kdkernels.transformers.data.collator import Collator
from kdkernels.transformers.data.records import Example, Prepared, examples, prepare
from kdkernels.transformers.data.sources import read

__all__ = ["Collator", "Example", "Prepared", "examples", "prepare", "read"]
