"""The layers that read the units of one group, as they were, and with other weights in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_effdl.structure.calibration.consumer import Consumer, consumer_of
from hf_effdl.structure.calibration.grams import Gram
from hf_effdl.structure.calibration.refit import refit
from hf_effdl.structure.groups.group import Group


Weights = list[tuple[Tensor, Tensor | None]]  # matrix and bias of every reader


@dataclass(frozen=True, eq=False)
class Readers:
    """All consumers of a group.

    Args:
        consumers: layers of the model that is worked on.
        original: their weights before anything changed.
    """

    consumers: Sequence[Consumer]
    original: Weights

    @classmethod
    def of(cls, model: nn.Module, group: Group) -> "Readers":
        consumers = [consumer_of(model, part, group.units) for part in group.slices if part.role == "input"]
        return cls(consumers, [(consumer.matrix.clone(), consumer.bias) for consumer in consumers])

    def write(self, weights: Weights) -> None:
        """Put weights into the layers."""
        for consumer, (matrix, bias) in zip(self.consumers, weights, strict=True):
            consumer.write(matrix, bias)

    def kept_columns(self, kept: Tensor) -> list[Tensor]:
        """Ascending columns of every matrix that are left when only some units are."""
        return [consumer.kept_columns(kept) for consumer in self.consumers]

    def without(self, kept: Tensor) -> Weights:
        """The weights as they were, with zeros where units are gone: what cutting does."""
        result = []
        for (matrix, bias), columns in zip(self.original, self.kept_columns(kept), strict=True):
            zeroed = torch.zeros_like(matrix)
            zeroed[:, columns] = matrix[:, columns]
            result.append((zeroed, bias))
        return result

    def refitted(self, grams: Sequence[Gram], kept: Tensor, ridge: float, intercept: bool) -> Weights:
        """The weights that do without by least squares; see `refit`. A layer that nothing reached is as `without`."""
        result = self.without(kept)
        for place, (gram, columns) in enumerate(zip(grams, self.kept_columns(kept), strict=True)):
            if gram.positions:
                matrix, bias = self.original[place]
                fitted, shift = refit(gram, columns, ridge, intercept and bias is not None, matrix)
                result[place] = fitted, bias if shift is None else bias + shift.to(bias)
        return result

    def error(self, grams: Sequence[Gram], weights: Weights) -> float:
        """Mean relative error of what the readers would say with some weights; of those that a row reaches."""
        errors = []
        for gram, (matrix, bias), (_, before) in zip(grams, weights, self.original, strict=True):
            if gram.positions:
                errors.append(gram.error(matrix, None if bias is None else bias - before))
        return sum(errors) / max(len(errors), 1)
