"""How rows of a data set become the inputs of a model."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, default_data_collator

from hf_effdl.files import digest
from hf_effdl.random_state import evaluating


Rows = Sequence[Mapping[str, Any]]
NOT_INPUTS = ("label", "labels", "label_ids", "weight", "inclusion_probability")


def check_dataset(
    data: Any, columns: Sequence[str] = (), argument: str = "the data set", named_by: str = ""
) -> Dataset:
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
        raise ValueError(f"{argument} has no rows; pass some")
    for column in columns:
        if column not in data.column_names:
            near = get_close_matches(column, data.column_names, 3, 0.4)
            raise ValueError(
                f"{argument} has no column {column!r}; its columns are {data.column_names}"
                + (f", near ones {near}" if near else "")
                + (f"; name the right one by {named_by}" if named_by else "")
            )
    return data


def label_names(data: Dataset, column: str | None) -> list[str] | None:
    """The class names of a `ClassLabel` column; None for other columns."""
    return getattr(data.features.get(column), "names", None) if column else None


def names_for(data: Dataset, column: str | None, of_probes: Sequence[str] | None) -> list[str] | None:
    """Class names of the pool and the probes.

    Raises:
        ValueError: if both have some and they differ.
    """
    names = label_names(data, column)
    if names and of_probes and list(names) != list(of_probes):
        if sorted(names) == sorted(of_probes):
            how = f"in another order: {names[:4]} ... and {list(of_probes)[:4]} ..."
        else:
            how = f"{sorted(set(names) ^ set(of_probes))[:6]} are known to one of them only"
        raise ValueError(
            f"the data set's classes and the probes' differ: {how}; train the probes on labels of the "
            f"same order, or align_labels_with_mapping the column {column!r}"
        )
    return list(names or of_probes or []) or None


def label_tensor(data: Dataset, column: str, names: Sequence[str] | None = None) -> Tensor:
    """The label column as int64 classes; texts are looked up in the class names.

    Raises:
        ValueError, TypeError: for texts outside the names, class names of the column that differ from them, missing
            values, or labels that are no classes.
    """
    return class_tensor(label_values(data, column), column, names_for(data, column, names))


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
    try:
        labels = torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"column {column!r} holds {values[0]!r}, which is no class ({error}); probes of one class a row need a "
            "number or a text. For several labels a row, or one for each token, train the models yourself and pass "
            "them as Probes(models, task='labels' or 'tokens')"
        ) from error
    if labels.ndim != 1 or labels.is_floating_point():
        raise TypeError(
            f"column {column!r} holds {labels.dtype} of shape {tuple(labels.shape)}; probes of one class a row need a "
            "whole number or a text. For several labels a row, or one for each token, train the models yourself and "
            "pass them as Probes(models, task='labels' or 'tokens')"
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
    if unknown := sorted(map(str, set(values) - set(place))):
        raise ValueError(
            f"column {column!r} holds {unknown[:3]}, which are none of the probes' {len(place)} "
            f"classes {list(place)[:10]}; rename them, or train probes on them too"
        )
    return torch.tensor([place[value] for value in values])


def check_classes(labels: Tensor, column: str, names: Sequence[str] | None = None) -> int:
    """How many classes the labels of a probe set stand for.

    Raises:
        ValueError: for negative labels, a single class, or numbers that are ids and no classes 0, 1, 2 and so on.
    """
    if (labels < 0).any():
        raise ValueError(f"{int((labels < 0).sum())} rows of the probe set have a negative label; leave them out")
    present, largest = len(labels.unique()), int(labels.max())
    if present < 2:
        raise ValueError(
            f"column {column!r} of the probe set holds one class only, {largest}; probes that never saw another one "
            "can say nothing. Pass rows of two classes or more"
        )
    if names is not None and largest >= len(names):
        raise ValueError(
            f"column {column!r} holds class {largest}, and there are {len(names)} class names; pass names="
        )
    if names is None and largest >= 4 * present + 16:
        raise ValueError(
            f"column {column!r} holds {present} classes with numbers up to {largest}: ids, it seems, where classes "
            f"are numbered 0..{present - 1}; call class_encode_column({column!r}), or pass class names"
        )
    return max(len(names or []), largest + 1)


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
        self.longest: int | None = None  # tokens that the model takes

    def bind(self, data: Dataset, model: nn.Module | None = None) -> Self:
        """Inputs with the columns found in a data set and the model's signature.

        Raises:
            ValueError: if it cannot be told which columns to feed.
        """
        bound = Inputs(self.processing_class, self.column, self.collator, self.aside)
        bound.mode = "L" if getattr(getattr(model, "config", None), "num_channels", 3) == 1 else "RGB"
        bound.longest = _longest(model)
        if self.column is not None:
            check_dataset(data, [self.column] if isinstance(self.column, str) else self.column)
        elif self.collator is None:
            bound._find_columns(data, model)
        return bound

    def fed_columns(self, data: Dataset) -> list[str] | None:
        """The columns that decide what is fed; None where that is not known, and all may."""
        if self.collator is not None or data.format["type"] == "custom":
            return None
        return self.forward_columns or ([self.column] if isinstance(self.column, str) else list(self.column or []))

    def describe(self) -> dict[str, Any]:
        """All that decides what a row becomes, plain values."""
        return {
            "column": self.column,
            "forward_columns": self.forward_columns,
            "mode": self.mode,
            "longest": self.longest,
            "aside": sorted(self.aside) if self.collator is not None else None,
            "processing_class": identity(self.processing_class),
            "collator": identity(self.collator),
        }

    def read(self, data: Dataset, places: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of the data set, with no more columns than are fed."""
        needed = self.fed_columns(data)
        if needed:  # a transform may need columns that it does not return
            data = data.select_columns(needed)
        kind = data.format["type"]
        # arrays and tensors of an image say neither its mode nor its palette
        as_stored = kind != "custom" and self.collator is None and any(is_decoded(data, name) for name in needed or ())
        if as_stored or kind not in (None, "numpy", "torch", "custom"):
            data = data.with_format(None)  # tables of other libraries, whose batches are no dicts of lists
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
        if isinstance(self.column, str):
            return self._processed([row[self.column] for row in rows])
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            return self._tokens(*([row[name] for row in rows] for name in self.column))
        return torch.tensor([[_number(row[name], name) for name in self.column] for row in rows])

    def _processed(self, values: list[Any]) -> Mapping[str, Any] | Tensor:
        if self.processing_class is None:
            return torch.stack([_vector(value, self.column) for value in values])
        if isinstance(self.processing_class, PreTrainedTokenizerBase):
            return self._tokens(values)
        return dict(self.processing_class([_image(value, self.mode) for value in values], return_tensors="pt"))

    def _tokens(self, *texts: list[Any]) -> Mapping[str, Any]:
        """Texts, or pairs of texts, as a tokenizer gives them, no longer than tokenizer and model take."""
        if len(texts) > 2:
            raise ValueError(
                f"input_column={list(self.column)}: a tokenizer takes one text, or a pair of texts, not {len(texts)}; "
                "join columns, or pass data_collator="
            )
        for name, column in zip([self.column] if isinstance(self.column, str) else self.column, texts, strict=True):
            if (bad := next((text for text in column if not isinstance(text, str | list)), 0)) != 0:
                raise TypeError(f"column {name!r} holds {bad!r} among texts; fill it in, or leave such rows out")
        limit = min(self.longest or 10**9, self.processing_class.model_max_length)
        length = {} if limit >= 10**9 else {"max_length": limit}
        return dict(self.processing_class(*texts, padding=True, truncation=True, return_tensors="pt", **length))

    def _pad(self, rows: list[dict[str, Any]]) -> Mapping[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows if hasattr(row.get("input_ids"), "__len__")]
        if self.longest is not None and max(lengths, default=0) > self.longest:
            raise ValueError(
                f"a row has {max(lengths)} tokens in 'input_ids', and the model takes {self.longest}; tokenize with "
                f"truncation=True and max_length={self.longest}"
            )
        if isinstance(self.processing_class, PreTrainedTokenizerBase) and "input_ids" in self.forward_columns:
            return dict(self.processing_class.pad(rows, return_tensors="pt"))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"rows have from {min(lengths)} to {max(lengths)} tokens in 'input_ids', which make no batch; pass "
                "processing_class=tokenizer, which pads them, or data_collator="
            )
        return default_data_collator(rows)


