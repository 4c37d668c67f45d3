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

from hf_effdl.structure.groups.record import LARGEST, listed, named, require, whole
from hf_effdl.structure.groups.surgery import set_sizes


QUANT_METHOD = "hf_effdl"
_SIZED = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


@register_quantization_config(QUANT_METHOD)
class SlimConfig(QuantizationConfigMixin):
    """Sizes of the layers that differ from what the stock config builds.

    Layers are numbered in the order in which the model registers them, among its convolutions, linear layers and batch
    norms: names of submodules change between releases of transformers, their order does not.

    Args:
        layers: `{number: [outputs, inputs]}` for convolutions and linear layers, `{number: [features]}` for norms;
            `None` for a size that the stock config says, so that it can still be changed at loading (`num_labels`,
            say).
        count: how many such layers the model has, to notice a model of another architecture.
    """

    def __init__(self, layers: dict[str, list[int | None]], count: int, **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.count = whole(count, "count", 0, LARGEST)
        self.layers = {}
        for number, sizes in dict(layers if isinstance(layers, Mapping) else named(layers, "layers")).items():
            at = str(number)
            require(at.isdecimal() and len(at) < 9 and int(at) < count, "layers", f"numbers a layer {at[:20]!r}")
            require(len(listed(sizes, f"layer {at}")) in (1, 2), f"layer {at}", "is no list of one or two sizes")
            self.layers[at] = [None if size is None else whole(size, f"layer {at}", 1, LARGEST) for size in sizes]

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
        return cls(layers, len(mine))


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
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # From here on it is an ordinary dense model, which trains, casts and saves like any other; the config keeps
        # the sizes for the next load.
        del model.hf_quantizer, model.is_quantized, model.quantization_method
        for module in model.modules():
            if getattr(module, "config", None) is not None:
                module.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def _sized_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _SIZED)]


def _sizes(layer: nn.Module) -> list[int]:
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return [layer.num_features]
    return list(layer.weight.shape[:2])


def _resize(layer: nn.Module, wanted: list[int | None]) -> None:
    sizes = [old if size is None else size for size, old in zip(wanted, _sizes(layer), strict=True)]
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.ndim == 0:  # the norm's batch counter
            continue
        shape = [*sizes[: tensor.ndim], *tensor.shape[len(sizes) :]]
        new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        setattr(layer, name, nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new)
    set_sizes(layer)
