"""The sparse path of one training run: when each unit entered the support, and which units a budget keeps."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl.structure.groups.group import Group, Network
from hf_effdl.structure.optim.prox import unit_norm


FILE_NAME = "sparse_path.safetensors"
ORDERS = ("dual", "entry")
LOOKS = 5  # at a latency near the budget


@dataclass(frozen=True)
class Tie:
    """Groups whose sizes move together, because one number of a model's config sets them all.

    At `step` of `steps` each named group keeps `step * share` units, e.g. `{"stem": 4, "inner": 1}`. A free group is a
    tie of its own.
    """

    steps: int
    shares: Mapping[str, int]
    fields: Mapping[str, int] = field(
        default_factory=dict
    )  # config entry -> its value per step, e.g. "hidden_sizes.0"


@dataclass
class SparsePath:
    """Per unit of every lifted group: the step it entered and left the support, its threshold and norms at read-out.

    Args:
        groups: the groups of the model (`find_groups`).
        units: by name of every lifted group, tensors of shape `(units,)`: `"entered"` (int64, step of first entry, -1
            for never), `"left"` (int64, step of the last exit, -1 if inside or never in), `"threshold"`, `"dual"`
            (`||V||`) and `"weight"` (`||W||` over the lifted slices), float32.
        step: optimizer steps taken at read-out.
        ties: groups whose sizes one config number sets; empty for a model without such a config.
        curve: optional measured points, dicts such as `{"macs": 0.5, "accuracy": 0.98}`.

    Example:
        >>> path = SparsePath.from_optimizer(trainer.optimizer, trainer.groups)  # doctest: +SKIP
        >>> kept = path.select(macs=0.5)                                         # doctest: +SKIP
    """

    groups: Sequence[Group]
    units: dict[str, dict[str, Tensor]]
    step: int
    ties: Sequence[Tie] = ()
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def from_optimizer(
        cls, optimizer: torch.optim.Optimizer, groups: Sequence[Group], ties: Sequence[Tie] = ()
    ) -> "SparsePath":
        """Read the path from a `SplitLBI` (or a wrapper around it) that was given `groups`."""
        optimizer = unwrap(optimizer)
        units, step = {}, 0
        for group in optimizer.param_groups:
            if group["penalty"] != "group":
                continue
            state = optimizer.state[group["params"][0]]
            shape = (group["units"],)
            step = max(step, int(state["step"])) if "step" in state else step
            never = torch.full(shape, -1, dtype=torch.int64)
            lifted = [p.detach().float() for p in group["params"]]
            units[group["name"]] = {
                "entered": state.get("entered", never).cpu().clone(),
                "left": state.get("left", never).cpu().clone(),
                "threshold": state.get("threshold", torch.ones(shape)).cpu().float().clone(),
                "dual": state.get("norm", torch.zeros(shape)).cpu().float().clone(),
                "weight": unit_norm(lifted, group["axis"], group["block"], group["scale"]).cpu().float(),
            }
        missing = [group.name for group in groups if group.lifted and group.name not in units]
        if missing:
            raise ValueError(
                f"the optimizer does not lift group {missing[0]!r} ({len(missing)} in all are missing); it holds "
                f"{list(units)}. Build it from these groups with param_groups(model, groups)"
            )
        return cls(list(groups), units, step, list(ties))

    # ---- what is in

    @property
    def support(self) -> dict[str, Tensor]:
        """Boolean `(units,)` per lifted group: which units are in the support now."""
        return {name: unit["dual"] > unit["threshold"] for name, unit in self.units.items()}

    @property
    def entered(self) -> dict[str, Tensor]:
        """Step of first entry per unit, -1 for never."""
        return {name: unit["entered"] for name, unit in self.units.items()}

    def support_share(self) -> dict[str, float]:
        """Share of every lifted group's units in the support."""
        return {name: inside.float().mean().item() for name, inside in self.support.items()}

    # ---- who goes first

    def scores(self, order: str = "dual") -> dict[str, Tensor]:
        """A score per unit; the lowest goes first. Comparable over groups.

        Args:
            order: `"dual"`: `||V|| / threshold`, divided by its mean over the group. It orders units that entered and
                units that never did on one scale. `"entry"`: rank by (entry step, -||W||) inside the group, as in the
                authors' code, so that every group gives up the same share.
        """
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: it must be one of {ORDERS}")
        result = {}
        for name, unit in self.units.items():
            if order == "dual":
                score = unit["dual"] / unit["threshold"]
                result[name] = score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)
            else:
                entered = torch.where(unit["entered"] < 0, torch.iinfo(torch.int64).max, unit["entered"])
                by_norm = torch.argsort(unit["weight"], stable=True)
                ranking = by_norm[torch.argsort(entered[by_norm], descending=True, stable=True)]
                rank = torch.empty(len(ranking))
                rank[ranking] = torch.arange(1, len(ranking) + 1, dtype=torch.float32)
                result[name] = rank / len(ranking)
        return result

    def select(
        self,
        *,
        keep: float | None = None,
        params: float | None = None,
        macs: float | None = None,
        latency: float | None = None,
        order: str = "dual",
        widths: str = "stock",
        round_to: int | None = None,
        least: int = 2,
        measure: Callable[[dict[str, Tensor]], float] | None = None,
    ) -> dict[str, Tensor]:
        """The units that a budget keeps: ascending indices per group, for `slim(model, groups, kept)`.

        One list over all groups, ordered by score, is cut from its lower end until the budget holds; then, from the
        strongest of what was cut, units come back as long as the budget still holds.

        Args:
            keep: share of every group's units, in (0, 1].
            params: share of the parameters, in (0, 1].
            macs: share of the multiply-accumulates, in (0, 1].
            latency: share of the latency, in (0, 1]; needs `measure`.
            order: see `scores`.
            widths: `"stock"` moves groups together that one config number sizes (`ties`), so that the result is a
                stock config; `"free"` sizes every group alone.
            round_to: sizes are multiples of this (a group smaller than it stays whole). They round down, so that the
                budget is never exceeded; with `keep` they round up. Default: 1; with `latency`, which falls in steps
                of 8 or 16 channels, multiples of 16 (in small groups of 8, 4, 2 or 1), and others only where those
                leave more than 3 % of the budget unused.
            least: units that every group keeps at least, as long as the budget can be held that way; else 1.
            measure: from kept units to the ratio of their latency to the whole model's, as measured once; it is asked
                again near the budget, and the median counts.

        Raises:
            ValueError: for a budget outside (0, 1] or below what one unit per group costs.
        """
        if widths not in ("stock", "free"):
            raise ValueError(f"widths={widths!r}: it must be 'stock' or 'free'")
        budget, share = one_budget(keep=keep, params=params, macs=macs, latency=latency)
        if round_to is None and budget != "latency":
            round_to = 1
        if least < 1 or (round_to is not None and round_to < 1):
            raise ValueError(f"round_to={round_to} and least={least} must be at least 1")
        ties = self._ties(widths)
        scores = self.scores(order)
        order_of = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}

        def kept(sizes: Mapping[str, int]) -> dict[str, Tensor]:
            return {name: order_of[name][:size].sort().values for name, size in sizes.items()}

        if budget == "keep":
            return kept(sizes_for_share(ties, self._sizes(), share, round_to))
        removals = _removal_list(ties, scores, round_to, least)

        def sizes_at(steps: Mapping[int, int]) -> dict[str, int]:
            return {name: steps[i] * a for i, tie in enumerate(ties) for name, a in tie.shares.items()}

        if budget == "latency":
            if measure is None:
                raise ValueError("latency= needs measure=, a function that times the slim model; trainer.slim has one")
            limit = _Limit(lambda steps: measure(kept(sizes_at(steps))), share, looks=LOOKS)
        else:
            network = self.groups[0].network
            whole = network.count()[budget]
            limit = _Limit(lambda steps: network.count(self.groups, sizes_at(steps))[budget] / whole, share)
        lowest = _steps_after(removals, ties)
        if (least > 1 or round_to is None) and not limit.holds(lowest):
            removals += [(i, below) for i, below in _removal_list(ties, scores, round_to or 1, 1) if below < lowest[i]]
        smallest = _steps_after(removals, ties)
        if not any(limit.holds_again(smallest) for _ in range(3)):
            raise ValueError(
                f"{budget}={share} is below what the smallest sizes cost ({sizes_at(smallest)}), which is "
                f"{limit.cost(smallest):.4f} of the model; ask for at least that"
                + (f", or for a smaller round_to than {round_to}" if round_to is not None and round_to > 1 else "")
            )
        return kept(sizes_at(_largest_within(limit, removals, ties, round_to)))

    def _sizes(self) -> dict[str, int]:
        return {group.name: group.units for group in self.groups if group.name in self.units}

    def _ties(self, widths: str) -> list[Tie]:
        return complete_ties(self.ties if widths == "stock" else (), self._sizes())

    # ---- file

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `sparse_path.safetensors` into a folder, atomically; it loads without the model."""
        from safetensors.torch import save

        meta = {
            "step": self.step,
            "curve": self.curve,
            "groups": [group.to_dict() for group in self.groups],
            "shapes": self.groups[0].network.shapes,
            "uses": self.groups[0].network.uses,
            "ties": [[tie.steps, dict(tie.shares), dict(tie.fields)] for tie in self.ties],
        }
        tensors = {
            f"{name}|{key}": value.to(torch.int32 if value.dtype == torch.int64 else torch.float32).contiguous()
            for name, unit in self.units.items()
            for key, value in unit.items()
        }
        target = Path(folder) / FILE_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".tmp")
        try:
            part.write_bytes(save(tensors, metadata={"sparse_path": json.dumps(meta)}))
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SparsePath":
        """Read the path that `save` wrote into a folder (a checkpoint, or what was pulled from the Hub)."""
        from safetensors import safe_open

        file = Path(folder) / FILE_NAME
        if not file.is_file():
            raise FileNotFoundError(f"no {FILE_NAME} in {folder}: it stands beside each checkpoint of a SplitLBI run")
        units: dict[str, dict[str, Tensor]] = {}
        with safe_open(file, "pt") as stored:
            meta = json.loads(stored.metadata()["sparse_path"])
            for key in stored.keys():
                name, _, value = key.rpartition("|")
                tensor = stored.get_tensor(key)
                units.setdefault(name, {})[value] = tensor.long() if tensor.dtype == torch.int32 else tensor
        network = Network({name: tuple(shape) for name, shape in meta["shapes"].items()}, meta["uses"])
        groups = [Group.from_dict(values, network) for values in meta["groups"]]
        units = {group.name: units[group.name] for group in groups if group.name in units}
        return cls(groups, units, meta["step"], [Tie(*tie) for tie in meta["ties"]], meta["curve"])

    # ---- picture

    def plot(self, selected: Mapping[str, Tensor] | None = None, order: str = "dual") -> Any:
        """Units over steps per group, those selected in one colour, and accuracy against size where it was measured.

        Args:
            selected: kept units by group (`select`); default: the units in the support now.
            order: see `scores`; only sets which unit is drawn first.

        Returns:
            A matplotlib Figure; needs `pip install hf_effdl[plot]`.
        """
        from hf_effdl.structure.path.picture import plot_path

        return plot_path(self, selected, order)


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def one_budget(**budgets: float | None) -> tuple[str, float]:
    """The one budget that was given, checked to be a share in (0, 1]."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(budgets)}; got {given or 'none'}")
    [(name, share)] = given.items()
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"{name}={share!r}: a budget is a share of the whole model, in (0, 1]")
    return name, float(share)