def _number(value: Any, column: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"column {column!r} holds {value!r} among numbers; fill missing values in, and encode texts and "
            "categories as numbers, or leave the column out of input_column="
        ) from error


def _vector(value: Any, column: str) -> Tensor:
    try:
        return torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        shown = repr(value)
        raise TypeError(
            f"column {column!r} holds {shown[:60]}, which is no vector of numbers; for texts or images pass "
            "processing_class=, for other rows data_collator="
        ) from error


def _image(value: Any, mode: str) -> Any:
    """An image in the mode of the model's channels; what is no image as it is."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint16:
        return _eight_bits(value)
    if not hasattr(value, "convert"):
        return value
    if value.mode.startswith("I"):  # 16-bit greys, which convert would cut off at 255
        values = np.asarray(value)
        if values.min() < 0 or values.max() > 2**16 - 1:
            raise ValueError(
                f"an image of mode {value.mode!r} holds values from {values.min()} to {values.max()}, whose white is "
                "not known; scale it to 8 or 16 bits in a transform of the data set"
            )
        return _picture(_eight_bits(values)).convert(mode)
    if value.mode == "F":
        raise ValueError(
            "an image of mode 'F' holds floating-point numbers, whose white is not known; scale it to 8 bits in a "
            "transform of the data set"
        )
    return value.convert(mode)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _picture(values: np.ndarray) -> Any:
    from PIL import Image as Picture

    return Picture.fromarray(values)


def _longest(model: nn.Module | None) -> int | None:
    """The most tokens that a model has places for; None if it does not say."""
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(places, int) or places < 1:
        return None
    for module in model.modules():  # RoBERTa and its kin count from the place behind the padding's
        if isinstance(module, nn.Embedding) and module.num_embeddings == places and module.padding_idx is not None:
            return places - module.padding_idx - 1
    return places


def identity(value: Any) -> Any:
    """Plain values that differ where objects do: settings of tokenizers and processors, code and state of others."""
    if value is None:
        return None
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, PreTrainedTokenizerBase):
        sides = [value.padding_side, value.truncation_side, value.model_max_length, str(value.special_tokens_map)]
        backend = getattr(value, "backend_tokenizer", None)
        if backend is None:
            return [kind, *sides, digest(json.dumps([sorted(value.get_vocab().items()), str(value.init_kwargs)]))]
        settings = json.loads(backend.to_str())
        # what the last call left
        return [kind, *sides, digest(json.dumps({**settings, "padding": None, "truncation": None}))]
    if hasattr(value, "to_json_string"):
        return [kind, value.to_json_string()]
    try:
        return [kind, Hasher.hash(value)]
    except Exception:  # what cannot be pickled is never the same again
        return [kind, os.urandom(16).hex()]


def run_model(model: nn.Module, inputs: Mapping[str, Any] | Tensor) -> Any:
    """Keyword tensors or one tensor into a model, in eval mode, whatever the mode of a training that it is part of."""
    try:
        with evaluating(model):
            return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    except Exception as error:
        fed = {"": inputs} if isinstance(inputs, Tensor) else inputs
        shapes = ", ".join(f"{name} {tuple(getattr(value, 'shape', ()))}".strip() for name, value in fed.items())
        error.add_note(
            f"{type(model).__name__} was fed {shapes}: rows, input_column= and processing_class= must fit it"
        )
        raise


def is_text(feature: Any) -> bool:
    """Whether a column of a data set holds texts."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_image(feature: Any) -> bool:
    """Whether a column of a data set holds images."""
    return isinstance(feature, Image)


def is_decoded(data: Dataset, column: str) -> bool:
    """Whether reading a column, or something inside its values, opens files: its type says how."""
    return _decodes(data.features[column])


def _decodes(feature: Any) -> bool:
    inside = feature if isinstance(feature, list) else list(feature.values()) if isinstance(feature, dict) else []
    inside = [*inside, *([feature.feature] if hasattr(feature, "feature") else [])]
    return hasattr(feature, "decode_example") or any(_decodes(one) for one in inside)
