# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Choose the rows worth training on, train on them, and see what it bought: any classification data set and model.

    python examples/select_then_train.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans \\
        --budget 0.2 --output_dir runs/beans --num_train_epochs 5 --compare
    torchrun --nproc_per_node 2 examples/select_then_train.py --config banking.yaml --push_selection me/banking-r10

Images and texts are told apart by the data set's columns. A share of the training rows is set aside for the probes:
by default linear heads on the model's frozen backbone (`--probes trained` trains whole models). The rest is the pool.
All fields of `TrainingArguments` are arguments too. Several processes on a machine without a GPU need `--use_cpu`.
"""

from functools import partial

from hf_effdl.cli import select
from hf_effdl.cli.arguments import leave


script = {"description": __doc__, "prog": None, "defaults": {"train": True}}
parse, main = partial(select.parse, **script), partial(select.main, **script)


if __name__ == "__main__":
    main()
    leave()
