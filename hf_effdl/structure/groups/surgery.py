"""Silencing and removing units, in place, and the sizes that layers report afterwards."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.group import PRODUCERS, Group


@torch.no_grad()
def mask(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Silence, in place, every unit that is not kept: its rows, bias, norm weight and norm bias become zero.

    Args:
        model: changed in place and returned.
        groups: the groups that `kept` speaks of.
        kept: indices of the kept units by group name; groups not named keep all.
    """
    for group in groups:
        if group.name not in kept:
            continue
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[kept[group.name].cpu()] = False
        for part in group.slices:
            if part.role in PRODUCERS:
                tensor = model.get_parameter(part.tensor)
                index = gone.repeat_interleave(part.block).nonzero().flatten().to(tensor.device)
                tensor.index_fill_(part.axis, index, 0)
    return model


@torch.no_grad()
def cut(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Remove, in place, every unit that is not kept: all its slices, and the sizes that the modules report.

    Args:
        model: changed in place and returned.
        groups: the groups that `kept` speaks of.
        kept: ascending indices of the kept units by group name; groups not named keep all.
    """
    for group in groups:
        if group.name not in kept:
            continue
        for part in group.slices:
            module, leaf = _owner(model, part.tensor)
            old = getattr(module, leaf)
            index = (
                torch.arange(group.units * part.block).view(group.units, part.block)[kept[group.name].cpu()].flatten()
            )
            new = old.detach().index_select(part.axis, index.to(old.device)).clone()
            setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
            set_sizes(module)
    return model


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer convolves every channel on its own, into one or several outputs."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def set_sizes(module: nn.Module) -> None:
    """Bring the sizes that a layer reports in line with its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if is_depthwise(module):  # by the sizes before; outputs per channel stay
            module.groups = module.weight.shape[0] * module.in_channels // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(module.running_mean if module.running_mean is not None else module.weight)


def share_config(model: nn.Module, config: Any) -> None:
    """Give a config to a transformers model and to its parts, which share one object, in place."""
    for module in model.modules():
        if type(getattr(module, "config", None)) is type(config):
            module.config = config


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
