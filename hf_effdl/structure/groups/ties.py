"""Which numbers of a transformers config set the sizes of which groups, and which sizes they can say."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_effdl.structure.groups.group import Group


@dataclass(frozen=True)
class Tie:
    """Groups whose sizes move together, because one number of a model's config sets them all.

    At `step` of `steps` each named group keeps `step * share` units, e.g. `{"stem": 4, "inner": 1}`. A free group is a
    tie of its own.

    Args:
        steps: how many there are.
        shares: units per step of every group.
        fields: value per step of every config entry, e.g. `{"hidden_sizes.0": 4}`.
    """

    steps: int
    shares: Mapping[str, int]
    fields: Mapping[str, int] = field(default_factory=dict)


def complete_ties(ties: Iterable[Tie], sizes: Mapping[str, int]) -> list[Tie]:
    """The given ties among the groups of `sizes`, and one tie of its own for every other group.

    A tie that names a group outside `sizes` (one that is not lifted, so has no order) stays at full size.
    """
    ties = list(ties)
    usable = [tie for tie in ties if tie.shares.keys() <= sizes.keys()]
    tied = {name for tie in ties for name in tie.shares}
    return [*usable, *(Tie(size, {name: 1}) for name, size in sizes.items() if name not in tied)]


# ---- the sizes a tie can have


def levels_of(tie: Tie, round_to: int | None) -> list[int]:
    """Ascending: the steps a tie can have when every size is a multiple of `round_to`, or the whole."""
    return [*range(_chunk(tie, round_to), tie.steps, _chunk(tie, round_to)), tie.steps]


def sizes_for_share(ties: Sequence[Tie], sizes: Mapping[str, int], share: float, round_to: int) -> dict[str, int]:
    """Units per group for a share of every group, rounded up to `round_to` and to what the ties allow."""
    result = {}
    for tie in ties:
        chunk = _chunk(tie, round_to)
        # 1e-9: a share such as 0.3 of 10 units is 3 units, not 4
        steps = min(tie.steps, chunk * math.ceil(share * tie.steps / chunk - 1e-9))
        result |= {name: max(steps, 1) * a for name, a in tie.shares.items()}
    return result


def _chunk(tie: Tie, round_to: int | None) -> int:
    """Steps of a tie that together change every one of its groups by a multiple of `round_to`.

    None: of the largest of 16, 8, 4, 2 and 1 that leaves the tie four sizes. Convolutions are computed in blocks of 8
    or 16 channels, so that sizes in between are no faster than the next multiple.
    """
    if round_to is None:
        return next((chunk for r in (16, 8, 4, 2) if 4 * (chunk := _chunk(tie, r)) <= tie.steps), 1)
    return math.lcm(*(round_to // math.gcd(round_to, share) for share in tie.shares.values()))


# ---- what a config says


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
    shapes = _shapes_as_built(model)
    if shapes is None:
        return []
    values = dict(_integers(model.config))
    ties = _joined(
        {name: _groups_set_by(name, values[name], model, groups, shapes) for name in values}, values, groups
    )
    complete = {name for tie in ties for name in tie.shares} == {group.name for group in groups}
    return ties if complete and all(_is_true(tie, model, groups) for tie in ties) else []


def _shapes_as_built(model: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """Parameter shapes of a model that is what its stock config builds; None for any other."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or _is_custom(config):
        return None
    shapes = _meta_shapes(type(model), config)
    return shapes if shapes == {name: tuple(p.shape) for name, p in model.named_parameters()} else None


def _groups_set_by(
    name: str, value: int, model: nn.Module, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """The groups that double with one number of the config."""
    grown = _meta_shapes(type(model), model.config, {name: 2 * value}) or {}

    def doubles(tensor: str, axis: int) -> bool:
        old, new = shapes.get(tensor, ()), grown.get(tensor, ())
        return len(new) == len(old) > axis and new[axis] == 2 * old[axis]

    return {group.name for group in groups for part in group.slices if doubles(part.tensor, part.axis)}


def _joined(touched: Mapping[str, set[str]], values: Mapping[str, int], groups: Sequence[Group]) -> list[Tie]:
    """One tie per set of config numbers and groups that hang together."""
    ties = []
    for fields, names in _components(touched):
        units = {group.name: group.units for group in groups if group.name in names}
        steps = math.gcd(*(values[entry] for entry in fields), *units.values())
        shares = {name: count // steps for name, count in units.items()}
        ties.append(Tie(steps, shares, {entry: values[entry] // steps for entry in fields}))
    return ties


def _is_true(tie: Tie, model: nn.Module, groups: Sequence[Group]) -> bool:
    """Whether the stock class, told one step less, builds what the tie foretells: no other sizes, no rounding."""
    step = tie.steps - 1 or 2
    return stock_builds(model, groups, [tie], {name: share * step for name, share in tie.shares.items()})


def stock_builds(model: nn.Module, groups: Sequence[Group], ties: Iterable[Tie], sizes: Mapping[str, int]) -> bool:
    """Whether the stock class builds these sizes from the model's config.

    It may not: where two widths become equal, say, some classes leave out the projection between them.

    Args:
        model: as its config builds it.
        groups: all its groups.
        ties: of the model; those without config entries are passed over.
        sizes: units of every group that the ties name; others keep all.
    """
    changes = _config_changes(ties, sizes)
    if changes is None:
        return False
    return _meta_shapes(type(model), model.config, changes) == groups[0].network.sizes(groups, sizes)


def stock_config(model: nn.Module, ties: Sequence[Tie], sizes: Mapping[str, int]) -> Any | None:
    """The config under which the stock class builds the slim `model`, or None where it cannot say those sizes.

    Args:
        model: the slim model, its config still the one it had before.
        ties: ties of the model before slimming.
        sizes: units that each group has now.
    """
    changes = _config_changes(ties, sizes)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if changes is None or _meta_shapes(type(model), model.config, changes) != shapes:
        return None
    config = _changed(model.config, changes)
    if _is_custom(config):  # sizes of before, which the numbers of the config now say
        del config.quantization_config
    return config


def _config_changes(ties: Iterable[Tie], sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The config entries that say some sizes; None where the groups of a tie are out of step."""
    changes = {}
    for tie in ties:
        steps = {sizes[name] / share for name, share in tie.shares.items() if name in sizes}
        if len(steps) != 1 or not (step := steps.pop()).is_integer():
            return None
        changes |= {entry: int(step) * value for entry, value in tie.fields.items()}
    return changes


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
    """A copy of a config with some of its integers changed; `name.index` is an entry of a list."""
    config = deepcopy(config)
    for name, value in changes.items():
        owner, _, index = name.partition(".")
        if index:
            entries = list(getattr(config, owner))
            entries[int(index)] = value
            value = entries
        setattr(config, owner, value)
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


def _components(touched: Mapping[str, set[str]]) -> list[tuple[list[str], set[str]]]:
    """Config entries that share a group, and the groups of each such set: `[(entries, groups), ...]`."""
    merged: list[tuple[list[str], set[str]]] = []
    for entry, names in ((entry, names) for entry, names in touched.items() if names):
        entries, together, apart = [entry], set(names), []
        for other_entries, other_names in merged:
            if together & other_names:
                entries, together = other_entries + entries, together | other_names
            else:
                apart.append((other_entries, other_names))
        merged = [*apart, (entries, together)]
    return merged
