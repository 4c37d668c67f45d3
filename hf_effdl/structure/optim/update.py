"""Split linearised Bregman iteration: the update as one pure function.

The formula has four texts: this one, two that have to be fast (`update_group` in `fused_gpu.py`, `fused_step.cpp`) and
the docstring of `SplitLBI`. `tests/test_split_lbi.py` and `tests/test_fused.py` keep them equal.

Source: Fu et al., "DessiLBI: Exploring Structural Sparsity of Deep Networks via Differential Inclusion Paths"
(https://arxiv.org/abs/2007.02010) and its journal version (https://arxiv.org/abs/1905.09449).
"""

import torch
from torch import Tensor

from hf_effdl.checks import real_number, tensor


def split_lbi_update(
    weight: Tensor,
    dual: Tensor,
    gamma: Tensor,
    direction: Tensor,
    *,
    lr: float,
    kappa: float,
    nu: float,
    path_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step of the iteration for one lifted tensor, from the old weight and the old Gamma:

        W <- W - kappa lr (d + (W - Gamma) / nu)
        V <- V + path_scale lr (W - Gamma) / nu        and afterwards  Gamma = kappa Prox(V)

    Args:
        weight: W, any shape.
        dual: V, the same shape; V starts at zero.
        gamma: Gamma = kappa Prox(V) of the old V.
        direction: d, the base optimizer's direction (the loss gradient, or its momentum average).
        lr: step size, the paper's alpha.
        kappa: damping; the path gets closer to a step function as it grows.
        nu: coupling between W and Gamma; `nu / kappa` is the time constant, in summed lr, of the ridge on units
            outside the support.
        path_scale: factor on the step of V alone; 1 is the paper.

    Returns:
        The new W (dtype of `weight`) and the new V (dtype of `dual`). Nothing is written in place.

    Relations: with `path_scale=1` the four lines of the paper (arXiv 2007.02010, eq. 3); the prox is left to the
    caller because a unit may span several tensors.

    Example:
        >>> import torch
        >>> w, v = torch.ones(2), torch.zeros(2)
        >>> split_lbi_update(w, v, torch.zeros(2), torch.zeros(2), lr=0.1, kappa=1.0, nu=1.0)
        (tensor([0.9000, 0.9000]), tensor([0.1000, 0.1000]))
    """
    tensors = {"weight": weight, "dual": dual, "gamma": gamma, "direction": direction}
    shapes = {name: tuple(tensor(name, value).shape) for name, value in tensors.items()}
    if len(set(shapes.values())) > 1 or not dual.is_floating_point():
        raise ValueError(f"shapes {shapes}, dual in {dual.dtype}: all have one shape, and V is floating point")
    lr, kappa, nu = real_number("lr", lr), real_number("kappa", kappa), real_number("nu", nu)
    if not (nu > 0 and kappa > 0):
        raise ValueError(f"kappa={kappa}, nu={nu}: both must be positive")
    path_scale = real_number("path_scale", path_scale)
    largest = torch.finfo(dual.dtype).max
    if any(abs(number) > largest for number in (kappa * lr, kappa * lr / nu, path_scale * lr / nu)):
        raise ValueError(
            f"lr={lr}, kappa={kappa}, nu={nu}, path_scale={path_scale}: no step is as large in {dual.dtype}"
        )
    new_weight, new_dual = weight.to(dual.dtype, copy=True), dual.clone()
    update_in_place(new_weight, new_dual, new_weight - gamma, direction, lr, kappa, nu, path_scale)
    return new_weight.to(weight.dtype), new_dual


def update_in_place(
    weight: Tensor, dual: Tensor, gap: Tensor, direction: Tensor, lr: float, kappa: float, nu: float, path_scale: float
) -> None:
    """`split_lbi_update` from `gap = W - Gamma`: three passes over memory instead of copies."""
    weight.add_(direction, alpha=-kappa * lr)
    weight.add_(gap, alpha=-kappa * lr / nu)
    dual.add_(gap, alpha=path_scale * lr / nu)
