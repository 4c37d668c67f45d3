"""Which numbers of a transformers config set the sizes of which groups, and which sizes they can say."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_effdl.structure.groups.group import Group


MOST = 5  # numbers that hang together, of which all choices are tried
WIDE, BLOCK, BY_SIZE = 1024, 16, 0  # `round_to=BY_SIZE`: multiples of a block where a config says many, else of one
KEPT = 256  # configs of a class whose shapes are kept
_SHAPES: WeakKeyDictionary[type[nn.Module], dict[str, dict[str, tuple[int, ...]] | None]] = WeakKeyDictionary()
HEAD_SIZE = "head_dim"  # the entry under which the configs of transformers keep the size of a head


@dataclass(frozen=True)
class Tie:
    """Groups whose sizes move together, because one number of a model's config sets them all.

    At `step` of `steps` each named group keeps `step * share` units, e.g. `{"stem": 4, "inner": 1}`. A free group is a
    tie of its own.

    Args:
        steps: how many there are.
        shares: units per step of every group.
        fields: value per step of every config entry, e.g. `{"hidden_sizes.0": 4}`.
        held: config entries that must be set to a value whatever the step, e.g. `{"head_dim": 64}`.
    """

    steps: int
    shares: Mapping[str, int]
    fields: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)

    def to_list(self) -> list[Any]:
        """Plain values."""
        return [self.steps, dict(self.shares), dict(self.fields), *([dict(self.held)] if self.held else [])]


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
    if round_to == BY_SIZE:
        round_to = BLOCK if tie.fields and tie.steps * min(tie.shares.values()) >= WIDE else 1
    if round_to is None:
        return next((chunk for r in (16, 8, 4, 2) if 4 * (chunk := _chunk(tie, r)) <= tie.steps), 1)
    return math.lcm(*(round_to // math.gcd(round_to, share) for share in tie.shares.values()))


# ---- what a config says


def config_ties(model: nn.Module, groups: Sequence[Group]) -> list[Tie]:
    """The groups that each size in the model's config sets, so that widths can stay what the stock class can build.

    Every integer of the config is doubled in turn and the model built on the meta device; tensors that grew along an
    axis of a group tie that group to the number. Groups that share a number, and numbers that share a group, make one
    `Tie`. For a transformers ResNet: the stem and the first stage, then one tie per stage; for a ViT the FFN of all
    layers (`intermediate_size`) and the heads of all layers (`num_attention_heads`, with `head_dim` held).

    A number that also sets other sizes (`hidden_sizes` of a ConvNeXt), or rounds them (`min_depth` of a MobileNetV2),
    ties nothing: its groups are free.

    Args:
        model: a `PreTrainedModel`; any other module has no ties.
        groups: its groups.
    """
    shapes = _shapes_as_built(model)
    if shapes is None:
        return []
    ties = _ties_of(_integers(model.config), model, groups, shapes)
    tied = {name for tie in ties for name in tie.shares}
    free = [group for group in groups if group.name not in tied and all(part.block == 1 for part in group.slices)]
    # an entry that is not set (`n_inner`) may set sizes once it is
    unset = [(name, units) for name in _unset(model.config) for units in {group.units for group in free}]
    return ties + _ties_of(unset, model, free, shapes)


def _shapes_as_built(model: nn.Module) -> dict[str, tuple[int, ...]] | None:
    """Parameter shapes of a model that is what its stock config builds; None for any other."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or _is_custom(config):
        return None
    shapes = _meta_shapes(type(model), config)
    return shapes if shapes == {name: tuple(p.shape) for name, p in model.named_parameters()} else None


@dataclass(frozen=True)
class _Effect:
    """What doubling one number of a config does.

    Args:
        entry, value: the number.
        names: of the groups whose units double.
        held: further entries that must be set so that it does no more.
        is_clean: whether nothing else changes.
    """

    entry: str
    value: int
    names: frozenset[str]
    held: Mapping[str, int]
    is_clean: bool


