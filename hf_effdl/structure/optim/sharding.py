"""Tensors that FSDP2 shards over processes (`DTensor`), beside plain ones: their local part, their whole."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # asking for the class would import torch.distributed.tensor for everyone


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_part(values: Tensor, like: Tensor) -> Tensor:
    """The part of `values`, the same on every process, that belongs to the local part of `like`.

    `values` has as many axes as `like`, each as long or of length one.
    """
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    placements = [
        place if place.is_shard() and values.shape[place.dim] > 1 else Replicate() for place in like.placements
    ]
    values = DTensor.from_local(values, mesh, everywhere, run_check=False)
    return values.redistribute(placements=placements).to_local()


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """The tensor, placed as `like`, of which this process holds `part`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def on_any_process(flag: bool, tensors: Sequence[Tensor]) -> bool:
    """Whether a flag is set on any of the processes that share sharded `tensors`."""
    sharded = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    if sharded is None:
        return flag
    mesh = sharded.device_mesh
    value = torch.tensor(float(flag), device=local(sharded).device)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return bool(value)
