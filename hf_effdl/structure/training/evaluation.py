"""Evaluating the models that a path contains: the one projected on the support, and slim ones."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers.trainer_utils import EvalPrediction

from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.group import PRODUCERS, Group
from hf_effdl.structure.groups.inputs import evaluating
from hf_effdl.structure.optim.prox import per_entry
from hf_effdl.structure.optim.sharding import local
from hf_effdl.structure.optim.split_lbi import SplitLBI


# what torch.compile and the activation checkpointing of FSDP2 put into the names of parameters
WRAPPERS = re.compile("_orig_mod[.]|_checkpoint_wrapped_module[.]")
NOT_MODEL_INPUTS = ("labels", "label", "weight")


@contextmanager
def projected(model: nn.Module, optimizer: SplitLBI, groups: Iterable[Group]) -> Iterator[nn.Module]:
    """The model projected on the support, in place and for the length of a `with` block.

    Units outside the support are silent; weights lifted one at a time are zero where Gamma is. Parameters and buffers
    are put back afterwards. Of parameters that FSDP2 shards, every process changes its own part.
    """
    # taking the state of an FSDP2 module also frees the whole tensors that its last forward pass left: what comes next
    # gathers the changed parts, in the block and again after it
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            _zero_single_weights(optimizer)
            outside = _units_outside(optimizer)
            named = {WRAPPERS.sub("", name): p for name, p in model.named_parameters()}
            for group in groups:
                for part in group.slices if group.name in outside else ():
                    if part.role in PRODUCERS:
                        p = named[part.tensor]
                        local(p).masked_fill_(per_entry(outside[group.name], p, part.axis, part.block), 0)
        yield model
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(saved[name])


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


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Loss and metrics of a model over an evaluation dataloader, over all processes if the dataloader is prepared.

    Returns:
        `{"loss": ..., **compute_metrics(...)}`; without `compute_metrics` and with class logits also `"accuracy"`.

    Raises:
        ValueError: if the batches have no `labels`, or the model's output no `loss` and `logits`.
    """
    device, accelerator = next(model.parameters()).device, Accelerator()
    losses, logits, labels = [], [], []
    with evaluating(model):
        for batch in dataloader:
            batch = send_to_device(dict(batch), device)
            batch.pop("weight", None)  # evaluation counts every row alike
            gathered = accelerator.gather_for_metrics(_answers(model, batch))
            for store, value in zip((losses, logits, labels), gathered, strict=True):
                store.append(value.cpu())
    metrics = {"loss": torch.cat(losses).mean().item()}
    return metrics | _scores(torch.cat(logits), torch.cat(labels), compute_metrics)


def _answers(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss by row, logits and labels of a batch."""
    if "labels" not in batch:
        raise ValueError(f"evaluating a model needs batches with 'labels'; these have {sorted(batch)}")
    output = model(**batch)
    if not isinstance(output, Mapping) or not {"loss", "logits"} <= output.keys():
        raise ValueError(f"{type(model).__name__} does not return 'loss' and 'logits', as transformers models do")
    return output["loss"].float().repeat(len(batch["labels"])), output["logits"], batch["labels"]


def _scores(
    logits: Tensor, labels: Tensor, compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None
) -> dict[str, float]:
    if compute_metrics is not None:
        scores = compute_metrics(EvalPrediction(predictions=logits.float().numpy(), label_ids=labels.numpy()))
        return {name: float(value) for name, value in scores.items()}
    if logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
        return {"accuracy": (logits.argmax(1) == labels).double().mean().item()}
    return {}


def training_inputs(dataloader: Any, batches: int, model: nn.Module) -> Iterator[dict[str, Any]]:
    """A few batches of training inputs without labels, spread evenly over the data, the same on every process."""
    dataset, size = dataloader.dataset, getattr(dataloader, "batch_size", None) or 1
    if isinstance(dataset, IterableDataset):
        rows: Any = list(islice(dataset, batches * size))
    else:
        count = min(len(dataset), batches * size)
        rows = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    device = next(model.parameters()).device
    for batch in DataLoader(rows, batch_size=size, collate_fn=dataloader.collate_fn):
        yield send_to_device({k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS}, device)


def example_row(dataloader: Any) -> dict[str, Any]:
    """One training row as the model receives it, without its label."""
    dataset = dataloader.dataset
    with random_state_kept():  # the row may be augmented at random
        row = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]
        batch = dataloader.collate_fn([row])
    return {k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS}
