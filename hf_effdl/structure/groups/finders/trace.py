"""From one traced forward pass to groups: the layers in Torch-Pruning's dependency graph, as slices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from hf_effdl.structure.groups.counting import LAYERS, LOOKUPS
from hf_effdl.structure.groups.group import BATCH_NORMS, CONVS, Group, Network, Slice, shared_names
from hf_effdl.structure.groups.inputs import call, describe, output_tensors
from hf_effdl.structure.groups.surgery import is_depthwise


_JOINT_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # each unit's output depends on the other units


def trace(model: nn.Module, inputs: Any, network: Network) -> tuple[list[Group], dict[str, str]]:
    """The groups of a model in the order of its layers, lifting nothing yet; and, by name, why others are left out."""
    reader = _Reader(model, inputs)
    groups, reasons = [], {}
    for traced in reader.traced:
        group, reason = reader.read(traced, network)
        groups.append(group)
        reasons[group.name] = reason
    position = {name: i for i, name in enumerate([*network.shapes, *dict(model.named_buffers())])}
    groups = _join_depthwise(groups, reasons, position)
    shared = shared_names(model)
    kept, skipped = [], {}
    for group in groups:
        reason = reasons[group.name] or _refusal(group, model, shared)
        if reason:
            skipped[group.name] = reason
        elif any(part.role == "input" for part in group.slices):  # without a consumer the units are the model's output
            kept.append(group)
    return sorted(kept, key=lambda group: position[group.slices[0].tensor]), skipped


class _Reader:
    """Reads the groups that Torch-Pruning finds in one forward pass."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        import torch_pruning

        self.model = model
        self.graph = torch_pruning.DependencyGraph()
        try:
            with torch.enable_grad():
                self.graph.build_dependency(
                    model, inputs, forward_fn=call, output_transform=output_tensors, verbose=False
                )
            self.traced = list(self.graph.get_all_groups(root_module_types=[*CONVS, nn.Linear]))
        except Exception as error:
            why = _unknown_layers(model) or f"{type(error).__name__}: {error}"
            raise ValueError(f"cannot trace {type(model).__name__}: {why}; it is a {describe(model)}") from error
        self.order = {module: i for i, module in enumerate(model.modules())}
        self.names = {module: name for name, module in model.named_modules()}

    def read(self, traced: Any, network: Network) -> tuple[Group, str | None]:
        """A traced group, and why its units cannot be taken out, where that shows already."""
        members = [
            (item, self.graph.is_out_channel_pruning_fn(item.dep.handler))
            for item in traced
            if isinstance(_layer(item), nn.Parameter) or _layer(item) in self.names
        ]
        members.sort(key=lambda member: self.order.get(_layer(member[0]), -1))
        root = _layer(traced[0])
        units = root.weight.shape[0]
        slices: list[Slice] = []
        for item, is_output in members:
            module = _layer(item)
            if module in self.names:
                slices += _slices(module, self.names[module], is_output, max(1, len(item.idxs) // units))
        rows = [part.tensor for part in slices if part.role == "row"]
        name = (rows[0] if rows else self.names[root] + ".weight").rpartition(".")[0]
        members.sort(key=lambda member: not _mixes(_layer(member[0])))  # the reason to name first
        operations = {type(_layer(item)).__name__ for item in traced}
        problems = (self._problem(item, is_output, units, operations) for item, is_output in members)
        return Group(name, units, tuple(slices), (), network), next(filter(None, problems), None)

    def _problem(self, item: Any, is_output: bool, units: int, operations: set[str]) -> str | None:
        """Why the units cannot go with their part of one layer; `operations` lie between their layers."""
        module = _layer(item)
        if isinstance(module, nn.Parameter):
            tensor = next(name for name, p in self.model.named_parameters() if p is module)
            module = self.model.get_submodule(tensor.rpartition(".")[0])
            if any(module.children()):
                return f"the bare parameter {tensor} goes with them"
        name = self.names[module]
        problem = _problem_of_kind(module, name)
        if problem or not any(True for _ in module.parameters(recurse=False)):
            return problem
        size = module.weight.shape[0] if is_output else getattr(module, "in_channels", module.weight.shape[-1])
        if _is_one_run_per_unit(item, size, units):
            return None
        if "_ConcatOp" in operations:
            return f"a concatenation sets them beside other channels in {name}"
        return f"they are spread over {name} in an order other than one run per unit"


_KNOWN = (*LAYERS, *LOOKUPS, nn.LayerNorm, nn.RMSNorm)


def _unknown_layers(model: nn.Module) -> str:
    """What a message says of the layers with parameters that the tracer cannot follow; empty without any."""
    kinds = {}
    for name, module in model.named_modules():
        if any(p.ndim > 1 for p in module.parameters(recurse=False)) and not isinstance(module, _KNOWN):
            kinds.setdefault(type(module).__name__, name or "the model itself")
    if not kinds:
        return ""
    listed = ", ".join(f"{kind} ({name})" for kind, name in kinds.items())
    return (
        f"it has layers with weights that cannot be followed: {listed}. Groups are found in convolutional networks, "
        "of convolutions, linear layers and norms"
    )


def _layer(item: Any) -> Any:
    """The module, bare parameter or operation that a member of a traced group speaks of."""
    return item.dep.target.module


def _problem_of_kind(module: nn.Module, name: str) -> str | None:
    """Why no unit can go from a layer of this kind."""
    kind = type(module).__name__
    if is_parametrized(module):
        return f"{name} has a parametrised weight; remove the parametrisation first"
    if isinstance(module, _JOINT_NORMS):
        base = next(base.__name__ for base in _JOINT_NORMS if isinstance(module, base))
        return f"{name} is a {base}, whose statistics run over them: without some, the others would change"
    if _mixes(module):
        return f"{name} is a grouped convolution"
    if isinstance(module, BATCH_NORMS) and module.weight is None:
        return f"{name} is a {kind} without a weight, so that nothing silences them"
    usual = {"weight", "bias"} if isinstance(module, (*CONVS, *BATCH_NORMS, nn.Linear)) else set()
    if {leaf for leaf, _ in module.named_parameters(recurse=False)} - usual:
        return f"{name} is a {kind}, which has parameters of its own"
    return None


def _is_one_run_per_unit(item: Any, size: int, units: int) -> bool:
    """Whether the entries of a layer's axis are those of the first unit, then of the second, and so on."""
    block, rest = divmod(len(item.idxs), units)
    # the tracer may list the entries in any order
    entries = sorted(zip(item.idxs, item.root_idxs, strict=True))
    return not rest and size == len(entries) and entries == [(i, i // block) for i in range(units * block)]


def _refusal(group: Group, model: nn.Module, shared: set[str]) -> str | None:
    """Why a whole group is left out, once its layers have been joined."""
    tied = next((part.tensor for part in group.slices if part.tensor in shared), None)
    if tied:
        return f"{tied} is shared with another layer"
    rows = [part.tensor for part in group.slices if part.role == "row"]
    if all(is_depthwise(model.get_submodule(row.rpartition(".")[0])) for row in rows):
        return f"{group.name} is a depthwise convolution of channels that no layer makes"
    return None


def _join_depthwise(
    groups: Sequence[Group], reasons: dict[str, str | None], position: Mapping[str, int]
) -> list[Group]:
    """Join the group that ends in a depthwise convolution with the one that starts there.

    With one output per channel the tracer has one group already; with more, the outputs of a channel are one unit.
    """
    groups = list(groups)
    while (meeting := next(_meetings(groups), None)) is not None:
        before, after, part, row = meeting
        joined = _joined(*meeting, position)
        reason = reasons[before.name] or reasons[after.name]
        block = max(part.block, row.block)
        if block % part.block or block % row.block:
            reason = reason or f"{row.tensor} has another number of outputs per unit than the layers beside it"
        reasons[joined.name] = reason
        groups = [*(group for group in groups if group is not before and group is not after), joined]
    return groups


def _joined(before: Group, after: Group, part: Slice, row: Slice, position: Mapping[str, int]) -> Group:
    """The group of two that meet; the larger unit decides, as it covers several units of the other group."""
    block = max(part.block, row.block)
    slices = _of_larger_units([other for other in before.slices if other is not part], block // part.block)
    if after is not before:
        slices += _of_larger_units(after.slices, block // row.block)
    slices.sort(key=lambda s: position.get(s.tensor, len(position)))  # a parametrised weight is no parameter
    name = next(s.tensor for s in slices if s.role == "row").rpartition(".")[0]
    return Group(name, before.units * part.block // block, tuple(slices), (), before.network)


def _meetings(groups: Sequence[Group]) -> Iterator[tuple[Group, Group, Slice, Slice]]:
    """Where a group ends in a depthwise convolution and another has its rows: both groups and both slices."""
    for before in groups:
        for part in before.slices:
            if part.role == "filtered":
                for after in groups:
                    rows = (row for row in after.slices if (row.tensor, row.role) == (part.tensor, "row"))
                    yield from ((before, after, part, row) for row in rows)


def _of_larger_units(slices: Iterable[Slice], times: int) -> list[Slice]:
    return [Slice(part.tensor, part.axis, part.block * times, part.role) for part in slices]


def _mixes(module: Any) -> bool:
    """Whether units come out of this layer changed by other units."""
    grouped = isinstance(module, CONVS) and module.groups != 1 and not is_depthwise(module)
    return grouped or isinstance(module, _JOINT_NORMS)


def _slices(module: nn.Module, name: str, is_output: bool, block: int) -> list[Slice]:
    prefix = name + "." if name else ""
    if isinstance(module, BATCH_NORMS):
        parts = [("weight", "scale"), ("bias", "shift"), ("running_mean", "mean"), ("running_var", "var")]
        return [Slice(prefix + t, 0, block, role) for t, role in parts if getattr(module, t) is not None]
    if not isinstance(module, (*CONVS, nn.Linear)):
        return []
    if is_depthwise(module) and not is_output:  # each channel has its rows; `_join_depthwise` brings them
        return [Slice(prefix + "weight", 0, block * module.out_channels // module.in_channels, "filtered")]
    if not is_output:
        return [Slice(prefix + "weight", 1, block, "input")]
    rows = [Slice(prefix + "weight", 0, block, "row")]
    return rows + ([Slice(prefix + "bias", 0, block, "bias")] if module.bias is not None else [])
