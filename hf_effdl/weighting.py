"""`WeightedTrainer`: train on a `weight` column, exactly, under gradient accumulation and on several processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Any, NoReturn
from warnings import warn

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_effdl.processes import is_first, refuse_lone_processes
from hf_effdl.row_losses import ASK, COLUMN, element_losses, find_task


# ---- the weights of the data


def has_weights(dataset: Any) -> bool | None:
    """Whether a data set has the column `weight`; None where only its rows can tell."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and COLUMN in columns:
        return True
    transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return None if columns is None or transformed else False


def check_weights(values: Any, where: str) -> np.ndarray:
    """The weights as float64, one per row, none of them negative, NaN, infinite or absent; else `ValueError`."""
    try:
        weights = np.asarray(values)
    except ValueError:  # lists of different lengths
        weights = np.array([None])
    if weights.ndim != 1 or weights.dtype.kind not in "biuf":
        raise ValueError(f"{where} must hold one number per row, not {weights.dtype} of shape {weights.shape}")
    weights = weights.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise ValueError(f"{where} must be finite and not negative; row {bad[0]} has {weights[bad[0]]}")
    return weights


def check_column(dataset: Dataset) -> None:
    """Refuse bad loss weights in a column of a training set, and warn of a mean other than 1."""
    where = f"the column {COLUMN!r} of train_dataset"
    weights = check_weights(dataset.select_columns(COLUMN).with_format("numpy")[:][COLUMN], where)
    if not len(weights):
        return
    if not weights.any():
        raise ValueError(f"{where} is all 0, so there is nothing to train on")
    if abs(weights.mean() - 1) > 1e-3 and is_first():
        warn(
            f"{where} has mean {weights.mean():.6g}, which multiplies the learning rate. Loss weights should "
            "have mean 1; if the column holds something else, rename it",
            stacklevel=4,
        )


