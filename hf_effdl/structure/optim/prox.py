"""Norms and proximal maps of units that may span several tensors, as tensor operations without a loop over units."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_effdl.structure.optim.sharding import is_sharded, local_part, whole


# Entries: five tensors of so many in float32, 5 MB, fit into the last cache, and several threads can share them; with
# fewer, calls cost more than memory.
CACHED = 1 << 18


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
    return joint_norm([squares(*one) for one in zip(tensors, axes, strict=True)], blocks, scales)


def joint_norm(squared: Sequence[Tensor], blocks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """`unit_norm` from the `squares` of the tensors."""
    total = None
    for entries, block, scale in zip(squared, blocks, scales, strict=True):
        share = (entries.view(-1, block).sum(1) if block > 1 else entries) * scale**2
        total = share if total is None else total + share
    return total.sqrt()


def squares(tensor: Tensor, axis: int) -> Tensor:
    """Sum of squares over all other axes, one value per entry of `axis`."""
    if is_sharded(tensor):
        return whole(_norms(tensor, axis)).square()
    return joint_squares([squares_of_rows(part, axis) for part in tensor.split(rows_in_cache(tensor))], axis)


def squares_of_rows(rows: Tensor, axis: int) -> Tensor:
    """Of some rows of a tensor, what `joint_squares` makes its `squares` of."""
    # on CPU a norm over axes in front of others is slow, many times slower than sums of rows that stay in the cache
    return _norms(rows, axis) if _by_norms(rows, axis) else rows.square().sum(tuple(range(axis)))


def joint_squares(parts: Sequence[Tensor], axis: int) -> Tensor:
    """`squares` of a tensor from the `squares_of_rows` of all its rows."""
    if _by_norms(parts[0], axis):
        return torch.cat(parts).square()
    total = torch.stack(parts).sum(0)
    return total.flatten(1).sum(1) if total.ndim > 1 else total


def _by_norms(tensor: Tensor, axis: int) -> bool:
    return axis == 0 or tensor.device.type != "cpu"


def _norms(tensor: Tensor, axis: int) -> Tensor:
    others = [dim for dim in range(tensor.ndim) if dim != axis]
    return torch.linalg.vector_norm(tensor, dim=others) if others else tensor.abs()


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
    # one bound after the other: clamping between two tensors is many times slower on CPU
    return dual - torch.maximum(torch.minimum(dual, threshold), -threshold)
