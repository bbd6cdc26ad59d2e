"""A teacher's most likely tokens on disk: written by ``write_cache``, read by ``TopKCache``."""

from kdkernels.transformers.cache.manifest import TOKENIZER
from kdkernels.transformers.cache.read import TopKCache, is_cache
from kdkernels.transformers.cache.write import write_cache

__all__ = ["TOKENIZER", "TopKCache", "is_cache", "write_cache"]
