"""Norms and proximal maps of units that may span several tensors, as tensor operations without a loop over units."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_effdl.structure.optim.sharding import is_sharded, local_part, whole


CACHED = 1 << 16  # entries: five tensors of so many in float32 fit into one core's cache


def unit_norm(
    tensors: Sequence[Tensor], axes: Sequence[int], blocks: Sequence[int], scales: Sequence[float]
) -> Tensor:
    """Norm of every unit over all the slices that belong to it: `n_c = sqrt(sum_t scale_t^2 ||T_t[c]||^2)`.

    Args:
        tensors: one tensor per slice; along `axes[t]` it has `units * blocks[t]` entries. A tensor that FSDP2 has
            sharded (`DTensor`) counts as a whole.
        axes: the axis of each tensor that the units run along.
        blocks: consecutive entries along that axis that belong to one unit (more than 1 where a convolution's output
            is flattened into a linear layer).
        scales: the factor each slice is multiplied with inside the norm.

    Returns:
        Tensor of shape `(units,)`, the same on every process.
    """
    total = None
    for tensor, axis, block, scale in zip(tensors, axes, blocks, scales, strict=True):
        squared = _squares(tensor, axis).unflatten(0, (-1, block)).sum(1) * scale**2
        total = squared if total is None else total + squared
    return total.sqrt()


def _squares(tensor: Tensor, axis: int) -> Tensor:
    """Sum of squares over all other axes, one value per entry of `axis`."""
    others = [dim for dim in range(tensor.ndim) if dim != axis]
    if axis == 0 or is_sharded(tensor) or tensor.device.type != "cpu":
        return whole(torch.linalg.vector_norm(tensor, dim=others) if others else tensor.abs()).square()
    # on CPU a norm over axes in front of others is slow, many times slower than sums of rows that stay in the cache
    parts = [part.square().sum(tuple(range(axis))) for part in tensor.split(rows_in_cache(tensor))]
    return torch.stack(parts).sum(0).flatten(1).sum(1) if tensor.ndim - axis > 1 else torch.stack(parts).sum(0)


def rows_in_cache(tensor: Tensor) -> int:
    """Rows of a tensor to work on at once: all, but on CPU so few that what is computed in between stays in cache."""
    if tensor.device.type != "cpu" or tensor.ndim == 0 or tensor.numel() <= CACHED:
        return max(len(tensor), 1) if tensor.ndim else 1
    return max(1, CACHED * len(tensor) // tensor.numel())


def per_entry(values: Tensor, tensor: Tensor, axis: int, block: int) -> Tensor:
    """Give every unit's value to all entries of its slice: `(units,)` to a shape that broadcasts with `tensor`.

    For a sharded tensor: with the part of it that this process holds.
    """
    if block > 1:
        values = values.repeat_interleave(block)
    return local_part(values.view([-1 if dim == axis else 1 for dim in range(tensor.ndim)]), tensor)


def shrinkage(norm: Tensor, threshold: Tensor) -> Tensor:
    """Factor of the group prox, `max(0, 1 - threshold / norm)`, which is 0 for a unit whose norm is 0."""
    return torch.where(norm > threshold, 1 - threshold / norm, torch.zeros_like(norm))


def soft_threshold(dual: Tensor, threshold: Tensor) -> Tensor:
    """Prox of `threshold * ||.||_1`: `sign(V) max(|V| - threshold, 0)`."""
    return dual - dual.clamp(-threshold, threshold)
