"""Putting blocks in: a deeper net that computes what it computed before."""

from copy import deepcopy
from numbers import Integral
from typing import Any

import torch
from torch import nn

from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.inputs import copy_of
from hf_effdl.structure.groups.surgery import share_config
from hf_effdl.structure.growing.new_units import layout
from hf_effdl.structure.optim.sharding import is_sharded
from hf_effdl.structure.slim.report import forget_report


@torch.no_grad()
def deepen(model: nn.Module, stage: int = -1, *, seed: int = 0) -> nn.Module:
    """A deeper copy of a transformers ResNet: one more residual block at the end of a stage, computing the same.

    The weight of the new block's last batch norm is zero, so that the block hands on what it gets: the stage's outputs
    are not negative, and the ReLU behind the block leaves them as they are. The gradient of that weight is not zero;
    the rest of the block learns from the second step on.

    Args:
        model: a transformers ResNet of basic or bottleneck blocks, as its config builds it; left as it is.
        stage: position of the stage in `config.depths`; negative counts from the last.
        seed: of the new block's weights; torch's random state stays.

    Returns:
        The deeper model with all the other weights, one more in `config.depths[stage]`, and a stock config: plain
        `from_pretrained` loads what it saves. Find its groups anew.

    Raises:
        TypeError: for a model that is not a transformers ResNet, or a stage that is not a whole number.
        ValueError: for a stage that it does not have, an activation that changes what it has already been applied to,
            or a model with sizes that its stock config does not say (`SlimConfig`), or sharded over processes.

    Example:
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        >>> deepen(ResNetForImageClassification(config), stage=0).config.depths
        [2, 1]

    Source:
        Blocks that start as the identity: Chen et al., "Net2Net" (arXiv 1511.05641), section 2.3; the zero in the last
        batch norm: Goyal et al. (arXiv 1706.02677), section 5.1.
    """
    stage = _check_stage(model, stage)
    name, block = _new_block(model, stage, seed)
    big = copy_of(model)
    path, _, leaf = name.rpartition(".")
    blocks = big.get_submodule(path)
    like = next(p for p in blocks.parameters() if p.ndim == 4)
    # of all its convolutions only some show their memory format, those with several inputs and entries
    formats = [layout(p) for p in blocks.parameters()]
    block.to(like.device, like.dtype)
    if torch.channels_last in formats:
        block.to(memory_format=torch.channels_last)
    blocks.add_module(leaf, block.train(blocks.training).requires_grad_(like.requires_grad))
    share_config(big, big.config)  # the new block came with one of its own
    big.config.depths = _deeper(model.config, stage)
    forget_report(big)
    return big


def _deeper(config: Any, stage: int) -> list[int]:
    return [depth + (i == stage) for i, depth in enumerate(config.depths)]


def _new_block(model: nn.Module, stage: int, seed: int) -> tuple[str, nn.Module]:
    """The block that a net of one more in a stage has, under its name, as the identity."""
    config = deepcopy(model.config)
    config.depths = _deeper(config, stage)
    with random_state_kept():
        torch.manual_seed(seed)
        built = type(model)(config)
    names = {name for name, _ in model.named_modules()}
    # the first module that the deeper net has and this one has not is the block: names of its parts come after it
    name, block = next((name, module) for name, module in built.named_modules() if name not in names)
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms[-1].weight.zero_()
    return name, block


def _check_stage(model: nn.Module, stage: int) -> int:
    from transformers import ResNetPreTrainedModel

    if not isinstance(model, ResNetPreTrainedModel):
        raise TypeError(f"deepen knows transformers' ResNet only, not {type(model).__name__}; widen takes any model")
    if not isinstance(stage, Integral) or isinstance(stage, bool):
        raise TypeError(f"stage={stage!r}: it must be a whole number, a position in config.depths")
    config = model.config
    stages = len(config.depths)
    if not -stages <= stage < stages:
        raise ValueError(f"stage={stage}: the model has {stages} stages (config.depths={config.depths})")
    if config.hidden_act not in ("relu", "relu6", "linear"):
        raise ValueError(
            f"hidden_act={config.hidden_act!r} changes what it has already been applied to, so that no block starts "
            "as the identity; deepen needs a ResNet with relu"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"this model has a {type(config.quantization_config).__name__}, which numbers its layers: one more would "
            'move them. Deepen before slimming or widening, or keep the widths stock (widths="stock")'
        )
    _check_as_built(model)
    return stage % stages


def _check_as_built(model: nn.Module) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in type(model)(deepcopy(model.config)).named_parameters()}
    for name, p in model.named_parameters():
        if shapes.get(name) != p.shape:
            raise ValueError(
                f"{name} has shape {tuple(p.shape)}, and the config builds {tuple(shapes.get(name, ()))}: deepen "
                "needs a model as its config builds it"
            )
        if is_sharded(p):
            raise ValueError(f"{name} is sharded over processes; deepen the model before FSDP wraps it")
