"""Finding the groups of a model by tracing one forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.checks import one_of
from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.counting import network_of
from hf_effdl.structure.groups.finders.blocks import find_blocks
from hf_effdl.structure.groups.finders.counts import with_counts
from hf_effdl.structure.groups.finders.lora import has_adapter, lora_groups
from hf_effdl.structure.groups.finders.trace import trace
from hf_effdl.structure.groups.group import BATCH_NORMS, CONVS, Group, Groups, Network, check_module
from hf_effdl.structure.groups.inputs import (
    call,
    copy_of,
    describe,
    fill_zeros,
    full_precision,
    guess_inputs,
    labels_of,
    logger,
    one_row,
)
from hf_effdl.structure.groups.surgery import has_inputs_first
from hf_effdl.structure.groups.trial import keep_removable, settings_for


UNITS = ("default", "row", "paper")


def find_groups(model: nn.Module, example_inputs: Any = None, *, unit: str = "default") -> Groups:
    """Find the units of a model that can be removed, each with all its tensor slices.

    In transformers a unit is a neuron of an FFN (gated or not), an attention head, or a key/value head together with
    the query heads that read it, or a query head alone where all read the same one; gradients of one forward pass of a
    copy say what reaches what. Where layers share position biases or a mask, as those of a T5, a unit is the head of
    that number in all of them. Convolutional networks are traced with Torch-Pruning's dependency graph. Module and
    model names play no part, and the model itself stays as it is. Every group found is tried out: taking random units
    out of the copy must give the same output as silencing them, in eval and in train mode, with labels where the model
    takes them, on inputs as they are and larger, up to pixels, and on a batch. Groups that fail are left out with a
    warning, and so are those that hold layers other than plain and depthwise convolutions, linear layers and batch
    norms (subclasses included), or that a concatenation joins. A depthwise convolution belongs to the units that it
    filters. Inputs and outputs of the model are never groups. What is frozen (`requires_grad=False`) shows no signal
    and is not lifted.

    In a model with a LoRA adapter of PEFT the units are the adapter's ranks, one group per adapted module, and nothing
    else; they need no example and no trial. The lifted tensor is B (of an embedding A), which starts at zero.

    Args:
        model: any module, of transformers, timm or your own.
        example_inputs: a tensor, a tuple of positional or a dict of keyword tensors with a batch axis. Default: made
            from the config of a transformers model of images or text (32 tokens), else guessed from the first layer
            (with a warning, since MACs depend on it). `labels` in a dict serve the trial alone; without them some are
            made up.
        unit: which tensors of a group the penalty sees. `"default"`: with batch norm, its weight and the next layers'
            input slices (a row in front of batch norm is scale-free); without, the producer rows, unless another group
            has them already, then the input slices. `"row"`: the producer rows. `"paper"`: the rows of convolutions,
            not rescaled.

    Returns:
        A list of `Group` in the order of the model's layers; it prints as a table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the model cannot be traced, its weights are quantised, or no group was found; an adapter has no
            ranks that can go one at a time. Names the modules.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> [(group.name, group.units) for group in find_groups(net, torch.zeros(1, 1, 8, 8))]
        [('0', 4)]
    """
    check_module(model, "find_groups")
    one_of("unit", unit, UNITS)
    if has_adapter(model):
        groups = lora_groups(model)
        _report_frozen([group for group in groups if not group.lifted], dict(model.named_parameters()))
        return groups
    _check_weights(model)
    # rounding would hide whether a unit can go, and inference mode how signals flow
    with random_state_kept(), full_precision(), torch.inference_mode(False):
        copy = _traceable_copy(model)
        inputs = one_row(example_inputs, copy) if example_inputs is not None else guess_inputs(copy)
        network = network_of(copy, inputs)
        _even_out(copy, inputs)
        found, skipped = _find(copy, inputs, network)
        settings = settings_for(copy, inputs, labels_of(example_inputs, copy))
        groups = keep_removable(settings, with_counts(copy, settings, found, skipped), skipped)
    _report_skipped(groups, skipped, model)
    return _lift(groups, model, unit)


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that are no floating point numbers: those of a unit could be neither silenced nor fitted."""
    for name, p in model.named_parameters():
        if not p.is_floating_point() or p.dtype.itemsize == 1:
            raise ValueError(
                f"{name} is quantised ({p.dtype}), so no units can be taken out; load the model without "
                "quantization_config, slim it, and quantise the smaller one"
            )


