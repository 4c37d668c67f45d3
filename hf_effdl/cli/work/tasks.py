"""What is trained on what, of each task that the verbs know: a model, rows, and what is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    default_data_collator,
)

from hf_effdl.cli.work.data import (
    accuracy,
    as_pixels,
    labels_of,
    load_splits,
    load_tokenizer,
    named_splits,
    padded_by,
    with_eval,
)


@dataclass
class Material:
    """A model and its rows."""

    model: torch.nn.Module
    train: Dataset
    eval: Dataset
    processor: Any
    metric: str = "accuracy"
    compute_metrics: Callable[[Any], dict[str, float]] | None = accuracy
    collator: Any = None

    def for_trainer(self) -> dict[str, Any]:
        """Arguments of a `Trainer`, but for the model and its settings."""
        rows = {"train_dataset": self.train, "eval_dataset": self.eval, "processing_class": self.processor}
        return rows | {"compute_metrics": self.compute_metrics, "data_collator": self.collator}


def load_model(auto: Any, options: Any, **config: Any) -> torch.nn.Module:
    """In single precision whatever the checkpoint has: images come in it, and layers want both alike."""
    name = options.model_name_or_path
    if options.from_scratch:
        settings = AutoConfig.from_pretrained(name, dtype=torch.float32, **config)
        settings.name_or_path = ""  # by which a model is known that has weights from there
        return auto.from_config(settings, dtype=torch.float32)
    more = {"ignore_mismatched_sizes": True} if config else {}
    return auto.from_pretrained(name, dtype=torch.float32, **more, **config)


def images(options: Any, args: Any) -> Material:
    """An image classifier; `args` are told to leave the columns that its transform reads."""
    data = load_splits(options, args.seed, ("image_column", "label_column"))
    processor = AutoImageProcessor.from_pretrained(options.model_name_or_path)
    model = load_model(AutoModelForImageClassification, options, **labels_of(data, options))
    data = data.with_transform(as_pixels(options, processor, model.config.num_channels))
    args.remove_unused_columns = False
    return Material(model, data["train"], data["eval"], processor)


def texts(options: Any, args: Any) -> Material:
    """A text classifier."""
    data = load_splits(options, args.seed, ("text_column", "label_column"))
    tokenizer = load_tokenizer(options.model_name_or_path)
    model = padded_by(tokenizer, load_model(AutoModelForSequenceClassification, options, **labels_of(data, options)))

    def tokens(rows: dict[str, list]) -> dict[str, list]:
        found = tokenizer(rows[options.text_column], truncation=True, max_length=options.max_length)
        return {**found, "labels": rows[options.label_column]}

    data = data.map(tokens, batched=True, remove_columns=data["train"].column_names)
    return Material(model, data["train"], data["eval"], tokenizer)


def language(options: Any, args: Any) -> Material:
    """A language model, and sequences of equal length; what is left over at the end is too short for one."""
    tokenizer = load_tokenizer(options.model_name_or_path)
    data = named_splits(options, ("text_column",))

    def sequences(some: dict[str, list]) -> dict[str, list]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        kept = filter(str.strip, some[options.text_column])
        ids, size = list(chain.from_iterable(tokenizer(text)["input_ids"] + end for text in kept)), options.max_length
        cut = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
        return {"input_ids": cut, "labels": cut}

    data = data.map(sequences, batched=True, remove_columns=data["train"].column_names)
    if len(data["train"]) < 2:
        raise ValueError(
            f"{options.dataset_name} holds {len(data['train'])} sequences of {options.max_length} tokens, and 2 are "
            "needed: set --max_length lower, or take more text"
        )
    data = with_eval(data, args.seed)
    model = load_model(AutoModelForCausalLM, options)
    return Material(model, data["train"], data["eval"], tokenizer, "loss", None, default_data_collator)


LOADERS = {"image-classification": images, "text-classification": texts, "text-generation": language}


def load_task(options: Any, args: Any) -> Material:
    """Model and rows of `options.task`."""
    return LOADERS[options.task](options, args)
