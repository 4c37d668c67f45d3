# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Train a pretrained language model along a proximal pruning path, take a smaller one, save or push both.

    python examples/sparsify_causal_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name corpus.txt \\
        --output_dir runs/smol --num_train_epochs 1 --macs 0.8

The data set is a text file with a row per line, a folder from `save_to_disk`, or an id on the Hub; its rows are put
together and cut into sequences of `--max_length` tokens. The path starts dense, from the pretrained weights, with
AdamW as its base. The layers behind what goes are refitted on training rows (`trainer.slim`), and the smaller model is
fine-tuned with the larger one as its teacher. The loss per token on the other rows is printed of all three. All fields
of `SplitLBIArguments` (a `TrainingArguments`) are arguments too. Without training at all: `slim_pretrained.py`.
"""

from functools import partial

from hf_effdl.cli import sparsify
from hf_effdl.cli.arguments import leave


script = {"task": "text-generation", "description": __doc__, "prog": None}
parse, main = partial(sparsify.parse, **script), partial(sparsify.main, **script)


if __name__ == "__main__":
    main()
    leave()
