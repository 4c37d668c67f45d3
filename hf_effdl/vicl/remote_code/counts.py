"""Whole numbers that people pass: Python's and NumPy's, and never True."""

from numbers import Integral
from typing import Any


def counted(name: str, value: Any, least: int = 1) -> int:
    """The number as an int.

    Raises:
        ValueError: it is none, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r}: pass a whole number of at least {least}")
    return int(value)
