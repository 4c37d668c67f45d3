# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Winning tickets on MNIST: found early by `find_ticket`, beside the baselines of `ticket_arms.py`.

Two nets: LeNet (no batch norm) and four conv-BN layers of 32, 48, 64 and 64 channels. Transfer: a ticket found on the
digits 0 to 4 in grey, trained on 1,000 digits 5 to 9 in random colours.

    python examples/benchmarks/tickets_mnist.py --net lenet
    python examples/benchmarks/tickets_mnist.py --net wide
    python examples/benchmarks/tickets_mnist.py --table

Rows go to `--out` as one JSON line per finished (net, arm, budget, seed); rows already there are skipped.
"""

from collections.abc import Sequence

import torch
from rows import RowFile, parser_of, read_rows
from structure_mnist import Task, mnist
from structure_mnist import build as small_build
from ticket_arms import Setting, rows_of_seed, table, transfer_rows
from torch import Tensor, nn
from trainer_rows import Classifier


SETTINGS = {
    "lenet": {"epochs": 6, "lr": 0.02, "weight_decay": 0.0},
    "wide": {"epochs": 4, "lr": 0.1, "weight_decay": 5e-4},
}
WIDTHS = (32, 48, 64, 64)


def conv_bn_net(widths: tuple[int, ...], channels: int = 1, classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, stride in zip(widths, (2, 1, 2, 1), strict=True):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def build(net: str, channels: int = 1, classes: int = 10) -> nn.Sequential:
    if net == "wide":
        return conv_bn_net(WIDTHS, channels, classes)
    model = small_build(net)
    if (channels, classes) != (1, 10):
        first, last = model[0], model[-1]
        model[0] = nn.Conv2d(channels, first.out_channels, 5, padding=2)
        model[-1] = nn.Linear(last.in_features, classes)
    return model


def coloured(images: Tensor, seed: int) -> Tensor:
    """Every grey image in a colour of its own."""
    colours = torch.rand(len(images), 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return images * (0.3 + 0.7 * colours)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "tickets_mnist")
    parser.add_argument("--net", choices=sorted(SETTINGS), default="lenet")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rows", type=int, default=60000)
    parser.add_argument("--epochs", type=int, default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.table:
        return table(read_rows(options.out))
    values = SETTINGS[options.net] | ({"epochs": options.epochs} if options.epochs else {})
    images, labels = mnist("train")
    data, test = (images[: options.rows], labels[: options.rows]), mnist("test")
    config = {"classes": 10, "rows": len(data[0]), "epochs": values["epochs"], "device": "cpu"}
    setting = Setting(
        options.net, Task(build), data, test, values["epochs"], values["lr"], values["weight_decay"], config=config
    )
    file = RowFile(options.out, ("arm", "seed", "budget", "transfer"), {"net": options.net, **config})
    done = {(arm, seed, budget) for arm, seed, budget, transfer in file.done if not transfer}
    transferred = {seed for _, seed, _, transfer in file.done if transfer}
    cache = options.out.parent / "cache" / f"tickets-{options.rows}-{values['epochs']}-{values['lr']}"
    for seed in options.seeds:
        for row in rows_of_seed(setting, seed, done, cache):
            file.add(row, hide=())
    low, high, unseen = data[1] < 5, data[1] >= 5, test[1] >= 5
    source = data[0][low], data[1][low]
    target = coloured(data[0][high][:1000], 1), data[1][high][:1000] - 5
    target_test = coloured(test[0][unseen], 2), test[1][unseen] - 5
    for seed in options.seeds:
        if seed in transferred:
            continue
        torch.manual_seed(seed)
        model = Classifier(build(options.net, 1, 5))

        def other(seed: int = seed) -> Classifier:
            torch.manual_seed(500 + seed)
            return Classifier(build(options.net, 3, 5))

        file.add(*transfer_rows(setting, seed, source, model, target, target_test, other, 0.25, steps=800), hide=())
    table(file.rows)


if __name__ == "__main__":
    main()