def _ties_of(
    entries: Iterable[tuple[str, int]],
    model: nn.Module,
    groups: Sequence[Group],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Tie]:
    """The ties that some config numbers make."""
    effects: dict[str, _Effect] = {}
    for entry, value in entries:
        if entry not in effects and (effect := _effect(entry, value, model, groups, shapes)):
            effects[entry] = effect
    ties = []
    for together in _components(list(effects.values())):
        clean = [effect for effect in together if effect.is_clean]
        whole = _joined(together, groups)
        if _is_true(whole, model, groups):
            ties.append(whole)
        else:
            ties += [tie for part in _components(clean) if (tie := _largest_true(part, model, groups))]
    return ties


def _largest_true(effects: Sequence[_Effect], model: nn.Module, groups: Sequence[Group]) -> Tie | None:
    """A tie of as many of some numbers as say sizes of their groups together: all, or all but a head's size."""
    for count in range(len(effects), 0, -1) if len(effects) < MOST else ():
        for some in combinations(effects, count):
            tie = _joined(some, groups)
            if _is_true(tie, model, groups):
                return tie
    return None


def _effect(
    entry: str, value: int, model: nn.Module, groups: Sequence[Group], shapes: Mapping[str, tuple[int, ...]]
) -> _Effect | None:
    """What doubling one number does; None if it doubles no group."""
    for held in ({}, *_head_sizes(entry, value, groups)):
        grown = _meta_shapes(type(model), model.config, {**held, entry: 2 * value}) or {}
        changed = {
            (name, axis)
            for name, shape in shapes.items()
            for axis, (old, new) in enumerate(zip(shape, grown.get(name, ()), strict=False))
            if new != old
        }
        growth = {(name, axis): grown[name][axis] - shapes[name][axis] for name, axis in changed}
        names = {group.name for group in groups if _doubles(group, growth)}
        own = {(part.tensor, part.axis) for group in groups if group.name in names for part in group.slices}
        if names:
            return _Effect(entry, value, frozenset(names), held, changed <= own and grown.keys() == shapes.keys())
        if changed and held:
            return None
    return None


def _doubles(group: Group, growth: Mapping[tuple[str, int], int]) -> bool:
    """Whether axes have grown by what units of a group take of them: of a fused layer, by its queries, say."""
    sizes: dict[tuple[str, int], set[int]] = {}
    for part in group.slices:
        place = part.tensor, part.axis
        before = sizes.get(place, {0})
        sizes[place] = before | {size + group.units * part.block for size in before}
    return any(growth.get(place) in some - {0} for place, some in sizes.items())


def _head_sizes(entry: str, value: int, groups: Sequence[Group]) -> list[dict[str, int]]:
    """Sizes of a head to hold: where it is not held, the number of heads divides the width up."""
    head_dim = f"{entry.rpartition('.')[0]}.{HEAD_SIZE}".removeprefix(".")
    sizes = {
        min(group.slices, key=lambda part: (part.role != "row", part.block)).block
        for group in groups
        if value % group.units == 0
    }
    return [{head_dim: size} for size in sorted(sizes - {1})]


