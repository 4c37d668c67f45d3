"""What users pass as numbers, as a tensor."""

from typing import Any

import torch
from torch import Tensor


def as_numbers(values: Any, name: str = "scores") -> Tensor:
    """Numbers of any kind as a tensor on the CPU; raises a `TypeError` for texts, missing values and the like."""
    try:
        numbers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} are no numbers ({error}); pass a tensor, an array or a list of numbers") from error
    if numbers.is_complex():
        raise TypeError(f"{name} are complex numbers ({numbers.dtype}); pass real ones")
    return numbers.detach().cpu()
