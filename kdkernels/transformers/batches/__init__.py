"""Batches as every path here has them: how they are laid out, what models take of them, and what both models of a run read."""