def _find(copy: nn.Module, inputs: Any, network: Network) -> tuple[list[Group], dict[str, str]]:
    """Groups to try out, and why others are left out: blocks of transformers, then what the tracer finds besides."""
    blocks = find_blocks(copy, inputs, network)
    if blocks.groups and blocks.is_all:
        return blocks.groups, blocks.skipped
    try:
        traced, skipped = trace(copy, inputs, network)
    except ValueError as error:
        if not blocks.groups:
            raise
        logger.info("only blocks of a transformer are looked for: %s", error)
        return blocks.groups, blocks.skipped
    taken = {(part.tensor, part.axis) for group in blocks.groups for part in group.slices}
    besides = [g for g in traced if not any((part.tensor, part.axis) in taken for part in g.slices)]
    own = {group.name for group in blocks.groups}
    position = {name: i for i, name in enumerate([*network.shapes, *dict(copy.named_buffers())])}
    groups = sorted([*blocks.groups, *besides], key=lambda group: position[group.slices[0].tensor])
    return groups, {name: why for name, why in (skipped | blocks.skipped).items() if name not in own}


def _report_skipped(groups: Sequence[Group], skipped: Mapping[str, str], model: nn.Module) -> None:
    for name, reason in skipped.items():
        logger.warning("hf_effdl leaves out the units of %s: %s", name, reason)
    if not groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"no group found in {describe(model)}{'; left out: ' if reasons else ''}{reasons}")


def _traceable_copy(model: nn.Module) -> nn.Module:
    copy = copy_of(model).float().eval()
    copy.requires_grad_(True)
    with torch.no_grad():
        for p in copy.parameters():
            fill_zeros(p)
            if p.numel() == max(p.shape, default=1):  # a vector; say a layer scale of 1e-6
                p.copy_(p.abs().clamp_min(0.1).copysign(p))
        for module in copy.modules():  # keys and values kept for later are no output of the network
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
        for name, buffer in copy.named_buffers():
            if not name.rpartition(".")[2].startswith("running_"):  # of those, zeros hide nothing
                fill_zeros(buffer)
    return copy


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

    kinds = (*CONVS, nn.Linear)
    layers = [module for module in model.modules() if isinstance(module, kinds) or has_inputs_first(module)]
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in layers]
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_running_stats()
    try:
        call(model, inputs)
    finally:
        for handle in hooks:
            handle.remove()


def _lift(groups: Sequence[Group], model: nn.Module, unit: str) -> Groups:
    """Choose the tensors of every group that the penalty sees; each tensor goes to one group at most."""
    claims = _Claims(model)
    if unit == "default":
        claims.by_default(groups)
    else:
        claims.rows(groups, convolutions_only=unit == "paper")
    parameters = dict(model.named_parameters())
    _report_frozen([group for group in groups if group.name not in claims.lifted], parameters)
    result = Groups()
    for group in groups:
        names = claims.lifted.get(group.name, ())
        tensors = {name: parameters[name] for name in names}
        result.append(replace(group, lifted=names, tensors=tensors, equalise=unit != "paper"))
    return result


def _report_frozen(groups: Sequence[Group], parameters: Mapping[str, nn.Parameter]) -> None:
    names = []
    for group in groups:
        seen = [part.tensor for part in group.slices if part.role in ("row", "scale", "input")]
        if any(not parameters[tensor].requires_grad for tensor in seen):
            names.append(group.name)
    if names:
        logger.warning(
            "frozen parameters (requires_grad=False) show no signal: the units of %s are not lifted and stay as many "
            "as they are",
            ", ".join(names),
        )


class _Claims:
    """Which group lifts which tensors; a tensor that is taken cannot be claimed again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.taken: set[str] = set()
        self.lifted: dict[str, tuple[str, ...]] = {}

    def by_default(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if any(part.role == "scale" for part in group.slices):
                self._claim(group, "scale", "input")
        for group in groups:
            if group.name not in self.lifted:
                self._claim(group, "row") or self._claim(group, "input")

    def rows(self, groups: Sequence[Group], convolutions_only: bool) -> None:
        for group in groups:
            rows = [self.model.get_parameter(part.tensor) for part in group.slices if part.role == "row"]
            if not convolutions_only or all(row.ndim > 2 for row in rows):
                self._claim(group, "row")

    def _claim(self, group: Group, *roles: str) -> bool:
        parts = [part for part in group.slices if part.role in roles]
        if not all(group.fills(part) for part in parts):  # the optimizer's units fill a tensor's axis
            return False
        names = [part.tensor for part in parts]
        tensors = {name: self.model.get_parameter(name) for name in names}
        # zero-initialised norms have no size to start from, and what is frozen shows no signal
        names = [name for name, p in tensors.items() if p.requires_grad and p.detach().any()]
        if not names or self.taken.intersection(names):
            return False
        self.lifted[group.name] = tuple(names)
        self.taken.update(names)
        return True
