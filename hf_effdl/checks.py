"""Numbers that settings may have, refused by name."""

from typing import Any


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`, as it came.

    Raises:
        ValueError: for anything else, also for True and False.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r}: it must be a whole number, at least {least}")
    return value
