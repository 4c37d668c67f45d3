"""Grow an image classifier from a narrow ResNet on any image data set, save or push it with its history.

    hf-effdl grow --model_name_or_path microsoft/resnet-18 --dataset_name beans --output_dir runs/beans \\
        --num_train_epochs 30 --max-macs-share 0.5

The net begins with new weights, the depths and a quarter of the widths of the dense net named, and grows where its
support saturates, to at most that share of the dense net's multiply-accumulates (`--max_macs`: an absolute bound).
Several processes on a machine without a GPU need `--use_cpu`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_effdl.cli.arguments import GROWING, parse_arguments
from hf_effdl.cli.options import ImageOptions


@dataclass(kw_only=True)
class GrowOptions(ImageOptions):
    """What to grow on what, from which size to which."""

    model_name_or_path: str = field(
        metadata={"help": "The dense net, a ResNet on the Hub or a folder: its config and image processor are read."}
    )
    seed_widths: list[int] | None = field(
        default=None, metadata={"help": "Widths of the embedding and of every stage; default: a quarter of dense."}
    )
    seed_depths: list[int] | None = field(default=None, metadata={"help": "Blocks of every stage; default: as dense."})
    max_macs_share: float = field(default=0.5, metadata={"help": "Share of the dense net's MACs, in (0, 1]."})

    def __post_init__(self) -> None:
        if not 0 < self.max_macs_share <= 1:
            raise ValueError(
                f"--max_macs_share {self.max_macs_share}: it is a share of the dense net's MACs, in (0, 1]"
            )


def parse(
    argv: Sequence[str] | None = None, description: str | None = __doc__, prog: str | None = "hf-effdl grow"
) -> tuple[Any, Any]:
    return parse_arguments(argv, GrowOptions, GROWING, description=description, prog=prog)


def main(argv: Sequence[str] | None = None, **script: Any) -> None:
    options, args = parse(argv, **script)
    from hf_effdl.cli.work.structure import grow

    grow(options, args)
