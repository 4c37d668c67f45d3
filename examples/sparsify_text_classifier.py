# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Fine-tune a pretrained text encoder along a proximal pruning path, take a smaller one, save or push both.

    python examples/sparsify_text_classifier.py --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name banking77 --output_dir runs/banking --num_train_epochs 3 --macs 0.5
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/sparsify_text_classifier.py \\
        --config banking.yaml --push_to_hub

The path starts dense, from the pretrained weights, with AdamW as its base. The layers behind what goes are refitted on
training rows (`trainer.slim`), and the smaller model is fine-tuned with the larger one as its teacher. Accuracy is
printed of all three. All fields of `SplitLBIArguments` (a `TrainingArguments`) are arguments too. Several processes on
a machine without a GPU need `--use_cpu`.
"""

from functools import partial

from hf_effdl.cli import sparsify
from hf_effdl.cli.arguments import leave


script = {"task": "text-classification", "description": __doc__, "prog": None}
parse, main = partial(sparsify.parse, **script), partial(sparsify.main, **script)


if __name__ == "__main__":
    main()
    leave()
