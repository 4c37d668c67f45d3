"""Finding a ticket early: looks at the selection during a run, and stops the run once it has settled."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_effdl.checks import real_number, whole_number
from hf_effdl.files import read_tensors, write_whole
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.tickets.files import WEIGHTS, State, packed, state_digest
from hf_effdl.structure.tickets.ticket import Ticket
from hf_effdl.structure.training.callbacks import SplitLBICallback
from hf_effdl.structure.training.settled import SettledCallback
from hf_effdl.structure.training.start import read_weights
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


class EarlyTicketCallback(SettledCallback):
    """Stops a run once the units that it would keep no longer change, and has them as `ticket`.

    Every `every` steps it takes the selection: with a budget what `SparsePath.select` keeps, without one the support.
    The distance between two selections is the share of all units of the lifted groups in which they differ. At path
    time t, d is the largest one between this selection and those since t / 2, at least the last `window`, the oldest
    of them at t_0. The selection has settled when what may still change until the path ends,
    `2 d (1 - t) / (t - t_0)`, was below `threshold` at `patience` looks in a row, and at least `min_path` of the path
    lies behind. So a search that travels its whole path ends settled: at its end nothing lies ahead.

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
        threshold: share of the units that may still change, in (0, 1].
        window: selections that are compared at least, 2 or more.
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

    Source: the distance is that of early-bird tickets, You et al. (https://arxiv.org/abs/1909.11957), the forecast is
    ours; the selection is that of the path of arXiv 2007.02010.
    """

    DEFAULTS = {**SettledCallback.DEFAULTS, "at_step": None, "at_epoch": None, "weights_at": ()}
    wanted = "a ticket"
    saves_last = True

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
        patience: int = 1,
        min_path: float = 0.4,
        within: float = 1.0,
        at_step: int | None = None,
        at_epoch: float | None = None,
        weights_at: Sequence[int] = (),
    ) -> None:
        super().__init__(
            groups,
            macs=macs,
            params=params,
            keep=keep,
            order=order,
            widths=widths,
            every=every,
            threshold=threshold,
            window=window,
            patience=patience,
            min_path=min_path,
            within=within,
            at_step=at_step,
            at_epoch=at_epoch,
            weights_at=weights_at,
        )

    def begin(self) -> None:
        super().begin()
        self._ticket: Ticket | None = None
        self.init: dict[str, Any] = {}
        self.weights: dict[int, State] = {}

    def check_settings(self) -> None:
        super().check_settings()
        _check_given(self.settings)

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

    def record(self) -> dict[str, Any]:
        return super().record() | {"init": self.init, "weights": sorted(self.weights)}

    def restore(self, saved: Mapping[str, Any], folder: Path) -> None:
        super().restore(saved, folder)
        self.init = saved["init"]
        for step in saved["weights"]:
            file = folder / FOLDER / WEIGHTS.format(step)
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
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        if state.global_step == 0:
            source = getattr(getattr(model, "config", None), "name_or_path", "") or None
            digest = state_digest(self._keep(model, 0, args))
            self.init = {"sha256": digest, "class": type(model).__name__, "source": source, "seed": args.seed}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.found is None and state.global_step in self.settings["weights_at"]:
            self._keep(kwargs["model"], state.global_step, args)
        super().on_step_end(args, state, control, **kwargs)

    @property
    def waits(self) -> bool:
        """Whether the ticket was asked for at a step or an epoch."""
        return self.settings["at_step"] is not None or self.settings["at_epoch"] is not None

    def is_asked_for(self, state: TrainerState) -> bool:
        epoch = self.settings["at_epoch"]
        if epoch is not None:
            return state.epoch >= epoch - 1e-9
        return state.global_step == self.settings["at_step"]

    def last_step(self, state: TrainerState) -> int:
        last = super().last_step(state)
        within, step, epoch = (self.settings[name] for name in ("within", "at_step", "at_epoch"))
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

    def stop(self, model: nn.Module, step: int, settled: bool, control: TrainerControl) -> None:
        """End the run, with a ticket of the last selection."""
        inside = self.settling.selection
        if not inside.any():
            raise ValueError(
                f"no unit is in the support at step {step}, so it is no ticket: give a budget (macs=, params= or "
                "keep=), which ranks units before they enter, or take it later (at_step=, within=, min_path=)"
            )
        parts = inside.split([group.units for group in self.lifted])
        kept = {group.name: part.nonzero().flatten() for group, part in zip(self.lifted, parts, strict=True)}
        weights = self.weights if step in self.weights else {**self.weights, step: read_weights(model)}
        self._ticket = Ticket(
            self.groups, kept, step, settled, list(self.settling.looks), dict(self.init), dict(weights)
        )
        super().stop(model, step, settled, control)

    # ---- weights

    def _keep(self, model: nn.Module, step: int, args: TrainingArguments) -> State:
        self.weights[step] = weights = read_weights(model)
        if args.should_save and str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            write_whole(Path(args.output_dir) / FOLDER / WEIGHTS.format(step), packed(weights))
        return weights


def _check_given(settings: dict[str, Any]) -> None:
    """Refuse steps and epochs to take a ticket or weights at that no run has."""
    if settings["at_epoch"] is not None:
        settings["at_epoch"] = real_number("at_epoch", settings["at_epoch"])
        if not settings["at_epoch"] > 0:
            raise ValueError(f"at_epoch={settings['at_epoch']}: it must be above 0")
    if settings["at_step"] is not None:
        settings["at_step"] = whole_number("at_step", settings["at_step"], 1)
        if settings["at_epoch"] is not None:
            raise ValueError("give at_step or at_epoch, not both")
    steps = settings["weights_at"]
    if isinstance(steps, str | bytes) or not isinstance(steps, Sequence):
        raise TypeError(f"weights_at={steps!r}: pass a list of steps")
    settings["weights_at"] = list(steps)
    for step in steps:
        if type(step) is not int or step < 0:
            raise ValueError(f"weights_at={settings['weights_at']}: they must be steps, whole numbers not below 0")