def complete_ties(ties: Iterable[Tie], sizes: Mapping[str, int]) -> list[Tie]:
    """The given ties among the groups of `sizes`, and one tie of its own for every other group.

    A tie that names a group outside `sizes` (one that is not lifted, so has no order) stays at full size.
    """
    usable = [tie for tie in ties if all(name in sizes for name in tie.shares)]
    frozen = {name for tie in ties if tie not in usable for name in tie.shares}
    named = {name for tie in usable for name in tie.shares} | frozen
    return [*usable, *(Tie(size, {name: 1}) for name, size in sizes.items() if name not in named)]


class _Limit:
    """Whether sizes cost at most `limit`. With `looks` above 1 the cost is measured with noise: the median counts.

    What lies near the limit is looked at more often than what is plainly above or below.
    """

    def __init__(self, measure: Callable[[dict[int, int]], float], limit: float, looks: int = 1) -> None:
        self.measure, self.limit, self.looks = measure, limit, looks
        self.seen: dict[tuple[int, ...], list[float]] = {}

    def cost(self, steps: dict[int, int]) -> float:
        seen = self.seen.setdefault(tuple(steps.values()), [])
        while len(seen) < self._enough(seen):
            seen.append(self.measure(steps))
        return statistics.median(seen)

    def holds(self, steps: dict[int, int]) -> bool:
        return self.cost(steps) <= self.limit * (1 + 1e-9)

    def is_near(self, steps: dict[int, int]) -> bool:
        """So close below the limit that noise would hide what more units cost."""
        return self.looks > 1 and self.cost(steps) > 0.97 * self.limit

    def holds_again(self, steps: dict[int, int]) -> bool:
        """The same, by new measurements alone."""
        if self.looks > 1:
            self.seen.pop(tuple(steps.values()), None)
        return self.holds(steps)

    def _enough(self, seen: list[float]) -> int:
        gap = abs(statistics.median(seen) / self.limit - 1) if seen else 0.0
        spread = (max(seen) - min(seen)) / self.limit if len(seen) > 1 else 0.2
        if len(seen) == 1 and seen[0] > self.limit:
            return min(2, self.looks)  # a disturbance only ever makes it longer
        return max(1, len(seen)) if gap > spread else self.looks


