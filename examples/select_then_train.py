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

"""Choose the rows worth training on, train on them, and see what it bought: any classification data set and model.

    python examples/select_then_train.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans \\
        --budget 0.2 --output_dir runs/beans --num_train_epochs 5 --compare
    torchrun --nproc_per_node 2 examples/select_then_train.py --config banking.yaml --push_selection me/banking-r10

Images and texts are told apart by the data set's columns. A share of the training rows is set aside for the probes:
by default linear heads on the model's frozen backbone (`--probes trained` trains whole models). The rest is the pool.
All fields of `TrainingArguments` are arguments too. Several processes on a machine without a GPU need `--use_cpu`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from command_line import leave, parse_arguments
from datasets import Dataset, DatasetDict, Image
from image_script import DataArguments, accuracy, labels_of, load_splits
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from hf_effdl import LinearProbes, UncertaintySelector, WeightedTrainer, train_probes


@dataclass(kw_only=True)
class ScriptArguments(DataArguments):
    """What to select from what, with what."""

    input_column: str | None = field(default=None, metadata={"help": "Images or texts; default: the first such."})
    budget: float = field(default=0.2, metadata={"help": "Rows to select; up to 1: a share of the pool."})
    probe_share: float = field(default=0.2, metadata={"help": "Share of the training rows that the probes get."})
    probes: str = field(
        default="linear", metadata={"choices": ["linear", "trained"], "help": "Heads on the backbone, or models."}
    )
    num_probes: int = field(default=8, metadata={"help": "Number of probes."})
    preset: str = field(default="default", metadata={"choices": ["default", "paper"], "help": "How rows are chosen."})
    compare: bool = field(default=False, metadata={"help": "Also train on as many random rows."})
    push_selection: str | None = field(default=None, metadata={"help": "Push the selection to this data set repo."})


def parse(argv: list[str]) -> tuple[ScriptArguments, TrainingArguments]:
    return parse_arguments(argv, ScriptArguments, TrainingArguments, description=__doc__)


def split_off_probes(data: DatasetDict, script: ScriptArguments, seed: int) -> DatasetDict:
    """The data set as `{"probe", "pool", "eval"}`; every class has its share of the probe rows."""
    parts = data["train"].train_test_split(
        test_size=script.probe_share, seed=seed, stratify_by_column=script.label_column
    )
    return DatasetDict(probe=parts["test"], pool=parts["train"], eval=data["eval"])


def find_input(data: Dataset, script: ScriptArguments) -> tuple[str, bool]:
    """The input column, and whether it holds images."""
    kinds = {
        name: isinstance(feature, Image)
        for name, feature in data.features.items()
        if isinstance(feature, Image) or getattr(feature, "dtype", None) in ("string", "large_string")
    }
    name = script.input_column or next(iter(sorted(kinds, key=lambda name: not kinds[name])), None)
    if name not in kinds:
        raise ValueError(
            f"no column with images or texts ({name!r} asked for) among {data.features}; set --input_column"
        )
    return name, kinds[name]


def make_collator(processor: Any, column: str, images: bool, labels: str) -> Callable[[list[dict]], dict[str, Any]]:
    def collate(rows: list[dict]) -> dict[str, Any]:
        values = [row[column] for row in rows]
        if images:
            batch = dict(processor([value.convert("RGB") for value in values], return_tensors="pt"))
        else:
            batch = dict(processor(values, padding=True, truncation=True, return_tensors="pt"))
        batch["labels"] = torch.tensor([row[labels] for row in rows])
        if "weight" in rows[0]:
            batch["weight"] = torch.tensor([row["weight"] for row in rows])
        return batch

    return collate


def main(argv: list[str] | None = None) -> None:
    script, args = parse(sys.argv[1:] if argv is None else argv)
    first = PartialState().is_main_process
    set_seed(args.seed)
    data = load_splits(script, args.seed)
    labels = labels_of(data, script)
    data = split_off_probes(data, script, args.seed)
    column, images = find_input(data["pool"], script)
    processor = (AutoImageProcessor if images else AutoTokenizer).from_pretrained(script.model_name_or_path)
    classifier = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    args.remove_unused_columns = False  # the collator reads columns that the model does not know
    collate = make_collator(processor, column, images, script.label_column)

    def new_model() -> torch.nn.Module:
        # in single precision whatever the checkpoint has: images come in it, and layers want both alike
        return classifier.from_pretrained(
            script.model_name_or_path, ignore_mismatched_sizes=True, dtype=torch.float32, **labels
        )

    def train(rows: Dataset, folder: str) -> dict[str, float]:
        set_seed(args.seed)
        args.output_dir = f"{output_dir}/{folder}"
        weighted = rows if "weight" in rows.column_names else rows.add_column("weight", [1.0] * len(rows))
        trainer = WeightedTrainer(
            new_model(),
            args,
            data_collator=collate,
            train_dataset=weighted,
            eval_dataset=data["eval"],
            processing_class=processor,
            compute_metrics=accuracy,
        )
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        return metrics

    output_dir = args.output_dir
    common = {
        "label_column": script.label_column,
        "num_probes": script.num_probes,
        "seed": args.seed,
        "processing_class": processor,
        "input_column": column,
    }
    if script.probes == "linear":
        backbone = AutoModel.from_pretrained(script.model_name_or_path, dtype=torch.float32)
        probes = LinearProbes.train(backbone, data["probe"], **common)
    else:
        args.output_dir = f"{output_dir}/probes"
        probes = train_probes(new_model, args, data["probe"], **common)

    selector = UncertaintySelector(
        probes,
        script.label_column,
        preset=script.preset,
        seed=args.seed,
        cache_dir=f"{output_dir}/scores",
        source=script.dataset_name,
        batch_size=args.per_device_eval_batch_size,
    )
    budget = script.budget if script.budget <= 1 else int(script.budget)
    subset = selector.select(data["pool"], budget)
    if first:
        selector.report().save(f"{output_dir}/report")
        print(selector.report(), flush=True)
    results = {"selected rows": train(subset, "selected")}
    if script.compare:
        rows = data["pool"].shuffle(seed=args.seed).select(range(len(subset)))
        results["random rows"] = train(rows, "random")
    if first:
        for name, metrics in results.items():
            print(f"{name}: accuracy {metrics['eval_accuracy']:.4f}, loss {metrics['eval_loss']:.4f}")
        if script.push_selection:
            selector.selection.push_to_hub(script.push_selection)


if __name__ == "__main__":
    main()
    leave()
