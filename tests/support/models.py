"""Small networks that several test files use, with an example input each."""

import random

import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)


def lenet() -> nn.Module:
    """LeNet for 28x28: the second convolution ends in 5x5 maps, so a filter has 25 columns of the linear layer."""
    body = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(400, 84), nn.ReLU(), nn.Linear(84, 10))


def vgg() -> nn.Module:
    """Three times convolution, batch norm, ReLU and pooling on 16x16, then 2x2 maps flattened for two layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 6), (6, 8), (8, 10)):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 5))


def resnet(layer_type: str = "basic", **config: object) -> ResNetForImageClassification:
    """A transformers ResNet: basic blocks with stem and stages 8, 8, 16 wide, or bottlenecks with 8, 16, 32."""
    sizes = {
        "basic": {"embedding_size": 8, "hidden_sizes": [8, 16]},
        "bottleneck": {"embedding_size": 8, "hidden_sizes": [16, 32]},
    }
    values = {"layer_type": layer_type, "depths": [2, 1], "num_labels": 4, **sizes[layer_type], **config}
    return ResNetForImageClassification(ResNetConfig(**values))


def mobilenet(**config: object) -> MobileNetV2ForImageClassification:
    """A transformers MobileNetV2 for 32x32 with 16 inverted residual blocks, 8 to 64 channels wide."""
    values = {"image_size": 32, "depth_multiplier": 0.2, "finegrained_output": False, "num_labels": 4, **config}
    return MobileNetV2ForImageClassification(MobileNetV2Config(**values))


def convnext(**config: object) -> ConvNextForImageClassification:
    """A transformers ConvNeXt for 32x32: five blocks with hidden layers 32, 64, 96, 96 and 128 wide."""
    values = {"image_size": 32, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 4, **config}
    return ConvNextForImageClassification(ConvNextConfig(**values))


NETS = {
    "lenet": (lenet, (1, 28, 28)),
    "vgg": (vgg, (3, 16, 16)),
    "resnet": (resnet, (3, 32, 32)),
    "bottleneck": (lambda: resnet("bottleneck"), (3, 32, 32)),
}


def build(name: str, seed: int = 0, rows: int = 1) -> tuple[nn.Module, Tensor]:
    """One of the four nets and an input of `rows` rows, both drawn from `seed`; torch's random state stays."""
    make, shape = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(), torch.randn(rows, *shape)


@torch.no_grad()
def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm the weights and statistics that it could have after training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, spread, shift in (
                (module.weight, 0.2, 1.0),
                (module.bias, 0.3, 0.1),
                (module.running_mean, 0.3, 0.1),
            ):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + shift)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


def logits(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def recount(model: nn.Module, inputs: Tensor) -> dict[str, int]:
    """Parameters, and multiply-accumulates of one row seen in a forward pass: none of the package's own counting."""
    macs = 0

    def watch(module: nn.Module, received: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            taps = module.kernel_size[0] * module.kernel_size[1] * received[0].shape[1] // module.groups
            macs += output[0].numel() * taps
        else:
            macs += output[0].numel() * received[0].shape[-1]

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    mode = model.training
    with torch.no_grad():
        model.eval()(inputs[:1])
    model.train(mode)
    for hook in hooks:
        hook.remove()
    return {"params": sum(p.numel() for p in model.parameters()), "macs": macs}


def renamed(model: nn.Module, lists: bool = True) -> nn.Module:
    """The same network with another class name and another name for every submodule, in lists too.

    Attributes that a forward pass uses stay reachable, but outside the registry that names are made from.
    """
    draw = random.Random(0)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and not lists:
            continue
        children = dict(module._modules)
        module._modules.clear()
        for name, child in children.items():
            module.__dict__[name] = child
            module._modules[f"x{draw.randrange(10**9)}"] = child
    model.__class__ = type("Zebra", (type(model),), {})
    return model