def _steps_after(removals: Iterable[tuple[int, int]], ties: Sequence[Tie]) -> dict[int, int]:
    return {i: tie.steps for i, tie in enumerate(ties)} | dict(removals)


def _largest_within(
    limit: _Limit, removals: Sequence[tuple[int, int]], ties: Sequence[Tie], round_to: int | None
) -> dict[int, int]:
    """Steps of every tie after as few removals as the limit needs, and what comes back because it fits after all."""
    low, high = 0, len(removals)
    while low < high:
        middle = (low + high) // 2
        fits = limit.holds(_steps_after(removals[:middle], ties))
        low, high = (low, middle) if fits else (middle + 1, high)
    fitting = [_steps_after(removals[:low], ties)]

    def grow(i: int, steps: int) -> bool:
        larger = fitting[-1] | {i: steps}
        if fits := not limit.is_near(fitting[-1]) and limit.holds(larger):
            fitting.append(larger)
        return fits

    for _ in range(3):
        # the last removal can free far more than was needed (a channel of the first layer, say): what was removed last
        # comes back as long as it fits
        for i, below in reversed(removals[:low]):
            above = next(level for level in levels_of(ties[i], round_to) if level > below)
            if below <= fitting[-1][i] < above:
                grow(i, above)
        for i in dict.fromkeys(i for i, _ in reversed(removals[:low])) if round_to is None else ():
            above = next((level for level in levels_of(ties[i], None) if level > fitting[-1][i]), ties[i].steps)
            while above - fitting[-1][i] > 1 and not limit.is_near(fitting[-1]):
                middle = (fitting[-1][i] + above) // 2
                above = above if grow(i, middle) else middle
        # among many that nearly fit, noise favours one that does not: the last word have new measurements
        while not limit.holds_again(fitting[-1]) and (len(fitting) > 1 or low < len(removals)):
            fitting.pop()
            if not fitting:
                low += 1
                fitting.append(_steps_after(removals[:low], ties))
        if limit.looks == 1 or limit.cost(fitting[-1]) >= 0.95 * limit.limit:
            break
        limit.seen.clear()  # measurements may have been disturbed that said what came back does not fit
    return fitting[-1]


