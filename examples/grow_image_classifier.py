"""Grow an image classifier from a narrow ResNet on any image data set of the Hub, save or push it with its history.

    python examples/grow_image_classifier.py --model_name_or_path microsoft/resnet-18 --dataset_name beans \\
        --output_dir runs/beans --num_train_epochs 30 --max-macs-share 0.5
    torchrun --nproc_per_node 2 examples/grow_image_classifier.py --config beans.yaml --push_to_hub

The net begins with new weights, the depths and a quarter of the widths of the dense net named, and grows where its
support saturates, to at most that share of the dense net's multiply-accumulates (`--max_macs`: an absolute bound).
`--config file.yaml` holds any of the arguments as `name: value`; the command line wins. All fields of
`GrowingArguments` (a `TrainingArguments`) are arguments too.
"""

import argparse
import gc
import sys
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import yaml
from accelerate import PartialState
from datasets import ClassLabel, DatasetDict, load_dataset, load_from_disk
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, ResNetForImageClassification, set_seed

from hf_effdl import GrowingArguments, GrowingTrainer
from hf_effdl.hub.cards import markdown_table
from hf_effdl.structure.groups.find import trace_network


@dataclass
class ScriptArguments:
    """What to grow on what, from which size to which."""

    model_name_or_path: str = field(
        metadata={"help": "The dense net, a ResNet on the Hub or a folder: its config and image processor are read."}
    )
    dataset_name: str = field(
        metadata={"help": "Data set id on the Hub, a folder of images, or one from save_to_disk."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the class labels."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; default: 10%% of train."})
    seed_widths: list[int] | None = field(
        default=None, metadata={"help": "Widths of the embedding and of every stage; default: a quarter of dense."}
    )
    seed_depths: list[int] | None = field(default=None, metadata={"help": "Blocks of every stage; default: as dense."})
    max_macs_share: float = field(default=0.5, metadata={"help": "Share of the dense net's MACs, in (0, 1]."})


def parse(argv: list[str]) -> tuple[ScriptArguments, GrowingArguments]:
    """Arguments from the command line, with defaults from `--config file.yaml`."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    parser = HfArgumentParser([ScriptArguments, GrowingArguments])
    if known.config:
        with open(known.config, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
        names = {action.dest for action in parser._actions}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"{known.config} sets {unknown}, which this script does not know; see --help")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    script, args = parser.parse_args_into_dataclasses(rest)
    if not 0 < script.max_macs_share <= 1:
        raise ValueError(f"--max_macs_share {script.max_macs_share}: it is a share of the dense net's MACs, in (0, 1]")
    return script, args


def load_splits(script: ScriptArguments, seed: int) -> DatasetDict:
    """The data set as `{"train", "eval"}`."""
    try:
        data = load_from_disk(script.dataset_name)
    except (FileNotFoundError, OSError):
        data = load_dataset(script.dataset_name, script.dataset_config)
    if script.train_split not in data:
        raise ValueError(f"{script.dataset_name} has splits {list(data)}, not --train_split {script.train_split!r}")
    train = data[script.train_split]
    for column in (script.image_column, script.label_column):
        if column not in train.column_names:
            raise ValueError(
                f"{script.dataset_name} has columns {train.column_names}, not {column!r}; set "
                "--image_column and --label_column"
            )
    if script.eval_split:
        return DatasetDict(train=train, eval=data[script.eval_split])
    split = train.train_test_split(test_size=0.1, seed=seed)
    return DatasetDict(train=split["train"], eval=split["test"])


def seed_config(dense, widths: list[int] | None, depths: list[int] | None):
    """The dense net's config with the widths and depths of the seed."""
    if dense.model_type != "resnet":
        raise ValueError(f"--model_name_or_path is a {dense.model_type!r}; this script grows a 'resnet'")
    config, stages = deepcopy(dense), len(dense.hidden_sizes)
    widths = widths or [max(1, width // 4) for width in (dense.embedding_size, *dense.hidden_sizes)]
    depths = depths or dense.depths
    if len(widths) != stages + 1 or len(depths) != stages:
        raise ValueError(
            f"the dense net has an embedding and {stages} stages, so --seed_widths takes {stages + 1} numbers and "
            f"--seed_depths {stages}; these are {widths} and {depths}"
        )
    config.embedding_size, config.hidden_sizes, config.depths = widths[0], widths[1:], depths
    return config


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> None:
    script, args = parse(sys.argv[1:] if argv is None else argv)
    set_seed(args.seed)
    data = load_splits(script, args.seed)
    if not isinstance(data["train"].features[script.label_column], ClassLabel):
        data = data.class_encode_column(script.label_column)
    names = data["train"].features[script.label_column].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    dense = AutoConfig.from_pretrained(script.model_name_or_path, **labels)
    model = ResNetForImageClassification(seed_config(dense, script.seed_widths, script.seed_depths))
    mode = "L" if dense.num_channels == 1 else "RGB"

    def transform(rows: dict[str, list]) -> dict[str, object]:
        images = [image.convert(mode) for image in rows[script.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(rows[script.label_column])}

    data = data.with_transform(transform)
    inputs = {"pixel_values": data["train"][0]["pixel_values"][None]}
    whole, seed = (trace_network(net, inputs).count() for net in (ResNetForImageClassification(dense), model))
    args.max_macs = args.max_macs or int(script.max_macs_share * whole["macs"])
    args.remove_unused_columns = False  # the transform reads columns that the model does not know
    trainer = GrowingTrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    found = trainer.evaluate()["eval_accuracy"]
    grown = trainer.groups[0].network.count()
    trainer.results = {"grown": {"accuracy": found, **{name: grown[name] for name in ("params", "macs")}}}
    trainer.save_model()
    card = {"dataset": script.dataset_name, "tasks": "image-classification"}
    if trainer.is_world_process_zero():
        trainer.create_model_card(**card)
        print(f"\n{markdown_table(*trainer.growth_table())}\n")
        sizes = [f"{name} {size['macs'] / whole['macs']:.3f}" for name, size in (("seed", seed), ("grown", grown))]
        print(f"accuracy {found:.4f}; MACs beside the dense net's: {', '.join(sizes)}")
        print(f"grown model in {args.output_dir}, with its card README.md and the picture growth.png")
    if args.push_to_hub:
        trainer.push_to_hub(**card)


if __name__ == "__main__":
    main()
    gc.collect()  # a model in DDP holds the process group, whose threads can abort the interpreter's exit
    PartialState().destroy_process_group()
