"""Finding the groups of a model by tracing one forward pass."""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hf_effdl.structure.groups.group import Group, Groups, Network, Slice, cut, is_depthwise, mask


logger = logging.getLogger(__name__)

UNITS = ("default", "row", "paper")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_JOINT_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # each unit's output depends on the other units


def find_groups(model: nn.Module, example_inputs: Any = None, *, unit: str = "default") -> Groups:
    """Find the units of a model that can be removed, each with all its tensor slices.

    A copy of the model is traced with Torch-Pruning's dependency graph, so module and model names play no part and the
    model itself stays as it is. Every group found is tried out: taking a unit out of the copy must give the same
    output as silencing it; groups that fail are left out with a warning, and so are those that hold layers other than
    plain and depthwise convolutions, linear layers and batch norms (subclasses included), or that a concatenation
    joins. A depthwise convolution belongs to the units that it filters. Inputs and outputs of the model are never
    groups.

    Args:
        model: any module, of transformers, timm or your own; convolutional networks are what this release is tested
            on.
        example_inputs: a tensor, a tuple of positional or a dict of keyword tensors with a batch axis. Default: made
            from the config of a transformers vision model, else guessed from the first layer (with a warning, since
            MACs depend on it).
        unit: which tensors of a group the penalty sees. `"default"`: with batch norm, its weight and the next layers'
            input slices (a row in front of batch norm is scale-free); without, the producer rows, unless another group
            has them already, then the input slices. `"row"`: the producer rows. `"paper"`: the rows of convolutions,
            not rescaled.

    Returns:
        A list of `Group` in the order of the model's layers; it prints as a table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model cannot be traced, or no group was found; names the modules seen.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> [(group.name, group.units) for group in find_groups(net, torch.zeros(1, 1, 8, 8))]
        [('0', 4)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_groups needs a torch.nn.Module, not {type(model).__name__}")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: it must be one of {UNITS}")
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        copy = _traceable_copy(model)
        inputs = _one_row(example_inputs, copy) if example_inputs is not None else _guess_inputs(copy)
        network = Network({name: tuple(p.shape) for name, p in copy.named_parameters()}, _count_uses(copy, inputs))
        _even_out(copy, inputs)
        found, skipped = _trace(copy, inputs, network)
        groups = _keep_removable(*_in_double(copy, inputs), found, skipped)
    for name, reason in skipped.items():
        logger.warning("hf_effdl leaves out the units of %s: %s", name, reason)
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"no group found in {_describe(model)}{'; left out: ' if reasons else ''}{reasons}")
    return _lift(groups, model, unit)


def trace_network(model: nn.Module, inputs: Any) -> Network:
    """Shapes of a model's parameters and how often one input row uses each, from one forward pass of a copy."""
    copy = _traceable_copy(model)
    shapes = {name: tuple(p.shape) for name, p in copy.named_parameters()}
    return Network(shapes, _count_uses(copy, _one_row(inputs, copy)))


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of tensors or a dict of keyword tensors."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def output_tensors(output: Any) -> list[Tensor]:
    """All floating point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in output_tensors(item)]
    return []


def _describe(model: nn.Module) -> str:
    leaves = [
        f"{name} ({type(module).__name__})" for name, module in model.named_modules() if not any(module.children())
    ]
    shown = ", ".join(leaves[:30]) + (f" and {len(leaves) - 30} more" if len(leaves) > 30 else "")
    return f"{type(model).__name__} with modules {shown or 'none'}"


def _traceable_copy(model: nn.Module) -> nn.Module:
    copy = deepcopy(model).float().eval()
    copy.requires_grad_(True)
    with torch.no_grad():
        for p in copy.parameters():
            _fill_zeros(p)
            if p.numel() == max(p.shape, default=1):  # a vector; say a layer scale of 1e-6
                p.copy_(p.abs().clamp_min(0.1).copysign(p))
    return copy


def _fill_zeros(tensor: Tensor) -> Tensor:
    """Zeros (a fresh head, the last norm of a branch, a blank example) would hide what a silent unit still sends."""
    return tensor.masked_fill_(tensor == 0, 0.1) if tensor.is_floating_point() else tensor


@torch.no_grad()
def _even_out(model: nn.Module, inputs: Any) -> None:
    """Scale every convolution and linear layer to outputs of size one, and let batch norms expect that.

    A signal that fades on its way (through fresh weights, say) would hide what a silent unit still sends.
    """
    seen = set()

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        bias = 0 if module.bias is None else module.bias.view(-1, *[1] * (module.weight.ndim - 2))
        size = (output - bias).square().mean().sqrt()
        if module in seen or not (size.isfinite() and size > 0):
            return None
        seen.add(module)
        module.weight.div_(size)
        if module.bias is not None:
            module.bias.div_(size.clamp_min(1))
        return module.forward(*args, **kwargs)

    layers = [module for module in model.modules() if isinstance(module, (*_CONVS, nn.Linear))]
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in layers]
    for module in model.modules():
        if isinstance(module, _BATCH_NORMS):
            module.reset_running_stats()
    try:
        call(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()


def _one_row(inputs: Any, model: nn.Module) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[:1].detach().to(device)
        return _fill_zeros(value.float().clone()) if value.is_floating_point() else value

    if isinstance(inputs, Mapping):
        # a loss would be one more output, and labels are no input of the network
        return {name: first(value) for name, value in inputs.items() if name != "labels"}
    return type(inputs)(first(value) for value in inputs) if isinstance(inputs, (tuple, list)) else first(inputs)


def _guess_inputs(model: nn.Module) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.randn(1, config.num_channels, height, width, device=device)}
    first = next((m for m in model.modules() if isinstance(m, (*_CONVS, nn.Linear))), None)
    shapes = []
    if isinstance(first, nn.Linear):
        shapes = [(1, first.in_features)]
    elif first is not None:
        axes = first.weight.ndim - 2
        shapes = [(1, first.in_channels, *[size] * axes) for size in (32, 28, 64, 96, 224)]
    for shape in shapes:
        inputs = torch.randn(shape, device=device)
        try:
            with torch.no_grad():
                model(inputs)
        except (RuntimeError, ValueError, TypeError):
            continue
        logger.warning("no example_inputs given: tracing %s with inputs of shape %s", type(model).__name__, shape)
        return inputs
    raise ValueError(f"cannot make inputs for {_describe(model)}; pass example_inputs=")


def _count_uses(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Multiply-accumulates per weight entry: output positions of every convolution and linear layer."""
    names = {id(p): name for name, p in model.named_parameters()}
    uses: dict[str, int] = {}

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        positions = output.numel() // module.weight.shape[0]
        name = names.get(id(module.weight))  # a parametrised weight is no parameter
        if name is not None:
            uses[name] = uses.get(name, 0) + positions

    hooks = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, (*_CONVS, nn.Linear))]
    try:
        with torch.no_grad():
            call(model, inputs)
    except Exception as error:
        raise ValueError(
            f"{_describe(model)} does not run on the example inputs ({type(error).__name__}: {error}); pass "
            "example_inputs= that model(example_inputs) accepts"
        ) from error
    finally:
        for handle in hooks:
            handle.remove()
    return uses


