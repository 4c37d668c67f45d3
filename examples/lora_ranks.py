# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Fine-tune a text classifier by LoRA, let the run choose the ranks, and save the smaller plain adapter.

    python examples/lora_ranks.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --dataset_name PolyAI/banking77 --eval_split test --output_dir runs/ranks --budget 0.25 --finetune_epochs 1

The data set is an id on the Hub or a folder from `save_to_disk`; a tenth of it evaluates without `--eval_split`.
The adapter, its path, picture and card are in the output folder; `--push_to_hub` pushes them. PEFT alone loads it.
"""

from functools import partial

from hf_effdl.cli import lora_ranks
from hf_effdl.cli.arguments import leave


main = partial(lora_ranks.main, description=__doc__, prog=None)


if __name__ == "__main__":
    main()
    leave()
