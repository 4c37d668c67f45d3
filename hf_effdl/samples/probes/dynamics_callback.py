"""Training dynamics: how a model's prediction of each training row moves from epoch to epoch, and scores made of it.

`DynamicsCallback` records a few numbers per row and epoch in any Trainer; `mean_el2n`, `aum`, `forgetting` and
`dyn_unc` are pure functions of such records, as their papers define them; `dynamics_scores` turns a recorded run into
difficulties that a sampler can use.
"""

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, send_to_device
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)

FOLDER = "dynamics"
RECORDED = ("p_label", "margin", "el2n")


# ---- one epoch


def row_dynamics(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is kept of one prediction per row: three numbers, whatever the number of classes.

    With `p = softmax(z)` and y the given label

        p_label = p_y        margin = z_y - max_{c != y} z_c        el2n = ||p - onehot(y)||_2

    The prediction is right where `margin > 0`, so that needs no number of its own.

    Args:
        logits: `(N, C)`, of two classes or more.
        labels: `(N,)` integers in `0 .. C-1`, right or wrong as they come with the data.

    Returns:
        `"p_label"`, `"margin"` and `"el2n"`, each `(N,)` float32.

    Raises:
        ValueError: if these are not logits and labels of a single-label classification.

    Example:
        >>> row_dynamics(torch.tensor([[0.0, 0.0], [2.0, 5.0]]), torch.tensor([0, 0]))["margin"]
        tensor([ 0., -3.])

    Source: margin: Pleiss et al. 2020 (arXiv 2001.10528), section 3; el2n: Paul et al. 2021 (arXiv 2107.07075),
    section 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"the model's logits have shape {tuple(logits.shape)}; training dynamics are defined for one label per "
            "row, so they must have shape (rows, classes) with two classes or more"
        )
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}; "
            "training dynamics need one class index per row"
        )
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        raise ValueError(
            f"label {int(labels[outside][0])} is none of the {logits.shape[1]} classes that the model predicts, "
            f"0 .. {logits.shape[1] - 1}; leave unlabelled rows out of the training set"
        )
    logits, index = logits.float(), labels.long()[:, None]
    p, given = logits.softmax(1), logits.gather(1, index)
    others = logits.scatter(1, index, float("-inf")).amax(1, keepdim=True)
    return {
        "p_label": p.gather(1, index)[:, 0],
        "margin": (given - others)[:, 0],
        # subtracting the one-hot vector first keeps the digits of a small error, 1 - 2 p_y + sum p^2 would not
        "el2n": p.scatter_add(1, index, torch.full_like(given, -1)).norm(dim=1),
    }


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
        for name, value in {"every": every, "batch_size": 1 if batch_size is None else batch_size}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: it must be a whole number, 1 or more")
        self.every = every
        self.batch_size = batch_size
        self.dataset = None if dataset is None else _map_style(dataset)
        self.data_collator = data_collator

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset, collate = self._rows(kwargs["train_dataloader"])
        done = int(state.epoch or 0) if state.global_step else 0
        folder = Path(args.output_dir) / FOLDER
        if state.is_world_process_zero:
            for file in folder.glob("epoch-*.tmp"):  # writing it was cut off
                file.unlink()
            for epoch, file in _files(folder).items():
                if epoch > done:
                    file.unlink()
            _check_rows(folder, len(dataset))
        PartialState().wait_for_everyone()
        with _aside(kwargs["model"], args, seed=args.seed):  # a row that cannot be scored is found before any work
            _score(kwargs["model"], collate([dataset[0]]), args.device)
        if done and done == state.epoch:  # the checkpoint may be older than the record that belongs to its epoch
            self._record(args, state, done, kwargs["model"], kwargs["train_dataloader"])

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
            scores = torch.cat([_score(model, batch, args.device) for batch in loader])
        scores = gather(scores)[:rows].cpu()
        if state.is_world_process_zero:
            _write(folder / f"epoch-{epoch:04d}.safetensors", dict(zip(RECORDED, scores.T, strict=True)))
        PartialState().wait_for_everyone()


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
    states = random.getstate(), np.random.get_state()
    modes = [(module, module.training) for module in model.modules()]
    # DDP brings batch norm's statistics together only at the next training step, from the first process
    buffers = list(model.buffers()) if args.world_size > 1 else []
    kept = [buffer.clone() for buffer in buffers]
    with torch.no_grad(), torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
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
            random.setstate(states[0])
            np.random.set_state(states[1])


