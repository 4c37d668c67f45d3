"""Batch statistics for a model that has changed."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.random_state import evaluating
from hf_effdl.structure.groups.group import check_module
from hf_effdl.structure.groups.inputs import call


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Re-estimate the running statistics of every batch norm as plain averages over some batches, in place.

    The statistics of a dense model do not fit the model that is left when units go. Nothing else changes: weights,
    mode and the norms' momentum stay.

    Args:
        model: returned.
        batches: inputs, each a tensor, tuple or dict that the model accepts.

    Raises:
        ValueError: for no batches; the statistics are then as they were.
    """
    check_module(model, "recalibrate_batch_norm")
    if isinstance(batches, str | bytes | Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}: pass a list of inputs as the model takes them")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError(
            "recalibrate_batch_norm got no batches, so there are no statistics to take; pass at least one"
        )
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for a plain average
            norm.train()
        try:
            for batch in chain([first], batches):
                if not isinstance(batch, (torch.Tensor, Mapping, tuple, list)):
                    raise TypeError(f"a batch must be a tensor, tuple or dict, not {type(batch).__name__}")
                call(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return model
