"""When a selection of units has stopped changing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass
class Settling:
    """The last selections of a run, and whether they have settled.

    The distance between two selections is the share of all units in which they differ. They have settled when the
    largest distance among the last `window` selections was below `threshold` at `patience` looks in a row, and at
    least `min_path` of the path lies behind. With the empty selection nothing settles.

    Args:
        threshold, window, patience, min_path: see above.
        looks: one row per look: `{"step", "path", "change", "distance"}`, see `Ticket`.
        recent: the last selections, packed, the newest one last.

    Example:
        >>> settling = Settling(threshold=0.3, window=2, patience=1, min_path=0.0)
        >>> selections = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
        >>> [settling.note(step, 0.1 * step, pack(selection)) for step, selection in enumerate(selections)]
        [False, True, True]
    """

    threshold: float
    window: int
    patience: int
    min_path: float
    looks: list[dict[str, Any]] = field(default_factory=list)
    recent: list[str] = field(default_factory=list)

    def note(self, step: int, path: float, selection: str) -> bool:
        """Note a selection (`pack`) at a path time; whether it has settled."""
        self.recent = [*self.recent[1 - self.window :], selection]
        seen = [unpack(text) for text in self.recent]
        change = float((seen[-1] != seen[-2]).mean()) if len(seen) > 1 else None
        self.looks.append({"step": step, "path": path, "change": change, "distance": self._distance(seen)})
        last = [look["distance"] for look in self.looks[-self.patience :]]
        quiet = len(last) == self.patience and all(d is not None and d < self.threshold for d in last)
        return quiet and path >= self.min_path - 1e-9

    def _distance(self, seen: Sequence[numpy.ndarray]) -> float | None:
        """The largest distance between two selections; None while they are too few, or one is empty."""
        if len(seen) < self.window or not all(inside.any() for inside in seen):
            return None
        return max(float((a != b).mean()) for a, b in combinations(seen, 2))

    @property
    def selection(self) -> Tensor:
        """The newest selection, boolean `(units,)`."""
        return torch.from_numpy(unpack(self.recent[-1]))


def pack(inside: Tensor) -> str:
    """A boolean vector as a short text."""
    return f"{len(inside)}:{numpy.packbits(inside.numpy()).tobytes().hex()}"


def unpack(text: str) -> numpy.ndarray:
    """The boolean vector in a text of `pack`."""
    count, _, bits = text.partition(":")
    if not count.isdecimal() or len(bits) != 2 * -(-int(count) // 8):
        raise ValueError(f"{text[:40]!r} is no packed selection: the checkpoint is damaged, go on from an earlier one")
    return numpy.unpackbits(numpy.frombuffer(bytes.fromhex(bits), numpy.uint8), count=int(count)).astype(bool)