def _joined(effects: Iterable[_Effect], groups: Sequence[Group]) -> Tie:
    """One tie of config numbers and groups that hang together."""
    names = {name for effect in effects for name in effect.names}
    units = {group.name: group.units for group in groups if group.name in names}
    steps = math.gcd(*(effect.value for effect in effects), *units.values())
    shares = {name: count // steps for name, count in units.items()}
    held = {name: value for effect in effects for name, value in effect.held.items()}
    return Tie(steps, shares, {effect.entry: effect.value // steps for effect in effects}, held)


def _is_true(tie: Tie, model: nn.Module, groups: Sequence[Group]) -> bool:
    """Whether the stock class, told other steps, builds what the tie foretells: no other sizes, no rounding.

    Some steps it may refuse (heads that do not divide the width); of one less, half and twice as many it takes one.
    """
    for step in dict.fromkeys((tie.steps - 1 or 2, tie.steps // 2 or 2, 2 * tie.steps)):
        sizes = {name: share * step for name, share in tie.shares.items()}
        built = _meta_shapes(type(model), model.config, _config_changes([tie], sizes))
        if built is not None:
            return built == groups[0].network.sizes(groups, sizes)
    return False


def stock_builds(model: nn.Module, groups: Sequence[Group], ties: Iterable[Tie], sizes: Mapping[str, int]) -> bool:
    """Whether the stock class builds these sizes from the model's config.

    It may not: where two widths become equal, say, some classes leave out the projection between them.

    Args:
        model: as its config builds it.
        groups: all its groups.
        ties: of the model; those without config entries are passed over.
        sizes: units of every group that the ties name. Others are free: no config says their sizes anyway.
    """
    ties = list(ties)
    changes = _config_changes(ties, sizes)
    if changes is None:
        return False
    tied = {name: sizes[name] for tie in ties if tie.fields for name in tie.shares if name in sizes}
    return _meta_shapes(type(model), model.config, changes) == groups[0].network.sizes(groups, tied)


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
        if step != tie.steps:
            changes |= {entry: int(step) * value for entry, value in tie.fields.items()} | tie.held
    return changes


def _is_custom(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _integers(config: Any) -> list[tuple[str, int]]:
    """All positive integers of a config, those in lists as `name.index`, those in configs inside as `name.entry`."""
    result = []
    for name, value in config.to_dict().items():
        if hasattr(getattr(config, name, None), "to_dict"):
            entries = [(f"{name}.{inner}", entry) for inner, entry in _integers(getattr(config, name))]
        elif isinstance(value, (list, tuple)):
            entries = [(f"{name}.{i}", entry) for i, entry in enumerate(value)]
        else:
            entries = [(name, value)]
        result += [(key, entry) for key, entry in entries if type(entry) is int and entry > 0]
    return result


def _unset(config: Any) -> list[str]:
    """All entries of a config that are None and may be integers, to all appearance."""
    return [name for name, value in config.to_dict().items() if value is None and not name.startswith("_")]


def _changed(config: Any, changes: Mapping[str, int]) -> Any:
    """A copy of a config with some of its integers changed; `name.index` is an entry of a list, or of a config."""
    config = deepcopy(config)
    for name, value in changes.items():
        owner, (*path, last) = config, name.split(".")
        for step in path[:-1] if last.isdecimal() else path:
            owner = getattr(owner, step)
        if last.isdecimal():
            entries = list(getattr(owner, path[-1]))
            entries[int(last)] = value
            last, value = path[-1], entries
        setattr(owner, last, value)
    return config


def _meta_shapes(
    cls: type[nn.Module], config: Any, changes: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Parameter shapes of the model that the changed config builds; None where it builds none.

    Finding groups, slimming and growing ask the same of a model again and again, so that answers are kept.
    """
    try:
        config = _changed(config, changes or {})
    except Exception:  # noqa: BLE001 - a changed config may break any of its own checks
        return None
    known = _SHAPES.setdefault(cls, {})
    key = repr(config.to_dict())
    if key not in known:
        if len(known) >= KEPT:
            known.clear()
        known[key] = _shapes_of(cls, config)
    return known[key]


def _shapes_of(cls: type[nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"):
            model = cls(config)
    except Exception:  # noqa: BLE001 - a changed config may break any of the model's own checks
        return None
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _components(effects: Sequence[_Effect]) -> list[list[_Effect]]:
    """Config entries that share a group, directly or through others."""
    merged: list[list[_Effect]] = []
    for effect in effects:
        together, apart = [effect], []
        for others in merged:
            if effect.names & {name for other in others for name in other.names}:
                together = others + together
            else:
                apart.append(others)
        merged = [*apart, together]
    return merged
