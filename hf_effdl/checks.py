"""Numbers that settings may have, refused by name."""

import operator
from collections.abc import Sequence
from typing import Any


def one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of some choices, as it came; raises ValueError for anything else, of any type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}={value!r}: it must be one of {tuple(choices)}")
    return value


def real_number(name: str, value: Any) -> float:
    """A number of Python, NumPy or a tensor of one entry, as a float; raises ValueError for anything else."""
    try:
        if isinstance(value, str | bytes) or _is_bool(value):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}={value!r}: it must be a number") from None


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`, of Python, NumPy or a tensor of one entry, as an int.

    Raises:
        ValueError: for anything else, also for True and False.
    """
    try:
        number = None if _is_bool(value) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    if number is None or number < least:
        raise ValueError(f"{name}={value!r}: it must be a whole number, at least {least}")
    return number


def _is_bool(value: Any) -> bool:
    """Whether a value is True or False, of Python, NumPy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
