"""``python -m kdkernels distill``: from names of models and data to a trained student."""
