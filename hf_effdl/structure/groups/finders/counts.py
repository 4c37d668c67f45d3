"""The numbers that attention modules keep of their heads, which must follow when heads go."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from os.path import commonprefix
from typing import Any

from torch import nn

from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.numbers import number_of, numbers_of
from hf_effdl.structure.groups.trial import Setting, is_removable


MOST = 3  # numbers tried at once; past that all at once
DEPENDS = (
    "with fewer heads the model computes something else, whatever their modules count: position biases may hang on "
    "how many there are, as those of ALiBi do"
)
Place = tuple[int, str, int]  # a module by its place between the layers, an attribute, its number per unit


def with_counts(
    model: nn.Module, settings: Sequence[Setting], groups: Sequence[Group], skipped: dict[str, str]
) -> list[Group]:
    """The groups with the numbers that must change with them, for those that cannot be taken out otherwise.

    Which numbers those are is tried out, as names say nothing: of all whole numbers on the modules between the layers
    of a group that equal a number of its heads or channels, the fewest with which a model without some units computes
    what the model with those units silent does. Blocks of the same modules are alike, so one of each kind is tried.
    Where no choice helps, all of a kind are tried as one group: the layers of a T5 that read its encoder are given one
    mask, which has a row per head. And where that does not help either, the numbers in the modules' configs too.
    Groups without heads that can all go at once need no numbers, and none are tried.

    Args:
        model: that the groups are of.
        settings: to try them out on; the first decides where no choice fits all.
        groups: without counts.
        skipped: gets the heads for which there is no choice, and why.
    """
    result: dict[str, Group] = {}
    plain = [group for group in groups if not _has_heads(group)]
    # tried all at once, which costs as much as one of them
    if plain and all(is_removable(setting, plain, 0) for setting in settings):
        result = {group.name: group for group in plain}
    kinds: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        if group.name in result:
            continue
        between = dict(_between(model, group))
        kinds[(*map(type, between.values()), len(group.slices), group.units)].append(group)
    for members in kinds.values():
        counted = _counted_alike(model, settings, members)
        if counted is None and _has_heads(members[0]):
            skipped |= {group.name: DEPENDS for group in members}
        else:
            result |= {group.name: group for group in counted or members}
    return [result[group.name] for group in groups if group.name in result]


def _has_heads(group: Group) -> bool:
    return any(part.block > 1 for part in group.slices if part.role == "input")


def _counted_alike(model: nn.Module, settings: Sequence[Setting], members: Sequence[Group]) -> list[Group] | None:
    """Groups of a kind with their counts, or one group of all of them; None where no choice helps."""
    own, in_configs = (list(_candidates(model, members[0], there)) for there in (False, True))
    alone = members[:1]
    found = _fewest(model, settings, alone, own)
    if found is None and len(members) > 1 and (found := _fewest(model, settings, members, own)) is not None:
        return [_together(model, members, found)]
    if found is None and in_configs:
        found = _fewest(model, settings, alone, own + in_configs)
    return None if found is None else [_counted(model, group, found) for group in members]


def _counted(model: nn.Module, group: Group, places: Iterable[Place]) -> Group:
    paths = list(dict(_between(model, group)))
    counts = tuple((paths[place], name, n) for place, name, n in places)
    fits = all(number_of(model.get_submodule(path), name) == group.units * n for path, name, n in counts)
    return replace(group, counts=counts) if fits else group


def _together(model: nn.Module, members: Sequence[Group], places: Iterable[Place]) -> Group:
    """Some groups as one, whose units are those of all, and their counts."""
    counted = [_counted(model, group, places) for group in members]
    slices, counts = (tuple(part for group in counted for part in getattr(group, of)) for of in ("slices", "counts"))
    return replace(members[0], slices=slices, counts=counts)


def _fewest(
    model: nn.Module, settings: Sequence[Setting], members: Sequence[Group], candidates: Sequence[Place]
) -> tuple[Place, ...] | None:
    """The fewest counts with which some groups can go as one; None where no choice helps."""
    first = None
    for size in dict.fromkeys([*range(min(MOST, len(candidates)) + 1), len(candidates)]):
        for places in combinations(candidates, size):
            changed = [_together(model, members, places)]
            if not all(is_removable(settings[0], changed, seed) for seed in ((0, 1) if places else (0,))):
                continue
            first = places if first is None else first
            if all(is_removable(setting, changed, 0) for setting in settings[1:]):
                return places
    return first


def _candidates(model: nn.Module, group: Group, in_configs: bool) -> Iterator[Place]:
    """All numbers that may count heads, or channels of heads."""
    blocks = {part.block for part in group.slices}
    width = max((part.block for part in group.slices if part.role == "input"), default=1)
    totals: dict[tuple[str, int], int] = {}
    for part in group.slices:
        totals[part.tensor, part.axis] = totals.get((part.tensor, part.axis), 0) + part.block
    per_unit = {1, *blocks, *totals.values()}
    # query heads per key/value head: a fused layer holds two blocks of a head's size beside the queries
    heads = blocks | {(total - width) // 2 for total in totals.values() if total > width}
    per_unit |= {width // head for head in heads if head and width % head == 0}
    for place, (_, module) in enumerate(_between(model, group)):
        for name, value in numbers_of(module, in_configs):
            number, rest = divmod(value, group.units)
            if not rest and number in per_unit:
                yield place, name, number


def _between(model: nn.Module, group: Group) -> Iterator[tuple[str, nn.Module]]:
    """The modules from the parent of a group's layers down to those layers, but not the layers' own sizes."""
    parent = _parent(group).rstrip(".")
    for path, module in model.named_modules():
        inside = path == parent or path.startswith(parent + ".") or not parent
        leads = any(part.tensor.startswith(path + "." if path else "") for part in group.slices)
        if inside and leads and any(module.children()):
            yield path, module


def _parent(group: Group) -> str:
    """Path, with its dot, of the innermost module that holds all layers of a group; empty for the model itself."""
    paths = [part.tensor.split(".")[:-1] for part in group.slices]
    return "".join(f"{name}." for name in commonprefix(paths))