def _trace(model: nn.Module, inputs: Any, network: Network) -> tuple[list[Group], dict[str, str]]:
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(model, inputs, forward_fn=call, output_transform=output_tensors, verbose=False)
        found = list(graph.get_all_groups(root_module_types=[*_CONVS, nn.Linear]))
    except Exception as error:
        raise ValueError(f"cannot trace {_describe(model)}: {type(error).__name__}: {error}") from error

    order = {module: i for i, module in enumerate(model.modules())}
    names = {module: name for name, module in model.named_modules()}
    groups, reasons = [], {}
    for traced in found:
        members = [
            (item, graph.is_out_channel_pruning_fn(item.dep.handler))
            for item in traced
            if isinstance(item.dep.target.module, nn.Parameter) or item.dep.target.module in names
        ]
        members.sort(key=lambda member: order.get(member[0].dep.target.module, -1))
        root = traced[0].dep.target.module
        units = root.weight.shape[0]
        slices: list[Slice] = []
        for item, is_output in members:
            module = item.dep.target.module
            if module in names:
                slices += _slices(module, names[module], is_output, max(1, len(item.idxs) // units))
        name = next((p.tensor for p in slices if p.role == "row"), names[root] + ".weight").rpartition(".")[0]
        groups.append(Group(name, units, tuple(slices), (), network))
        how = {type(item.dep.target.module).__name__ for item in traced}
        members.sort(key=lambda member: not _mixes(member[0].dep.target.module))  # the reason to name first
        reasons[name] = next(filter(None, (_unsupported(model, names, *m, units, how) for m in members)), None)

    position = {name: i for i, name in enumerate([*network.shapes, *dict(model.named_buffers())])}
    groups = _join_depthwise(groups, reasons, position)
    shared = _shared_names(model)
    kept, skipped = [], {}
    for group in groups:
        rows = [part.tensor for part in group.slices if part.role == "row"]
        tied = next((part.tensor for part in group.slices if part.tensor in shared), None)
        if reasons[group.name]:
            skipped[group.name] = reasons[group.name]
        elif tied:
            skipped[group.name] = f"{tied} is shared with another layer"
        elif all(is_depthwise(model.get_submodule(row.rpartition(".")[0])) for row in rows):
            skipped[group.name] = f"{group.name} is a depthwise convolution of channels that no layer makes"
        elif any(part.role == "input" for part in group.slices):  # without a consumer the units are the model's output
            kept.append(group)
    return sorted(kept, key=lambda group: position[group.slices[0].tensor]), skipped


def _join_depthwise(
    groups: Sequence[Group], reasons: dict[str, str | None], position: Mapping[str, int]
) -> list[Group]:
    """Join the group that ends in a depthwise convolution with the one that starts there.

    With one output per channel the tracer has one group already; with more, the outputs of a channel are one unit.
    """
    groups = list(groups)
    while True:
        pairs = (
            (before, after, part, row)
            for before in groups
            for part in before.slices
            if part.role == "filtered"
            for after in groups
            for row in after.slices
            if (row.tensor, row.role) == (part.tensor, "row")
        )
        before, after, part, row = next(pairs, (None,) * 4)
        if before is None:
            return groups
        # the larger unit decides: it covers as many rows of this convolution as several units of the other group
        block = max(part.block, row.block)
        rest = [other for other in before.slices if other is not part]
        both = [(rest, block // part.block), (after.slices if after is not before else (), block // row.block)]
        slices = [Slice(s.tensor, s.axis, s.block * times, s.role) for side, times in both for s in side]
        slices.sort(key=lambda s: position.get(s.tensor, len(position)))  # a parametrised weight is no parameter
        name = next(s.tensor for s in slices if s.role == "row").rpartition(".")[0]
        reason = reasons[before.name] or reasons[after.name]
        if block % part.block or block % row.block:
            reason = reason or f"{row.tensor} has another number of outputs per unit than the layers beside it"
        units = before.units * part.block // block
        groups = [group for group in groups if group is not before and group is not after]
        groups.append(Group(name, units, tuple(slices), (), before.network))
        reasons[name] = reason


def _shared_names(model: nn.Module) -> set[str]:
    """Names of all parameters that more than one layer holds; a layer registered twice is one layer."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            names.setdefault(id(p), []).append(f"{prefix}.{leaf}" if prefix else leaf)
    return {name for alike in names.values() if len(alike) > 1 for name in alike}


def _mixes(module: Any) -> bool:
    """Whether units come out of this layer changed by other units."""
    grouped = isinstance(module, _CONVS) and module.groups != 1 and not is_depthwise(module)
    return grouped or isinstance(module, _JOINT_NORMS)


def _unsupported(
    model: nn.Module, names: Mapping[nn.Module, str], item: Any, is_output: bool, units: int, how: set[str]
) -> str | None:
    """Why the units cannot go with their part of one layer; `how` names the operations between their layers."""
    module = item.dep.target.module
    if isinstance(module, nn.Parameter):
        tensor = next(name for name, p in model.named_parameters() if p is module)
        owner = model.get_submodule(tensor.rpartition(".")[0])
        if any(owner.children()):
            return f"the bare parameter {tensor} goes with them"
        module = owner
    name, kind = names[module], type(module).__name__
    if is_parametrized(module):
        return f"{name} has a parametrised weight; remove the parametrisation first"
    if isinstance(module, _JOINT_NORMS):
        base = next(base.__name__ for base in _JOINT_NORMS if isinstance(module, base))
        return f"{name} is a {base}, whose statistics run over them: without some, the others would change"
    if _mixes(module):
        return f"{name} is a grouped convolution"
    if isinstance(module, _BATCH_NORMS) and module.weight is None:
        return f"{name} is a {kind} without a weight, so that nothing silences them"
    own = {leaf for leaf, _ in module.named_parameters(recurse=False)}
    if own - ({"weight", "bias"} if isinstance(module, (*_CONVS, *_BATCH_NORMS, nn.Linear)) else set()):
        return f"{name} is a {kind}, which has parameters of its own"
    if not own:
        return None
    size = module.weight.shape[0] if is_output else getattr(module, "in_channels", module.weight.shape[-1])
    block, rest = divmod(len(item.idxs), units)
    # the tracer may list the entries in any order
    entries = sorted(zip(item.idxs, item.root_idxs, strict=True))
    if rest or size != len(entries) or entries != [(i, i // block) for i in range(units * block)]:
        if "_ConcatOp" in how:
            return f"a concatenation sets them beside other channels in {name}"
        return f"they are spread over {name} in an order other than one run per unit"
    return None


def _slices(module: nn.Module, name: str, is_output: bool, block: int) -> list[Slice]:
    prefix = name + "." if name else ""
    if isinstance(module, _BATCH_NORMS):
        parts = [("weight", "scale"), ("bias", "shift"), ("running_mean", "mean"), ("running_var", "var")]
        return [Slice(prefix + t, 0, block, role) for t, role in parts if getattr(module, t) is not None]
    if not isinstance(module, (*_CONVS, nn.Linear)):
        return []
    if is_depthwise(module) and not is_output:  # each channel has its rows; `_join_depthwise` brings them
        return [Slice(prefix + "weight", 0, block * module.out_channels // module.in_channels, "filtered")]
    if not is_output:
        return [Slice(prefix + "weight", 1, block, "input")]
    rows = [Slice(prefix + "weight", 0, block, "row")]
    return rows + ([Slice(prefix + "bias", 0, block, "bias")] if module.bias is not None else [])


@torch.no_grad()
def _in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """A model and its inputs in double precision, where it runs in that: what a few units change shows up better."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    try:
        double = deepcopy(model).double()
        if isinstance(inputs, Mapping):
            doubled: Any = {name: wide(value) for name, value in inputs.items()}
        else:
            doubled = type(inputs)(map(wide, inputs)) if isinstance(inputs, (tuple, list)) else wide(inputs)
        if all(tensor.dtype == torch.float64 for tensor in output_tensors(call(double, doubled))):
            return double, doubled
    except Exception:  # noqa: BLE001 - a dtype written into the forward pass, a device without double precision
        pass
    return model, inputs


def _keep_removable(model: nn.Module, inputs: Any, groups: Sequence[Group], skipped: dict[str, str]) -> list[Group]:
    """Only the groups whose units can be taken out; the rest goes to `skipped`."""
    if not groups or _is_removable(model, inputs, groups):  # the common case costs two forward passes in all
        return list(groups)
    if len(groups) == 1:
        skipped[groups[0].name] = "a model without some of them is not the model in which those are silent"
        return []
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:])
    return [group for half in halves for group in _keep_removable(model, inputs, half, skipped)]


@torch.no_grad()
def _is_removable(model: nn.Module, inputs: Any, groups: Sequence[Group]) -> bool:
    # several at once, so that means and norms over the units change visibly; few, so that the signal stays
    kept = {group.name: torch.arange(group.units) for group in groups if group.units > 1}
    kept = {name: index[index % 8 > 0] for name, index in kept.items()}
    silent = output_tensors(call(mask(deepcopy(model), groups, kept), inputs))
    try:
        small = output_tensors(call(cut(deepcopy(model), groups, kept), inputs))
    except Exception:  # noqa: BLE001 - a size written into the forward pass may break it in any way
        return False
    return len(silent) == len(small) and all(
        a.shape == b.shape
        and (a - b).abs().max() <= (1e-6 if a.dtype == torch.float64 else 1e-4) * (1 + a.abs().max())
        for a, b in zip(silent, small, strict=True)
    )


def _lift(groups: Sequence[Group], model: nn.Module, unit: str) -> Groups:
    """Choose the tensors of every group that the penalty sees; each tensor goes to one group at most."""
    taken: set[str] = set()
    lifted: dict[str, tuple[str, ...]] = {}

    def claim(group: Group, *roles: str) -> bool:
        names = [part.tensor for part in group.slices if part.role in roles]
        names = [name for name in names if model.get_parameter(name).detach().any()]  # e.g. zero-initialised norms
        if not names or taken.intersection(names):
            return False
        lifted[group.name] = tuple(names)
        taken.update(names)
        return True

    def rows_are_convolutions(group: Group) -> bool:
        return all(model.get_parameter(part.tensor).ndim > 2 for part in group.slices if part.role == "row")

    if unit == "default":
        with_norm = [group for group in groups if any(part.role == "scale" for part in group.slices)]
        for group in with_norm:
            claim(group, "scale", "input")
        for group in groups:
            if group.name not in lifted:
                claim(group, "row") or claim(group, "input")
    else:
        for group in groups:
            if unit == "row" or rows_are_convolutions(group):
                claim(group, "row")
    parameters = dict(model.named_parameters())
    return Groups(
        Group(
            group.name,
            group.units,
            group.slices,
            lifted.get(group.name, ()),
            group.network,
            {name: parameters[name] for name in lifted.get(group.name, ())},
            equalise=unit != "paper",
        )
        for group in groups
    )
