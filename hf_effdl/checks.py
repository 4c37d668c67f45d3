"""Numbers that settings may have, refused by name."""

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
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name}={value!r}: it must be a number") from None


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`, as it came.

    Raises:
        ValueError: for anything else, also for True and False.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r}: it must be a whole number, at least {least}")
    return value
