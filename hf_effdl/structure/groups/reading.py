"""What Python reads of tensors in a forward pass, and forward passes in which it reads a truth the other way round.

A number that leaves the tensors can decide anything: `if float(x.mean()) > 3` shows in no answer before it is too
late. So it counts as an answer itself; and what stands behind a condition that never held is tried too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


TRUTH = Tensor.__bool__
READERS = {Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.tolist, Tensor.numpy, TRUTH}
READERS |= {Tensor.__array__}
ATTENTION = torch.nn.functional.scaled_dot_product_attention


class Reading(TorchFunctionMode):
    """Within, everything that is read of a tensor is noted.

    Args:
        against: number of the truth that is told the other way round, in the order in which they are read; None: none.

    Attributes:
        values: what was read, in that order; of a truth that one number decides, that number too.
        truths: how many truths were read.
        double: whether all numbers with fractions that came up are in double precision.
    """

    def __init__(self, against: int | None = None) -> None:
        super().__init__()
        self.against = against
        self.values: list[Tensor] = []
        self.truths = 0
        self.double = True

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is ATTENTION:
            _check_heads(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.double = self.double and not any(map(_is_single, result if isinstance(result, tuple) else (result,)))
        if func in READERS:
            self.values.append(args[0].detach().clone())
        elif _is_one_truth(result):
            self.values += [value.detach().clone() for value in args if _is_one_number(value)]
        if func is not TRUTH:
            return result
        self.truths += 1
        return not result if self.truths - 1 == self.against else result


def _check_heads(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
    """Refuse what has no heads, as wrong counts leave it: torch 2.10 divides by their number, and the process dies."""
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if any(shape[-3:-2] == (0,) for shape in shapes):
        raise ValueError(f"attention of queries, keys and values of shapes {shapes}")


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _is_one_truth(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.numel() == 1


def _is_one_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