def _score(model: nn.Module, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """The recorded numbers of a batch, `(rows, 3)`."""
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
    output = model(**inputs)
    if isinstance(output, Mapping):
        logits = output.get("logits")
    else:  # of a tuple with the loss, the logits are what has rows and classes
        outputs = output if isinstance(output, (tuple, list)) else [output]
        logits = next((value for value in outputs if isinstance(value, Tensor) and value.ndim == 2), None)
    if logits is None:
        found = sorted(output) if isinstance(output, Mapping) else type(output).__name__
        raise ValueError(f"training dynamics need logits, but {type(model).__name__} returns {found}")
    return torch.stack(list(row_dynamics(logits, labels).values()), dim=1)


# ---- files


def _files(folder: Path) -> dict[int, Path]:
    """The record of every epoch, in order."""
    return dict(sorted((int(file.stem.removeprefix("epoch-")), file) for file in folder.glob("epoch-*.safetensors")))


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".tmp")
    try:
        part.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def _check_rows(folder: Path, rows: int | None = None) -> None:
    """All records are of the same number of rows, the given one."""
    for file in _files(folder).values():
        with safe_open(file, "pt") as stored:
            [found] = stored.get_slice(RECORDED[0]).get_shape()
        if rows is not None and found != rows:
            raise ValueError(
                f"{file} is a record of {found} rows, but the dataset has {rows} now, and rows are known by their "
                "place. Resume with the same data, or train without resume_from_checkpoint, which starts records anew"
            )
        rows = found


