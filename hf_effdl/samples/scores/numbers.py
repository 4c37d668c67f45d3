"""What users pass as numbers, as a tensor."""

from typing import Any

import torch
from torch import Tensor


def as_numbers(values: Any, name: str = "scores") -> Tensor:
    """Numbers of any kind as a tensor on the CPU; raises a `TypeError` for texts, missing values and the like.

    Lists of Python's floats keep all their digits: they become float64.
    """
    try:
        numbers = torch.as_tensor(values)
        if numbers.is_floating_point() and not hasattr(values, "dtype"):
            numbers = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} are no numbers ({error}); pass a tensor, an array or a list of numbers") from error
    if numbers.is_complex():
        raise TypeError(f"{name} are complex numbers ({numbers.dtype}); pass real ones")
    return numbers.detach().cpu()