def _chunk(tie: Tie, round_to: int | None) -> int:
    """Steps of a tie that together change every one of its groups by a multiple of `round_to`.

    None: of the largest of 16, 8, 4, 2 and 1 that leaves the tie four sizes. Convolutions are computed in blocks of 8
    or 16 channels, so that sizes in between are no faster than the next multiple.
    """
    if round_to is None:
        return next((chunk for r in (16, 8, 4, 2) if 4 * (chunk := _chunk(tie, r)) <= tie.steps), 1)
    return math.lcm(*(round_to // math.gcd(round_to, share) for share in tie.shares.values()))


def levels_of(tie: Tie, round_to: int | None) -> list[int]:
    """Ascending: the steps a tie can have when every size is a multiple of `round_to`, or the whole."""
    return [*range(_chunk(tie, round_to), tie.steps, _chunk(tie, round_to)), tie.steps]


def sizes_for_share(ties: Sequence[Tie], sizes: Mapping[str, int], share: float, round_to: int) -> dict[str, int]:
    """Units per group for a share of every group, rounded up to `round_to` and to what the ties allow."""
    result = {}
    for tie in ties:
        chunk = _chunk(tie, round_to)
        # 1e-9: a share such as 0.3 of 10 units is 3 units, not 4
        steps = min(tie.steps, chunk * math.ceil(share * tie.steps / chunk - 1e-9))
        result |= {name: max(steps, 1) * a for name, a in tie.shares.items()}
    return result


def _removal_list(
    ties: Sequence[Tie], scores: Mapping[str, Tensor], round_to: int | None, least: int
) -> list[tuple[int, int]]:
    """All removals, weakest first, as (tie, steps it has afterwards)."""
    removals: list[tuple[float, int, int]] = []
    for i, tie in enumerate(ties):
        floor = min(tie.steps, max(math.ceil(least / share) for share in tie.shares.values()))
        levels = [level for level in levels_of(tie, round_to) if level >= floor]
        # double: means of equal scores must be equal, or the levels of a tie come out of order
        best_first = {name: torch.sort(scores[name].double(), descending=True).values for name in tie.shares}
        for below, level in zip(levels, levels[1:], strict=False):
            parts = [best_first[name][below * a : level * a].mean() for name, a in tie.shares.items()]
            removals.append((torch.stack(parts).mean().item(), i, below))
    # inside a tie the score falls with the level, so sorting by score keeps its levels in order; -below settles ties
    return [(i, below) for _, i, below in sorted(removals, key=lambda r: (r[0], r[1], -r[2]))]