def load_dynamics(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """What `DynamicsCallback` recorded, for E epochs and N rows.

    Args:
        folder: the run's `output_dir`, or the folder `dynamics` in it.

    Returns:
        `"epoch"` `(E,)` int64, ascending: epochs trained at each record; `"p_label"`, `"margin"` and `"el2n"` `(E, N)`
        float32 (see `row_dynamics`); `"correct"` `(E, N)` bool, `margin > 0`. Column i is row i of the dataset.

    Raises:
        FileNotFoundError: if there are no records.
        ValueError: if they are of different numbers of rows.

    Example:
        >>> load_dynamics("trainer_output")["correct"].float().mean(1)  # accuracy per epoch    # doctest: +SKIP
    """
    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = _files(folder)
    if not files:
        raise FileNotFoundError(f"no epoch-*.safetensors in {folder}: a Trainer with DynamicsCallback() writes them")
    _check_rows(folder)
    records = [load_file(file) for file in files.values()]
    stacked = {name: torch.stack([record[name] for record in records]) for name in RECORDED}
    return {"epoch": torch.tensor(list(files)), **stacked, "correct": stacked["margin"] > 0}


# ---- scores


def mean_el2n(el2n: Tensor, epochs: Sequence[int] | None = None) -> Tensor:
    """Mean error norm of a row: `1/|T| sum_{t in T} ||p_t - onehot(y)||_2`. High: hard, or wrongly labelled.

    Args:
        el2n: `(E, N)`, error norm per epoch and row.
        epochs: T, positions along the first axis; default: all. The paper takes one early epoch (10 or 20 of 200) of
            some ten runs and averages over the runs.

    Returns:
        `(N,)` in [0, sqrt 2].

    Example:
        >>> mean_el2n(torch.tensor([[1.0, 0.5], [0.5, 0.5], [0.0, 0.0]]), epochs=[0, 1])
        tensor([0.7500, 0.5000])

    Source: Paul, Ganguli and Dziugaite, "Deep learning on a data diet", arXiv 2107.07075, section 2.
    """
    el2n = _checked("el2n", el2n)
    if epochs is None:
        return el2n.mean(0)
    chosen = list(epochs)
    if not chosen or not all(-len(el2n) <= epoch < len(el2n) for epoch in chosen):
        raise ValueError(f"epochs={chosen} must be one or more positions in the {len(el2n)} epochs recorded")
    return el2n[chosen].mean(0)


def aum(margins: Tensor) -> Tensor:
    """Area under the margin: `1/E sum_t (z_{t,y} - max_{c != y} z_{t,c})`. Low: hard; negative: perhaps mislabelled.

    Args:
        margins: `(E, N)`, margin per epoch and row.

    Returns:
        `(N,)`, of any sign.

    Example:
        >>> aum(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        tensor([ 2., -1.])

    Source: Pleiss, Zhang, Elenberg and Weinberger, "Identifying mislabeled data using the area under the margin
    ranking", arXiv 2001.10528, section 3.
    """
    return _checked("margins", margins).mean(0)


def forgetting(correct: Tensor) -> Tensor:
    """How often a row was right at one record and wrong at the next. High: hard.

    `sum_t [correct_{t-1} and not correct_t]`. A row that was never right was never forgotten either; it counts E, more
    than any other can reach, so that it ranks as the hardest, as in the authors' code.

    Args:
        correct: `(E, N)` bool, or 0 and 1.

    Returns:
        `(N,)` int64: `0 .. E // 2`, or E where never right.

    Example:
        >>> forgetting(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]))
        tensor([1, 2, 4])

    Source: Toneva et al., "An empirical study of example forgetting during deep neural network learning", arXiv
    1812.05159, section 3.
    """
    correct = _checked("correct", correct).bool()
    flips = (correct[:-1] & ~correct[1:]).sum(0)
    return torch.where(correct.any(0), flips, len(correct))


def dyn_unc(p_label: Tensor, window: int = 10) -> Tensor:
    """Dynamic uncertainty: how much the probability of the given label moves. Low: settled, be it right or wrong.

    The unbiased standard deviation within each window of J successive epochs, averaged over all `E - J + 1` windows:

        1/(E-J+1) sum_k sqrt( 1/(J-1) sum_{j<J} (p_{k+j} - mean_k)^2 )

    Args:
        p_label: `(E, N)`, probability of the given label per epoch and row.
        window: J; where there are fewer epochs, all of them are one window.

    Returns:
        `(N,)`, non-negative.

    Raises:
        ValueError: for fewer than two epochs.

    Example:
        >>> dyn_unc(torch.tensor([[0.0, 0.9], [1.0, 0.9], [1.0, 0.9]]), window=2)
        tensor([0.3536, 0.0000])

    Source: He, Yang, Huang and Zhao, "Large-scale dataset pruning with dynamic uncertainty", arXiv 2306.05175, section
    3. Their released code leaves out the last window and multiplies by ten.
    """
    p_label = _checked("p_label", p_label, least=2)
    if window < 2:
        raise ValueError(f"window={window}: a standard deviation needs two epochs or more")
    return p_label.unfold(0, min(window, len(p_label)), 1).std(-1).mean(0)


def dynamics_scores(
    folder: str | os.PathLike[str], *, el2n_epochs: Sequence[int] | None = None, window: int = 10
) -> dict[str, Tensor]:
    """Four difficulties of every row of a recorded run: all non-negative, all higher where a row is harder.

    So each can be given to a sampler as it is. EL2N, forgetting and dynamic uncertainty are so by definition. The area
    under the margin is turned round: `"aum"` is `max_j AUM_j - AUM_i`, how far a row's mean margin lies below the
    largest one, which keeps the order and the distances. `aum(load_dynamics(folder)["margin"])` is the paper's.

    Args:
        folder: the run's `output_dir`.
        el2n_epochs: numbers of the epochs that EL2N is averaged over; default: all that were recorded.
        window: of `dyn_unc`, in records.

    Returns:
        `"el2n"`, `"aum"`, `"forgetting"` and `"dyn_unc"`, each `(N,)` float32.

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
    }


def _checked(name: str, records: Tensor, least: int = 1) -> Tensor:
    records = torch.as_tensor(records)
    if records.ndim != 2 or len(records) < least:
        raise ValueError(
            f"{name} of shape {tuple(records.shape)} must have shape (epochs, rows) with {least} epochs or more"
        )
    if records.is_floating_point() and not records.isfinite().all():
        epoch, row = (~records.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name}[{epoch}, {row}] is {records[epoch, row]}: the recorded run had broken down by then")
    return records
