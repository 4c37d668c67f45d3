"""Score rows by how unsure probes are of them, to Parquet.

    hf-effdl score --model_name_or_path facebook/dinov2-small --dataset_name beans --output_dir runs/scores
    hf-effdl score --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --dataset_name banking77 \\
        --files rows-0.parquet rows-1.parquet --labelled false --output_dir runs/scores
    accelerate launch -m hf_effdl.cli score --config shards.yaml

Linear probes are trained on a frozen backbone and labelled rows (`--probe_rows` of `--train_split`). Without `--files`
the other rows of that split are scored, into one table; with them Parquet shards of any number of rows, a table each,
by `score_shards`: all processes share them, and a run that was cut off goes on. `plan_shards` and `join_shards` read
these tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_effdl.cli.arguments import parse_arguments
from hf_effdl.cli.options import INPUT, ModelDataOptions


@dataclass(kw_only=True)
class ScoreOptions(ModelDataOptions):
    """What scores which rows."""

    output_dir: str = field(metadata={"help": "Folder of the tables."})
    input_column: str | None = field(default=None, metadata=INPUT)
    probe_rows: int = field(default=1000, metadata={"help": "Labelled rows that train the probes, at most half."})
    num_probes: int = field(default=8, metadata={"help": "Number of probes."})
    files: list[str] = field(default_factory=list, metadata={"help": "Parquet files or URLs to score."})
    labelled: bool = field(default=True, metadata={"help": "Whether the rows' labels count, as for wrong ones."})
    id_column: str | None = field(default="row_id", metadata={"help": "Column of the files that names their rows."})
    batch_rows: int = field(default=1024, metadata={"help": "Rows of a file that are read together."})
    batch_size: int = field(default=64, metadata={"help": "Rows of a forward pass."})
    seed: int = field(default=0, metadata={"help": "Of the draw of the probes' rows, and of the probes."})


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_arguments(argv, ScoreOptions, description=__doc__, prog="hf-effdl score")
    from hf_effdl.cli.work.samples import score

    score(options)
