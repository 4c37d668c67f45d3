"""Tensors as a data set that `Trainer` reads in whole batches, and nets as it calls them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


class Rows(Dataset):
    """Images and labels in memory; a batch is one index into them, not many rows put together again."""

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor, Any], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        images = self.images[indices]
        return [
            {
                "pixel_values": images if self.augment is None else self.augment(images, None),
                "labels": self.labels[indices],
            }
        ]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch as `Rows` gives it, or rows of which one is to be made."""
    if rows[0]["pixel_values"].ndim == 4:
        return rows[0]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Classifier(nn.Module):
    """A net with the loss of a classifier, as `Trainer` wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return loss | {"logits": logits}
