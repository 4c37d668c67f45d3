"""When a selection of units has stopped changing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor


# What lies ahead is often more than the pace so far says. Set on searches of other seeds than `tickets_settling.py`
# reports.
MARGIN = 2.0


@dataclass
class Settling:
    """The last selections of a run, and whether they have settled.

    The distance between two selections is the share of all units in which they differ. At path time t (1 is the end)
    d is the largest distance between the newest selection and those since t / 2, and at least the last `window`, the
    oldest of them at t_0. What is still to change is forecast as if it went on at that pace, with a margin of two:

        ahead = 2 d (1 - t) / (t - t_0),        0 at the end of the path

    The selections have settled when this was below `threshold` at `patience` looks in a row, and at least `min_path`
    of the path lies behind. With an empty selection nothing settles. How often one looks matters little, since the
    stretch that is compared is a part of the path and not a number of looks.

    Args:
        threshold, window, patience, min_path: see above.
        looks: one row per look: `{"step", "path", "change", "distance", "ahead"}`, see `Ticket`.
        recent: the selections to compare with, packed, the newest one last.

    Example:
        >>> settling = Settling(threshold=0.3, window=2, patience=1, min_path=0.0)
        >>> selections = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
        >>> [settling.note(step, 0.1 * step, pack(selection)) for step, selection in enumerate(selections)]
        [False, False, True]
    """

    threshold: float
    window: int
    patience: int
    min_path: float
    looks: list[dict[str, Any]] = field(default_factory=list)
    recent: list[str] = field(default_factory=list)

    def note(self, step: int, path: float, selection: str) -> bool:
        """Note a selection (`pack`) at a path time; whether it has settled."""
        self.looks.append({"step": step, "path": path})
        later_half = sum(look["path"] >= path / 2 for look in self.looks)
        self.recent = [*self.recent, selection][-max(later_half, self.window) :]
        seen = [unpack(text) for text in self.recent]
        change = float((seen[-1] != seen[-2]).mean()) if len(seen) > 1 else None
        distance = self._distance(seen)
        ahead = self._ahead(distance, path, self.looks[-len(seen)]["path"])
        self.looks[-1] |= {"change": change, "distance": distance, "ahead": ahead}
        # a checkpoint of an earlier release has looks without a forecast
        last = [look.get("ahead") for look in self.looks[-self.patience :]]
        quiet = len(last) == self.patience and all(share is not None and share < self.threshold for share in last)
        return quiet and path >= self.min_path - 1e-9

    def _distance(self, seen: Sequence[numpy.ndarray]) -> float | None:
        """The largest distance of the newest selection to others; None while they are too few, or one is empty."""
        if len(seen) < self.window or not all(inside.any() for inside in seen):
            return None
        return max(float((seen[-1] != other).mean()) for other in seen[:-1])

    @staticmethod
    def _ahead(distance: float | None, path: float, since: float) -> float | None:
        """Share of the units that may change until the path ends; None where there is nothing to tell it by."""
        if distance is None or path <= since:
            return None
        return MARGIN * distance * max(1 - path, 0.0) / (path - since)

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
