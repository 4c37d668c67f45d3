"""The numbers that attention modules keep of their heads, which must follow when heads go."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from os.path import commonprefix
from typing import Any

from torch import nn

from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.trial import Setting, is_removable


MOST = 3  # numbers tried at once; past that all at once


def with_counts(model: nn.Module, setting: Setting, groups: Sequence[Group]) -> list[Group]:
    """The groups with the numbers that must change with them, for those that cannot be taken out otherwise.

    Which numbers those are is tried out, as names say nothing: of all whole numbers on the modules between the layers
    of a group that equal a number of its heads or channels, the fewest with which a model without some units computes
    what the model with those units silent does. Blocks of the same modules are alike, so one of each kind is tried.

    Args:
        model: that the groups are of.
        setting: to try them out on.
        groups: without counts.
    """
    wanted: dict[Any, list[tuple[int, str, int]]] = {}  # modules by their place between the layers
    result = []
    for group in groups:
        between = dict(_between(model, group))
        paths, kind = list(between), (*map(type, between.values()), len(group.slices))
        if kind not in wanted:
            wanted[kind] = [(paths.index(path), name, n) for path, name, n in _fewest(model, setting, group)]
        counts = tuple((paths[place], name, n) for place, name, n in wanted[kind])
        fits = all(getattr(model.get_submodule(p), name, None) == group.units * n for p, name, n in counts)
        result.append(replace(group, counts=counts) if fits else group)
    return result


def _fewest(model: nn.Module, setting: Setting, group: Group) -> tuple[tuple[str, str, int], ...]:
    """The fewest counts with which a group can go; none where no choice helps, as the trial will say."""
    candidates = list(_candidates(model, group))
    if not candidates:
        return ()
    for size in dict.fromkeys([*range(min(MOST, len(candidates)) + 1), len(candidates)]):
        for counts in combinations(candidates, size):
            changed = [replace(group, counts=counts)]
            if all(is_removable(setting, changed, seed) for seed in ((0, 1) if counts else (0,))):
                return counts
    return ()


def _candidates(model: nn.Module, group: Group) -> Iterator[tuple[str, str, int]]:
    """`(module, attribute, number per unit)` of all numbers that may count heads, or channels of heads."""
    blocks = {part.block for part in group.slices}
    width = max((part.block for part in group.slices if part.role == "input"), default=1)
    totals: dict[tuple[str, int], int] = {}
    for part in group.slices:
        totals[part.tensor, part.axis] = totals.get((part.tensor, part.axis), 0) + part.block
    per_unit = {1, *blocks, *totals.values()}
    # query heads per key/value head: a fused layer holds two blocks of a head's size beside the queries
    heads = blocks | {(total - width) // 2 for total in totals.values() if total > width}
    per_unit |= {width // head for head in heads if head and width % head == 0}
    for path, module in _between(model, group):
        for name, value in sorted(vars(module).items()):
            number, rest = divmod(value, group.units) if type(value) is int else (0, 0)
            if not rest and number in per_unit and not name.startswith("_"):
                yield path, name, number


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
