# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.12",
#     "datasets>=5.1",
#     "peft>=0.21",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Fine-tune a text classifier by LoRA, let the run choose the ranks, and save the smaller plain adapter.

    python examples/lora_ranks.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --dataset_name PolyAI/banking77 --output_dir runs/ranks --budget 0.25 --finetune_epochs 1

The data set is an id on the Hub or a folder from `save_to_disk`, with splits `train` and `test` (or `--eval_split`).
The adapter, its path, picture and card are in the output folder; `--push_to_hub` pushes them. PEFT alone loads it.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from command_line import ConfigArguments, leave, parse_arguments
from datasets import ClassLabel, Dataset
from image_script import load_any
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer

from hf_effdl import SplitLBIArguments, SplitLBITrainer, select_lora_ranks
from hf_effdl.hub.cards import markdown_table


@dataclass(kw_only=True)
class ScriptArguments(ConfigArguments):
    """What is adapted, on which rows, and how much of the adapter is kept."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    dataset_name: str = field(metadata={"help": "Data set id on the Hub, or a folder from save_to_disk."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the classes."})
    eval_split: str = field(default="test", metadata={"help": "Split that is evaluated on."})
    rank: int = field(default=16, metadata={"help": "Of every module at the start; alpha is the same."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Ends of module names, as in LoraConfig."}
    )
    budget: float = field(default=0.25, metadata={"help": "Share of the adapter's parameters that is kept."})
    finetune_epochs: int = field(default=0, metadata={"help": "Epochs for the smaller adapter."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})


def load_rows(script: ScriptArguments, tokenizer: Any) -> tuple[Dataset, Dataset, list[str]]:
    """Rows to train and to evaluate on, as tokens, and the names of the classes."""
    data = load_any(script.dataset_name, script.dataset_config)
    missing = {"train", script.eval_split} - set(data)
    if missing:
        raise ValueError(f"{script.dataset_name} has splits {list(data)}, not {sorted(missing)}; set --eval_split")
    if not isinstance(data["train"].features[script.label_column], ClassLabel):
        data = data.class_encode_column(script.label_column)
    data = data.rename_columns({script.label_column: "labels"} if script.label_column != "labels" else {})

    def tokens(rows: dict[str, list]) -> dict[str, list]:
        return tokenizer(rows[script.text_column], truncation=True, max_length=script.max_length)

    unused = [name for name in data["train"].column_names if name != "labels"]
    data = data.map(tokens, batched=True, remove_columns=unused)
    return data["train"], data[script.eval_split], data["train"].features["labels"].names


def accuracy(answers: Any) -> dict[str, float]:
    return {"accuracy": float((answers.predictions.argmax(-1) == answers.label_ids).mean())}


def main(argv: list[str] | None = None) -> None:
    defaults = {"base": "adamw", "num_train_epochs": 3, "save_strategy": "no", "report_to": "none"}
    kinds = (ScriptArguments, SplitLBIArguments)
    script, args = parse_arguments(
        sys.argv[1:] if argv is None else argv, *kinds, description=__doc__, defaults=defaults
    )
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    train, test, names = load_rows(script, tokenizer)
    base = AutoModelForSequenceClassification.from_pretrained(script.model_name_or_path, num_labels=len(names))
    targets = script.target_modules[0] if script.target_modules == ["all-linear"] else script.target_modules
    config = LoraConfig(
        r=script.rank, lora_alpha=script.rank, target_modules=targets, task_type=TaskType.SEQ_CLS, lora_dropout=0.05
    )
    rows = {"train_dataset": train, "eval_dataset": test, "data_collator": DataCollatorWithPadding(tokenizer)}
    rows |= {"processing_class": tokenizer, "compute_metrics": accuracy}
    trainer = SplitLBITrainer(get_peft_model(base, config), args, **rows)
    trainer.train()
    small = select_lora_ranks(trainer.model, trainer.path, script.budget)
    size = small.effdl_report["params"]
    trainer.results = {
        "all ranks": {**trainer.evaluate_model(trainer.model), "params": size["before"]},
        f"{size['ratio']:.0%} by the path": {**trainer.evaluate_model(small), "params": size["after"]},
    }
    if script.finetune_epochs:
        trainer.args.num_train_epochs = script.finetune_epochs
        Trainer(small, trainer.args, **rows).train()
        name = f"{size['ratio']:.0%}, fine-tuned for {script.finetune_epochs} epochs"
        trainer.results[name] = {**trainer.evaluate_model(small), "params": size["after"]}
    if trainer.is_world_process_zero():
        lines = [{"adapter": name, **row} for name, row in trainer.results.items()]
        columns = {"adapter": "adapter", "loss": "loss", "accuracy": "accuracy", "params": "parameters"}
        print(f"\n{markdown_table(lines, columns)}\n")
        card = {"finetuned_from": script.model_name_or_path, "dataset": script.dataset_name}
        trainer.save_slim(small, args.output_dir, **card)
        if args.push_to_hub:
            trainer.push_slim(small, args.hub_model_id or args.output_dir.rsplit("/", 1)[-1], **card)
    leave()


if __name__ == "__main__":
    main()
