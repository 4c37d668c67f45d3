# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Grow an image classifier from a narrow ResNet on any image data set of the Hub, save or push it with its history.

    python examples/grow_image_classifier.py --model_name_or_path microsoft/resnet-18 --dataset_name beans \\
        --output_dir runs/beans --num_train_epochs 30 --max-macs-share 0.5
    torchrun --nproc_per_node 2 examples/grow_image_classifier.py --config beans.yaml --push_to_hub

The net begins with new weights, the depths and a quarter of the widths of the dense net named, and grows where its
support saturates, to at most that share of the dense net's multiply-accumulates (`--max_macs`: an absolute bound).
All fields of `GrowingArguments` (a `TrainingArguments`) are arguments too. Several processes on a machine without a
GPU need `--use_cpu`.
"""

from functools import partial

from hf_effdl.cli import grow
from hf_effdl.cli.arguments import leave


script = {"description": __doc__, "prog": None}
parse, main = partial(grow.parse, **script), partial(grow.main, **script)


if __name__ == "__main__":
    main()
    leave()
