# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.12",
#     "datasets>=5.1",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
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

import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from command_line import leave, parse_arguments
from datasets import DatasetDict, load_dataset
from image_script import load_any
from text_script import SmallerArguments, run
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

from hf_effdl import SplitLBIArguments, SplitLBITrainer


@dataclass(kw_only=True)
class ScriptArguments(SmallerArguments):
    """What is trained on what, and how small the result is."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    dataset_name: str = field(metadata={"help": "Text file, folder, or data set id on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column with the texts."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; a tenth of it evaluates."})


def parse(argv: list[str]) -> tuple[ScriptArguments, SplitLBIArguments]:
    return parse_arguments(argv, ScriptArguments, SplitLBIArguments, description=__doc__, defaults={"base": "adamw"})


def load_sequences(script: ScriptArguments, tokenizer: Any, seed: int) -> DatasetDict:
    """Sequences of equal length to train and to evaluate on; what is left over at the end is too short for one."""
    if Path(script.dataset_name).is_file():
        data = load_dataset("text", data_files=script.dataset_name)
    else:
        data = load_any(script.dataset_name, script.dataset_config)
    if script.train_split not in data:
        raise ValueError(f"{script.dataset_name} has splits {list(data)}, not --train_split {script.train_split!r}")
    rows = data[script.train_split]
    if script.text_column not in rows.column_names:
        raise ValueError(
            f"{script.dataset_name} has columns {rows.column_names}, not {script.text_column!r}; set --text_column"
        )

    def sequences(some: dict[str, list]) -> dict[str, list]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = filter(str.strip, some[script.text_column])
        ids = list(chain.from_iterable(tokenizer(text)["input_ids"] + end for text in texts))
        cut = [ids[i : i + script.max_length] for i in range(0, len(ids) - script.max_length + 1, script.max_length)]
        return {"input_ids": cut, "labels": cut}

    found = rows.map(sequences, batched=True, remove_columns=rows.column_names)
    if len(found) < 2:
        raise ValueError(
            f"{script.dataset_name} holds {len(found)} sequences of {script.max_length} tokens, and 2 are needed: set "
            "--max_length lower, or take more text"
        )
    return found.train_test_split(test_size=0.1, seed=seed)


def main(argv: list[str] | None = None) -> None:
    script, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    data = load_sequences(script, tokenizer, args.seed)
    trainer = SplitLBITrainer(
        AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32),
        args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    run(trainer, script, "loss", dataset=script.dataset_name, tasks="text-generation")


if __name__ == "__main__":
    main()
    leave()
