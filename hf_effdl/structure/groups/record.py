"""Groups as plain values in files, and how what a file says of them is checked before it is believed."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from hf_effdl.structure.groups.group import PRODUCERS, Group, Groups, Network
from hf_effdl.structure.groups.numbers import is_number_name
from hf_effdl.structure.groups.ties import Tie


ROLES = (*PRODUCERS, "mean", "var", "table", "input")
LARGEST = 2**24  # units or entries along one axis
MOST = 2**62  # products of one weight entry


def groups_record(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups and their network as plain values."""
    network = groups[0].network
    return {
        "groups": [group.to_dict() for group in groups],
        "shapes": {name: list(shape) for name, shape in network.shapes.items()},
        "uses": network.uses,
    } | ({"products": {name: list(pair) for name, pair in network.products.items()}} if network.products else {})


def groups_of(record: Any) -> Groups:
    """The groups in a record of `groups_record`.

    Raises:
        ValueError: what it holds cannot be groups: names the entry.
    """
    network = _network(record)
    entries = listed(_entry(record, "groups"), "groups")
    require(bool(entries), "groups", "is empty")
    groups = Groups(_group(values, network) for values in entries)
    require(len({group.name for group in groups}) == len(groups), "groups", "has a name twice")
    _check_apart(groups)
    return groups


def _check_apart(groups: Sequence[Group]) -> None:
    """Refuse slices that lie over each other."""
    runs = sorted(
        (part.tensor, part.axis, part.start, part.start + group.units * part.block)
        for group in groups
        for part in group.slices
    )
    for one, other in pairwise(runs):
        require(one[:2] != other[:2] or one[3] <= other[2], "groups", f"has two slices of the same part of {one[0]}")


def ties_of(values: Any, groups: Sequence[Group]) -> list[Tie]:
    """The ties in a record, `[[steps, shares, fields, held], ...]`, of these groups; raises as `groups_of` does."""
    units = {group.name: group.units for group in groups}
    ties = []
    for tie in listed(values, "ties"):
        require(len(listed(tie, "ties")) in (3, 4), "ties", f"has {len(tie)} values where there are 3 or 4")
        steps, shares = whole(tie[0], "ties", 1, LARGEST), named(tie[1], "ties")
        fields, held = (named(values, "ties") for values in (*tie[2:], {})[:2])
        for name, share in shares.items():
            size = whole(share, "ties", 1, LARGEST) * steps
            require(units.get(name) == size, "ties", f"gives {size} units to {name!r}, which has {units.get(name)}")
        for value in (*fields.values(), *held.values()):
            whole(value, "ties", 1, LARGEST)
        ties.append(Tie(steps, shares, fields, held))
    return ties


def _network(record: Any) -> Network:
    shapes = {}
    for name, shape in named(_entry(record, "shapes"), "shapes").items():
        sizes = listed(shape, f"shapes of {name}")
        require(len(sizes) <= 8, f"shapes of {name}", f"has {len(sizes)} axes")
        shapes[name] = tuple(whole(size, f"shapes of {name}", 0, LARGEST) for size in sizes)
        require(math.prod(shapes[name]) < 2**40, f"shapes of {name}", f"is {shapes[name]}")
    uses = named(_entry(record, "uses"), "uses")
    for name, count in uses.items():
        require(name in shapes, "uses", f"names {name!r}, which has no shape")
        whole(count, f"uses of {name}", 0, MOST)
    return Network(shapes, dict(uses), _products(record, shapes))


