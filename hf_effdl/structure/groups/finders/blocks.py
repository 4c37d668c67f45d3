"""FFN neurons, attention heads and key/value groups with their query heads, from what reaches what.

All three are one thing: channels of what a linear layer reads fall into units, and every entry of the layers before it
reaches one unit at most, or all of them. A unit is one channel of an FFN (gated or not), all channels of a head, or
those of all query heads that read one key/value head. The one key/value head of multi-query attention reaches all: it
stays, and so zero queries do not silence a head, but zeros in the layer that reads it do.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.finders.flow import Probe, Product, leaves_of, record
from hf_effdl.structure.groups.group import BATCH_NORMS, Group, Network, Slice, shared_names


DENSE, APART, OPEN = "dense", "apart", "open"


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one product reads.

    Args:
        product: the one that reads.
        leaves: of the products before it, by id.
        kind: `DENSE`: some channel is computed from all of a layer's outputs, so there are no units. `APART`: units
            were found. `OPEN`: neither, a matter for the tracer.
        block: channels per unit.
        units: how many there are.
        slices: of the layers before it.
        reason: why there are no units, where that is worth a word.
    """

    product: Product
    leaves: Mapping[int, Product]
    kind: str
    block: int = 0
    units: int = 0
    slices: frozenset[Slice] = frozenset()
    reason: str | None = None


@dataclass(frozen=True)
class Blocks:
    """The groups found, why others are left out, and whether layers remain in which the tracer may find more."""

    groups: list[Group]
    skipped: dict[str, str]
    is_all: bool


def find_blocks(model: nn.Module, inputs: Any, network: Network) -> Blocks:
    """The FFN neurons, heads and key/value groups of a model in eval mode, lifting nothing yet.

    Args:
        model: a copy whose parameters all require gradients.
        inputs: one row, of two tokens or more.
        network: its shapes and uses.
    """
    try:
        with torch.enable_grad():
            readings = _readings(model, record(model, inputs))
    except Exception:  # noqa: BLE001 - what leaves torch on its way through the model, say; the tracer will name it
        return Blocks([], {}, False)
    readers = defaultdict(list)
    for reading in readings:
        for leaf, product in reading.leaves.items():
            if product.kind != "lookup":  # who shares a table is asked of its tensor, below
                readers[leaf].append(reading)
    found: dict[frozenset[Slice], list[_Reading]] = defaultdict(list)
    is_all = not any(isinstance(module, BATCH_NORMS) for module in model.modules())
    for reading in readings:
        others = [other for leaf in reading.leaves for other in readers[leaf]]
        if reading.kind == APART and all((other.kind, other.slices) == (APART, reading.slices) for other in others):
            found[reading.slices].append(reading)
        elif reading.kind == OPEN or (reading.kind == APART and all(other.kind != DENSE for other in others)):
            is_all = False
    position = {name: i for i, name in enumerate(network.shapes)}
    groups = [_group(same, network, position) for same in _joined(found.values())]
    groups.sort(key=lambda group: position[group.slices[0].tensor])
    skipped = {_name(reading): reading.reason for reading in readings if reading.reason}
    return Blocks(_usable(groups, model, skipped), skipped, is_all)


def _readings(model: nn.Module, products: Sequence[Product]) -> list[_Reading]:
    by_leaf = {id(product.leaf): product for product in products}
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {id(p) for module in model.modules() if isinstance(module, BATCH_NORMS) for p in module.parameters()}
    readings = []
    for product in products:
        reached = leaves_of(product.given) if product.given is not None else []
        before = {id(leaf): by_leaf[id(leaf)] for leaf in reached if id(leaf) in by_leaf}
        if before:
            parameters = {names[id(leaf)]: leaf for leaf in reached if id(leaf) in names}
            normed = any(id(leaf) in norms for leaf in reached)
            readings.append(_reading(product, before, parameters, normed))
    return readings


