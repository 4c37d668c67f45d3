"""Sizes that hold a budget: cut down along a list, as little as that needs, and given back what fits after all."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_effdl.checks import real_number
from hf_effdl.structure.groups.ties import Tie, levels_of, sizes_for_share


Sizes = Mapping[str, int]  # units by group
Steps = dict[int, int]  # of every tie, by its position


def one_budget(**budgets: float | None) -> tuple[str, float]:
    """The one budget that was given, checked to be a share in (0, 1]."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(budgets)}; got {given or 'none'}")
    [(name, share)] = given.items()
    try:
        number = real_number(name, share)
    except ValueError:
        number = float("nan")
    if not 0 < number <= 1:
        raise ValueError(f"{name}={share!r}: a budget is a share of the whole model, in (0, 1]")
    return name, number


def sizes_at(ties: Sequence[Tie], steps: Steps) -> dict[str, int]:
    """Units by group where every tie is at its step."""
    return {name: steps[i] * share for i, tie in enumerate(ties) for name, share in tie.shares.items()}


class Limit:
    """What sizes may cost. With `looks` above 1 the cost is measured with noise: the median counts.

    What lies near the limit is looked at more often than what is plainly above or below.

    Args:
        name: of the budget, for messages.
        limit: the highest cost that holds.
        measure: the cost of sizes.
        looks: at sizes whose cost is near the limit.
    """

    def __init__(self, name: str, limit: float, measure: Callable[[Sizes], float], looks: int = 1) -> None:
        self.name, self.limit, self.measure, self.looks = name, limit, measure, looks
        self.seen: dict[frozenset[tuple[str, int]], list[float]] = {}

    def cost(self, sizes: Sizes) -> float:
        seen = self.seen.setdefault(frozenset(sizes.items()), [])
        while len(seen) < self._enough(seen):
            seen.append(self.measure(sizes))
        return statistics.median(seen)

    def holds(self, sizes: Sizes) -> bool:
        return self.cost(sizes) <= self.limit * (1 + 1e-9)

    def is_near(self, sizes: Sizes) -> bool:
        """So close below the limit that noise would hide what more units cost."""
        return self.looks > 1 and self.cost(sizes) > 0.97 * self.limit

    def holds_again(self, sizes: Sizes) -> bool:
        """The same, by new measurements alone."""
        if self.looks > 1:
            self.seen.pop(frozenset(sizes.items()), None)
        return self.holds(sizes)

    def _enough(self, seen: Sequence[float]) -> int:
        gap = abs(statistics.median(seen) / self.limit - 1) if seen else 0.0
        spread = (max(seen) - min(seen)) / self.limit if len(seen) > 1 else 0.2
        if len(seen) == 1 and seen[0] > self.limit:
            return min(2, self.looks)  # a disturbance only ever makes it longer
        return max(1, len(seen)) if gap > spread else self.looks


