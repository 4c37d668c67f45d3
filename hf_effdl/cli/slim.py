"""Make a trained model smaller without training: by the path it was trained with, or on some hundred calibration rows.

    hf-effdl slim --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --calibration questions.txt \\
        --output_dir runs/half
    hf-effdl slim --model_name_or_path facebook/dinov2-small --calibration beans --output_dir runs/half --rows 128
    hf-effdl slim --model_name_or_path HuggingFaceTB/SmolLM2-135M --calibration questions.txt --output_dir runs/lean \\
        --keep 0.75
    hf-effdl slim --model_name_or_path runs/beans --macs 0.3 --output_dir runs/third      # of `sparsify`: its path

Every layer keeps `--keep` of its FFN neurons, and with `--calibration` the layer behind is refitted on the rows so
that it does without the others; so are the layers behind the heads, to make up for what is lost before them. Rows come
from a text file with a row per line, a folder of images, a folder from `save_to_disk`, or an id on the Hub; a fifth of
them is held out. With `--widths free` more goes from layers that the outputs miss less. What is printed and stands in
the checkpoint's config as `effdl_report` are parameters, multiply-accumulates and latency of one row, and the relative
squared error of the outputs on those. A folder with a path (`sparse_path.safetensors`) says itself which units stay,
under a budget of any kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_effdl.cli.arguments import LongOptions, parse_arguments, refuse_several_processes
from hf_effdl.cli.options import WIDTHS, one_of_budgets


@dataclass(kw_only=True)
class SlimOptions(LongOptions):
    """What is made smaller, and on which rows."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    output_dir: str = field(metadata={"help": "Folder of the smaller checkpoint."})
    calibration: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset_name"],
            "help": "File of rows (text, CSV, JSON, Parquet), folder, or id on the Hub; default: no refits.",
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(default="train", metadata={"help": "Split that the rows are drawn from."})
    column: str | None = field(default=None, metadata={"help": "Column of the rows; default: 'text' or 'image'."})
    model_class: str | None = field(default=None, metadata={"help": "Default: the class that the checkpoint names."})
    keep: float | None = field(default=None, metadata={"help": "Share of the units that stays; default: 0.5."})
    macs: float | None = field(default=None, metadata={"help": "Share of the multiply-accumulates, by the path."})
    params: float | None = field(default=None, metadata={"help": "Share of the parameters, by the path."})
    units: str = field(
        default="neurons",
        metadata={"help": "What goes without a path: neurons, or attention heads too.", "choices": ["neurons", "all"]},
    )
    score: str | None = field(
        default=None,
        metadata={
            "help": "Which units stay; default: by the path, else activation, or magnitude without calibration.",
            "choices": ["path", "magnitude", "activation", "obs"],
        },
    )
    widths: str = field(default="stock", metadata=WIDTHS)
    ridge: float | None = field(default=None, metadata={"help": "Of the refits; default: chosen on held-out rows."})
    round_to: int = field(default=1, metadata={"help": "Numbers of units are multiples of this."})
    rows: int = field(default=512, metadata={"help": "How many rows."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a forward pass."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    seed: int = field(default=0, metadata={"help": "Of the rows that are drawn."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push the smaller model to this repository."})

    def __post_init__(self) -> None:
        if (self.keep, self.macs, self.params) == (None, None, None):
            self.keep = 0.5
        self.budget()
        for name in ("rows", "batch_size", "max_length", "round_to"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: it is a number from 1 on")
        if self.output_dir is not None and Path(self.output_dir).is_file():
            raise ValueError(f"--output_dir {self.output_dir} is a file: name a folder")

    def budget(self) -> dict[str, float]:
        """The one that is set."""
        return one_of_budgets(keep=self.keep, macs=self.macs, params=self.params)


def main(argv: Sequence[str] | None = None, **script: Any) -> None:
    script = {"description": __doc__, "prog": "hf-effdl slim"} | script
    (options,) = parse_arguments(argv, SlimOptions, **script)
    refuse_several_processes("slimming a checkpoint")
    from hf_effdl.cli.work.pretrained import slim_checkpoint

    slim_checkpoint(options)