def _reading(
    product: Product, before: Mapping[int, Product], parameters: Mapping[str, Tensor], normed: bool
) -> _Reading:
    leaves = list(before.values())
    probe = Probe(product, [(one.leaf, one.channels) for one in leaves])
    first = probe.reached(torch.arange(1))
    everything = [bool(entries.all()) and len(entries) > 1 for entries in first]
    partly = any(bool(entries.any()) and not whole for entries, whole in zip(first, everything, strict=True))
    if any(everything) and not partly:
        return _Reading(product, before, DENSE)
    if normed or any(one.kind == "convolution" for one in (product, *leaves)):
        return _Reading(product, before, DENSE if any(everything) else OPEN)
    block, common = _smallest_block(probe)
    slices = _slices(leaves, probe.units(block), common, probe.channels // block) if block else None
    if slices:
        slices |= _tables(product, parameters, block)
        return _Reading(product, before, APART, block, probe.channels // block, frozenset(slices))
    if not any(everything):
        return _Reading(product, before, OPEN)
    shared = leaves[everything.index(True)].weight.rpartition(".")[0]
    return _Reading(product, before, DENSE, reason=f"what {shared} makes goes into every one of them")


def _smallest_block(probe: Probe) -> tuple[int, list[Tensor]]:
    """The fewest channels per unit with which what reaches the first and another reaches all; 0 without another.

    Returns:
        that number, and for every leaf which of its entries reach all units (bool).
    """
    channels = torch.arange(probe.channels)
    for block in range(1, probe.channels // 2 + 1):
        if probe.channels % block:
            continue
        first, rest = probe.reached(channels[:block]), probe.reached(channels[block:])
        common = [a & b for a, b in zip(first, rest, strict=True)]
        if not any(map(torch.any, common)) or all(
            _is_within(common, probe.reached(unit)) for unit in reversed(channels.split(block))
        ):
            return block, common
    return 0, []


def _is_within(entries: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return not any(bool((a & ~b).any()) for a, b in zip(entries, others, strict=True))


def _slices(
    leaves: Sequence[Product], units: Sequence[Tensor], common: Sequence[Tensor], count: int
) -> set[Slice] | None:
    """Where the units lie in the layers before; None where one of those has them in no regular order.

    Where some entries reach all units, the others go along with theirs, but do not silence them.
    """
    slices, producers = set(), {"row": "row", "bias": "bias"}
    if any(map(torch.any, common)):
        producers = dict.fromkeys(producers, "table")
    for product, unit, in_all in zip(leaves, units, common, strict=True):
        runs = _runs(unit.masked_fill(in_all, -1).tolist(), count)
        if runs is None:
            return None
        for start, block in runs:
            role = "table" if product.kind == "lookup" else producers["row"]
            slices.add(Slice(product.weight, product.out_axis, block, role, start))
            if product.bias:
                slices.add(Slice(product.bias, 0, block, producers["bias"], start))
    computed = {product.weight for product in leaves if product.kind != "lookup"}
    return slices if any(part.tensor in computed for part in slices) else None


def _runs(units: Sequence[int], count: int) -> list[tuple[int, int]] | None:
    """Start and block of every run `0, .., 0, 1, .., 1, .., count - 1` among unit numbers; -1 lies in none."""
    runs, i = [], 0
    while i < len(units):
        if units[i] == -1:
            i += 1
            continue
        block = next((n for n, unit in enumerate(units[i:]) if unit != 0), len(units) - i)
        expected = [unit for unit in range(count) for _ in range(block)]
        if not block or list(units[i : i + len(expected)]) != expected:
            return None
        runs.append((i, block))
        i += len(expected)
    return runs


def _tables(product: Product, parameters: Mapping[str, Tensor], block: int) -> set[Slice]:
    """Slices of bare parameters with entries of every unit along one axis: a table of position biases, say."""
    slices = set()
    axes = [(name, axis) for name, p in parameters.items() for axis in range(p.ndim)]
    probe = Probe(product, [(parameters[name], axis) for name, axis in axes])
    for (name, axis), unit in zip(axes, probe.units(block) if axes else [], strict=True):
        runs = _runs(unit.tolist(), probe.channels // block) or []
        slices |= {Slice(name, axis, size, "table", start) for start, size in runs}
    return slices


# ---- groups


def _joined(found: Iterable[list[_Reading]]) -> list[list[_Reading]]:
    """Readings by group: those whose units have a table in common are of one, as all layers of a T5 are."""
    joined: list[list[_Reading]] = []
    for readings in found:
        tables = {part for part in readings[0].slices if part.role == "table"}
        alike = [others for others in joined if any(tables & other.slices for other in others)]
        joined = [others for others in joined if others not in alike]
        joined.append([reading for others in alike for reading in others] + readings)
    return joined


def _group(same: Sequence[_Reading], network: Network, position: Mapping[str, int]) -> Group:
    products = [(reading.product, reading.block) for reading in same]
    readers = {Slice(product.weight, 1 - product.out_axis, block, "input") for product, block in products}
    slices = frozenset.union(*(reading.slices for reading in same)) | readers
    slices = sorted(slices, key=lambda part: (position[part.tensor], part.start))
    first = min(slices, key=lambda part: part.role != "row")  # it names the group
    rest = [part for part in slices if part is not first]
    return Group(first.tensor.rpartition(".")[0], same[0].units, (first, *rest), (), network)


def _name(reading: _Reading) -> str:
    return next(iter(reading.leaves.values())).weight.rpartition(".")[0]


def _usable(groups: Iterable[Group], model: nn.Module, skipped: dict[str, str]) -> list[Group]:
    """The groups whose tensors are theirs alone; the rest goes to `skipped`."""
    groups, shared = list(groups), shared_names(model)
    claims = Counter((part.tensor, part.axis, part.start) for group in groups for part in group.slices)
    usable = []
    for group in groups:
        reason = None
        for part in group.slices:
            if part.tensor in shared:
                reason = f"{part.tensor} is shared with another layer"
            elif claims[part.tensor, part.axis, part.start] > 1:
                reason = f"{part.tensor} goes with the units of several layers"
        if reason is None and any(group.name == other.name for other in usable):
            reason = "other units start in the same layer"
        if reason is None and not any(group.fills(part) for part in group.slices):
            reason = "none of their layers is theirs alone"
        if reason is None:
            usable.append(group)
        else:
            skipped[group.name] = reason
    return usable
