"""Evaluating the models that a path contains: the one projected on the support, and slim ones."""

import inspect
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

import numpy
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from hf_effdl.random_state import evaluating, random_state_kept
from hf_effdl.structure.calibration.batches import HELD_OUT
from hf_effdl.structure.groups.group import Group, Slice
from hf_effdl.structure.optim.prox import per_entry
from hf_effdl.structure.optim.sharding import local
from hf_effdl.structure.optim.split_lbi import SplitLBI


# what torch.compile and the activation checkpointing of FSDP2 put into the names of parameters
WRAPPERS = re.compile("_orig_mod[.]|_checkpoint_wrapped_module[.]")
NOT_MODEL_INPUTS = ("labels", "label", "weight")


@contextmanager
def projected(
    model: nn.Module, optimizer: SplitLBI, groups: Iterable[Group], support: Mapping[str, Tensor] | None = None
) -> Iterator[nn.Module]:
    """The model projected on the support, in place and for the length of a `with` block.

    Units outside the support are silent; weights lifted one at a time are zero where Gamma is. Parameters and buffers
    are put back afterwards. Of parameters that FSDP2 shards, every process changes its own part.

    Args:
        model: with the weights of the moment that the support is of.
        optimizer: a `SplitLBI` of that moment.
        groups: all groups of the model.
        support: of another moment than the optimizer's, see `SparsePath.support`.
    """
    # taking the state of an FSDP2 module also frees the whole tensors that its last forward pass left: what comes next
    # gathers the changed parts, in the block and again after it
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            _zero_single_weights(optimizer)
            outside = _units_outside(optimizer)
            if support is not None:
                outside = {name: ~support[name].to(units.device) for name, units in outside.items()}
            named = {WRAPPERS.sub("", name): p for name, p in model.named_parameters()}
            for group in groups:
                for part in group.silent_slices if group.name in outside else ():
                    p = named[part.tensor]
                    local(p).masked_fill_(per_entry(_entries_of(outside[group.name], p, part), p, part.axis, 1), 0)
        yield model
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(saved[name])


def _entries_of(units: Tensor, tensor: Tensor, part: Slice) -> Tensor:
    """Which entries along a slice's axis belong to some units, `(size of the axis,)` from `(units,)`, both bool."""
    entries = units.new_zeros(tensor.shape[part.axis])
    entries[part.entries(units.nonzero().flatten())] = True
    return entries


def _zero_single_weights(optimizer: SplitLBI) -> None:
    for group in optimizer.param_groups:
        for p in group["params"] if group["penalty"] == "l1" else ():
            local(p).masked_fill_(local(optimizer.gamma(p)) == 0, 0)


def _units_outside(optimizer: SplitLBI) -> dict[str, Tensor]:
    """Which units are not in the support, boolean by group; before the first step all of them."""
    outside = {}
    for group in optimizer.param_groups:
        if group["penalty"] == "group":
            first = group["params"][0]
            state = optimizer.state[first]
            everything = torch.ones(group["units"], dtype=torch.bool, device=first.device)
            outside[group["name"]] = ~(state["norm"] > state["threshold"]) if "norm" in state else everything
    return outside


# ---- Trainer's own evaluation


def loop_metrics(trainer: Trainer, dataloader: Any, **options: Any) -> dict[str, Any]:
    """Loss and metrics of a trainer's model by its own `evaluation_loop`, under their names without a prefix.

    Without `compute_metrics` the accuracy of a classifier is computed too.

    Args:
        trainer: any `Trainer`.
        dataloader: of `trainer.get_eval_dataloader`.
        options: `ignore_keys`, see `Trainer.evaluate`.
    """
    options = {"description": "Evaluation", "metric_key_prefix": "eval", **options}
    if trainer.compute_metrics is not None or trainer.args.prediction_loss_only:
        loss_only = True if trainer.compute_metrics is None else None
        return _without_prefix(trainer.evaluation_loop(dataloader, prediction_loss_only=loss_only, **options).metrics)
    args, preprocess = trainer.args, trainer.preprocess_logits_for_metrics
    include, by_batch = args.include_for_metrics, args.batch_eval_metrics
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = _accuracy, _is_right
    args.include_for_metrics, args.batch_eval_metrics = [], False
    try:
        metrics = trainer.evaluation_loop(dataloader, **options).metrics
    except Exception:  # noqa: BLE001 - outputs or labels that cannot be put together: Trainer takes the loss alone
        trainer.compute_metrics = None
        metrics = trainer.evaluation_loop(dataloader, prediction_loss_only=True, **options).metrics
    finally:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, preprocess
        args.include_for_metrics, args.batch_eval_metrics = include, by_batch
    return _without_prefix(metrics)


def _without_prefix(metrics: Mapping[str, Any]) -> dict[str, Any]:
    values = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    values.pop("model_preparation_time", None)
    return {name: values.pop(name) for name in ("loss",) if name in values} | values


def _is_right(logits: Any, labels: Any) -> Tensor:
    """Whether the class of each row is right; NaN where there are no classes."""
    logits = logits[0] if isinstance(logits, (tuple, list)) and len(logits) == 1 else logits
    if isinstance(logits, Tensor) and isinstance(labels, Tensor) and logits.ndim == 2 and labels.ndim == 1:
        if len(logits) == len(labels) and not labels.is_floating_point():
            return (logits.argmax(1) == labels).double()
    return torch.full((1,), float("nan"), dtype=torch.float64, device=_device_of(labels))


