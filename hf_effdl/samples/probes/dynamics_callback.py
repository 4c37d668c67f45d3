"""Training dynamics recorded by any Trainer, and the difficulties of a recorded run.

`DynamicsCallback` keeps a few numbers per row and epoch; `dynamics_scores` turns a recorded run into difficulties that
a sampler can use, by the formulas of `scores/dynamics.py`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather, send_to_device
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_effdl.checks import path, whole_number
from hf_effdl.files import SEALED, damaged, digest, parsed, read_sealed, sealed, sweep, write_whole
from hf_effdl.processes import refuse_lone_processes, same_fate, together
from hf_effdl.random_state import random_state_kept
from hf_effdl.samples.probes.row_marks import row_marks
from hf_effdl.samples.scores.dynamics import aum, dual, dyn_unc, forgetting, mean_el2n, row_dynamics


logger = logging.getLogger(__name__)

FOLDER = "dynamics"
REMEDY = "remove it, or record the run again"
RECORDED = ("p_label", "margin", "el2n")
ROWS = "rows"  # the note that says of which rows a record is
LOOKED_AT = 1000  # rows whose whole content counts in it


class DynamicsCallback(TrainerCallback):
    """Records per training row, at the end of every epoch, how the model predicts it.

    The training set passes once through the model: in evaluation mode, in the order of the rows, without gradient. Of
    every row three numbers are kept (`row_dynamics`), in `output_dir/dynamics/epoch-0001.safetensors` and so on, which
    `load_dynamics` and `dynamics_scores` read. Training is the same with it as without, bit for bit: modes, buffers
    and random states are put back. It costs a forward pass over the data per recorded epoch.

    - **Only whole epochs are recorded**, since the scores compare and average epochs as equals. A run that ends in the
      middle of an epoch (`max_steps`, early stopping) leaves no record of that one, and warns if it leaves none.
    - **The files are the only state.** A run killed at any moment and resumed ends with the files of an uninterrupted
      run: what was recorded beyond the checkpoint is dropped and recorded again. A fresh run clears the folder.
    - **Several processes** score a part each, in batches that do not depend on their number, with the buffers of the
      first one, which are those that checkpoints have; it writes, the others wait.
    - **Augmented data**: rows come through the dataset's own transforms, so that random ones make the record one of
      one random view per row and epoch (a function of `args.seed` and the epoch). For the rows as they are, or where
      the dataset keeps a random generator of its own, which the pass would advance, pass them as `dataset`.
    - A column `weight` never reaches the model.

    Args:
        every: record every so many epochs: those whose number it divides.
        batch_size: rows per forward pass and process; default: `args.per_device_eval_batch_size`.
        dataset: rows to record, map-style, with the columns that the collator and the model take; default: the
            training set, as the Trainer feeds it.
        data_collator: makes a batch, a dict with `labels`, from a list of rows; default: the training dataloader's.

    Raises:
        ValueError, TypeError: before the first step, for a stream (`IterableDataset`) or an empty dataset, rows
            without labels, a model that is no classifier, or records of another number of rows to be continued.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[DynamicsCallback()])  # doctest: +SKIP
        >>> trainer.train()                                                                     # doctest: +SKIP
        >>> dynamics_scores(args.output_dir)["forgetting"].topk(100).indices                    # doctest: +SKIP

    Relations: the literature takes a row's margin and correctness when it is trained on, in training mode and before
    the step; here all rows of an epoch are predicted by one and the same model.
    """

    def __init__(
        self,
        every: int = 1,
        batch_size: int | None = None,
        dataset: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        if data_collator is not None and not callable(data_collator):
            raise TypeError(f"data_collator is a {type(data_collator).__name__}: pass a function of a list of rows")
        self.every = whole_number("every", every, 1)
        self.batch_size = None if batch_size is None else whole_number("batch_size", batch_size, 1)
        self.dataset = None if dataset is None else _map_style(dataset)
        self.data_collator = data_collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_lone_processes()
        dataset, collate = self._rows(kwargs["train_dataloader"])
        done = int(state.epoch or 0) if state.global_step else 0
        folder = Path(args.output_dir) / FOLDER
        with same_fate():
            _check_labels(dataset)
            if state.is_world_process_zero:
                self._tidy(folder, done, dataset)
        with _aside(kwargs["model"], args, seed=args.seed):  # a row that cannot be scored is found before any work
            _score(kwargs["model"], collate([dataset[0]]), args.device)
        if done and done == state.epoch:  # the checkpoint may be older than the record that belongs to its epoch
            self._record(args, state, done, kwargs["model"], kwargs["train_dataloader"])

    def _tidy(self, folder: Path, done: int, dataset: Any) -> None:
        """Leave the records of the epochs that are done, if they are of these rows."""
        if folder.is_dir():
            sweep(folder, "epoch-*.safetensors")
            for file in folder.glob("epoch-*.tmp"):  # what older versions left when they were cut off
                file.unlink()
            for epoch, file in _files(folder).items():
                if epoch > done:
                    file.unlink()
        _check_rows(folder, len(dataset), _identity(dataset))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.epoch and state.epoch == int(state.epoch):
            self._record(args, state, int(state.epoch), kwargs["model"], kwargs["train_dataloader"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not _files(Path(args.output_dir) / FOLDER):
            logger.warning(
                "no training dynamics were recorded: training ended at epoch %.2f and every=%d; train for longer",
                state.epoch or 0,
                self.every,
            )

    def _rows(self, dataloader: DataLoader) -> tuple[Any, Callable[[list[Any]], Mapping[str, Any]]]:
        dataset = _map_style(dataloader.dataset) if self.dataset is None else self.dataset
        return dataset, self.data_collator or dataloader.collate_fn

    def _record(
        self, args: TrainingArguments, state: TrainerState, epoch: int, model: nn.Module, dataloader: DataLoader
    ) -> None:
        if epoch % self.every:
            return
        dataset, collate = self._rows(dataloader)
        folder, rows = Path(args.output_dir) / FOLDER, len(dataset)
        with same_fate():
            if state.is_world_process_zero:
                _check_rows(folder, rows)
        size = self.batch_size or args.per_device_eval_batch_size
        # Each process takes the same number of whole batches, the last row repeated where there are no more. So every
        # row has the same neighbours in its batch on any number of processes, and none waits in a collective call.
        share = -(-rows // (size * args.world_size)) * size
        part = [min(row, rows - 1) for row in range(args.process_index * share, (args.process_index + 1) * share)]
        with _aside(model, args, seed=args.seed + epoch):
            loader = DataLoader(
                dataset, size, sampler=part, collate_fn=collate, num_workers=args.dataloader_num_workers
            )
            scores = torch.cat([_score(model, batch, args.device, all_rows=False) for batch in loader])
        scores = gather(scores)[:rows].cpu()
        if state.is_world_process_zero:
            if len(bad := scores.isnan().any(1).nonzero().flatten()):
                logger.warning("%d rows have no class or no numbers to record, the first is row %d", len(bad), bad[0])
            record = dict(zip(RECORDED, scores.T, strict=True))
            named = _identity(dataset)
            content = sealed(record, {} if named is None else {ROWS: named})
            write_whole(folder / f"epoch-{epoch:04d}.safetensors", content)
        together()


def _map_style(dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"{type(dataset).__name__} is a stream: its rows have no fixed places to keep records by. Train on a "
            "map-style dataset, or pass one as DynamicsCallback(dataset=...)"
        )
    if not len(dataset):
        raise ValueError("the dataset to record is empty; pass one with rows as DynamicsCallback(dataset=...)")
    return dataset


@contextmanager
def _aside(model: nn.Module, args: TrainingArguments, seed: int) -> Iterator[None]:
    """Evaluation mode without gradient, random numbers that follow from the seed; then all is put back."""
    import random

    import numpy

    modes = [(module, module.training) for module in model.modules()]
    # DDP brings batch norm's statistics together only at the next training step, from the first process
    buffers = list(model.buffers()) if args.world_size > 1 else []
    kept = [buffer.clone() for buffer in buffers]
    with torch.no_grad(), random_state_kept():
        try:
            random.seed(seed)
            numpy.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            model.eval()
            for buffer in buffers:
                broadcast(buffer)
            yield
        finally:
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)
            for module, mode in modes:
                module.training = mode


def _score(model: nn.Module, batch: Mapping[str, Any], device: torch.device, all_rows: bool = True) -> Tensor:
    """The recorded numbers of a batch, `(rows, 3)`; NaN for rows without a class, unless all rows must have one."""
    inputs = send_to_device({name: value for name, value in batch.items() if name != "weight"}, device)
    if "labels" not in inputs:
        raise ValueError(
            f"training dynamics need the label of every row, but the batches have no 'labels', only {sorted(inputs)}: "
            "name the label column 'label' or 'labels', or pass data_collator=..."
        )
    labels = inputs["labels"]
    # without labels no loss is computed; a model that cannot do without gets them
    given = signature(model.forward).parameters.get("labels")
    if given is None or given.default is not Parameter.empty:
        del inputs["labels"]
    logits = _logits(model(**inputs), type(model).__name__)
    if all_rows or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        return torch.stack(list(row_dynamics(logits, labels).values()), dim=1)
    outside = (labels < 0) | (labels >= logits.shape[1])  # no reason to end a run in its middle
    recorded = torch.stack(list(row_dynamics(logits, labels.masked_fill(outside, 0)).values()), dim=1)
    return recorded.masked_fill(outside[:, None], float("nan"))


def _logits(output: Any, model: str) -> Tensor:
    """The logits in what a model returned."""
    if isinstance(output, Mapping):
        logits, returned = output.get("logits"), sorted(output)
    else:  # of a tuple with the loss, the logits are what has rows and classes
        outputs = output if isinstance(output, (tuple, list)) else [output]
        logits = next((value for value in outputs if isinstance(value, Tensor) and value.ndim == 2), None)
        returned = type(output).__name__
    if logits is None:
        raise ValueError(f"training dynamics need logits, but {model} returns {returned}")
    return logits


# ---- files


def _files(folder: Path) -> dict[int, Path]:
    """The record of every epoch, in order."""
    return dict(sorted((int(file.stem.removeprefix("epoch-")), file) for file in folder.glob("epoch-*.safetensors")))


def _check_labels(dataset: Any) -> None:
    """Raise a `ValueError` for rows that have no class, where the data set has a column of labels to look into."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return
    column = next((name for name in ("labels", "label") if name in dataset.column_names), None)
    if column is None or getattr(dataset.features[column], "dtype", "")[:3] not in ("int", "uin"):
        return
    labels = torch.tensor([-1 if value is None else value for value in dataset.with_format(None)[column][:]])
    bad = (labels < 0).nonzero().flatten()  # one that is too large only the model can tell
    if len(bad):
        raise ValueError(
            f"column {column!r} is {labels[bad[0]].item()} at row {bad[0].item()} ({len(bad)} rows have no class): "
            "training dynamics need the label of every row; leave these rows out, or pass those with labels as "
            "DynamicsCallback(dataset=...)"
        )


