"""Least squares for a layer whose inputs have become fewer."""

import torch
from torch import Tensor

from hf_effdl.structure.calibration.grams import Gram


def refit(
    gram: Gram, kept: Tensor, ridge: float, intercept: bool = False, toward: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The matrix that says with some inputs, as nearly as it can, what a layer should say.

    `W_S = V_S + (C[:, S] - V_S G[S, S]) (G[S, S] + r I)^-1` minimises
    `sum w |t - W_S a_S|^2 + r |W_S - V_S|^2` over the positions of the Gram, with `G = sum w a a^T` and
    `C = sum w t a^T`. As long as nothing before the layer has changed, `C` is `W G`. With `V = 0` it is the closed
    form of arXiv 2302.04089 and 2602.23795; a ridge towards the weights as they were keeps what rows say nothing of.

    Args:
        gram: of the layer's inputs and targets.
        kept: ascending indices of the inputs that stay.
        ridge: `r`, in units of the mean diagonal of `G[S, S]`; at least 0.
        intercept: also fit what is added to the bias.
        toward: `V`, `(outputs, inputs)`; default: zero.

    Returns:
        The new matrix, `(outputs, inputs)`, zero where an input is gone; and what to add to the bias, or None.
    """
    products, targets, kept = gram.products, gram.targets, kept.to(gram.products.device)
    if intercept:  # the same on inputs and targets without their means
        weights = gram.weights.clamp_min(torch.finfo(products.dtype).tiny)
        mean, said = gram.sums / weights, gram.target_sums / weights
        products = products - weights * torch.outer(mean, mean)
        targets = targets - weights * torch.outer(said, mean)
    result, square = torch.zeros_like(targets), products[kept][:, kept]
    old = result[:, kept] if toward is None else toward[:, kept].to(targets)
    result[:, kept] = old + solve(square, (targets[:, kept] - old @ square).T, ridge).T
    return result, said - result @ mean if intercept else None


def solve(products: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """`(products + r I)^-1 targets`, with `r` in units of the mean diagonal.

    A matrix that is singular to the last digit gets a larger `r`, as little as is needed.
    """
    scale = products.diagonal().mean().clamp_min(torch.finfo(products.dtype).tiny)
    identity = torch.eye(len(products), dtype=products.dtype, device=products.device)
    least = torch.finfo(products.dtype).eps
    for added in [ridge, *(max(ridge, least) * 10.0**power for power in range(1, 9))]:
        factor, failed = torch.linalg.cholesky_ex(products + added * scale * identity)
        if not int(failed):
            return torch.cholesky_solve(targets, factor)
    return torch.zeros_like(targets)  # of inputs that are all zero


def inverse(products: Tensor, ridge: float) -> Tensor:
    """`(products + r I)^-1`."""
    return solve(products, torch.eye(len(products), dtype=products.dtype, device=products.device), ridge)
