"""Example inputs of a model: made, guessed, cut to one row; and what a model says to them."""

import dataclasses
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_effdl.structure.groups.group import CONVS


logger = logging.getLogger(__name__)
TOKENS = 32  # in a made-up text
CONTAINERS = (OrderedDict, dict, list, set)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of tensors or a dict of keyword tensors."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 in float32 for the length of a `with` block, where TF32 or bfloat16 may do elsewhere."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, which cannot be asked for as a whole
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def each_input(change: Callable[[Any], Any], inputs: Any) -> Any:
    """The same tensor, tuple or dict, with every value changed."""
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return type(inputs)(map(change, inputs)) if isinstance(inputs, (tuple, list)) else change(inputs)


def each_tensor(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """The same inputs, with every tensor changed, also those inside lists and dicts of theirs."""

    def deep(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return each_input(deep, value) if isinstance(value, (Mapping, tuple, list)) else value

    return deep(inputs)


def copy_of(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of a model; results of an earlier forward pass that it holds on to come without their graph.

    Args:
        model: left as it is.
        shared: parameters that the copy has in common with it.

    Raises:
        ValueError: it holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}

    def detach(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is not None:  # such a tensor cannot be copied
            memo[id(tensor)] = tensor.detach()
        return tensor

    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in CONTAINERS and not value:  # hooks that are not there, half of the time of a copy
                memo[id(value)] = type(value)()
            elif not name.startswith("_"):
                each_tensor(detach, _if_plain(value))
    try:
        return deepcopy(model, memo)
    except Exception as error:  # of whatever the model holds
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the model that is given "
            "stays as it is: take off it what copy.deepcopy refuses, a lock or a compiled function, say"
        ) from error


def _if_plain(value: Any) -> Any:
    return value if isinstance(value, (Tensor, tuple, list)) or type(value) is dict else None


def output_tensors(output: Any) -> list[Tensor]:
    """All floating point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in output_tensors(item)]
    return []


def all_values(output: Any) -> list[Tensor]:
    """Everything in a model's output that can be compared, in order: tensors of all types, arrays, numbers."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (bool, int, float)):
        return [torch.tensor(output)]
    if hasattr(output, "__array__"):
        array = output.__array__()
        return [torch.as_tensor(array)] if array.dtype.kind in "biuf" else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    elif type(output).__module__ not in ("builtins", "collections") and hasattr(output, "__dict__"):
        output = [value for value in vars(output).values() if not callable(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for item in output for tensor in all_values(item)]
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


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """An input without its graph, on a device; raises where it has no values."""
    if tensor.is_meta:
        raise ValueError(
            f"inputs hold a tensor of shape {tuple(tensor.shape)} on the device 'meta', which has no values: pass "
            "rows as the model gets them"
        )
    return tensor.detach().to(device)


def one_row(inputs: Any, model: nn.Module) -> Any:
    """The first row of some inputs, on the model's device, without labels and without zeros."""
    device = _device(model)

    def first(value: Any) -> Any:
        value = torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value
        if not isinstance(value, Tensor):
            return value
        value = moved(value[:1] if value.ndim else value, device)
        return fill_zeros(value.float().clone()) if value.is_floating_point() else value

    if isinstance(inputs, Mapping):
        # a loss would be one more output, and labels are no input of the network
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
    return each_input(first, inputs)


def twice(inputs: Any) -> Any:
    """Inputs of one row as two equal ones."""

    def double(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.cat([value, value]) if value.ndim and len(value) == 1 else value
        return value * 2 if isinstance(value, list) and len(value) == 1 else value

    return each_input(double, inputs)


# ---- labels


def labels_of(inputs: Any, model: nn.Module) -> Any:
    """The first row of the labels among some inputs, on the model's device; None where there are none."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if labels is None:
        return None
    device = _device(model)
    labels = torch.as_tensor(labels) if isinstance(labels, np.ndarray) else labels
    return each_tensor(lambda tensor: tensor.detach().to(device), labels[:1] if len(labels) else labels)


@torch.no_grad()
def with_labels(model: nn.Module, inputs: Any, labels: Any = None) -> list[dict[str, Any]]:
    """Inputs of one row together with labels, one for each kind of labels that the model runs on; at most one here.

    Args:
        model: of any kind; one that takes no `labels` runs on none.
        inputs: without labels.
        labels: of that row; None: made up, of the usual shapes.
    """
    try:
        signature = inspect.signature(model.forward)
        if "labels" not in signature.parameters:
            return []
        if not isinstance(inputs, Mapping):
            rows = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
            inputs = signature.bind(*rows).arguments
    except (TypeError, ValueError):
        return []
    for candidate in [labels] if labels is not None else _likely_labels(inputs):
        labelled = {**inputs, "labels": candidate}
        try:
            call(model, labelled)
        except Exception:  # noqa: BLE001 - labels of another kind may break it in any way
            continue
        return [labelled]
    logger.warning(
        "%s takes labels, but its groups were tried out without: none that it runs on are known; pass example_inputs= "
        "with labels",
        type(model).__name__,
    )
    return []


def _likely_labels(inputs: Mapping[str, Any]) -> Iterator[Tensor]:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        return
    rows, device = len(tensors[0]), tensors[0].device
    if "input_ids" in inputs:
        yield inputs["input_ids"]
    yield torch.zeros(rows, dtype=torch.int64, device=device)
    for image in (tensor for tensor in tensors if tensor.ndim == 4):
        yield torch.zeros(rows, *image.shape[2:], dtype=torch.int64, device=device)
        yield torch.zeros_like(image)
    yield torch.zeros(rows, device=device)


# ---- guesses


def guess_inputs(model: nn.Module) -> Any:
    """One random row for a model: by the config of a transformers model of images or text, else by its first layer.

    Raises:
        ValueError: if none is accepted.
    """
    device, config = _device(model), getattr(model, "config", None)
    tokens = _tokens(model, device)
    if tokens:
        return tokens
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(config, "num_channels"):
        return {"pixel_values": _image(config, device)}
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


def _image(config: Any, device: torch.device) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.randn(1, config.num_channels, height, width, device=device)


def _tokens(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Random tokens for a transformers model of text, with an image where it takes one too; else nothing."""
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", config)
    takes = inspect.signature(model.forward).parameters
    if not isinstance(getattr(text, "vocab_size", None), int) or "input_ids" not in takes:
        return {}
    length = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
    # the first tokens are special: padding, say
    inputs = {"input_ids": torch.randint(min(5, text.vocab_size - 1), text.vocab_size, (1, length), device=device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    vision = getattr(config, "vision_config", None)
    if "pixel_values" in takes and hasattr(vision, "num_channels"):
        inputs["pixel_values"] = _image(vision, device)
    logger.info("no example_inputs given: %s is tried out and counted on %d tokens", type(model).__name__, length)
    return inputs


def _likely_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    first = next((module for module in model.modules() if isinstance(module, (*CONVS, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        yield 1, first.in_features
    elif first is not None:
        axes = first.weight.ndim - 2
        yield from ((1, first.in_channels, *[size] * axes) for size in (32, 28, 64, 96, 224))


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
