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

"""Fit a cascade that chooses examples for an in-context model, on any image data set and encoder.

    python examples/fit_cascade.py                      # scenes of digits and a tiny SegGPT: about a minute, offline
    python examples/fit_cascade.py --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --output_dir runs/food --push_to_hub me/segment-food
    torchrun --nproc_per_node 2 examples/fit_cascade.py --config cells.yaml --label_budget 200

Builds a pool from the training split, measures how its examples do on `label_budget` of its images (what is done stays
in `output_dir`/performance: a run that was cut off goes on), fits a `CascadeSelector`, and compares it on images of
the query split with the nearest example, two other strategies and the best of all candidates. What looks like one of
these images is neither measured on nor shown while measuring. `output_dir`/model is a whole pipeline:

    VisualInContextPipeline("runs/cascade/model")("photo.jpg")
"""

from collections.abc import Sequence
from typing import Any

from train_ranker import DIGITS, load_scenes

from hf_effdl.cli import fit
from hf_effdl.cli.arguments import is_given, leave


# of digit scenes; a cascade has no width
SMALL = {name: value for name, value in DIGITS.items() if name != "hidden_size"} | {"max_queries": 48}


def arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    """What `hf-effdl fit` is told; without a data set it fits on digit scenes."""
    digits = {} if is_given(argv, "dataset_name") else SMALL
    return {"kind": "cascade", "description": __doc__, "prog": None, "defaults": digits}


def parse(argv: Sequence[str] | None = None) -> Any:
    return fit.parse(argv, **arguments(argv))[0]


def main(argv: Sequence[str] | None = None) -> None:
    fit.main(argv, load_scenes, **arguments(argv))


if __name__ == "__main__":
    main()
    leave()
