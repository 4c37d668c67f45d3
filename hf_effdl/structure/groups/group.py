"""A group: n deletable units and every tensor slice that goes when a unit goes.

Sparsifying, counting, slimming and growing are all verbs on this one noun.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


# What a slice is to its unit. The first four produce the unit's value: with those zeroed the unit is silent.
PRODUCERS = ("row", "bias", "scale", "shift")
# Layers that have units.
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Slice:
    """Where the units of a group lie in one tensor.

    Args:
        tensor: name of the parameter or buffer in the model.
        axis: axis the units run along.
        block: consecutive entries per unit along that axis (height times width where a convolution is flattened, the
            outputs per channel of a depthwise convolution).
        role: `"row"` (producer weight), `"bias"`, `"scale"` and `"shift"` (norm weight and bias), `"mean"` and `"var"`
            (running statistics), `"table"` (entries that go along, as a column of a table of position biases, or
            queries that alone do not make a unit's value) or `"input"` (consumer weight).
        start: first entry along that axis; queries, keys and values that lie in one tensor start at three places.
    """

    tensor: str
    axis: int
    block: int
    role: str
    start: int = 0

    def entries(self, units: Tensor) -> Tensor:
        """Where some units lie along the axis, unit after unit: `(len(units) * block,)` from `(len(units),)`."""
        first = self.start + units[:, None] * self.block
        return (first + torch.arange(self.block, device=units.device)).flatten()


@dataclass(frozen=True)
class Network:
    """The shape of every parameter of a model, and how often one input row uses it: enough to count without the model.

    Args:
        shapes: shape of every parameter, by name.
        uses: multiply-accumulates per entry of the parameter and input row (output positions of a convolution).
        products: multiply-accumulates of activations with each other, as in attention: `{tensor: (axis, number)}`, the
            number per entry along that axis of the weight that reads the result.
    """

    shapes: dict[str, tuple[int, ...]]
    uses: dict[str, int]
    products: dict[str, tuple[int, int]] = field(default_factory=dict)

    def sizes(self, groups: Iterable["Group"], kept: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter when `kept[name]` units of each group stay; groups not named keep all."""
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for group in groups:
            for part in group.slices:
                if part.tensor in sizes:
                    sizes[part.tensor][part.axis] -= (group.units - kept.get(group.name, group.units)) * part.block
        return {name: tuple(size) for name, size in sizes.items()}

    def count(self, groups: Iterable["Group"] = (), kept: Mapping[str, int] | None = None) -> dict[str, int]:
        """Parameters and multiply-accumulates per input row when `kept[name]` units of each group stay.

        Groups that `kept` does not name keep all. Convolutions, linear layers and the products of attention count as
        multiply-accumulates.
        """
        sizes = self.sizes(groups, kept or {})
        numel = {name: prod(size) for name, size in sizes.items()}
        macs = sum(uses * numel[name] for name, uses in self.uses.items())
        macs += sum(number * sizes[name][axis] for name, (axis, number) in self.products.items())
        return {"params": sum(numel.values()), "macs": macs}


@dataclass(frozen=True, eq=False)
class Group:
    """n deletable units and all their slices. Made by `find_groups`.

    Args:
        name: name of the first module that produces the units.
        units: how many units there are.
        slices: every slice that goes with a unit.
        lifted: names of the tensors that the penalty sees; empty if the group is not penalised.
        network: the network the group was found in.
        tensors: the lifted parameters themselves, by name.
        equalise: scale every lifted tensor by its mean initial norm per unit, so that tensors of different size weigh
            the same.
        counts: numbers that modules keep of the units (of heads, say): `(module, attribute, number per unit)`; of one
            in the config that all modules share the attribute is `"config.<entry>"`.
        from_zero: the lifted tensors start at zero, as those of a fresh LoRA adapter, and have no initial norm.
    """

    name: str
    units: int
    slices: tuple[Slice, ...]
    lifted: tuple[str, ...]
    network: Network = field(repr=False)
    tensors: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)
    equalise: bool = True
    counts: tuple[tuple[str, str, int], ...] = ()
    from_zero: bool = False

    @property
    def params(self) -> int:
        """Parameters that go with one unit while all the others stay."""
        return self._per_unit("params")

    @property
    def macs(self) -> int:
        """Multiply-accumulates per input row that go with one unit while all the others stay."""
        return self._per_unit("macs")

    def _per_unit(self, key: str) -> int:
        full, less = (self.network.count([self], {self.name: n})[key] for n in (self.units, self.units - 1))
        return full - less

    @property
    def lifted_slices(self) -> list[Slice]:
        """The slices that the penalty sees, in the order of `lifted`."""
        # a convolution that adds to the stream it reads has the units on both axes; the penalty sees one of them
        for roles in (("row",), ("scale", "input")):
            by_tensor = {part.tensor: part for part in self.slices if part.role in roles}
            if all(name in by_tensor for name in self.lifted):
                break
        return [by_tensor[name] for name in self.lifted]

    @property
    def silent_slices(self) -> list[Slice]:
        """What is zero where a unit is silent: all that makes its value, or else all that reads it."""
        has_rows = any(part.role == "row" for part in self.slices)
        return [part for part in self.slices if (part.role in PRODUCERS if has_rows else part.role == "input")]

    @torch.no_grad()
    def param_group(self, model: nn.Module | None = None) -> dict[str, Any]:
        """The group as a torch param group of plain values, for `SplitLBI`.

        Args:
            model: take the parameters from this model (by name) instead of the one the group was found in.

        Returns:
            `{"params", "penalty": "group", "name", "axis", "block", "scale", "units"}`, one entry of the lists per
            lifted tensor. `scale` is one over the tensor's mean norm per unit, so that every tensor contributes alike.
            Tensors that start at zero have none: there a unit's norm is the root mean square of its entries, and
            `lam_scale` is `"none"`, see `walk_path`.

        Raises:
            ValueError: if the group is not lifted, the model has other tensors, or a lifted tensor is all zeros.
        """
        if not self.lifted:
            raise ValueError(f"group {self.name!r} lifts no tensor, so it has no param group; leave it out")
        if model is not None:
            check_same_network([self], model)
        params = [self.tensors[name] if model is None else model.get_parameter(name) for name in self.lifted]
        scale = [1.0] * len(params)
        if self.from_zero:
            scale = [(self.units / p.numel()) ** 0.5 for p in params]
        elif self.equalise:
            for i, (p, part) in enumerate(zip(params, self.lifted_slices, strict=True)):
                mean = rows_of(p, part, self.units).norm(dim=1).mean().item()
                if mean == 0:
                    raise ValueError(
                        f"{part.tensor} of group {self.name!r} is all zeros: its initial norm is zero and gives it no "
                        "scale. Initialise it, or find groups with another `unit`"
                    )
                scale[i] = 1.0 / mean
        return {
            "params": params,
            "penalty": "group",
            "name": self.name,
            "units": self.units,
            "scale": scale,
            "axis": [part.axis for part in self.lifted_slices],
            "block": [part.block for part in self.lifted_slices],
        } | ({"lam_scale": "none"} if self.from_zero else {})

    @torch.no_grad()
    def norm(self, model: nn.Module) -> Tensor:
        """Size of every unit in `model`, `(units,)`: over its lifted slices, each divided by its mean over the units.

        A group that lifts nothing is measured by its producer rows, or where it has none by what reads it.
        """
        parts = self.lifted_slices or [part for part in self.silent_slices if part.role in ("row", "input")]
        squared = torch.zeros(self.units)
        for part in parts:
            norm = rows_of(model.get_parameter(part.tensor), part, self.units).norm(dim=1).float().cpu()
            squared += (norm / norm.mean().clamp_min(torch.finfo(norm.dtype).tiny)).square()
        return squared.sqrt()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the network is stored once beside the groups."""
        # the start is said of slices that leave room for others: records had none while there were no such slices
        parts = [
            [part.tensor, part.axis, part.block, part.role, *([] if self.fills(part) else [part.start])]
            for part in self.slices
        ]
        counts = {"counts": [list(count) for count in self.counts]} if self.counts else {}
        return {"name": self.name, "units": self.units, "lifted": list(self.lifted), "slices": parts} | counts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], network: Network) -> "Group":
        parts = tuple(Slice(*part) for part in values["slices"])
        counts = tuple((module, attribute, number) for module, attribute, number in values.get("counts", ()))
        return cls(values["name"], values["units"], parts, tuple(values["lifted"]), network, counts=counts)

    def fills(self, part: Slice) -> bool:
        """Whether the units are all that lies along the axis of a slice."""
        shape = self.network.shapes.get(part.tensor)  # a buffer has none, and nobody shares it
        return shape is None or shape[part.axis] == self.units * part.block

    def units_in(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many units a model has whose parameters have other shapes after units were cut or grown."""
        part = next(part for part in self.slices if part.tensor in shapes and self.fills(part))
        return shapes[part.tensor][part.axis] // part.block