def _device_of(value: Any) -> torch.device | None:
    return value.device if isinstance(value, Tensor) else None


def _accuracy(answers: EvalPrediction) -> dict[str, float]:
    right = answers.predictions
    return {} if right.size == 0 or numpy.isnan(right).any() else {"accuracy": float(right.mean())}


@contextmanager
def evaluator(
    model: nn.Module,
    args: TrainingArguments | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
) -> Iterator[Trainer]:
    """A `Trainer` that only evaluates, for a model that another one may be training.

    Args:
        model: as the other one has prepared it.
        args: of the other one; default: plain ones on the model's device.
        compute_metrics, preprocess_logits_for_metrics: as in `Trainer`.
    """
    with tempfile.TemporaryDirectory() as folder, random_state_kept():
        if args is None:
            args = TrainingArguments(folder, report_to=[], use_cpu=next(model.parameters()).device.type == "cpu")
        args = copy(args)
        args.output_dir, args.push_to_hub, args.report_to, args.disable_tqdm = folder, False, [], True
        args.load_best_model_at_end, args.eval_strategy = False, "no"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                model,
                args,
                compute_metrics=compute_metrics,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        trainer.pop_callback(PrinterCallback)
        trainer.is_in_train = True  # so that the model keeps its precision
        trainer.accelerator.prepare_model = lambda model, **_: model  # it is prepared as far as it is to be
        yield trainer


def evaluate_model(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Loss and metrics of a model over an evaluation dataloader, over all processes if the dataloader is prepared.

    Returns:
        `{"loss": ..., **compute_metrics(...)}`; without `compute_metrics` and with class logits also `"accuracy"`.
    """
    with evaluating(model), evaluator(model, None, compute_metrics) as trainer:
        return loop_metrics(trainer, dataloader)


# ---- rows for a model


def rows_per_batch(dataloader: Any) -> int:
    """Of this process. A loader that Accelerate has prepared has no `batch_size`; its sampler knows."""
    sampler = getattr(dataloader, "batch_sampler", None)
    return getattr(dataloader, "batch_size", None) or getattr(sampler, "batch_size", None) or 1


def training_inputs(
    dataloader: Any, batches: int, model: nn.Module, labels: bool = False, share: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:
    """A few batches of training inputs, spread evenly over the data, the same on every process.

    Args:
        dataloader: of training.
        batches: how many.
        model: what it cannot do without stays; its device is that of the batches.
        labels: whether labels stay.
        share: a process's number and how many there are, to share the rows among them five at a time.
    """
    dataset, size = dataloader.dataset, rows_per_batch(dataloader)
    if isinstance(dataset, IterableDataset):
        rows: Any = list(islice(dataset, batches * size))
    else:
        count = min(len(dataset), batches * size)
        rows = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    mine = [i for i in range(len(rows)) if i // HELD_OUT % share[1] == share[0]]
    rows = Subset(rows, mine) if share[1] > 1 else rows
    device, unused = next(model.parameters()).device, {"weight"} if labels else _not_inputs(model)
    for batch in DataLoader(rows, batch_size=size, collate_fn=dataloader.collate_fn):
        yield send_to_device({k: v for k, v in batch.items() if k not in unused}, device)


def _not_inputs(model: nn.Module | None) -> set[str]:
    """Columns that a model is to go without; labels that it cannot do without are none of them."""
    needed: set[str] = set()
    if model is not None:
        parameters = inspect.signature(model.forward).parameters.items()
        needed = {name for name, p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return set(NOT_MODEL_INPUTS) - needed


def example_row(dataloader: Any, model: nn.Module | None = None, labels: bool = False) -> dict[str, Any]:
    """One training row as the model receives it.

    Args:
        dataloader: of training.
        model: labels that it cannot do without stay in the row.
        labels: whether all labels stay, for `find_groups`, which tries groups out with them.
    """
    dataset = dataloader.dataset
    with random_state_kept():  # the row may be augmented at random
        rows = iter(dataset) if isinstance(dataset, IterableDataset) else (dataset[i] for i in range(len(dataset)))
        batch = _collated(dataloader.collate_fn, rows)
    unused = {"weight"} if labels else _not_inputs(model)
    return {name: _first(value) for name, value in batch.items() if name not in unused}


def _collated(collate: Callable[[list], Any], rows: Iterator[Any]) -> Any:
    """A batch of one row; of two where a collator needs an even number."""
    first = [next(rows)]
    try:
        return collate(first)
    except Exception as error:  # noqa: BLE001 - a collator's own reasons
        try:
            return collate([*first, *islice(rows, 1)])
        except Exception:  # noqa: BLE001 - as above; the first error is the one to read
            raise ValueError(
                f"the data collator takes neither one row nor two ({type(error).__name__}: {error}), and an example "
                "row is needed to find groups; pass groups=find_groups(model, example)"
            ) from error


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.ndim else value


@contextmanager
def explain_half_precision(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Raise a clearer error where weights in half precision meet inputs in float32; None: inputs that may be so."""
    try:
        yield
    except RuntimeError as error:
        half = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
        given = {} if inputs is None else inputs
        floats = [name for name, value in given.items() if isinstance(value, Tensor) and value.dtype == torch.float32]
        if not (half and (floats or inputs is None) and "type" in str(error)):
            raise
        named = f" {floats}" if floats else ""
        raise ValueError(
            f"the model is in {half.pop()} and does not take its inputs{named} in torch.float32 ({error}): "
            "load it with dtype=torch.float32, and set bf16=True for mixed precision"
        ) from error
