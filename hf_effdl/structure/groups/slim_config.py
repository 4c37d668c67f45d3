"""Loading a model with sizes that its stock config cannot say, by transformers' hook for rebuilding modules.

`from_pretrained` calls a registered quantizer between building the model and filling in the weights, which is where
the layers get their sizes. Nothing is quantised.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_effdl.structure.groups.numbers import (
    IN_CONFIG,
    is_number_name,
    number_of,
    numbers_of,
    own_numbers,
    set_number,
    shared_config,
)
from hf_effdl.structure.groups.record import LARGEST, listed, named, require, whole
from hf_effdl.structure.groups.surgery import has_inputs_first, set_sizes


QUANT_METHOD = "hf_effdl"
_SIZED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


@register_quantization_config(QUANT_METHOD)
class SlimConfig(QuantizationConfigMixin):
    """Sizes of the layers that differ from what the stock config builds.

    Layers are numbered in the order in which the model registers them, among its convolutions, linear layers and batch
    norms: names of submodules change between releases of transformers, their order does not. So are the parameters
    that lie in none of those, and, for each attribute, the modules that have it.

    Args:
        layers: `{number: [outputs, inputs]}` for convolutions and linear layers, `{number: [features]}` for norms;
            `None` for a size that the stock config says, so that it can still be changed at loading (`num_labels`,
            say).
        count: how many such layers the model has, to notice a model of another architecture.
        tables: `{number: shape}` of other parameters, a table of position biases with a column per head, say.
        counts: `{attribute: {number: value}}` of whole numbers that modules keep of their units.
    """

    def __init__(
        self,
        layers: dict[str, list[int | None]],
        count: int,
        tables: dict[str, list[int]] | None = None,
        counts: dict[str, dict[str, int]] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.tables = {
            _number(at, "tables"): [whole(size, f"table {at}", 1, LARGEST) for size in listed(shape, f"table {at}")]
            for at, shape in named(tables or {}, "tables").items()
        }
        self.counts = {}
        for attribute, values in named(counts or {}, "counts").items():
            require(is_number_name(attribute), "counts", f"names the attribute {attribute[:20]!r}")
            entries = named(values, f"counts of {attribute}").items()
            self.counts[attribute] = {_number(at, "counts"): whole(n, "counts", 1, LARGEST) for at, n in entries}
        self.count = whole(count, "count", 0, LARGEST)
        self.layers = {}
        for number, sizes in dict(layers if isinstance(layers, Mapping) else named(layers, "layers")).items():
            at = str(number)
            require(at.isdecimal() and len(at) < 9 and int(at) < count, "layers", f"numbers a layer {at[:20]!r}")
            require(len(listed(sizes, f"layer {at}")) in (1, 2), f"layer {at}", "is no list of one or two sizes")
            self.layers[at] = [None if size is None else whole(size, f"layer {at}", 1, LARGEST) for size in sizes]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what holds nothing is not said."""
        return {name: value for name, value in super().to_dict().items() if value or name not in ("tables", "counts")}

    @classmethod
    def of(cls, model: nn.Module) -> "SlimConfig":
        """The sizes of a slim transformers model, compared with what its config builds without them."""
        config = deepcopy(model.config)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            stock = type(model)(config)
        mine, theirs = _sized_layers(model), _sized_layers(stock)
        layers = {
            str(i): [None if size == old else size for size, old in zip(_sizes(layer), _sizes(other), strict=True)]
            for i, (layer, other) in enumerate(zip(mine, theirs, strict=True))
            if _sizes(layer) != _sizes(other)
        }
        pairs = zip(_tables(model), _tables(stock), strict=True)
        shapes = [(tuple(own[2].shape), tuple(other[2].shape)) for own, other in pairs]
        tables = {str(i): list(own) for i, (own, other) in enumerate(shapes) if own != other}
        return cls(layers, len(mine), tables, _counts_that_differ(model, stock))