class Groups(list):
    """A list of groups that prints as a table."""

    def __str__(self) -> str:
        rows = [("group", "units", "params/unit", "MACs/unit", "lifted")]
        for group in self:
            roles = [part.role for part in group.lifted_slices]
            lifted = " + ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles)) or "nothing"
            rows.append((group.name, f"{group.units:,}", f"{group.params:,}", f"{group.macs:,}", lifted))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]) for row in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def rows_of(tensor: Tensor, part: Slice, units: int) -> Tensor:
    """A view or copy with one row per unit, `(units, entries)`."""
    return tensor.detach().narrow(part.axis, part.start, units * part.block).movedim(part.axis, 0).reshape(units, -1)


def regroup(groups: Sequence[Group], model: nn.Module) -> Groups:
    """The same groups in a model whose units were cut or grown: its numbers of units, shapes and parameters.

    Args:
        groups: of the model before, or of one that differs in layers outside the groups only.
        model: has all tensors of the groups.
    """
    parameters = dict(model.named_parameters())
    network = replace(groups[0].network, shapes={name: tuple(p.shape) for name, p in parameters.items()})
    units = {group.name: group.units_in(network.shapes) for group in groups}
    starts = _starts(groups, units)
    result = Groups()
    for group in groups:
        tensors = {name: parameters[name] for name in group.lifted}
        slices = tuple(replace(part, start=starts[group.name, part]) for part in group.slices)
        result.append(replace(group, units=units[group.name], slices=slices, network=network, tensors=tensors))
    return result