def _identity(dataset: Any) -> str | None:
    """A digest of all labels and of some rows' content, so that records of other rows are told; None if unknown."""
    if not isinstance(dataset, Dataset):
        return None  # looking at a row may draw random numbers
    some = torch.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).round().long().tolist()
    labels = [name for name in ("label", "labels") if name in dataset.column_names]
    marks = row_marks(dataset, labels), row_marks(dataset.select(some), dataset.column_names)
    return digest([part.numpy().tobytes() for part in marks])


def _head(file: Path) -> tuple[int, str | None]:
    """How many rows a record is of, and which, from the file's head alone."""
    try:
        with safe_open(file, "pt") as stored:
            [recorded] = stored.get_slice(RECORDED[0]).get_shape()
            notes = parsed((stored.metadata() or {}).get(SEALED, "{}"))
            return recorded, notes.get(ROWS)
    except (SafetensorError, ValueError, AttributeError) as error:
        raise damaged(file, str(error), REMEDY) from error


def _read(file: Path) -> dict[str, Tensor]:
    """A record; a `ValueError` where it is damaged, or none."""
    record, _ = read_sealed(file, REMEDY)
    if missing := sorted(set(RECORDED) - set(record)):
        raise damaged(file, f"it lacks {missing}", REMEDY)
    kinds = {(record[name].dtype, record[name].ndim, record[name].numel()) for name in RECORDED}
    if kinds != {(torch.float32, 1, record[RECORDED[0]].numel())}:
        raise damaged(file, f"it holds no float32 number a row, but {sorted(map(str, kinds))}", REMEDY)
    return record


