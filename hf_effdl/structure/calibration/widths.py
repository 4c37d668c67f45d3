"""Widths that differ from layer to layer: more goes where the model's outputs miss it least."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass


STEPS = 64  # that a group loses its units in


@dataclass(frozen=True)
class Loss:
    """What cutting one group alone does to the model's outputs, `error * (share / near) ** power`.

    Args:
        units: of the group.
        near: share of the units that goes in the first of two measurements.
        far: the same in the second; more never goes, since nothing is known beyond.
        error: of the outputs, `near` of the units gone.
        power: how fast the error grows, at least 1: by the two measurements.
        cost: of one unit, in multiply-accumulates, say.
    """

    units: int
    near: float
    far: float
    error: float
    power: float
    cost: float = 1.0

    @classmethod
    def of(cls, units: int, near: float, far: float, errors: tuple[float, float], cost: float = 1.0) -> "Loss":
        """From the errors with `near` and with `far` of the units gone."""
        first, second = (max(error, 1e-12) for error in errors)
        power = math.log(max(second / first, 1.0)) / math.log(far / near) if far > near else 1.0
        return cls(units, near, far, first, max(1.0, power), cost)

    def at(self, gone: int) -> float:
        """The error with so many units gone."""
        return self.error * (gone / self.units / self.near) ** self.power


def divide(losses: Mapping[str, Loss], budget: float, round_to: int = 1) -> dict[str, int]:
    """How many units stay in every group, so that the sum of the errors is least where `budget` is cut.

    `min sum_g error_g(gone_g)` subject to `sum_g cost_g gone_g >= budget`: one step of a group after the other goes,
    the one that costs the least error for what it saves. Since errors grow ever faster that is the least sum, up to
    the size of a step. Errors of layers far apart have nothing to do with each other, so that their squares add up.

    Args:
        losses: by group.
        budget: what the units that go cost together.
        round_to: sizes are multiples of that, where the group's own number is.

    Returns:
        Sizes by group; where no more may go the budget is not reached.

    Example:
        >>> flat, steep = (Loss(64, 0.25, 0.5, error, 1.5) for error in (1.0, 2.0))
        >>> divide({"flat": flat, "steep": steep}, budget=32)
        {'flat': 38, 'steep': 58}
    """
    steps = {name: _step(loss.units, round_to) for name, loss in losses.items()}
    gone = dict.fromkeys(losses, 0)
    queue: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        loss, after = losses[name], gone[name] + steps[name]
        if after <= loss.far * loss.units + 1e-9:
            price = (loss.at(after) - loss.at(gone[name])) / (loss.cost * steps[name])
            heapq.heappush(queue, (price, name))

    for name in losses:
        offer(name)
    left = budget
    while queue and left > 1e-9 * budget:
        _, name = heapq.heappop(queue)
        gone[name] += steps[name]
        left -= losses[name].cost * steps[name]
        offer(name)
    return {name: loss.units - gone[name] for name, loss in losses.items()}


def _step(units: int, round_to: int) -> int:
    """Units that go at once: a multiple of `round_to`, about `STEPS` of them in a group."""
    return max(1, units // STEPS // round_to) * round_to
