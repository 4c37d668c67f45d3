"""Stopping a run of split LBI once the units that it would keep no longer change."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_effdl.checks import one_of, real_number, whole_number
from hf_effdl.processes import agreed
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.finders.lora import refuse_adapter
from hf_effdl.structure.groups.group import Group, check_groups
from hf_effdl.structure.groups.record import groups_of, groups_record
from hf_effdl.structure.groups.ties import Tie, config_ties
from hf_effdl.structure.optim.schedule import PATH_LENGTHS
from hf_effdl.structure.optim.sharding import is_sharded
from hf_effdl.structure.optim.split_lbi import SplitLBI, unwrap
from hf_effdl.structure.path.budget import one_budget
from hf_effdl.structure.path.path import ORDERS, WIDTHS, SparsePath
from hf_effdl.structure.path.settling import Settling, pack
from hf_effdl.structure.training.arguments import SplitLBIArguments, scheduled_rates
from hf_effdl.structure.training.callbacks import check_split_lbi
from hf_effdl.structure.training.evaluation import example_row


logger = logging.getLogger(__name__)

BUDGETS = ("macs", "params", "keep")


class SettledCallback(TrainerCallback, ExportableState):
    """Stops a run once the selection has settled, or at the latest after `within` of it.

    Every `every` steps it takes the selection: with a budget what `SparsePath.select` keeps, without one the support;
    `Settling` says when it no longer changes. What it has seen stands in `trainer_state.json` of every checkpoint, so
    a run that was killed and is resumed stops at the same step.

    Args:
        groups: the groups in the optimizer; default: found with a row of the training data as example.
        settings: the budget (`macs`, `params` or `keep`, at most one), and others of `DEFAULTS`; see
            `EarlyTicketCallback`.

    Raises:
        ValueError: for numbers out of range; at the start of training for another optimizer, sharded weights, or a
            budget that cannot be held.
    """

    DEFAULTS: Mapping[str, Any] = {
        "macs": None,
        "params": None,
        "keep": None,
        "order": "dual",
        "widths": "stock",
        "every": None,
        "threshold": 0.05,
        "window": 3,
        "patience": 1,
        "min_path": 0.4,
        "within": 1.0,
    }
    wanted = "the selection of a budget"  # in messages: what the run is for
    saves_last = False  # whether the step at which it stops may be saved; one resumed from there takes a step more

    def __init__(self, groups: Sequence[Group] | None = None, **settings: Any) -> None:
        self.groups = groups
        if unknown := settings.keys() - self.DEFAULTS.keys():
            raise TypeError(
                f"{type(self).__name__} has no settings {sorted(unknown)}; there are {list(self.DEFAULTS)}"
            )
        self.settings = {**self.DEFAULTS, **settings}
        self.check_settings()
        if groups is not None:
            check_groups(groups, type(self).__name__)
        self.budget = {name: share for name in BUDGETS if (share := self.settings[name]) is not None}
        self.ties: Sequence[Tie] = ()
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.found: tuple[int, bool] | None = None
        self.settling = Settling(*(self.settings[key] for key in ("threshold", "window", "patience", "min_path")))
        self.travelled = 0.0  # summed learning rate

    def check_settings(self) -> None:
        """Refuse settings that are out of range; numbers become those of Python."""
        settings = self.settings
        if any(settings[name] is not None for name in BUDGETS):
            name, share = one_budget(**{name: settings[name] for name in BUDGETS})
            settings[name] = share
        for name, choices in (("order", ORDERS), ("widths", WIDTHS)):
            one_of(name, settings[name], choices)
        for name in ("threshold", "within", "min_path"):
            settings[name] = real_number(name, settings[name])
        for name in ("threshold", "within"):
            if not 0 < settings[name] <= 1:
                raise ValueError(f"{name}={settings[name]}: it is a share, in (0, 1]")
        if not settings["min_path"] >= 0:
            raise ValueError(f"min_path={settings['min_path']}: it is a path time, not below 0 (1 is one whole path)")
        for name, least in (("window", 2), ("patience", 1), ("every", 1)):
            if name != "every" or settings[name] is not None:
                settings[name] = whole_number(name, settings[name], least)

    # ---- what a checkpoint holds

    def record(self) -> dict[str, Any]:
        """What is kept of the run so far, plain values."""
        return {
            "looks": self.settling.looks,
            "recent": self.settling.recent,
            "travelled": self.travelled,
            "found": self.found and list(self.found),
            "groups": groups_record(self.groups) if self.groups else None,
        }

    def state(self) -> dict[str, Any]:
        """What Trainer writes into `trainer_state.json`."""
        return {"args": self.settings, "attributes": {"saved": self.record()}}

    def restore(self, saved: Mapping[str, Any], folder: Path) -> None:
        """Go on from a record; `folder` is the run's."""
        self.settling.looks, self.settling.recent = list(saved["looks"]), list(saved["recent"])
        self.travelled = saved["travelled"]
        if self.groups is None:  # this object is one that transformers made of the state
            self.groups = groups_of(saved["groups"])

    def _saved(self, state: TrainerState) -> Mapping[str, Any]:
        """What the checkpoint holds of this callback; at the start of a run, what it is to hold."""
        name = type(self).__name__
        if state.global_step and name not in state.stateful_callbacks:
            raise ValueError(
                f"the checkpoint of step {state.global_step} is of a run without {name}, so the initial weights are "
                "not known; start that run again with the callback"
            )
        stored = state.stateful_callbacks.setdefault(name, self.state())
        if isinstance(stored, list):
            raise ValueError(f"this trainer has {len(stored)} callbacks of class {name}; a run finds one ticket")
        return stored["attributes"]["saved"]

    # ---- events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], unwrap(kwargs["optimizer"])
        check_run(model, optimizer, self.wanted)
        saved = self._saved(state)
        self.begin()
        if state.global_step:
            self.restore(saved, Path(args.output_dir))
        if self.groups is None:
            self.groups = find_groups(model, example_row(kwargs["train_dataloader"], labels=True))
        self.ties = config_ties(model, self.groups)
        self.one_path = _one_path(args, optimizer, state.max_steps)
        self.every = self.settings["every"] or max(1, round(state.max_steps / 50))
        self.last = self.last_step(state)
        if self.budget:
            self.select(optimizer)  # one that cannot be held is refused before the first step
        if state.global_step and saved["found"]:  # the run was over; Trainer takes one more step
            self.stop(model, *saved["found"], control)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.found is None:
            lifted = next(group for group in unwrap(kwargs["optimizer"]).param_groups if group["penalty"] == "group")
            self.travelled += float(lifted["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.found is not None:
            control.should_training_stop = True
            return
        step = state.global_step
        is_asked, is_last = self.is_asked_for(state), step >= self.last
        if not (is_asked or is_last or step % self.every == 0):
            return
        settled = self.look(unwrap(kwargs["optimizer"]), step)
        if is_last and not (settled or is_asked):
            self._warn_unsettled(state)
        if is_asked or is_last or (settled and not self.waits):
            self.stop(kwargs["model"], step, settled, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.found is not None and not self.saves_last:
            control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.found is None:
            logger.warning("the run ended at step %d before the selection had settled", state.global_step)
            self.look(unwrap(kwargs["optimizer"]), state.global_step)
            self.stop(kwargs["model"], state.global_step, False, control)

    def stop(self, model: nn.Module, step: int, settled: bool, control: TrainerControl) -> None:
        """End the run here."""
        self.found = (step, settled)
        control.should_training_stop = True
        control.should_save = control.should_save and self.saves_last

    def last_step(self, state: TrainerState) -> int:
        """The step at which the run stops at the latest."""
        return max(1, math.floor(self.settings["within"] * state.max_steps + 1e-9))

    waits = False  # whether settling alone does not stop the run

    def is_asked_for(self, state: TrainerState) -> bool:
        """Whether the run is to stop at this step, settled or not."""
        return False

    def _warn_unsettled(self, state: TrainerState) -> None:
        logger.warning(
            "the selection had not settled by step %d of %d, the bound of within=%s: %s is what it was then. "
            "Share of the units that could still change, at the last looks: %s",
            state.global_step,
            state.max_steps,
            self.settings["within"],
            self.wanted,
            [row["ahead"] for row in self.settling.looks[-3:]],
        )

    # ---- a look

    def look(self, optimizer: SplitLBI, step: int) -> bool:
        """Note the selection of this step; whether it has settled."""
        selection = agreed(pack(self.select(optimizer)))
        return self.settling.note(step, self.travelled / self.one_path, selection)

    def select(self, optimizer: SplitLBI) -> Tensor:
        """Which units stay, boolean, over the lifted groups in their order."""
        path = SparsePath.from_optimizer(optimizer, self.groups, self.ties)
        order = self.settings["order"]
        if self.budget:
            kept = path.select(**self.budget, order=order, widths=self.settings["widths"])
        else:
            kept = {name: inside.nonzero().flatten() for name, inside in path.support.items()}
            if any(map(len, kept.values())):  # a group cannot go
                best = path.scores(order)
                kept = {name: index if len(index) else best[name].argmax()[None] for name, index in kept.items()}
        masks = [torch.zeros(group.units, dtype=torch.bool) for group in self.lifted]
        for group, inside in zip(self.lifted, masks, strict=True):
            inside[kept.get(group.name, slice(None))] = True
        return torch.cat(masks)

    @property
    def lifted(self) -> list[Group]:
        """The groups that a selection is over."""
        return [group for group in self.groups if group.lifted]


def _one_path(args: TrainingArguments, optimizer: SplitLBI, steps: int) -> float:
    """Summed learning rate of one path."""
    group = next(group for group in optimizer.param_groups if group["penalty"] == "group")
    defaults = SplitLBIArguments.__dataclass_fields__
    length, share = (getattr(args, name, defaults[name].default) for name in ("path_length", "path_share"))
    length = length or PATH_LENGTHS["empty"]
    if group["lam_scale"] == "init":
        return length * group["lam"] * group["nu"] / group["path_scale"]
    return sum(scheduled_rates(args, steps)[: max(1, round(share * steps))])


def check_run(model: nn.Module, optimizer: Any, wanted: str) -> None:
    """Refuse a run whose selection cannot settle; `wanted` begins the sentences, such as "a ticket"."""
    check_split_lbi(model, optimizer, f"{wanted} is read from")
    refuse_adapter(model, wanted)
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            f"the weights are sharded (FSDP2), and {wanted} holds whole ones: find it with DDP, which a "
            "search this short rarely needs more than"
        )
    if any(group["start"] == "dense" for group in optimizer.param_groups):
        raise ValueError(
            "the path starts dense, so nothing enters by which units could settle early; pass start='empty' and a "
            "model with fresh weights"
        )
    if not any(group["penalty"] == "group" for group in optimizer.param_groups):
        raise ValueError(
            "no param group of SplitLBI has penalty='group', so there are no units to select; pass "
            "params=param_groups(model, find_groups(model))"
        )
