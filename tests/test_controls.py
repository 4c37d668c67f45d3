"""Does the support say anything? Redrawn labels on noise must leave it empty, true labels must fill it."""

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_effdl import SparsePath, SplitLBI, derive_path, find_groups, param_groups
from hf_effdl.structure.training.arguments import LEARNING_RATES


STEPS, BATCH = 468, 32


def conv_bn_net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 8, 2), (8, 16, 2), (16, 16, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def lenet() -> nn.Sequential:
    body = [nn.Conv2d(1, 6, 5, stride=2), nn.ReLU(), nn.Conv2d(6, 16, 5, stride=2), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def mnist(folder) -> tuple[torch.Tensor, torch.Tensor]:
    images = np.frombuffer(gzip.open(folder / "mnist/train-images-idx3-ubyte.gz").read(), np.uint8, offset=16)
    labels = np.frombuffer(gzip.open(folder / "mnist/train-labels-idx1-ubyte.gz").read(), np.uint8, offset=8)
    images = torch.tensor(images.reshape(-1, 1, 28, 28)[:10000] / np.float32(255))
    return (images - 0.13) / 0.31, torch.tensor(labels[:10000].astype(np.int64))


def entered_share(net: nn.Module, batch, base: str) -> float:
    """Share of units in the support after a run with the default settings, lr constant for 60 %, then to 0."""
    rates = [LEARNING_RATES[base] * min(1.0, (STEPS - k) / (0.4 * STEPS)) for k in range(STEPS)]
    groups = find_groups(net, torch.zeros(1, 1, 28, 28))
    optimizer = SplitLBI(param_groups(net, groups), lr=rates[0], base=base, **derive_path(sum(rates), base=base))
    net.train()
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, labels = batch()
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    path = SparsePath.from_optimizer(optimizer, groups)
    return torch.cat(list(path.support.values())).float().mean().item()


@pytest.mark.parametrize("build", [conv_bn_net, lenet])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_noise_with_redrawn_labels_enters_hardly_any_unit(build, seed, base):
    torch.manual_seed(seed)
    share = entered_share(build(), lambda: (torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))), base)
    assert share < 0.1


@pytest.mark.parametrize("build", [conv_bn_net, lenet])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_true_labels_enter_most_units_in_the_same_budget(data_folder, build, seed, base):
    torch.manual_seed(seed)
    images, labels = mnist(data_folder)

    def batch():
        rows = torch.randint(len(images), (BATCH,))
        return images[rows], labels[rows]

    share = entered_share(build(), batch, base)
    assert share > 0.5