@register_quantizer(QUANT_METHOD)
class SlimQuantizer(HfQuantizer):
    """Gives the layers of a freshly built model the sizes in its `SlimConfig`, before the weights arrive."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers = _sized_layers(model)
        wanted = self.quantization_config
        if wanted.count != len(layers):
            raise ValueError(
                f"this checkpoint's slim sizes are for a model with {wanted.count} sized layers, but "
                f"{type(model).__name__} has {len(layers)}; load it with the class it was saved from"
            )
        for number, sizes in wanted.layers.items():
            layer = layers[int(number)]
            if len(sizes) != len(_sizes(layer)):
                raise ValueError(
                    f"layer {number} of this checkpoint has sizes {sizes}, which do not fit a {type(layer).__name__}; "
                    "load it with the class it was saved from"
                )
            _resize(layer, sizes)
        _resize_tables(model, wanted.tables)
        for attribute, values in wanted.counts.items():
            modules = _modules_with(model, attribute)
            for number, value in values.items():
                if int(number) >= len(modules):
                    raise ValueError(
                        f"this checkpoint sets {attribute} of module {number}, but {type(model).__name__} has "
                        f"{len(modules)} such modules; load it with the class it was saved from"
                    )
                set_number(modules[int(number)], attribute, value)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # From here on it is an ordinary dense model, which trains, casts and saves like any other; the config keeps
        # the sizes for the next load.
        del model.hf_quantizer, model.is_quantized, model.quantization_method
        for module in model.modules():
            if (config := shared_config(module)) is not None:
                config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _number(text: str, where: str) -> str:
    require(text.isdecimal() and len(text) < 9, where, f"has the number {text[:20]!r}")
    return text


def _is_sized(module: nn.Module) -> bool:
    return isinstance(module, _SIZED) or has_inputs_first(module)


def _sized_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_sized(module)]


def _tables(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name there and value of every parameter that lies in no sized layer."""
    modules = [module for module in model.modules() if not _is_sized(module)]
    return [(module, name, p) for module in modules for name, p in module.named_parameters(recurse=False)]


def _resize_tables(model: nn.Module, wanted: Mapping[str, list[int]]) -> None:
    tables = _tables(model)
    for number, shape in wanted.items():
        module, name, p = tables[int(number)] if int(number) < len(tables) else (None, None, None)
        if p is None or p.ndim != len(shape):
            raise ValueError(
                f"parameter {number} of this checkpoint has shape {shape}, which fits none of "
                f"{type(model).__name__}; load it with the class it was saved from"
            )
        new = torch.empty(shape, dtype=p.dtype, device=p.device)
        setattr(module, name, nn.Parameter(new, p.requires_grad))
        set_sizes(module)


def _modules_with(model: nn.Module, attribute: str) -> list[nn.Module]:
    """The modules, sized layers aside, that keep a whole number of that name."""
    return [m for m in model.modules() if number_of(m, attribute) is not None and not _is_sized(m)]


def _counts_that_differ(model: nn.Module, stock: nn.Module) -> dict[str, dict[str, int]]:
    """Whole numbers of modules that are not what the stock class sets, by attribute and place."""
    modules = [m for m in model.modules() if not _is_sized(m) and not isinstance(m, nn.Embedding)]
    names = {name for module in modules for name, _ in numbers_of(module, in_config=False)}
    names |= {IN_CONFIG + name for module in modules for name in own_numbers(module)}
    counts = {}
    for name in sorted(names):
        pairs = zip(_modules_with(model, name), _modules_with(stock, name), strict=False)
        values = [(number_of(mine, name), number_of(theirs, name)) for mine, theirs in pairs]
        differ = {str(i): mine for i, (mine, theirs) in enumerate(values) if mine != theirs}
        counts |= {name: differ} if differ else {}
    return counts


def _sizes(layer: nn.Module) -> list[int]:
    if has_inputs_first(layer):
        return list(layer.weight.shape[::-1])
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return [layer.num_features]
    return list(layer.weight.shape[:2])


def _resize(layer: nn.Module, wanted: list[int | None]) -> None:
    sizes = [old if size is None else size for size, old in zip(wanted, _sizes(layer), strict=True)]
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.ndim == 0:  # the norm's batch counter
            continue
        shape = [*sizes[: tensor.ndim], *tensor.shape[len(sizes) :]]
        if tensor.ndim == 2 and has_inputs_first(layer):
            shape = shape[::-1]
        new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        setattr(layer, name, nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new)
    set_sizes(layer)
