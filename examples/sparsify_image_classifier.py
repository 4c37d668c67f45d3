# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train an image classifier with split LBI on any image data set of the Hub, take a smaller one, save or push both.

    python examples/sparsify_image_classifier.py --model_name_or_path microsoft/resnet-18 --from_scratch \\
        --dataset_name beans --output_dir runs/beans --num_train_epochs 20 --macs 0.5
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/sparsify_image_classifier.py \\
        --config beans.yaml --push_to_hub

The smaller model is fine-tuned for `--finetune_epochs` with plain SGD, and its accuracy printed before and after. With
`--from_scratch` the learning rate is 0.1 by default, and all measurements of this project were made so; without it the
path starts dense, from the pretrained weights, at a rate of 0.01, as so large a one destroys them. All fields of
`SplitLBIArguments` (a `TrainingArguments`) are arguments too. Several processes
on a machine without a GPU need `--use_cpu`.
"""

from functools import partial

from hf_effdl.cli import sparsify
from hf_effdl.cli.arguments import leave


script = {"task": "image-classification", "description": __doc__, "prog": None}
parse, main = partial(sparsify.parse, **script), partial(sparsify.main, **script)


if __name__ == "__main__":
    main()
    leave()
