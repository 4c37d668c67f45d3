# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
#     "scikit-learn>=1.6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train list-wise rankers that choose examples for an in-context model, on any image data set and encoder.

    python examples/train_ranker.py                     # scenes of digits and a tiny SegGPT: some minutes, offline
    python examples/train_ranker.py --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --lengths 5 10 --hidden_size 768 --output_dir runs/ranker
    torchrun --nproc_per_node 2 examples/train_ranker.py --config cells.yaml --num_train_epochs 80

Builds a pool from the training split, measures how its examples do on each other (what is done stays in
`output_dir`/performance: a run that was cut off goes on), trains one ranker for each list length on random lists, and
compares them with the nearest example on images of the query split. What looks like one of those is left out of the
training. All fields of `TrainingArguments` are arguments too. Several processes on a machine without a GPU need
`--use_cpu`. The rankers are in `output_dir`/ranker-5 and so on:

    rankers = [ListwiseRanker.from_pretrained(f"runs/ranker/ranker-{k}") for k in (5, 10)]
    VisualInContextPipeline(model, selector=RankerSelector(rankers), pool=pool)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from digit_scenes import make_scenes

from hf_effdl.cli import fit
from hf_effdl.cli.arguments import is_given, leave
from hf_effdl.cli.work.prompts import load_pool_splits


TINY = str(Path(__file__).parents[1] / "model_cards" / "tiny-seggpt-digits")
# of digit scenes: the features of the tiny model are all alike, and no two scenes are copies
DIGITS = {
    "label_column": "mask",
    "model": TINY,
    "max_pool": 120,
    "max_queries": 24,
    "candidates": 16,
    "label_budget": 60,
    "hidden_size": 96,
    "duplicates": 1.0,
}


def load_scenes(options: Any) -> tuple[Dataset, Dataset]:
    """The data set that is asked for, else scenes to choose from and scenes to test on."""
    if options.dataset_name is not None:
        return load_pool_splits(options)
    counts = {"train": options.max_pool, "test": options.max_queries}
    return tuple(Dataset.from_list(make_scenes(count, split, options.task)) for split, count in counts.items())


def arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    """What `hf-effdl fit` is told; without a data set it fits on digit scenes."""
    digits = {} if is_given(argv, "dataset_name") else DIGITS
    return {"kind": "ranker", "description": __doc__, "prog": None, "defaults": digits}


def parse(argv: Sequence[str] | None = None) -> tuple[Any, Any]:
    return fit.parse(argv, **arguments(argv))


def main(argv: Sequence[str] | None = None) -> None:
    fit.main(argv, load_scenes, **arguments(argv))


if __name__ == "__main__":
    main()
    leave()
