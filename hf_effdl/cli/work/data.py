"""Data sets by name, their splits and columns; labels, and images as a model takes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedModel


def load_any(name: str, config: str | None = None) -> Any:
    """A text file with a row per line, a data set from `save_to_disk`, else one that `load_dataset` knows."""
    if Path(name).is_file():
        kind = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(name).suffix, "text")
        return load_dataset(kind, data_files=name)
    try:
        return load_from_disk(name)
    except (FileNotFoundError, OSError):
        return load_dataset(name, config)


def split_of(data: Any, name: str, split: str, option: str) -> Dataset:
    """One split of what was loaded, which may be a single one."""
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        raise ValueError(f"{name} has splits {list(data)}, not --{option} {split!r}")
    return data[split]


def check_column(rows: Dataset, name: str, column: str, option: str) -> None:
    """Refuse a data set without a column."""
    if column not in rows.column_names:
        raise ValueError(f"{name} has columns {rows.column_names}, not {column!r}; set --{option}")


def named_splits(options: Any, columns: Sequence[str]) -> DatasetDict:
    """The splits that are named, as `{"train"}` or `{"train", "eval"}`; labels are a `ClassLabel`.

    Args:
        options: with `dataset_name`, `dataset_config`, `train_split`, `eval_split` and `columns`.
        columns: names of options that name columns, which must be there.
    """
    data = load_any(options.dataset_name, options.dataset_config)
    data = data if isinstance(data, DatasetDict) else DatasetDict({options.train_split: data})
    train = split_of(data, options.dataset_name, options.train_split, "train_split")
    if options.eval_split is not None:
        split_of(data, options.dataset_name, options.eval_split, "eval_split")
    for option in columns:
        check_column(train, options.dataset_name, getattr(options, option), option)
    names = {"train": options.train_split} | ({"eval": options.eval_split} if options.eval_split else {})
    data = DatasetDict({name: data[split] for name, split in names.items()})
    return with_classes(data, options.dataset_name, options.label_column) if "label_column" in columns else data


def with_classes(data: DatasetDict, name: str, column: str) -> DatasetDict:
    """Labels of all splits by one `ClassLabel`: texts in order of the alphabet, whole numbers by size.

    Raises:
        ValueError: a split has no such column, rows without a label or other classes than the others; or the column
            holds no classes.
    """
    kinds = {}
    for split, rows in data.items():
        check_column(rows, f"the {split} split of {name}", column, "label_column")
        kinds[split] = kind = rows.features[column]
        if not isinstance(kind, ClassLabel | Value):
            raise ValueError(
                f"{column!r} of {name} holds {kind}, and classes are texts or numbers; set --label_column"
            )
        missing = (None, -1) if isinstance(kind, ClassLabel) else (None,)
        if any(label in missing for label in rows.unique(column)):
            raise ValueError(f"the {split} split of {name} has rows without a {column!r}: leave them out")
    if any(isinstance(kind, ClassLabel) for kind in kinds.values()):
        if len({str(kind) for kind in kinds.values()}) > 1:
            raise ValueError(
                f"{column!r} of {name} has other classes in one split than in another: {kinds}; "
                "align_labels_with_mapping them, or leave --eval_split out"
            )
        return data
    numbers = all(kind.dtype.startswith(("int", "uint")) for kind in kinds.values())
    data = data.cast_column(column, Value("string"))
    found = {label for rows in data.values() for label in rows.unique(column)}
    return data.cast_column(column, ClassLabel(names=sorted(found, key=int if numbers else None)))


def with_eval(data: DatasetDict, seed: int) -> DatasetDict:
    """`{"train", "eval"}`; where no rows to evaluate on were named, they are a tenth of the others."""
    if "eval" in data:
        return data
    split = tenth_aside(data["train"], seed, "eval_split")
    return DatasetDict(train=split["train"], eval=split["test"])


def tenth_aside(rows: Dataset, seed: int, option: str) -> DatasetDict:
    """`{"train", "test"}`, a tenth of the rows in the second, where `option` names no split of their own.

    Raises:
        ValueError: for fewer than two rows.
    """
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} rows: a tenth of them cannot be set aside; pass more, or set --{option} to other rows"
        )
    return rows.train_test_split(test_size=0.1, seed=seed)


def load_splits(options: Any, seed: int, columns: Sequence[str] = ("label_column",)) -> DatasetDict:
    """The data set as `{"train", "eval"}`; see `named_splits`."""
    return with_eval(named_splits(options, columns), seed)


def labels_of(data: DatasetDict, options: Any) -> dict[str, dict]:
    """What a model's config says of its labels."""
    names = data["train"].features[options.label_column].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def as_pixels(options: Any, processor: Any, channels: int) -> Callable[[dict[str, list]], dict[str, Any]]:
    """For `with_transform`: rows of images and labels to what a classifier takes; grey where it has one channel."""
    mode = "L" if channels == 1 else "RGB"

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert(mode) for image in rows[options.image_column]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor(rows[options.label_column])}

    return transform


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of rows whose largest logit is at the label."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def load_tokenizer(name: str) -> Any:
    """A tokenizer that can pad: with the end of a text where it has nothing else, as those of language models."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def padded_by(tokenizer: Any, model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose config says what rows are padded with: classifiers that read the last token go by it."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return model
