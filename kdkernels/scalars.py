"""Checks of numbers, flags and names, of Python or NumPy: an error names the argument, what came and what is accepted."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

from kdkernels.divergences import is_number
from kdkernels.errors import nearest


def number(
    name: str, value: Any, accepted: str, low: float = -math.inf, high: float = sys.float_info.max, *, above: bool = False
) -> float:
    """A number from low (``above``: greater than that) to high; by default any that float64 holds."""
    if not is_number(value):
        raise TypeError(f"{name} is {accepted}, got {type(value).__name__}")
    value = value if isinstance(value, (int, float)) else float(value)  # NumPy would compare in a dtype of its own
    # not math.isfinite: a compiled graph may hold the number as a symbol; written so that NaN is refused
    if not (value >= low and -sys.float_info.max <= value <= high) or (above and value == low):
        raise ValueError(f"{name} is {accepted}, got {value}")
    return float(value)


# Factors reach the backends as float32. Within these bounds they, and T² times a weight, are numbers there and not 0 or infinite.
# The bounds are written out, as a compiled graph may hold a named number as a symbol, which no text can be made of.
def positive(name: str, value: Any, otherwise: str = "") -> float:
    """otherwise: what is accepted besides, as " or None"."""
    return number(name, value, f"a positive number from 1e-18 to 1e18{otherwise}", 1e-18, 1e18)


def temperature_of(name: str, value: Any) -> float:
    # Above, float32 knows p and q no better than they differ, and the divergence loses its last digits (docs/numerics.md).
    return number(name, value, "a positive number from 1e-9 to 1e5", 1e-9, 1e5)


def weight_of(name: str, value: Any) -> float:
    return number(name, value, "a number of at least 0 and at most 1e18", 0.0, 1e18)


def share(name: str, value: Any, otherwise: str = "") -> float:
    return number(name, value, f"a number in [0, 1]{otherwise}", 0.0, 1.0)


def whole(name: str, value: Any, accepted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} is {accepted}, got {type(value).__name__}")
    return int(value)


def count(name: str, value: Any, low: int = 1, high: int | None = None, *, kind: str = "a whole number") -> int:
    """A whole number from low to high (None: any)."""
    accepted = f"{kind} of at least {low}" if high is None else f"{kind} from {low} to {high}"
    found = whole(name, value, accepted)
    if found < low or (high is not None and found > high):
        raise ValueError(f"{name} is {accepted}, got {found}")
    return found


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.bool_):
        raise TypeError(f"{name} is True or False, got {type(value).__name__}")
    return bool(value)


def one_of(name: str, value: Any, accepted: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in accepted:
        near = nearest(value, accepted) if isinstance(value, str) else ""
        raise ValueError(f"{name} {value!r} is not known; accepted: {', '.join(accepted)}{near}")
    return value


def vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    if vocab_size is None and student != teacher:
        raise ValueError(
            f"student_head has {student} rows and teacher_head {teacher}; if the larger is padded, pass vocab_size= the number "
            "of tokens that both know"
        )
    return cut_vocabulary(min(student, teacher), vocab_size, "the rows that both heads have")


def cut_vocabulary(rows: int, vocab_size: int | None, what: str) -> int:
    """vocab_size, or all ``rows``; ``what`` these are."""
    if vocab_size is None:
        return rows
    size = whole("vocab_size", vocab_size, "an integer")
    if not 1 <= size <= rows:
        raise ValueError(f"vocab_size={size}; accepted: 1 to {rows}, {what}")
    return size
