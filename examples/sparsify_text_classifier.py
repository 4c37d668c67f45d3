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

import sys
from dataclasses import dataclass, field

import torch
from command_line import leave, parse_arguments
from image_script import DataArguments, accuracy, labels_of, load_splits
from text_script import SmallerArguments, run
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from hf_effdl import SplitLBIArguments, SplitLBITrainer


@dataclass(kw_only=True)
class ScriptArguments(SmallerArguments, DataArguments):
    """What is trained on what, and how small the result is."""

    text_column: str = field(default="text", metadata={"help": "Column with the texts."})


def parse(argv: list[str]) -> tuple[ScriptArguments, SplitLBIArguments]:
    return parse_arguments(argv, ScriptArguments, SplitLBIArguments, description=__doc__, defaults={"base": "adamw"})


def main(argv: list[str] | None = None) -> None:
    script, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    data = load_splits(script, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path, dtype=torch.float32, **labels_of(data, script)
    )

    def tokens(rows: dict[str, list]) -> dict[str, list]:
        found = tokenizer(rows[script.text_column], truncation=True, max_length=script.max_length)
        return {**found, "labels": rows[script.label_column]}

    data = data.map(tokens, batched=True, remove_columns=data["train"].column_names)
    trainer = SplitLBITrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    run(trainer, script, "accuracy", dataset=script.dataset_name, tasks="text-classification")


if __name__ == "__main__":
    main()
    leave()
