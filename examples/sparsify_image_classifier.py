"""Train an image classifier with split LBI on any image data set of the Hub, take a smaller one, save or push both.

    python examples/sparsify_image_classifier.py --model_name_or_path microsoft/resnet-18 --dataset_name beans \\
        --output_dir runs/beans --num_train_epochs 20 --macs 0.5
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/sparsify_image_classifier.py \\
        --config beans.yaml --push_to_hub

`--config file.yaml` holds any of the arguments as `name: value`; the command line wins. All fields of
`SplitLBIArguments` (a `TrainingArguments`) are arguments too.
"""

import argparse
import gc
import sys
from dataclasses import dataclass, field

import torch
import yaml
from accelerate import PartialState
from datasets import ClassLabel, DatasetDict, load_dataset, load_from_disk
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, set_seed

from hf_effdl import SplitLBIArguments, SplitLBITrainer


@dataclass
class ScriptArguments:
    """What to train on what, and how small the result should be."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    dataset_name: str = field(
        metadata={"help": "Data set id on the Hub, a folder of images, or one from save_to_disk."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with the class labels."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; default: 10%% of train."})
    from_scratch: bool = field(default=False, metadata={"help": "Use the model's config with new weights."})
    macs: float = field(default=0.5, metadata={"help": "Share of the multiply-accumulates to keep, in (0, 1]."})
    widths: str = field(default="stock", metadata={"help": "'stock' sizes, or 'free' (loading needs hf_effdl)."})


def parse(argv: list[str]) -> tuple[ScriptArguments, SplitLBIArguments]:
    """Arguments from the command line, with defaults from `--config file.yaml`."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    parser = HfArgumentParser([ScriptArguments, SplitLBIArguments])
    if known.config:
        with open(known.config, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
        names = {action.dest for action in parser._actions}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"{known.config} sets {unknown}, which this script does not know; see --help")
        for action in parser._actions:
            action.required = action.required and action.dest not in values
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(rest)


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
    if script.from_scratch:
        config = AutoConfig.from_pretrained(script.model_name_or_path, **labels)
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            script.model_name_or_path, ignore_mismatched_sizes=True, **labels
        )
    mode = "L" if model.config.num_channels == 1 else "RGB"

    def transform(rows: dict[str, list]) -> dict[str, object]:
        images = [image.convert(mode) for image in rows[script.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(rows[script.label_column])}

    data = data.with_transform(transform)
    args.remove_unused_columns = False  # the transform reads columns that the model does not know
    trainer = SplitLBITrainer(
        model,
        args,
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    curve = trainer.evaluate_path()
    small = trainer.slim(macs=script.macs, widths=script.widths, bn_batches=8)
    report = small.config.effdl_report
    slim_metrics = trainer.evaluate_model(small)
    sizes = [{key: report[key][side] for key in ("params", "macs", "latency_ms")} for side in ("before", "after")]
    trainer.results = {
        "dense, split LBI": {"accuracy": metrics["eval_accuracy"], **sizes[0]},
        "slim, not fine-tuned": {"accuracy": slim_metrics["accuracy"], **sizes[1]},
    }
    trainer.save_model()
    card = {"dataset": script.dataset_name, "tasks": "image-classification"}
    if trainer.is_world_process_zero():
        trainer.create_model_card(**card)
        folder = trainer.save_slim(small, f"{args.output_dir}/slim", **card)
        print(f"accuracy along the path: {[(round(p['macs'], 3), round(p['accuracy'], 4)) for p in curve]}")
        print(
            f"slim model in {folder}: MACs x {report['macs']['ratio']:.3f}, "
            f"latency x {report['latency_ms']['ratio']:.3f}"
        )
    if args.push_to_hub:
        trainer.push_to_hub(**card)
        if trainer.is_world_process_zero():
            trainer.push_slim(small, f"{trainer.hub_model_id}-slim", **card)


if __name__ == "__main__":
    main()
    gc.collect()  # a model in DDP holds the process group, whose threads can abort the interpreter's exit
    PartialState().destroy_process_group()
