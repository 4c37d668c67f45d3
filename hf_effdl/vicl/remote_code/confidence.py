"""How sure an answer is: of itself, and, learnt on pool images, how good it can be expected to be."""

import torch
from torch import Tensor

from .visual_tasks import PICTURES


def certainty(painted: Tensor) -> Tensor:
    """Of masks `(..., c, h, w)`: how far from grey they are where they are white, everywhere where nothing is; (...,).

    Example:
        >>> certainty(torch.tensor([[[1.0, 0.75, 0.0]]]))
        tensor(0.7500)
    """
    white = painted.float().mean(-3)
    sure = (2 * white - 1).abs()
    inside = (white >= 0.5).float()
    inside = torch.where(inside.sum((-2, -1), keepdim=True) > 0, inside, torch.ones_like(inside))
    return (sure * inside).sum((-2, -1)) / inside.sum((-2, -1))


def learn_confidence(certain: Tensor, scores: Tensor, performance: Tensor) -> list[float]:
    """Weights of `expected_performance`, by least squares on images whose performance is known, `(L,)` each."""
    features = torch.stack([torch.ones_like(certain), certain, scores], 1).double()
    target = performance.double()
    # a little towards the mean, so that few images do not make it wild
    gram = features.T @ features + torch.diag(torch.tensor([0.0, 1.0, 1e-3])).double()
    weights = torch.linalg.lstsq(gram, (features.T @ (target - target.mean()))[:, None]).solution[:, 0]
    weights[0] += target.mean()
    low, high = float(performance.min()), float(performance.max())
    return [*weights.tolist(), low, high]


def expected_performance(weights: list[float], certain: Tensor, scores: Tensor) -> Tensor:
    """What an answer can be expected to be worth, within what was seen on pool images; `(B,)`."""
    offset, of_certainty, of_score, low, high = weights
    return (offset + of_certainty * certain + of_score * scores).clamp(low, high)


def confidence_of(task: str, painted: Tensor, scores: Tensor, learnt: list[float] | None) -> list[float | None]:
    """How sure each of some answers `(B, 3, h, w)` is; None for pictures.

    Args:
        task: by name.
        scores: `(B, m)` of the examples shown.
        learnt: weights of `expected_performance`; None: certainty is all that is known.
    """
    if task in PICTURES:
        return [None] * len(painted)
    sure = certainty(painted).cpu()
    return (sure if learnt is None else expected_performance(learnt, sure, scores[:, 0].float().cpu())).tolist()
