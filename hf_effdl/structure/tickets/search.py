"""Finding a ticket early: looks at the selection during a run, and stops the run once it has settled."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_effdl.files import read_tensors, write_whole
from hf_effdl.processes import agreed
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.finders.lora import refuse_adapter
from hf_effdl.structure.groups.group import Group, check_groups
from hf_effdl.structure.groups.record import groups_of, groups_record
from hf_effdl.structure.groups.ties import Tie, config_ties
from hf_effdl.structure.optim.schedule import PATH_LENGTHS
from hf_effdl.structure.optim.sharding import is_sharded
from hf_effdl.structure.optim.split_lbi import SplitLBI, unwrap
from hf_effdl.structure.path.path import SparsePath
from hf_effdl.structure.tickets.files import WEIGHTS, State, packed, state_digest
from hf_effdl.structure.tickets.settings import check_settings
from hf_effdl.structure.tickets.settling import Settling, pack
from hf_effdl.structure.tickets.ticket import Ticket
from hf_effdl.structure.training.arguments import SplitLBIArguments, scheduled_rates
from hf_effdl.structure.training.callbacks import SplitLBICallback, check_split_lbi
from hf_effdl.structure.training.evaluation import WRAPPERS, example_row
from hf_effdl.structure.training.trainer import SplitLBITrainer


logger = logging.getLogger(__name__)

FOLDER = "ticket"  # in the run's output folder: weights that a resumed run needs


def find_ticket(
    trainer: Trainer,
    *,
    macs: float | None = None,
    params: float | None = None,
    keep: float | None = None,
    at_step: int | None = None,
    at_epoch: float | None = None,
    within: float = 0.2,
    weights_at: Sequence[int] = (),
    resume_from_checkpoint: str | bool | None = None,
    **options: Any,
) -> Ticket:
    """Train until the selection has settled, and return it as a `Ticket`.

    A `SplitLBITrainer` travels its whole path in the first `within` of the run: its `args.path_share` becomes `within`
    where it is 1. A plain `Trainer` with the `SplitLBI` optimizer is taken as it is; derive its `nu` and `path_scale`
    from that part of the run. The learning rates stay those of the whole run.

    Args:
        trainer: before its training. It stops at the step found and can then be thrown away.
        macs, params, keep: the budget, a share of the model in (0, 1]; at most one, see `SparsePath.select`. Without
            one the ticket is the support.
        at_step, at_epoch: take the ticket there, settled or not.
        within: share of the run after which the ticket is taken at the latest.
        weights_at: steps whose weights the ticket is to hold too.
        resume_from_checkpoint: as in `Trainer.train`.
        options: others of `EarlyTicketCallback`.

    Raises:
        ValueError: for a trainer that has trained, an optimizer other than `SplitLBI`, a budget that cannot be held or
            numbers out of range.
        TypeError: for what is no `Trainer`.

    Example:
        >>> ticket = find_ticket(SplitLBITrainer(model, args, train_dataset=rows), macs=0.25)  # doctest: +SKIP
        >>> small = rewind(model_init, ticket)                                                 # doctest: +SKIP
    """
    _check_trainer(trainer)
    callback = EarlyTicketCallback(
        macs=macs,
        params=params,
        keep=keep,
        at_step=at_step,
        at_epoch=at_epoch,
        within=within,
        weights_at=weights_at,
        **options,
    )
    if isinstance(trainer, SplitLBITrainer):
        if trainer.args.path_share == 1:
            trainer.args.path_share = within
        callback.groups = trainer.groups
    else:
        others = [c for c in trainer.callback_handler.callbacks if isinstance(c, SplitLBICallback)]
        callback.groups = others[0].groups if others else None
    trainer.add_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    finally:
        # with restore_callback_states_from_checkpoint it is another object by now
        callback = trainer.pop_callback(EarlyTicketCallback) or callback
    return callback.ticket


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError(f"find_ticket needs a Trainer of transformers, not {type(trainer).__name__}")
    if trainer.state.global_step > 0:
        raise ValueError(
            f"this {type(trainer).__name__} has trained for {trainer.state.global_step} steps, and a ticket is found "
            "from the initial weights on: make a new one, or pass resume_from_checkpoint to a new one"
        )
    if any(isinstance(callback, EarlyTicketCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            "this trainer has an EarlyTicketCallback already: call trainer.train() and read its ticket, "
            "or leave it out"
        )


class EarlyTicketCallback(TrainerCallback, ExportableState):
    """Stops a run once the units that it would keep no longer change, and has them as `ticket`.

    Every `every` steps it takes the selection: with a budget what `SparsePath.select` keeps, without one the support.
    The distance between two selections is the share of all units of the lifted groups in which they differ. The
    selection has settled when the largest distance among the last `window` selections was below `threshold` at
    `patience` looks in a row, and at least `min_path` of the path lies behind.

    Path time is the summed learning rate so far, divided by that of one path: `path_length` (2.5 where the arguments
    have none) times what a unit of unchanged norm takes to enter, `lam nu / path_scale`. With `lam_scale="none"`,
    where no unit's time is known beforehand, it is divided by that of the run's first `path_share`.

    It works in any `Trainer` whose optimizer is `SplitLBI`. What it has seen stands in `trainer_state.json` of every
    checkpoint, the weights that the ticket will need in `ticket/` of the output folder, so a run that was killed and
    is resumed finds the same ticket at the same step. Without checkpoints (`save_strategy="no"`) nothing is written.

    Args:
        groups: the groups in the optimizer; default: found with a row of the training data as example.
        macs, params, keep: the budget, at most one; see `SparsePath.select`. Without one the ticket is the support, in
            which a group that no unit has entered keeps its best one.
        order, widths: see `SparsePath.select`.
        every: steps between two looks; default: a fiftieth of the run.
        threshold: distance below which selections count as the same, in (0, 1].
        window: selections that are compared, at least 2.
        patience: looks in a row, at least 1.
        min_path: path time before which nothing has settled.
        within: share of the run after which the ticket is taken at the latest, in (0, 1]; it is then not `settled`.
        at_step, at_epoch: take the ticket there, settled or not.
        weights_at: steps whose weights the ticket is to hold, as far as the run gets; those of step 0 and of the step
            found are always there.

    Raises:
        ValueError: for numbers out of range; at the start of training for another optimizer, sharded weights, a budget
            that cannot be held, or a checkpoint of a run without this callback; where the support is empty at the end.

    Example:
        >>> callback = EarlyTicketCallback(groups, macs=0.25)                 # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=rows, callbacks=[callback],
        ...         optimizer_cls_and_kwargs=(SplitLBI, kwargs)).train()      # doctest: +SKIP
        >>> callback.ticket.step                                              # doctest: +SKIP

    Source: distance and window as in early-bird tickets, You et al. (https://arxiv.org/abs/1909.11957); the selection
    is that of the path of arXiv 2007.02010.
    """

    def __init__(
        self,
        groups: Sequence[Group] | None = None,
        *,
        macs: float | None = None,
        params: float | None = None,
        keep: float | None = None,
        order: str = "dual",
        widths: str = "stock",
        every: int | None = None,
        threshold: float = 0.05,
        window: int = 3,
        patience: int = 2,
        min_path: float = 0.4,
        within: float = 1.0,
        at_step: int | None = None,
        at_epoch: float | None = None,
        weights_at: Sequence[int] = (),
    ) -> None:
        self.groups = groups
        self.settings = {
            "macs": macs,
            "params": params,
            "keep": keep,
            "order": order,
            "widths": widths,
            "every": every,
            "threshold": threshold,
            "window": window,
            "patience": patience,
            "min_path": min_path,
            "within": within,
            "at_step": at_step,
            "at_epoch": at_epoch,
            "weights_at": weights_at,
        }
        check_settings(self.settings)
        if groups is not None:
            check_groups(groups, "EarlyTicketCallback")
        self.budget = {
            name: share for name in ("macs", "params", "keep") if (share := self.settings[name]) is not None
        }
        self.ties: Sequence[Tie] = ()
        self._ticket: Ticket | None = None
        self._begin()

    def _begin(self) -> None:
        self._ticket = None
        self.settling = Settling(*(self.settings[key] for key in ("threshold", "window", "patience", "min_path")))
        self.travelled = 0.0  # summed learning rate
        self.init: dict[str, Any] = {}
        self.weights: dict[int, State] = {}

    @property
    def ticket(self) -> Ticket:
        """The ticket, once the run has stopped.

        Raises:
            ValueError: before.
        """
        if self._ticket is None:
            raise ValueError("there is no ticket yet: train with this callback first")
        return self._ticket

    # ---- what a checkpoint holds

    def state(self) -> dict[str, Any]:
        saved = {
            "looks": self.settling.looks,
            "recent": self.settling.recent,
            "travelled": self.travelled,
            "init": self.init,
            "weights": sorted(self.weights),
            "found": self._ticket and [self._ticket.step, self._ticket.settled],
            "groups": groups_record(self.groups) if self.groups else None,
        }
        return {"args": self.settings, "attributes": {"saved": saved}}

    def _continue(self, saved: Mapping[str, Any], folder: Path) -> None:
        self.settling.looks, self.settling.recent = list(saved["looks"]), list(saved["recent"])
        self.travelled, self.init = saved["travelled"], saved["init"]
        if self.groups is None:  # this object is one that transformers made of the state
            self.groups = groups_of(saved["groups"])
        for step in saved["weights"]:
            file = folder / WEIGHTS.format(step)
            if not file.is_file():
                logger.warning("%s is gone, so the ticket will not hold the weights of step %d", file, step)
                continue
            self.weights[step] = read_tensors(file, remedy="start the run again")
            if step == 0 and state_digest(self.weights[0]) != self.init["sha256"]:
                raise ValueError(
                    f"{file} does not hold the initial weights of this run; give every run an output folder of its own"
                )

    # ---- events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], unwrap(kwargs["optimizer"])
        _check_run(model, optimizer)
        saved = self._saved(state)
        self._begin()
        if state.global_step:
            self._continue(saved, Path(args.output_dir) / FOLDER)
        if self.groups is None:
            self.groups = find_groups(model, example_row(kwargs["train_dataloader"], labels=True))
        self.ties = config_ties(model, self.groups)
        self.one_path = _one_path(args, optimizer, state.max_steps)
        self.every = self.settings["every"] or max(1, round(state.max_steps / 50))
        self.last = _last_step(self.settings, state)
        if self.budget:
            self._select(optimizer)  # one that cannot be held is refused before the first step
        if state.global_step == 0:
            source = getattr(getattr(model, "config", None), "name_or_path", "") or None
            digest = state_digest(self._keep(model, 0, args))
            self.init = {"sha256": digest, "class": type(model).__name__, "source": source, "seed": args.seed}
        elif taken := saved["found"]:  # the run was over; Trainer takes one more step
            self._take(model, *taken)
            control.should_training_stop = True

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

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ticket is None:
            lifted = next(group for group in unwrap(kwargs["optimizer"]).param_groups if group["penalty"] == "group")
            self.travelled += float(lifted["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ticket is not None:
            control.should_training_stop = True
            return
        step = state.global_step
        if step in self.settings["weights_at"]:
            self._keep(kwargs["model"], step, args)
        is_given, is_last = self._is_given(state), step >= self.last
        if not (is_given or is_last or step % self.every == 0):
            return
        settled = self._look(unwrap(kwargs["optimizer"]), step)
        if is_last and not (settled or is_given):
            self._warn_unsettled(state)
        if is_given or is_last or (settled and not self._has_given_step):
            self._take(kwargs["model"], step, settled)
            control.should_training_stop = True

    def _warn_unsettled(self, state: TrainerState) -> None:
        logger.warning(
            "the selection had not settled by step %d of %d, the bound of within=%s: the ticket is what it was then. "
            "Distances of the last looks: %s",
            state.global_step,
            state.max_steps,
            self.settings["within"],
            [row["distance"] for row in self.settling.looks[-3:]],
        )

    @property
    def _has_given_step(self) -> bool:
        return self.settings["at_step"] is not None or self.settings["at_epoch"] is not None

    def _is_given(self, state: TrainerState) -> bool:
        """Whether the ticket was asked for at this step."""
        epoch = self.settings["at_epoch"]
        if epoch is not None:
            return state.epoch >= epoch - 1e-9
        return state.global_step == self.settings["at_step"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ticket is None:
            logger.warning("the run ended at step %d before the selection had settled", state.global_step)
            self._look(unwrap(kwargs["optimizer"]), state.global_step)
            self._take(kwargs["model"], state.global_step, False)

    # ---- a look

    def _look(self, optimizer: SplitLBI, step: int) -> bool:
        """Note the selection of this step; whether it has settled."""
        selection = agreed(pack(self._select(optimizer)))
        return self.settling.note(step, self.travelled / self.one_path, selection)

    def _select(self, optimizer: SplitLBI) -> Tensor:
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
        masks = [torch.zeros(group.units, dtype=torch.bool) for group in self._lifted]
        for group, inside in zip(self._lifted, masks, strict=True):
            inside[kept.get(group.name, slice(None))] = True
        return torch.cat(masks)

    @property
    def _lifted(self) -> list[Group]:
        return [group for group in self.groups if group.lifted]

    def _take(self, model: nn.Module, step: int, settled: bool) -> None:
        """Make the ticket of the last selection."""
        inside = self.settling.selection
        if not inside.any():
            raise ValueError(
                f"no unit is in the support at step {step}, so it is no ticket: give a budget (macs=, params= or "
                "keep=), which ranks units before they enter, or take it later (at_step=, within=, min_path=)"
            )
        parts = inside.split([group.units for group in self._lifted])
        kept = {group.name: part.nonzero().flatten() for group, part in zip(self._lifted, parts, strict=True)}
        weights = self.weights if step in self.weights else {**self.weights, step: read_weights(model)}
        self._ticket = Ticket(
            self.groups, kept, step, settled, list(self.settling.looks), dict(self.init), dict(weights)
        )

    # ---- weights and bounds

    def _keep(self, model: nn.Module, step: int, args: TrainingArguments) -> State:
        self.weights[step] = weights = read_weights(model)
        if args.should_save and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            write_whole(Path(args.output_dir) / FOLDER / WEIGHTS.format(step), packed(weights))
        return weights


def read_weights(model: nn.Module) -> State:
    """A copy of the model's state dict on the CPU, under plain names, the same on every process."""
    copies = {WRAPPERS.sub("", name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    buffers = {WRAPPERS.sub("", name) for name, _ in model.named_buffers()}
    # every process has its own batch statistics; the first one's are those that checkpoints hold
    copies |= broadcast({name: tensor for name, tensor in copies.items() if name in buffers})
    return {name: tensor.cpu().contiguous() for name, tensor in copies.items()}


def _one_path(args: TrainingArguments, optimizer: SplitLBI, steps: int) -> float:
    """Summed learning rate of one path."""
    group = next(group for group in optimizer.param_groups if group["penalty"] == "group")
    defaults = SplitLBIArguments.__dataclass_fields__
    length, share = (getattr(args, name, defaults[name].default) for name in ("path_length", "path_share"))
    length = length or PATH_LENGTHS["empty"]
    if group["lam_scale"] == "init":
        return length * group["lam"] * group["nu"] / group["path_scale"]
    return sum(scheduled_rates(args, steps)[: max(1, round(share * steps))])


# ---- what cannot be


def _last_step(settings: Mapping[str, Any], state: TrainerState) -> int:
    """The step at which the ticket is taken at the latest."""
    within, step, epoch = (settings[name] for name in ("within", "at_step", "at_epoch"))
    last = max(1, math.floor(within * state.max_steps + 1e-9))
    if step is not None and step > last:
        raise ValueError(
            f"at_step={step} lies after within={within} of this run, which is step {last} of "
            f"{state.max_steps}; lower at_step or raise within"
        )
    if epoch is not None and epoch > within * state.num_train_epochs + 1e-9:
        raise ValueError(
            f"at_epoch={epoch} lies after within={within} of this run of {state.num_train_epochs} "
            "epochs; lower at_epoch or raise within"
        )
    return last


def _check_run(model: nn.Module, optimizer: Any) -> None:
    """Refuse a run that no ticket can be read from."""
    check_split_lbi(model, optimizer, "a ticket is read from")
    refuse_adapter(model, "a ticket")
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "the weights are sharded (FSDP2), and a ticket holds whole ones: find it with DDP, which a "
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
