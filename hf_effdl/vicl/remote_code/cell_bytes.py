"""Cosines between cells from products of whole numbers: nearly single precision, quicker where bytes multiply so."""

from typing import NamedTuple

import torch
from torch import Tensor


STEPS = 127  # of the large part, and in half of one of its steps as many of the small part
UNIT_BYTES = 4


class CellBytes(NamedTuple):
    """Unit features of the cells of an image as `unit * (large + small / 254)`.

    Args:
        large, small: `(G, d)` int8.
        unit: their largest entry over 127.
    """

    large: Tensor
    small: Tensor
    unit: float

    @classmethod
    def of(cls, cells: Tensor) -> "CellBytes":
        """Of features `(G, d)` that are not all zero."""
        unit = float(cells.abs().max().clamp(min=1e-12)) / STEPS
        steps = cells / unit
        large = steps.round()
        return cls(large.to(torch.int8), ((steps - large) * 2 * STEPS).round().to(torch.int8), unit)

    @property
    def packed(self) -> Tensor:
        """`(2 G + 1, d)` int8, all of it in one tensor."""
        last = torch.zeros_like(self.large[:1])
        last[0, :UNIT_BYTES] = torch.tensor([self.unit], dtype=torch.float32).view(torch.int8)
        return torch.cat([self.large, self.small, last])

    @classmethod
    def unpacked(cls, packed: Tensor) -> "CellBytes":
        """From `packed`, without a copy."""
        count = len(packed) // 2
        unit = packed[-1, :UNIT_BYTES].clone().view(torch.float32)
        return cls(packed[:count], packed[count : 2 * count], float(unit))

    def cosines(self, other: "CellBytes") -> Tensor:
        """`(G, G')` inner products with the cells of another image.

        Of the four products the one of both small parts is left out. With units u and v that errs by u v sqrt(d) / 12,
        a standard deviation, and rounding by sqrt(u^2 + v^2) / 880: together some 4e-6 for features as vision
        transformers have them, with entries up to 0.15, and 4e-5 where one is a half.
        """
        large, both = (torch._int_mm(self.large, part.T).float() for part in (other.large, other.small))
        both += torch._int_mm(self.small, other.large.T)
        return large.add_(both, alpha=1 / (2 * STEPS)).mul_(self.unit * other.unit)
