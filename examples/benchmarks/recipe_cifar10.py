# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "torch-pruning==1.6.1",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""The recipe of `trainer.train_small` on CIFAR-10: all classes and images, a narrow ResNet-20 from fresh weights.

Arms, search and "equal MACs" are those of `recipe_mnist.py`. The net is that of `pretrained_resnet20.py` with half of
its channels (8, 16, 32; 10 MMACs): what can go are the channels inside its nine blocks. SGD at 0.1, constant for 60 %
of the steps and then falling to zero, weight decay 5e-4, 128 cropped and flipped images a step, 12 epochs in all. The
strength of the group lasso is that of `structure_cifar10.py`, tuned on nothing.

    python examples/benchmarks/recipe_cifar10.py               # three seeds, half an hour each on one core
    python examples/benchmarks/recipe_cifar10.py --table

CIFAR-10 is read as in `structure_cifar10.py`. Rows go to `--out` as one JSON line per finished (net, budget, arm,
seed); rows already there are skipped.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from pretrained_resnet20 import ResNet20
from recipe_mnist import KEYS, RECIPE, SCRATCH, Run, add_rows, table
from rows import RowFile, parser_of
from structure_cifar10 import DATA, SETTINGS, augment, cifar10, on_device
from structure_mnist import Task
from torch import Tensor, nn
from transformers.utils import logging


ARMS = (
    "path, even order",
    "global L2, even order",
    "random",
    "scratch, uniform widths, equal MACs",
    "group lasso, even order",
)
WIDTH, EPOCHS = 8, 12


class Logits(nn.Module):
    """A net of transformers' kind as the loop of `structure_mnist.py` calls it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits


def run_of(data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], width: int, epochs: int) -> Run:
    def build(net: str) -> nn.Module:
        return Logits(ResNet20(width))

    def place(model: nn.Module) -> nn.Module:
        return model.to(memory_format=torch.channels_last)

    task = Task(build, int(SETTINGS["batch"]), place, augment)
    named = f"ResNet-20 of {width} channels, {len(data[0]):,} images, {epochs} epochs"
    return Run(named, data, test, task=task, given={**SETTINGS, "epochs": epochs, "tune": 0})


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "recipe_cifar10")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=(*RECIPE, *SCRATCH), default=ARMS, metavar="ARM")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.25])
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the first stage; 16 is the whole net")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rows", type=int, help="training images; default: all")
    parser.add_argument("--data", type=Path, default=DATA / "cifar10-travel")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    file = RowFile(options.out, KEYS)
    if not options.table:
        data, test = (on_device(*cifar10(split, options.data), torch.device("cpu")) for split in ("train", "test"))
        run = run_of(tuple(part[: options.rows] for part in data), test, options.width, options.epochs)
        add_rows(run, options.seeds, options.budgets, options.arms, file)
    table(file.rows)


if __name__ == "__main__":
    main()
