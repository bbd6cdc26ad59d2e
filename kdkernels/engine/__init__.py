"""One loss step: which rows count, how the work is cut, and the loops that carry it out."""
