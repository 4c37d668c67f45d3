"""What the scripts that train classifiers share: data sets by name, labels, images as a model takes them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from command_line import ConfigArguments
from datasets import ClassLabel, DatasetDict, load_dataset, load_from_disk


@dataclass(kw_only=True)
class DataArguments(ConfigArguments):
    """What is trained on what."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    dataset_name: str = field(metadata={"help": "Data set id on the Hub, a folder, or one from save_to_disk."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    label_column: str = field(default="label", metadata={"help": "Column with the class labels."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; default: 10%% of train."})


@dataclass(kw_only=True)
class ImageArguments(DataArguments):
    """The same, of images."""

    image_column: str = field(default="image", metadata={"help": "Column with the images."})


def load_any(name: str, config: str | None = None) -> Any:
    """A data set from `save_to_disk`, else one that `load_dataset` knows."""
    try:
        return load_from_disk(name)
    except (FileNotFoundError, OSError):
        return load_dataset(name, config)


def load_splits(script: DataArguments, seed: int) -> DatasetDict:
    """The data set as `{"train", "eval"}` with a `ClassLabel` column."""
    data = load_any(script.dataset_name, script.dataset_config)
    for option in ("train_split", "eval_split"):
        split = getattr(script, option)
        if split is not None and split not in data:
            raise ValueError(f"{script.dataset_name} has splits {list(data)}, not --{option} {split!r}")
    train = data[script.train_split]
    for option in ("image_column", "text_column", "label_column"):
        column = getattr(script, option, None)
        if column is not None and column not in train.column_names:
            raise ValueError(f"{script.dataset_name} has columns {train.column_names}, not {column!r}; set --{option}")
    if not isinstance(train.features[script.label_column], ClassLabel):
        data = data.class_encode_column(script.label_column)
    if script.eval_split is not None:
        return DatasetDict(train=data[script.train_split], eval=data[script.eval_split])
    split = data[script.train_split].train_test_split(test_size=0.1, seed=seed)
    return DatasetDict(train=split["train"], eval=split["test"])


def labels_of(data: DatasetDict, script: DataArguments) -> dict[str, dict]:
    """What a model's config says of its labels."""
    names = data["train"].features[script.label_column].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def as_pixels(script: ImageArguments, processor: Any, channels: int) -> Callable[[dict[str, list]], dict[str, Any]]:
    """For `with_transform`: rows of images and labels to what a classifier takes; grey where it has one channel."""
    mode = "L" if channels == 1 else "RGB"

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in rows[script.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(rows[script.label_column])}

    return transform


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
