"""Putting units in: the same class with larger tensors that computes what it computed before."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_effdl.structure.groups import Group, Slice, set_sizes
from hf_effdl.structure.slim import set_config
from hf_effdl.structure.stock import config_ties


@torch.no_grad()
def widen(model: nn.Module, group: Group, add: int = 8, init: str = "zero-out", *, seed: int = 0) -> nn.Module:
    big = deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for part in sorted(group.slices, key=lambda part: part.role == "input"):
        path, _, leaf = part.tensor.rpartition(".")
        module = big.get_submodule(path)
        old = getattr(module, leaf)
        new = torch.cat([old.detach(), _new_entries(old, part, add, generator)], part.axis)
        setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        set_sizes(module)
    if isinstance(model, PreTrainedModel):
        sizes = {group.name: group.units + add}
        set_config(big, config_ties(model, [group]), sizes)
    return big


def _new_entries(old: Tensor, part: Slice, add: int, generator: torch.Generator) -> Tensor:
    shape = list(old.shape)
    shape[part.axis] = add * part.block
    if part.role == "row":
        return torch.randn(shape, generator=generator).to(old) * old.square().mean().sqrt()
    if part.role in ("scale", "mean", "var"):
        return old.mean().expand(shape).clone()
    return torch.zeros(shape).to(old)
