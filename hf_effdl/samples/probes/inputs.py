"""How rows of a data set become the inputs of a model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

import torch
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, default_data_collator


Rows = Sequence[Mapping[str, Any]]
NOT_INPUTS = ("label", "labels", "label_ids", "weight", "inclusion_probability")


def check_dataset(data: Any, columns: Sequence[str] = (), argument: str = "the data set") -> Dataset:
    """The data set itself, if it is a non-empty `datasets.Dataset` with the columns.

    Raises:
        TypeError: for a `DatasetDict`, an iterable one, or something else.
        ValueError: for an empty one or missing columns, with the nearest names.
    """
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise TypeError(
            f"{argument} is a DatasetDict with the splits {list(data)}; pass one of them, as in "
            f"data[{next(iter(data), 'train')!r}], or split="
        )
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{argument} is an IterableDataset, whose rows have no fixed places; load it without streaming=True"
        )
    if not isinstance(data, Dataset):
        raise TypeError(f"{argument} is a {type(data).__name__}; pass a datasets.Dataset")
    if len(data) == 0:
        raise ValueError(f"{argument} has no rows")
    for column in columns:
        if column not in data.column_names:
            near = get_close_matches(column, data.column_names, 3, 0.4)
            raise ValueError(
                f"{argument} has no column {column!r}; its columns are {data.column_names}"
                + (f", near ones {near}" if near else "")
            )
    return data


def label_names(data: Dataset, column: str | None) -> list[str] | None:
    """The class names of a `ClassLabel` column; None for other columns."""
    return getattr(data.features.get(column), "names", None) if column else None


def label_tensor(data: Dataset, column: str, names: Sequence[str] | None = None) -> Tensor:
    """The label column as int64 classes; texts are looked up in the class names.

    Raises:
        ValueError, TypeError: for texts outside the names, missing values, or labels that are no classes.
    """
    return class_tensor(label_values(data, column), column, names)


def label_values(data: Dataset, column: str) -> list[Any]:
    """The label column as it is stored."""
    return data.with_format(None)[column][:]


def class_tensor(values: list[Any], column: str, names: Sequence[str] | None = None) -> Tensor:
    """`label_tensor` of the values of the label column."""
    missing = sum(value is None for value in values)
    if missing:
        raise ValueError(
            f"column {column!r} has {missing} rows without a label; drop them, or use mode='active', which needs no "
            "labels"
        )
    if isinstance(values[0], str):
        return _looked_up(values, column, names)
    labels = torch.tensor(values)
    if labels.ndim != 1 or labels.is_floating_point():
        raise TypeError(
            f"column {column!r} holds {labels.dtype} of shape {tuple(labels.shape)}; selection needs one class a row"
        )
    return labels.long()


def _looked_up(values: list[str], column: str, names: Sequence[str] | None) -> Tensor:
    """The places of the values among the class names."""
    if names is None:
        raise ValueError(
            f"column {column!r} holds texts and the probes have no class names to look them up in; "
            f"call class_encode_column({column!r}) first"
        )
    place = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(values) - set(place)):
        raise ValueError(
            f"column {column!r} holds {unknown[:3]}, which are none of the probes' {len(place)} "
            f"classes {list(place)[:10]}"
        )
    return torch.tensor([place[value] for value in values])


class Inputs:
    """Turns rows into what a model takes: a dict of keyword tensors, or one tensor.

    Args:
        processing_class: a tokenizer or an image processor, for rows with texts or images.
        column: the column(s) to feed: a text, an image, a vector, or several numbers that are stacked. Default: the
            columns that the model's `forward` names; else, with a processing class, the only image or text column.
        collator: does it all instead; gets the rows without labels and returns the inputs.
        aside: more columns that are never fed, the label column for one.

    Example:
        >>> Inputs(column=["width", "height"])([{"width": 1.0, "height": 2.0}])
        tensor([[1., 2.]])
    """

    def __init__(
        self,
        processing_class: Any = None,
        column: str | Sequence[str] | None = None,
        collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
        aside: Sequence[str] = (),
    ) -> None:
        self.processing_class, self.column, self.collator = processing_class, column, collator
        self.aside = {*NOT_INPUTS, *aside}
        self.forward_columns: list[str] = []
        self.mode = "RGB"

    def bind(self, data: Dataset, model: nn.Module | None = None) -> Self:
        """Inputs with the columns found in a data set and the model's signature.

        Raises:
            ValueError: if it cannot be told which columns to feed.
        """
        bound = Inputs(self.processing_class, self.column, self.collator, self.aside)
        bound.mode = "L" if getattr(getattr(model, "config", None), "num_channels", 3) == 1 else "RGB"
        if self.column is not None:
            check_dataset(data, [self.column] if isinstance(self.column, str) else self.column)
        elif self.collator is None:
            bound._find_columns(data, model)
        return bound

    def read(self, data: Dataset, places: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of the data set, with no more columns than are fed."""
        needed = self.forward_columns or ([self.column] if isinstance(self.column, str) else list(self.column or []))
        if needed and data.format["type"] != "custom":  # a transform may need columns that it does not return
            data = data.select_columns(needed)
        batch = data[list(places)]
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def _find_columns(self, data: Dataset, model: nn.Module | None) -> None:
        arguments = set(inspect.signature(model.forward).parameters) if model is not None else set()
        # a transform decides only when a row is read which columns there are
        columns = list(data[0]) if data.format["type"] == "custom" else data.column_names
        self.forward_columns = [name for name in columns if name in arguments and name not in self.aside]
        if self.forward_columns:
            return
        if self.processing_class is None:
            candidates, why = [], "none of them is an argument of the model"
        else:
            texts = isinstance(self.processing_class, PreTrainedTokenizerBase)
            fits = is_text if texts else is_image
            candidates = [name for name, kind in data.features.items() if name not in self.aside and fits(kind)]
            why = f"{len(candidates)} of them hold {'texts' if texts else 'images'}"
        if len(candidates) != 1:
            raise ValueError(
                f"cannot tell which of the columns {columns} to feed to the model: {why}; pass "
                "input_column=, and for raw images or texts processing_class="
            )
        self.column = candidates[0]

    def __call__(self, rows: Rows) -> Mapping[str, Any] | Tensor:
        if self.collator is not None:
            return self.collator([{name: row[name] for name in row if name not in self.aside} for row in rows])
        if self.forward_columns:
            return self._pad([{name: row[name] for name in self.forward_columns} for row in rows])
        if not isinstance(self.column, str):
            return torch.tensor([[float(row[name]) for name in self.column] for row in rows])
        return self._processed([row[self.column] for row in rows])

    def _processed(self, values: list[Any]) -> Mapping[str, Any] | Tensor:
        if self.processing_class is None:
            return torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in values])
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            return dict(self.processing_class(values, padding=True, truncation=True, return_tensors="pt"))
        images = [value.convert(self.mode) if hasattr(value, "convert") else value for value in values]
        return dict(self.processing_class(images, return_tensors="pt"))

    def _pad(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        if isinstance(self.processing_class, PreTrainedTokenizerBase) and "input_ids" in self.forward_columns:
            return dict(self.processing_class.pad(rows, return_tensors="pt"))
        return default_data_collator(rows)


def run_model(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Any:
    """Keyword tensors or one tensor into a model."""
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def is_text(feature: Any) -> bool:
    """Whether a column of a data set holds texts."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_image(feature: Any) -> bool:
    """Whether a column of a data set holds images."""
    return isinstance(feature, Image)
