"""Choose the rows worth training on, of any classification data set of images or texts; train on them if asked.

    hf-effdl select --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --budget 0.2 \\
        --output_dir runs/beans
    hf-effdl select --config banking.yaml --push_selection me/banking-r10 --train --compare --num_train_epochs 5
    torchrun --nproc_per_node 2 -m hf_effdl.cli select --config banking.yaml

Images and texts are told apart by the data set's columns. A share of the training rows is set aside for the probes:
by default linear heads on the model's frozen backbone (`--probes trained` trains whole models). The rest is the pool.
The rows with their weights are in `output_dir`/rows, as `datasets.load_from_disk` and `--dataset_name` read them, a
report with pictures in `output_dir`/report, and the choice alone, with its card, in `output_dir`/selection. Several
processes on a machine without a GPU need `--use_cpu`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_effdl.cli.arguments import TRAINING, parse_arguments
from hf_effdl.cli.options import INPUT, ModelDataOptions


@dataclass(kw_only=True)
class SelectOptions(ModelDataOptions):
    """What to select from what, with what."""

    input_column: str | None = field(default=None, metadata=INPUT)
    budget: float = field(default=0.2, metadata={"help": "Rows to select; up to 1: a share of the pool."})
    probe_share: float = field(default=0.2, metadata={"help": "Share of the training rows that the probes get."})
    probes: str = field(
        default="linear", metadata={"choices": ["linear", "trained"], "help": "Heads on the backbone, or models."}
    )
    num_probes: int = field(default=8, metadata={"help": "Number of probes."})
    preset: str = field(default="default", metadata={"choices": ["default", "paper"], "help": "How rows are chosen."})
    train: bool = field(default=False, metadata={"help": "Train a model on the rows that were chosen."})
    compare: bool = field(default=False, metadata={"help": "Then also on as many random rows."})
    push_selection: str | None = field(default=None, metadata={"help": "Push the selection to this data set repo."})

    def __post_init__(self) -> None:
        if not 0 < self.probe_share < 1:
            raise ValueError(f"--probe_share {self.probe_share}: it is a share of the training rows, in (0, 1)")
        if self.budget <= 0:
            raise ValueError(f"--budget {self.budget}: it is a share of the pool up to 1, or a number of rows")


def parse(
    argv: Sequence[str] | None = None,
    description: str | None = __doc__,
    prog: str | None = "hf-effdl select",
    defaults: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    return parse_arguments(argv, SelectOptions, TRAINING, description=description, prog=prog, defaults=defaults)


def main(argv: Sequence[str] | None = None, **script: Any) -> None:
    options, args = parse(argv, **script)
    from hf_effdl.cli.work.samples import select

    select(options, args)
