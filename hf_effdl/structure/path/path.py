"""The sparse path of one training run: when each unit entered the support, and which units a budget keeps."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl.checks import one_of, whole_number
from hf_effdl.files import write_whole
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.record import groups_record
from hf_effdl.structure.groups.ties import BY_SIZE, Tie, complete_ties
from hf_effdl.structure.optim.prox import unit_norm
from hf_effdl.structure.optim.split_lbi import SplitLBI, unwrap
from hf_effdl.structure.path.budget import Limit, largest_share, largest_within, one_budget
from hf_effdl.structure.path.file import pack_path, unpack_path
from hf_effdl.structure.path.picture import plot_path


logger = logging.getLogger(__name__)

FILE_NAME = "sparse_path.safetensors"
ORDERS = ("dual", "entry", "even")
WIDTHS = ("stock", "free")
LOOKS = 5  # at a latency near the budget


@dataclass
class SparsePath:
    """Per unit of every lifted group: the step it entered and left the support, its threshold and norms at read-out.

    Args:
        groups: the groups of the model (`find_groups`).
        units: by name of every lifted group, tensors of shape `(units,)`: `"entered"` (int64, step of first entry, -1
            for never), `"left"` (int64, step of the last exit, -1 if inside or never in), `"threshold"`, `"dual"`
            (`||V||`) and `"weight"` (`||W||` over the lifted slices), float32; with AdamW also `"gradient"`, the root
            mean square of the gradient's entries over the last steps, by AdamW's second moment.
        step: optimizer steps taken at read-out.
        ties: groups whose sizes one config number sets; empty for a model without such a config.
        start: `"empty"`, or `"dense"`: units were in from the start (entered at step 0), and the order is that of
            their exits, reversed.
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
    start: str = "empty"

    @classmethod
    @torch.no_grad()
    def from_optimizer(
        cls, optimizer: torch.optim.Optimizer, groups: Sequence[Group], ties: Sequence[Tie] = ()
    ) -> "SparsePath":
        """Read the path from a `SplitLBI` (or a wrapper around it) that was given `groups`."""
        optimizer = unwrap(optimizer)
        if not isinstance(optimizer, SplitLBI):
            raise TypeError(f"a path is read from a SplitLBI optimizer, not {type(optimizer).__name__}")
        units, step, start = {}, 0, "empty"
        for group in optimizer.param_groups:
            if group["penalty"] != "group":
                continue
            start = group["start"]
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
            squares = [optimizer.state[p].get("exp_avg_sq") for p in group["params"]]
            if all(square is not None for square in squares):
                units[group["name"]]["gradient"] = _rms(squares, group)
        missing = [group.name for group in groups if group.lifted and group.name not in units]
        if missing:
            raise ValueError(
                f"the optimizer does not lift group {missing[0]!r} ({len(missing)} in all are missing); it holds "
                f"{list(units)}. Build it from these groups with param_groups(model, groups)"
            )
        return cls(list(groups), units, step, list(ties), start=start)

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

    def scores(self, order: str = "dual", relative: bool = True) -> dict[str, Tensor]:
        """A score per unit; the lowest goes first. Comparable over groups.

        Args:
            relative: whether `"dual"` scores are divided by their mean over the group; without, a group may have
                nothing but strong units.
            order: `"dual"`: `||V|| / threshold`, divided by its mean over the group. It orders units that entered and
                units that never did on one scale; with a dense start it is the share of the run that a unit stayed
                for, at most 1, where it left. `"entry"`: rank by (entry step, -||W||) inside the group, as in the
                authors' code, so that every group gives up the same share; with a dense start by exit instead.
                `"even"`: units by `"dual"`, and how many of each group halfway to the same share: the mean of a
                unit's place among all and its place in its group, each in (0, 1].
        """
        one_of("order", order, ORDERS)
        if order == "even":
            return _halfway(self.scores("dual"))
        result = {}
        for name, unit in self.units.items():
            if order == "dual" or self.start == "dense":
                score = self._survival(unit) if self.start == "dense" else unit["dual"] / unit["threshold"]
            if order == "dual":
                mean = score.mean().clamp_min(torch.finfo(score.dtype).tiny)
                result[name] = score / mean if relative else score
            else:
                entered = torch.where(unit["entered"] < 0, torch.iinfo(torch.int64).max, unit["entered"])
                entered = entered if self.start == "empty" else -score
                by_norm = torch.argsort(unit["weight"], stable=True)
                ranking = by_norm[torch.argsort(entered[by_norm], descending=True, stable=True)]
                rank = torch.empty(len(ranking))
                rank[ranking] = torch.arange(1, len(ranking) + 1, dtype=torch.float32)
                result[name] = rank / len(ranking)
        return result

    def _survival(self, unit: Mapping[str, Tensor]) -> Tensor:
        """Of a dense start: above 1 for units inside, `||V|| / threshold`; below it, by exit, for others."""
        inside = unit["dual"] > unit["threshold"]
        ratio = unit["dual"] / torch.where(unit["threshold"] > 0, unit["threshold"], 1)  # it has not risen: by ||V||
        left = (unit["left"].clamp_min(1) - 1 + ratio) / max(self.step, 1)
        return torch.where(inside, ratio, left)

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
        allowed: Callable[[dict[str, int]], bool] | None = None,
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
            widths: `"stock"` moves groups together that one config number sizes (`ties`), and leaves others whole, so
                that the result is a stock config; without ties, and with `"free"`, every group is sized alone.
            round_to: sizes are multiples of this (a group smaller than it stays whole). They round down, so that the
                budget is never exceeded; with `keep` they round up. Default: 16 where a config number says at least
                1024 units, as those of a transformer's FFNs, else 1; with `latency`, which falls in steps
                of 8 or 16 channels, multiples of 16 (in small groups of 8, 4, 2 or 1), and others only where those
                leave more than 3 % of the budget unused.
            least: units that every group keeps at least, as long as the budget can be held that way; else 1.
            measure: from kept units to the ratio of their latency to the whole model's, as measured once; it is asked
                again near the budget, and the median counts.
            allowed: which units per lifted group may be chosen, such as sizes that the stock class builds; those that
                hold the budget best among them are. Where none are, the sizes are what they are without it.

        Raises:
            ValueError: for a budget outside (0, 1] or below what one unit per group costs.
        """
        if type(widths) is not str or widths not in WIDTHS:
            raise ValueError(f"widths={widths!r}: it must be 'stock' or 'free'")
        budget, share = one_budget(keep=keep, params=params, macs=macs, latency=latency)
        try:
            sizes = [None if size is None else whole_number("size", size, 1) for size in (round_to, least)]
        except ValueError:
            raise ValueError(f"round_to={round_to} and least={least} must be at least 1") from None
        round_to, least = sizes
        if round_to is None and budget != "latency":
            round_to = BY_SIZE
        units = {group.name: group.units for group in self.groups if group.name in self.units}
        ties = self._ties(units, widths)
        scores = self.scores(order)
        order_of = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}

        def kept(sizes: Mapping[str, int]) -> dict[str, Tensor]:
            return {name: order_of[name][:size].sort().values for name, size in sizes.items()}

        if budget == "keep":
            return kept(largest_share(ties, units, share, round_to, allowed))
        if budget != "latency":
            limit = Limit(budget, share, self._counted(budget))
        elif measure is None:
            raise ValueError("latency= needs measure=, a function that times the slim model; trainer.slim has one")
        else:
            limit = Limit(budget, share, lambda sizes: measure(kept(sizes)), looks=LOOKS)
        return kept(largest_within(limit, ties, scores, round_to, least, allowed))

    def _ties(self, units: Mapping[str, int], widths: str) -> list[Tie]:
        """What is sized together; with stock widths without the groups whose sizes no config says."""
        ties = complete_ties(self.ties if widths == "stock" else (), units)
        if widths == "free" or not any(tie.fields for tie in self.ties):
            return ties
        tied = [tie for tie in ties if tie in self.ties]
        whole = [name for tie in ties if tie not in tied for name in tie.shares]
        if whole:
            logger.warning(
                "no config number says how many units %s have: they stay whole; widths='free' takes units out there",
                ", ".join(whole),
            )
        return tied

    def _counted(self, key: str) -> Callable[[Mapping[str, int]], float]:
        """A function that counts which share of the whole network some sizes are."""
        network = self.groups[0].network
        whole = network.count()[key]
        if not whole > 0:
            raise ValueError(
                f"{key}=: the path says that the whole network has {whole} {key}, so no share can be kept"
            )
        return lambda sizes: network.count(self.groups, sizes)[key] / whole

    # ---- file

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `sparse_path.safetensors` into a folder, atomically; it loads without the model."""
        meta = {
            "step": self.step,
            "curve": self.curve,
            "start": self.start,
            **groups_record(self.groups),
            "ties": [tie.to_list() for tie in self.ties],
        }
        tensors = {
            f"{name}|{key}": value.to(torch.int32 if value.dtype == torch.int64 else torch.float32).contiguous()
            for name, unit in self.units.items()
            for key, value in unit.items()
        }
        return write_whole(Path(folder) / FILE_NAME, pack_path(meta, tensors))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SparsePath":
        """Read the path that `save` wrote into a folder (a checkpoint, or what was pulled from the Hub).

        Raises:
            FileNotFoundError: for a folder without a path.
            ValueError: for a file that is not what was written, or says what no path can be.
        """
        file = Path(folder) / FILE_NAME
        if not file.is_file():
            raise FileNotFoundError(f"no {FILE_NAME} in {folder}: it stands beside each checkpoint of a SplitLBI run")
        return cls(**unpack_path(file))

    # ---- picture

    def plot(self, selected: Mapping[str, Tensor] | None = None, order: str = "dual") -> Any:
        """Units over steps per group, those selected in one colour, and accuracy against size where it was measured.

        Args:
            selected: kept units by group (`select`); default: the units in the support now.
            order: see `scores`; only sets which unit is drawn first.

        Returns:
            A matplotlib Figure; needs matplotlib (the extra `plot`).
        """
        kept = selected or {name: inside.nonzero().flatten() for name, inside in self.support.items()}
        words = ("selected", "not selected") if selected else ("in the support", "left again")
        return plot_path(self.units, self.scores(order), kept, self.step, self.curve, words, self.start)


def _rms(squares: Sequence[Tensor], group: Mapping[str, Any]) -> Tensor:
    """The root of the mean of a unit's entries in some tensors of squares, `(units,)`."""
    roots = [square.detach().float().sqrt() for square in squares]
    entries = sum(square.numel() for square in squares) / group["units"]
    return (unit_norm(roots, group["axis"], group["block"], [1.0] * len(roots)) / entries**0.5).cpu()


def _halfway(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of every score's place among all and in its group, each in (0, 1]."""
    every = torch.cat(list(scores.values())).sort().values

    def place(score: Tensor, among: Tensor) -> Tensor:
        return torch.searchsorted(among, score, right=True) / len(among)

    return {name: (place(score, every) + place(score, score.sort().values)) / 2 for name, score in scores.items()}
