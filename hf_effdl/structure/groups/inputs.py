"""Example inputs of a model: made, guessed, cut to one row; and what a model says to them."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.group import CONVS


logger = logging.getLogger(__name__)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of tensors or a dict of keyword tensors."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode for the length of a `with` block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def each_input(change: Callable[[Any], Any], inputs: Any) -> Any:
    """The same tensor, tuple or dict, with every value changed."""
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return type(inputs)(map(change, inputs)) if isinstance(inputs, (tuple, list)) else change(inputs)


def output_tensors(output: Any) -> list[Tensor]:
    """All floating point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in output_tensors(item)]
    return []


def describe(model: nn.Module) -> str:
    """A model's class and the modules in it, for messages."""
    leaves = [
        f"{name} ({type(module).__name__})" for name, module in model.named_modules() if not any(module.children())
    ]
    shown = ", ".join(leaves[:30]) + (f" and {len(leaves) - 30} more" if len(leaves) > 30 else "")
    return f"{type(model).__name__} with modules {shown or 'none'}"


def fill_zeros(tensor: Tensor) -> Tensor:
    """Zeros (a fresh head, the last norm of a branch, a blank example) would hide what a silent unit still sends."""
    return tensor.masked_fill_(tensor == 0, 0.1) if tensor.is_floating_point() else tensor


def one_row(inputs: Any, model: nn.Module) -> Any:
    """The first row of some inputs, on the model's device, without labels and without zeros."""
    device = _device(model)

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value[:1].detach().to(device)
        return fill_zeros(value.float().clone()) if value.is_floating_point() else value

    if isinstance(inputs, Mapping):
        # a loss would be one more output, and labels are no input of the network
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    return each_input(first, inputs)


def guess_inputs(model: nn.Module) -> Any:
    """One random row for a model: by the config of a vision model, else by its first layer.

    Raises:
        ValueError: if none is accepted.
    """
    device, config = _device(model), getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.randn(1, config.num_channels, height, width, device=device)}
    for shape in _likely_shapes(model):
        inputs = torch.randn(shape, device=device)
        try:
            with torch.no_grad():
                model(inputs)
        except (RuntimeError, ValueError, TypeError):
            continue
        logger.warning("no example_inputs given: tracing %s with inputs of shape %s", type(model).__name__, shape)
        return inputs
    raise ValueError(f"cannot make inputs for {describe(model)}; pass example_inputs=")


def _likely_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    first = next((module for module in model.modules() if isinstance(module, (*CONVS, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield 1, first.in_features
    elif first is not None:
        axes = first.weight.ndim - 2
        yield from ((1, first.in_channels, *[size] * axes) for size in (32, 28, 64, 96, 224))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