def columns_of(dataset: Any) -> list[str]:
    """The columns of a data set; those of its first row where it does not say, none where its rows have no names."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        row = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]
        columns = list(row) if isinstance(row, Mapping) else []
    return list(columns)


def refuse_no_weights(dataset: Any, trainer: str, plain: str, names: Sequence[str] = (COLUMN,)) -> NoReturn:
    """Raise the `ValueError` for a training set without weights, naming its columns and the nearest of them."""
    columns = columns_of(dataset)
    near = get_close_matches(COLUMN, [name for name in columns if name not in names], cutoff=0.5)
    raise ValueError(
        f"{trainer} trains on a column {' or '.join(map(repr, names))}, but train_dataset has {columns}"
        + (f"; did you mean {' or '.join(map(repr, near))}? Rename it with rename_column" if near else "")
        + f". Select rows with weights first, or use {plain}"
    )


@dataclass
class WeightCollator:
    """A collator that never shows `weight` to the one it wraps, which may drop it, pad it or fail on it."""

    collator: Callable[[Sequence[Any]], Any]
    keep: bool

    def __call__(self, rows: Sequence[Any]) -> Any:
        weights = [row[COLUMN] for row in rows if isinstance(row, Mapping) and COLUMN in row]
        weights = [value.tolist() if hasattr(value, "tolist") else value for value in weights]  # from any device
        if not weights:
            return self.collator(rows)
        batch = self._without_weights(rows)
        if not self.keep:
            return batch
        if len(weights) != len(rows):
            raise ValueError(f"{len(rows) - len(weights)} of {len(rows)} rows of a batch have no {COLUMN!r}")
        if not isinstance(batch, Mapping):
            raise TypeError(f"to train on {COLUMN!r}, data_collator must return a mapping, not {type(batch)}")
        batch[COLUMN] = torch.from_numpy(check_weights(weights, f"the column {COLUMN!r}")).float()
        return batch

    def _without_weights(self, rows: Sequence[Any]) -> Any:
        try:
            return self.collator([{name: value for name, value in row.items() if name != COLUMN} for row in rows])
        except KeyError as error:
            if error.args != (COLUMN,):
                raise
        batch = self.collator(rows)  # one of the user's own, which asks for the weights itself
        batch.pop(COLUMN, None)
        return batch


# ---- the trainers


class WeightedLossMixin:
    """Makes a `Trainer` train on the column `weight` of its training data; without that column it is that `Trainer`.

    One optimizer step descends

        loss = sum_i w_i * l_i / n        i = 1..n: all rows of the step, over micro batches and processes

    where `l_i` is the mean over the row's own labels: its cross entropy, squared error or mean binary cross entropy in
    classification and regression; the mean over its label tokens in token classification and language modelling (a row
    without any counts 0). `n` counts rows and not weights on purpose: with weights of mean 1 over the data set, as a
    selector leaves them, the expectation over batches is the weighted empirical risk. Dividing by the batch's own sum
    of weights would be biased, the more so the smaller the micro batch: a row alone in its batch would lose its
    weight altogether. It also differs from Trainer's mean over all tokens of a step: there long rows weigh more.

    - Evaluation and prediction are unweighted, also for data with a column `weight`.
    - The first batch of a run checks that these rows' losses average to the loss which the model itself returns, so
      that class weights, auxiliary losses and the like are refused rather than lost.
    - `args.label_smoothing_factor` smooths each row's loss.
    - `compute_loss_func(outputs, labels, num_items_in_batch)` must return one loss per row, shape (rows,), not yet
      divided by anything; it gets `num_items_in_batch=None`.
    - The row count is always that of all processes, whatever `args.average_tokens_across_devices` says of tokens.
    - A subclass with a `compute_loss` of its own that takes the weights itself is trained as `Trainer` would train it:
      what it returns is scaled by Trainer's rules, and its `num_items_in_batch` is Trainer's. Where it calls
      `super().compute_loss` with the weights in the inputs, it gets the loss above in Trainer's scale: where Trainer
      divides by the micro batches of the step, it is that many times the micro batch's share, so that terms can be
      added to it.
    - Under DeepSpeed with 16-bit weights Trainer rounds all floating inputs, so also these weights, to 16 bit.

    Weights must be finite, not negative and not all 0, which is checked before training where the data set can be read
    at once, else batch by batch. A mean that is not 1 warns: it multiplies the learning rate.

    Raises:
        ValueError: for weights as above, a column that does not reach the batches, a model whose loss per row is not
            known, or sequences that are spread over processes.

    Example:
        >>> from transformers import Seq2SeqTrainer
        >>> class WeightedSeq2SeqTrainer(WeightedLossMixin, Seq2SeqTrainer): ...

    Source: weighted empirical risk minimisation on selected rows, COPS, arXiv 2309.02476; the authors' code divides by
    the sum of weights of each mini batch.
    """

    _needs_weights = False
    _checked_dataset: Any = None
    _checked_loss = False
    _rows_of_step: Any = None
    _undivided = 1  # what Trainer will divide the losses of the step by

    @wraps(Trainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_lone_processes()
        self._check_train_dataset()

    def _check_train_dataset(self) -> None:
        dataset = self.train_dataset
        if dataset is None or dataset is self._checked_dataset:
            return
        weighted = has_weights(dataset)
        if self._needs_weights and weighted is False:
            self._refuse_no_weights()
        if weighted and isinstance(dataset, Dataset):
            check_column(dataset)
        self._checked_dataset = dataset

    def _refuse_no_weights(self) -> None:
        refuse_no_weights(self.train_dataset, type(self).__name__, "Trainer")

    # ---- from the data set to the batch

    def _set_signature_columns_if_needed(self) -> None:
        # the only way to keep a column that the model does not take, short of giving up remove_unused_columns
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    @property
    def _has_own_loss(self) -> bool:
        """Whether a subclass, or a function set on this trainer, computes the loss."""
        return getattr(self.compute_loss, "__func__", None) is not WeightedLossMixin.compute_loss

    @contextmanager
    def _collating(self, keep: bool) -> Iterator[None]:
        plain = self.data_collator
        self.data_collator = WeightCollator(plain, keep)
        try:
            yield
        finally:
            self.data_collator = plain

    def get_train_dataloader(self) -> DataLoader:
        self._check_train_dataset()  # it may be another one than at the start
        self._checked_loss = False
        with self._collating(keep=True):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        with self._collating(keep=self._has_own_loss):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        with self._collating(keep=False):
            return super().get_test_dataloader(test_dataset)

    # ---- from the batch to the loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """As in `Trainer`; with weights, the items are the rows of the optimizer step on all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        if COLUMN in batches[0]:
            if self.get_cp_size() > 1 or self.get_sp_size() > 1:
                raise ValueError(
                    "context and sequence parallelism spread a row over processes, so that none has the row's loss to "
                    f"weight; use neither, or remove the column {COLUMN!r}"
                )
            rows = sum(len(batch[COLUMN]) for batch in batches)
            self._rows_of_step = self.accelerator.gather(torch.tensor(rows, device=device)).sum()
            if not self._has_own_loss:  # one of its own gets what Trainer gives it
                items = self._rows_of_step
            self._undivided = len(batches) if self._is_divided_by_trainer(items) else 1
            return batches, items
        if has_weights(self.train_dataset):
            raise ValueError(
                f"train_dataset has the column {COLUMN!r}, but its batches have only {sorted(batches[0])}: let its "
                "transform, set_format(columns=...) or data_collator pass it on; or, to train without weights, "
                f"remove_columns({COLUMN!r})"
            )
        if self._needs_weights:
            self._refuse_no_weights()
        return batches, items

    def _is_divided_by_trainer(self, items: Tensor | int | None) -> bool:
        """Whether `Trainer.training_step` divides the loss of a micro batch by how many the step has."""
        if self.loss_is_scaled_for_ga is not None:
            return not self.loss_is_scaled_for_ga
        return self.compute_loss_func is None and not (self.model_accepts_loss_kwargs and items is not None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """As in `Trainer`; of a batch with weights, this process's share of the step's weighted loss."""
        inputs = dict(inputs)
        weights = inputs.pop(COLUMN, None)
        if weights is None or (self._has_own_loss and not model.training):  # evaluation is unweighted
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if self.compute_loss_func is not None:
            outputs, losses = self._own_losses(model, inputs, weights)
        else:
            outputs, losses = self._model_losses(model, inputs, weights, return_outputs)
        loss = self.weighted_share(weights, losses, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def weighted_share(self, weights: Tensor, losses: Tensor, items: Tensor | int | None = None) -> Tensor:
        """This process's share of a step's weighted mean, from weights and losses by row."""
        total = (weights.to(losses.device) * losses).sum()  # at least float32, as the weights are
        rows = items if self._rows_of_step is None or not self._has_own_loss else self._rows_of_step
        if rows is None:
            return total / len(weights)
        # the gradients of the processes are averaged, the rows are counted over all of them
        return total / rows * (self.accelerator.num_processes * self._undivided)

    def _own_losses(self, model: nn.Module, inputs: dict[str, Any], weights: Tensor) -> tuple[Any, Tensor]:
        """Outputs, and the loss of each row by `compute_loss_func`."""
        labels = inputs.pop("labels", None)
        outputs = model(**inputs)
        losses = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        if not isinstance(losses, Tensor) or losses.shape != weights.shape:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"compute_loss_func returned {got}; with a column {COLUMN!r} it must return one loss per row, "
                f"shape {tuple(weights.shape)}: use reduction='none', and the mean over the labels of each row"
            )
        return outputs, losses

    def _model_losses(
        self, model: nn.Module, inputs: dict[str, Any], weights: Tensor, keep_outputs: bool
    ) -> tuple[Any, Tensor]:
        """Outputs, if they are to be kept, and the loss of each row by what the model trains on."""
        if "labels" not in inputs:
            raise ValueError(f"training on weights needs 'labels'; the batch has {sorted(inputs)}. Or {ASK}")
        outputs = model(**inputs)
        if isinstance(outputs, Mapping):
            own, logits, aux = (outputs.get(name) for name in ("loss", "logits", "aux_loss"))
        else:
            own, logits, aux = *outputs[:2], None
        if not keep_outputs:
            outputs = None  # the graph of the model's own loss is as large as the logits; nobody needs it
        losses = self._row_losses(model, inputs["labels"], logits, None if own is None else own.detach(), aux)
        if losses.shape != weights.shape:
            raise ValueError(
                f"the batch has {len(weights)} weights and {len(losses)} rows; data_collator must make one row of "
                "each row of the data set (no packing)"
            )
        return outputs, losses

    def _row_losses(self, model: nn.Module, labels: Tensor, logits: Any, own: Tensor | None, aux: Any) -> Tensor:
        """The mean loss of each row (rows,), once the model's own loss was seen to be their mean."""
        model = self.accelerator.unwrap_model(model)
        name = type(model).__name__
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{name} returned no logits to take the loss of a row from (with use_liger_kernel=True none does); "
                + ASK
            )
        task = find_task(model, logits, labels)
        smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
        terms, counted = element_losses(logits, labels, task, smoothing)
        if not self._checked_loss and own is not None and own.ndim == 0 and own.isfinite() and counted.any():
            with torch.no_grad():
                plain = element_losses(logits, labels, task)[0].sum() / counted.sum()
            if aux is not None or not self._is_close(own.to(plain), plain, logits.dtype):
                raise ValueError(
                    f"the loss of {name} is {own:.6g} where the mean over its logits and labels, as {task}, is "
                    f"{plain:.6g}: it adds or weights something (an auxiliary loss, classes) that weighting the rows "
                    f"would lose; {ASK}"
                )
            self._checked_loss = True
        return terms.sum(1) / counted.sum(1).clamp(min=1)

    def _is_close(self, loss: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
        half = self.accelerator.mixed_precision != "no" or dtype in (torch.float16, torch.bfloat16)
        return torch.isclose(loss, plain, rtol=2e-2 if half else 1e-4, atol=1e-6).item()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        # for batches of the caller's own making; ours have none here
        labelled = bool(self.label_names) and all(inputs.get(name) is not None for name in self.label_names)
        if not (self._has_own_loss and labelled):
            inputs = {name: value for name, value in inputs.items() if name != COLUMN}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)


class WeightedTrainer(WeightedLossMixin, Trainer):
    """A `Trainer` that trains on the column `weight` of `train_dataset`; see `WeightedLossMixin` for the loss.

    Takes the arguments of `Trainer`. Where `train_dataset` has no column `weight` it raises rather than train
    unweighted.

    Raises:
        ValueError: if `train_dataset` has no column `weight`; and as `WeightedLossMixin`.

    Example:
        >>> import tempfile, torch
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> rows = Dataset.from_dict({"input_ids": [[2, 7], [2, 9]], "labels": [0, 1], "weight": [1.5, 0.5]})
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=10, **sizes))
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=1, use_cpu=True, disable_tqdm=True)
        >>> result = WeightedTrainer(model, args, train_dataset=rows).train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> result.global_step
        1
    """

    _needs_weights = True
