"""Which numbers of a transformers config set the sizes of which groups, found by trying them out."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.path.path import Tie


def config_ties(model: nn.Module, groups: Sequence[Group]) -> list[Tie]:
    """The groups that each size in the model's config sets, so that widths can stay what the stock class can build.

    Every integer of the config is doubled in turn and the model built on the meta device; tensors that grew along an
    axis of a group tie that group to the number. Groups that share a number, and numbers that share a group, make one
    `Tie`. For a transformers ResNet: the stem and the first stage, then one tie per stage.

    A number that also sets other sizes (`hidden_sizes` of a ConvNeXt), or rounds them (`min_depth` of a MobileNetV2),
    ties nothing. As long as one group is free the config cannot say the sizes anyway, so then there are no ties.

    Args:
        model: a `PreTrainedModel`; any other module has no ties.
        groups: its groups.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or _is_custom(config):
        return []
    shapes = _meta_shapes(type(model), config)
    if shapes != {name: tuple(p.shape) for name, p in model.named_parameters()}:
        return []  # this model is not what its config builds
    owners = {(part.tensor, part.axis): group.name for group in groups for part in group.slices}
    sets: dict[str, set[str]] = {}
    for name, value in _integers(config):
        grown = _meta_shapes(type(model), config, {name: 2 * value})
        if grown is None:
            continue
        touched = {
            owners[tensor, axis]
            for tensor in shapes.keys() & grown.keys()
            if len(grown[tensor]) == len(shapes[tensor])
            for axis, (old, new) in enumerate(zip(shapes[tensor], grown[tensor], strict=True))
            if new == 2 * old and (tensor, axis) in owners
        }
        if touched:
            sets[name] = touched
    units = {group.name: group.units for group in groups}
    values = dict(_integers(config))
    ties = []
    for fields, names in _components(sets):
        steps = math.gcd(*(values[field] for field in fields), *(units[name] for name in names))
        ties.append(
            Tie(
                steps,
                {name: units[name] // steps for name in units if name in names},
                {field: values[field] // steps for field in fields},
            )
        )
    network = groups[0].network if groups else None
    for tie in ties:
        step = tie.steps - 1 or 2
        sizes = network.sizes(groups, {name: share * step for name, share in tie.shares.items()})
        if _meta_shapes(type(model), config, {field: share * step for field, share in tie.fields.items()}) != sizes:
            return []
    return ties if {name for tie in ties for name in tie.shares} == units.keys() else []


def stock_config(model: nn.Module, ties: Sequence[Tie], sizes: Mapping[str, int]) -> Any | None:
    """The config under which the stock class builds the slim `model`, or None where it cannot say those sizes.

    Args:
        model: the slim model, its config still the one it had before.
        ties: ties of the model before slimming.
        sizes: units that each group has now.
    """
    changes = {}
    for tie in ties:
        steps = {sizes[name] / share for name, share in tie.shares.items() if name in sizes}
        if len(steps) != 1 or not (step := steps.pop()).is_integer():
            return None
        changes |= {field: int(step) * value for field, value in tie.fields.items()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if _meta_shapes(type(model), model.config, changes) != shapes:
        return None
    config = _changed(model.config, changes)
    if _is_custom(config):  # sizes of before, which the numbers of the config now say
        del config.quantization_config
    return config


def _is_custom(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _integers(config: Any) -> list[tuple[str, int]]:
    """All positive integers of a config, those in lists as `name.index`."""
    result = []
    for name, value in config.to_dict().items():
        entries = (
            [(name, value)]
            if not isinstance(value, (list, tuple))
            else [(f"{name}.{i}", entry) for i, entry in enumerate(value)]
        )
        result += [(key, entry) for key, entry in entries if type(entry) is int and entry > 0]
    return result


def _changed(config: Any, changes: Mapping[str, int]) -> Any:
    config = deepcopy(config)
    for name, value in changes.items():
        field, _, index = name.partition(".")
        if index:
            entries = list(getattr(config, field))
            entries[int(index)] = value
            value = entries
        setattr(config, field, value)
    return config


def _meta_shapes(
    cls: type[nn.Module], config: Any, changes: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Parameter shapes of the model that the changed config builds; None where it builds none."""
    try:
        with torch.device("meta"):
            model = cls(_changed(config, changes or {}))
    except Exception:  # noqa: BLE001 - a changed config may break any of the model's own checks
        return None
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _components(sets: Mapping[str, Iterable[str]]) -> list[tuple[list[str], set[str]]]:
    """Merge config fields that share a group: `[(fields, groups), ...]`."""
    merged: list[tuple[list[str], set[str]]] = []
    for field, names in sets.items():
        fields, together = [field], set(names)
        rest = []
        for other_fields, other_names in merged:
            if together & other_names:
                fields, together = other_fields + fields, together | other_names
            else:
                rest.append((other_fields, other_names))
        merged = [*rest, (fields, together)]
    return merged