def _check_rows(folder: Path, rows: int | None = None, identity: str | None = None) -> None:
    """All records are of the same rows, the given ones."""
    for file in _files(folder).values():
        recorded, noted = _head(file)
        if rows is not None and recorded != rows:
            raise ValueError(
                f"{file} is a record of {recorded} rows, but the dataset has {rows} now, and rows are known by their "
                "place. Resume with the same data, or train without resume_from_checkpoint, which starts records anew"
            )
        rows = recorded
        if None not in (identity, noted) and noted != identity:
            raise ValueError(
                f"{file} is a record of other rows: their labels, content or order are not those of the dataset or of "
                "the other records, and rows are known by their place. Resume with the same data, or train without "
                "resume_from_checkpoint, which starts records anew"
            )
        identity = noted or identity


def load_dynamics(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """What `DynamicsCallback` recorded, for E epochs and N rows.

    Args:
        folder: the run's `output_dir`, or the folder `dynamics` in it.

    Returns:
        `"epoch"` `(E,)` int64, ascending: epochs trained at each record; `"p_label"`, `"margin"` and `"el2n"` `(E, N)`
        float32 (see `row_dynamics`); `"correct"` `(E, N)` bool, `margin > 0`. Column i is row i of the dataset.

    Raises:
        FileNotFoundError: if there are no records.
        ValueError: if they are of different rows.

    Example:
        >>> load_dynamics("trainer_output")["correct"].float().mean(1)  # accuracy per epoch    # doctest: +SKIP
    """
    folder = path("folder", folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = _files(folder)
    if not files:
        raise FileNotFoundError(f"no epoch-*.safetensors in {folder}: a Trainer with DynamicsCallback() writes them")
    _check_rows(folder)
    records = [_read(file) for file in files.values()]
    stacked = {name: torch.stack([record[name] for record in records]) for name in RECORDED}
    return {"epoch": torch.tensor(list(files)), **stacked, "correct": stacked["margin"] > 0}


# ---- scores


def dynamics_scores(
    folder: str | os.PathLike[str],
    *,
    el2n_epochs: Sequence[int] | None = None,
    window: int = 10,
    dual_epochs: int = 30,
) -> dict[str, Tensor]:
    """Five difficulties of every row of a recorded run: all non-negative, all higher where a row is harder.

    So each can be given to a sampler as it is. All but the area under the margin are so by definition. That
    is turned round: `"aum"` is `max_j AUM_j - AUM_i`, how far a row's mean margin lies below the
    largest one, which keeps the order and the distances. `aum(load_dynamics(folder)["margin"])` is the paper's.

    Args:
        folder: the run's `output_dir`.
        el2n_epochs: numbers of the epochs that EL2N is averaged over; default: all that were recorded.
        window: of `dyn_unc` and `dual`, in records.
        dual_epochs: so many of the first records make `dual`.

    Returns:
        `"el2n"`, `"aum"`, `"forgetting"`, `"dyn_unc"` and `"dual"`, each `(N,)` float32.

    Raises:
        ValueError: for fewer than two epochs, epochs that were not recorded, or records with NaN.

    Example:
        >>> dynamics_scores("trainer_output", el2n_epochs=range(1, 11))["el2n"]                 # doctest: +SKIP
    """
    records = load_dynamics(folder)
    recorded = records["epoch"].tolist()
    chosen = recorded if el2n_epochs is None else list(el2n_epochs)
    if not set(chosen) <= set(recorded):
        raise ValueError(f"el2n_epochs={chosen}: only epochs {recorded} were recorded")
    margins = aum(records["margin"])
    return {
        "el2n": mean_el2n(records["el2n"], [recorded.index(epoch) for epoch in chosen]),
        "aum": margins.max() - margins,
        "forgetting": forgetting(records["correct"]).float(),
        "dyn_unc": dyn_unc(records["p_label"], window),
        "dual": dual(records["p_label"][:dual_epochs], window),
    }
