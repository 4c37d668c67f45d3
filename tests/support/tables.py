"""Made-up tables of measured performance."""

import torch
from torch import Tensor


CASES = {
    "all pairs": (list(range(14)), None),
    "all examples on some images": ([1, 3, 4, 7, 8, 12, 13], None),
    "some examples on all images": (list(range(14)), 6),
    "some examples on some images": ([0, 2, 5, 6, 9, 11], 5),
}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(n: int, labelled: list[int], count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Measured candidates, in a random order, and performance; of some images, and of all others or of `count`."""
    generator = drawn(seed)
    count = n - 1 if count is None else count
    measured, performance = torch.full((n, count), -1), torch.zeros(n, count)
    for row in labelled:
        others = torch.randperm(n, generator=generator)
        measured[row] = others[others != row][:count]
        performance[row] = torch.rand(count, generator=generator) + 0.1 * row
    return measured, performance
