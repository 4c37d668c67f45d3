"""Silencing and removing units, in place, and the sizes that layers report afterwards."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.numbers import IN_CONFIG, number_of, own_numbers, set_number, shared_config


@torch.no_grad()
def mask(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Silence, in place, every unit that is not kept: its `silent_slices` become zero.

    Args:
        model: changed in place and returned.
        groups: the groups that `kept` speaks of.
        kept: indices of the kept units by group name; groups not named keep all.
    """
    for group in groups:
        if group.name not in kept:
            continue
        gone = _gone(group, kept)
        for part in group.silent_slices:
            tensor = model.get_parameter(part.tensor)
            tensor.index_fill_(part.axis, part.entries(gone).to(tensor.device), 0)
    return model


def _gone(group: Group, kept: Mapping[str, Tensor]) -> Tensor:
    """Indices of the units that are not kept."""
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[kept[group.name].cpu()] = False
    return gone.nonzero().flatten()


@torch.no_grad()
def cut(model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Remove, in place, every unit that is not kept: all its slices, and the sizes that the modules report.

    Args:
        model: changed in place and returned.
        groups: the groups that `kept` speaks of.
        kept: ascending indices of the kept units by group name; groups not named keep all.
    """
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in groups:
        if group.name in kept:
            _set_counts(model, group, len(kept[group.name]))
            units = _gone(group, kept)
            for part in group.slices:
                gone[part.tensor, part.axis].append(part.entries(units))
    for (name, axis), entries in gone.items():
        module, leaf = _owner(model, name)
        old = getattr(module, leaf)
        stays = torch.ones(old.shape[axis], dtype=torch.bool)
        stays[torch.cat(entries)] = False
        new = old.detach().index_select(axis, stays.nonzero().flatten().to(old.device)).clone()
        setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        set_sizes(module)
    return model


def _set_counts(model: nn.Module, group: Group, units: int) -> None:
    """Bring the numbers that modules keep of a group's units in line with how many are left."""
    for path, attribute, number in group.counts:
        module = model.get_submodule(path)
        now = number_of(module, attribute)
        if now != group.units * number:
            raise ValueError(
                f"{path}.{attribute} is {now!r}, but the {group.units} units of group {group.name!r} make it "
                f"{group.units * number}; call find_groups on this model"
            )
        set_number(module, attribute, units * number)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a layer convolves every channel on its own, into one or several outputs."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def has_inputs_first(module: nn.Module) -> bool:
    """Whether a layer is a linear one whose weight has the inputs on axis 0: `Conv1D` of transformers."""
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    weight = getattr(module, "weight", None)
    return None not in sizes and isinstance(weight, nn.Parameter) and weight.ndim == 2 and not any(module.children())


def set_sizes(module: nn.Module) -> None:
    """Bring the sizes that a layer reports in line with its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif has_inputs_first(module):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if is_depthwise(module):  # by the sizes before; outputs per channel stay
            module.groups = module.weight.shape[0] * module.in_channels // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(module.running_mean if module.running_mean is not None else module.weight)


def share_config(model: nn.Module, config: Any) -> None:
    """Give a config to a transformers model and to its parts, which share one object, in place.

    A part with a config of its own, as the encoder of a T5, keeps that. Numbers that a module has of its own in the
    shared one are gone where the new config says them.
    """
    before = getattr(model, "config", None)
    for module in model.modules():
        shared, own = shared_config(module), own_numbers(module)
        if type(shared) is type(config) and (shared is before or shared.to_dict() == before.to_dict()):
            module.config = config
            for name, value in own.items():
                if getattr(config, name) != value:
                    set_number(module, IN_CONFIG + name, value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
