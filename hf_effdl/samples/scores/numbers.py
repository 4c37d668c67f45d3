"""What users pass as numbers, as a tensor."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_numbers(values: Any, name: str = "scores") -> Tensor:
    """Numbers of any kind as a tensor on the CPU; raises a `TypeError` for texts, missing values and the like.

    Lists of Python's floats keep all their digits: they become float64. Columns of a table come in their order,
    whatever their index is.
    """
    ask = "pass a tensor, an array or a list of numbers"
    try:
        numbers = _tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} are no numbers ({error}); {ask}") from error
    if numbers.is_complex():
        raise TypeError(f"{name} are complex numbers ({numbers.dtype}); pass real ones")
    if numbers.layout != torch.strided or numbers.is_meta:
        raise TypeError(
            f"{name} are a {numbers.layout} tensor on {numbers.device}, whose numbers are not there; {ask}"
        )
    eighth = numbers.is_floating_point() and numbers.itemsize == 1  # which hardly anything can be asked about
    return (numbers.float() if eighth else numbers).detach().cpu()


def _tensor(values: Any) -> Tensor:
    if hasattr(values, "__array__") and not isinstance(values, Tensor):
        values = _array(values)
    numbers = torch.as_tensor(values)
    exact = numbers.is_floating_point() and not hasattr(values, "dtype")  # floats of Python have 64 bits
    return torch.as_tensor(values, dtype=torch.float64) if exact else numbers


def _array(values: Any) -> np.ndarray:
    """A table's column, or an array of another byte order or direction, as torch takes it."""
    if np.ma.is_masked(values):
        raise ValueError("some are masked")
    array = np.asarray(values)
    kind = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    return np.require(array, kind, ["C", "W"])  # torch warns of what cannot be written
