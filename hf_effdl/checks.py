"""What settings and arguments may be, refused by name."""

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


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


def flag(name: str, value: Any) -> bool:
    """True or False, also NumPy's, as a bool; raises ValueError for anything else."""
    if not _is_bool(value) or getattr(value, "size", 1) != 1 or isinstance(value, Tensor):
        raise ValueError(f"{name}={value!r}: it must be True or False")
    return bool(value)


def instance(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> Any:
    """An object of some class, as it came; raises TypeError, saying what to pass, for anything else."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is a {type(value).__name__}: pass {what}")
    return value


def tensor(name: str, value: Any) -> Tensor:
    """A real tensor, as it came; raises TypeError for anything else."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: pass a torch tensor, torch.as_tensor(...)")
    if value.is_complex() or value.is_meta:
        raise TypeError(f"{name} is a {value.dtype} tensor on {value.device}: pass real numbers that are there")
    return value


def path(name: str, value: Any) -> Path:
    """A text or path, as a path; raises TypeError for anything else."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is a {type(value).__name__}: pass the path of a file or folder")
    return Path(value)


def _is_bool(value: Any) -> bool:
    """Whether a value is True or False, of Python, NumPy or torch."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