def _products(record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Products of attention; records written before they were counted have none."""
    result = {}
    for name, pair in named(record.get("products", {}), "products").items():
        where = f"products of {name}"
        require(name in shapes, "products", f"names {name!r}, which has no shape")
        require(len(listed(pair, where)) == 2, where, f"has {len(pair)} values where there are 2")
        axis, count = whole(pair[0], where, 0, 7), whole(pair[1], where, 0, MOST)
        require(axis < len(shapes[name]), where, f"names axis {axis} of {shapes[name]}")
        result[name] = (axis, count)
    return result


def _group(values: Any, network: Network) -> Group:
    name = text(_entry(values, "name"), "name")
    units = whole(_entry(values, "units"), f"units of {name}", 1, LARGEST)
    lifted = [text(tensor, f"lifted of {name}") for tensor in listed(_entry(values, "lifted"), f"lifted of {name}")]
    parts = listed(_entry(values, "slices"), f"slices of {name}")
    require(bool(parts), f"slices of {name}", "is empty")
    for part in parts:
        _check_slice(part, name, units, network)
    counts = listed(values.get("counts", ()), f"counts of {name}")
    for count in counts:
        _check_count(count, name)
    values = {"name": name, "units": units, "slices": parts, "lifted": lifted, "counts": counts}
    group = Group.from_dict(values, network)
    fills = any(group.fills(part) for part in group.slices if part.tensor in network.shapes)
    require(fills, f"slices of {name}", "shares every axis with others")
    try:
        for part in group.lifted_slices:
            require(part.tensor in network.shapes, f"lifted of {name}", f"names {part.tensor!r}, which has no shape")
    except KeyError as error:
        raise wrong(f"lifted of {name}", f"names {error.args[0]!r}, which is no part of its units") from error
    return group


def _check_slice(part: Any, group: str, units: int, network: Network) -> None:
    where = f"slices of {group}"
    require(len(listed(part, where)) in (4, 5), where, f"has {len(part)} values where there are 4 or 5")
    start = whole(part[4], where, 0, LARGEST) if len(part) == 5 else 0
    tensor, axis, block = text(part[0], where), whole(part[1], where, 0, 7), whole(part[2], where, 1, LARGEST)
    require(part[3] in ROLES, where, f"has the role {part[3]!r}")
    shape = network.shapes.get(tensor)  # a buffer has none
    if shape is None:
        require(part[3] in ("mean", "var"), where, f"names {tensor!r}, which has no shape")
    else:
        size = shape[axis] if axis < len(shape) else 0
        fits = size == units * block if len(part) == 4 else size >= start + units * block
        require(fits, where, f"says {units} times {block} along axis {axis} of {tensor}, which has shape {shape}")


def _check_count(count: Any, group: str) -> None:
    where = f"counts of {group}"
    require(len(listed(count, where)) == 3, where, f"has {len(count)} values where there are 3")
    text(count[0], where)
    require(is_number_name(text(count[1], where)), where, f"names the attribute {count[1][:20]!r}")
    whole(count[2], where, 1, LARGEST)


# ---- plain values


def wrong(where: str, why: str) -> ValueError:
    return ValueError(f"its entry {where} {why[:200]}")


def require(condition: bool, where: str, why: str) -> None:
    if not condition:
        raise wrong(where, why)


def _entry(record: Any, name: str) -> Any:
    require(name in named(record, "the record"), name, "is missing")
    return record[name]


def whole(value: Any, where: str, least: int, most: int = MOST) -> int:
    """A whole number within bounds."""
    require(type(value) is int and least <= value <= most, where, f"holds {_short(value)}, no number it can be")
    return value


def text(value: Any, where: str) -> str:
    require(isinstance(value, str), where, f"holds {_short(value)}, no text")
    return value


def listed(value: Any, where: str) -> Sequence[Any]:
    require(isinstance(value, list | tuple), where, f"is {_short(value)}, no list")
    return value


def named(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping whose keys are texts."""
    require(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), where, "is no mapping of names")
    return value


def number(value: Any, where: str) -> float:
    """A finite number."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    require(fits, where, f"holds {_short(value)}, no finite number")
    return value


def plain_values(value: Any, where: str, depth: int = 4) -> Any:
    """Text, finite numbers, None, and lists and mappings of them, not nested any deeper than that."""
    require(depth > 0, where, "is nested too deep")
    if isinstance(value, Mapping):
        return {key: plain_values(inner, where, depth - 1) for key, inner in named(value, where).items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner, where, depth - 1) for inner in value]
    return value if value is None or isinstance(value, str | bool) else number(value, where)


def _short(value: Any) -> str:
    return repr(value)[:80] if not isinstance(value, list | Mapping) else f"a {type(value).__name__}"