class Cut:
    """Sizes on their way under a limit: cuts are made from the weak end of a list, then what fits comes back.

    Args:
        ties: at full size before the first cut.
        cuts: the weakest first; each holds the steps that some ties, by position, have afterwards.
        limit: what the sizes may cost.
        allowed: which sizes may be chosen; default: all.
    """

    def __init__(
        self,
        ties: Sequence[Tie],
        cuts: list[Steps],
        limit: Limit,
        allowed: Callable[[dict[str, int]], bool] | None = None,
    ) -> None:
        self.ties, self.cuts, self.limit, self.allowed = ties, cuts, limit, allowed
        self.made = 0  # cuts
        self.held: list[Steps] = []  # steps that hold, each a little more than the one before

    @property
    def steps(self) -> Steps:
        """The steps of every tie by now."""
        return self.held[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Units by group by now."""
        return self._sizes(self.steps)

    def _sizes(self, steps: Steps) -> dict[str, int]:
        return sizes_at(self.ties, steps)

    def after(self, count: int) -> Steps:
        """The steps of every tie after so many cuts."""
        steps = {i: tie.steps for i, tie in enumerate(self.ties)}
        for cut in self.cuts[:count]:
            steps |= cut
        return steps

    def drop(self) -> bool:
        """Make as few cuts as the limit needs, and more where those sizes are not allowed; whether any are."""
        low, high = 0, len(self.cuts)
        while low < high:
            middle = (low + high) // 2
            fits = self.limit.holds(self._sizes(self.after(middle)))
            low, high = (low, middle) if fits else (middle + 1, high)
        return self._stop(low)

    def _stop(self, count: int) -> bool:
        """Stop after so many cuts, or at the first later one whose sizes are allowed; whether there is one."""
        end = len(self.cuts)
        places = range(count, end + 1)
        if self.allowed is not None:
            places = (place for place in places if self.allowed(self._sizes(self.after(place))))
        place = next(iter(places), None)
        self.made = end if place is None else place
        self.held = [self.after(self.made)]
        return place is not None

    def give_back(self, i: int, steps: int) -> bool:
        """Bring a tie up to so many steps, if that still holds and is allowed; whether it is."""
        sizes = self._sizes(self.steps | {i: steps})
        fits = not self.limit.is_near(self.sizes) and self.limit.holds(sizes)
        if fits := fits and (self.allowed is None or self.allowed(sizes)):
            self.held.append(self.steps | {i: steps})
        return fits

    def give_back_levels(self, round_to: int | None) -> None:
        """What was cut last comes back as long as it fits.

        The last cut can free far more than was needed: a channel of the first layer, say.
        """
        cut = [(i, below) for cut in reversed(self.cuts[: self.made]) for i, below in cut.items()]
        for i, below in cut:
            above = next(level for level in levels_of(self.ties[i], round_to) if level > below)
            if below <= self.steps[i] < above:
                self.give_back(i, above)
        for i in dict.fromkeys(i for i, _ in cut) if round_to is None else ():
            self._give_back_between(i)

    def _give_back_between(self, i: int) -> None:
        """Steps between two levels, found by halving."""
        levels = levels_of(self.ties[i], None)
        above = next((level for level in levels if level > self.steps[i]), self.ties[i].steps)
        while above - self.steps[i] > 1 and not self.limit.is_near(self.sizes):
            middle = (self.steps[i] + above) // 2
            above = above if self.give_back(i, middle) else middle

    def confirm(self) -> None:
        """Go back to what also holds by new measurements.

        Among many sizes that nearly fit, noise favours some that do not.
        """
        while not self.limit.holds_again(self.sizes) and (len(self.held) > 1 or self.made < len(self.cuts)):
            if len(self.held) > 1:
                self.held.pop()
            else:
                self._stop(self.made + 1)


def largest_within(
    limit: Limit,
    ties: Sequence[Tie],
    scores: Mapping[str, Tensor],
    round_to: int | None,
    least: int,
    allowed: Callable[[dict[str, int]], bool] | None = None,
) -> dict[str, int]:
    """Units by group that hold a limit, the weakest units cut first; see `SparsePath.select`."""
    free = Cut(ties, cut_list(ties, scores, round_to, least), limit)
    lowest = free.after(len(free.cuts))
    if (least > 1 or round_to is None) and not limit.holds(sizes_at(ties, lowest)):
        more = cut_list(ties, scores, round_to or 1, 1)
        free.cuts += [cut for cut in more for i, below in cut.items() if below < lowest[i]]
    _check_smallest(limit, sizes_at(ties, free.after(len(free.cuts))), round_to)
    free.drop()
    sizes = _give_back(free, round_to)
    if allowed is None or allowed(sizes):
        return sizes
    strict = Cut(ties, free.cuts, limit, allowed)
    return _give_back(strict, round_to) if strict.drop() else sizes


def _check_smallest(limit: Limit, sizes: Sizes, round_to: int | None) -> None:
    if not any(limit.holds_again(sizes) for _ in range(3)):
        raise ValueError(
            f"{limit.name}={limit.limit} is below what the smallest sizes cost ({sizes}), which is "
            f"{limit.cost(sizes):.4f} of the model; ask for at least that"
            + (f", or for a smaller round_to than {round_to}" if round_to is not None and round_to > 1 else "")
        )


def _give_back(cut: Cut, round_to: int | None) -> dict[str, int]:
    for _ in range(3):
        cut.give_back_levels(round_to)
        cut.confirm()
        if cut.limit.looks == 1 or cut.limit.cost(cut.sizes) >= 0.95 * cut.limit.limit:
            break
        cut.limit.seen.clear()  # measurements may have been disturbed that said what came back does not fit
    return cut.sizes


def largest_share(
    ties: Sequence[Tie],
    units: Sizes,
    share: float,
    round_to: int,
    allowed: Callable[[dict[str, int]], bool] | None = None,
) -> dict[str, int]:
    """Units by group for a share of every group, or for the largest share below it whose sizes are allowed."""
    sizes = sizes_for_share(ties, units, share, round_to)
    if allowed is None or allowed(sizes):
        return sizes
    lower = sorted({step / tie.steps for tie in ties for step in range(1, tie.steps)}, reverse=True)
    smaller = (sizes_for_share(ties, units, other, round_to) for other in lower if other < share)
    return next(filter(allowed, smaller), sizes)


def cut_list(ties: Sequence[Tie], scores: Mapping[str, Tensor], round_to: int | None, least: int) -> list[Steps]:
    """All cuts, weakest first; each holds the steps that one tie has afterwards."""
    cuts: list[tuple[float, int, int]] = []
    for i, tie in enumerate(ties):
        floor = min(tie.steps, max(math.ceil(least / share) for share in tie.shares.values()))
        levels = [level for level in levels_of(tie, round_to) if level >= floor]
        # double: means of equal scores must be equal, or the levels of a tie come out of order
        best_first = {name: torch.sort(scores[name].double(), descending=True).values for name in tie.shares}
        for below, level in pairwise(levels):
            parts = [best_first[name][below * a : level * a].mean() for name, a in tie.shares.items()]
            cuts.append((torch.stack(parts).mean().item(), i, below))
    # inside a tie the score falls with the level, so sorting by score keeps its levels in order; -below settles ties
    return [{i: below} for _, i, below in sorted(cuts, key=lambda cut: (cut[0], cut[1], -cut[2]))]