def _starts(groups: Sequence[Group], units: Mapping[str, int]) -> dict[tuple[str, Slice], int]:
    """Where every slice starts once its group has another number of units, by group and slice."""
    parts = [(group, part) for group in groups for part in group.slices]
    parts.sort(key=lambda pair: (pair[1].tensor, pair[1].axis, pair[1].start))
    starts = {}
    for _, along in groupby(parts, key=lambda pair: (pair[1].tensor, pair[1].axis)):
        moved = 0
        for group, part in along:
            starts[group.name, part] = part.start + moved
            moved += (units[group.name] - group.units) * part.block
    return starts


def check_module(model: Any, function: str) -> None:
    """Refuse what is no module, or has no weights, by the name of the function that was given it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} needs a torch.nn.Module, not {type(model).__name__}")
    if away := next((name for name, p in model.named_parameters() if p.is_meta), None):
        raise ValueError(
            f"{function} needs weights, and {away} is on the device 'meta', which holds none: load the whole model "
            "onto a real device, without init_empty_weights or offloading"
        )


def check_groups(groups: Any, function: str) -> None:
    """Refuse what is no list of groups, by the name of the function that was given it."""
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Group) for group in groups):
        raise TypeError(f"{function} needs the list of groups that find_groups returns, not {type(groups).__name__}")


def check_same_network(groups: Sequence[Group], model: nn.Module) -> None:
    """Refuse groups that were found in a model with other parameters or shapes."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for group in groups:
        if group.network.shapes == shapes:
            continue
        differ = [name for name, shape in group.network.shapes.items() if shapes.get(name) != shape]
        name = (differ or [name for name in shapes if name not in group.network.shapes])[0]
        raise ValueError(
            f"group {group.name!r} is of another model: {name} has shape {group.network.shapes.get(name)} there and "
            f"{shapes.get(name)} here; call find_groups on this {type(model).__name__}"
        )


def shared_names(model: nn.Module) -> set[str]:
    """Names of all parameters that more than one layer holds; a layer registered twice is one layer."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            names.setdefault(id(p), []).append(f"{prefix}.{leaf}" if prefix else leaf)
    return {name for alike in names.values() if len(alike) > 1 for name in alike}
