"""`GrowingTrainer`: start from a few units and widen where the support saturates, in one run with one schedule."""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, TrainOutput

from hf_effdl.files import write_whole
from hf_effdl.hub.cards import markdown_table
from hf_effdl.processes import decided, forget_accelerate, together
from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.finders.lora import refuse_adapter
from hf_effdl.structure.groups.group import Group, regroup
from hf_effdl.structure.growing.arguments import GrowingArguments
from hf_effdl.structure.growing.checkpoint import grow_checkpoint, saved_history
from hf_effdl.structure.growing.history import Row, by_round, grew, growth_curve, growth_table, restarted_at
from hf_effdl.structure.growing.picture import plot_growth
from hf_effdl.structure.growing.plan import growth_is_over
from hf_effdl.structure.growing.widen import widen_groups
from hf_effdl.structure.optim.split_lbi import SplitLBI
from hf_effdl.structure.training.trainer import SplitLBITrainer, last_complete_checkpoint


class GrowthCallback(TrainerCallback, ExportableState):
    """Asks for a growth stage: at the step of a round, for a log, an evaluation, a checkpoint and the stage's end.

    Growth itself is `GrowingTrainer`'s, which adds this callback. The growth history stands in its state, and so in
    every `trainer_state.json`.

    Raises:
        ValueError: at the start of training in any other Trainer.
    """

    def __init__(self) -> None:
        self.history: list[Row] = []
        self.steps: Sequence[int] | None = None  # of the rounds to come; set by GrowingTrainer
        self.requested = False

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"history": self.history}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.steps is None:
            raise ValueError(
                "GrowthCallback only asks for growth, which GrowingTrainer carries out; this Trainer "
                "would just stop. Use GrowingTrainer with GrowingArguments"
            )
        self.requested = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not self._is_round(state) or control.should_training_stop:
            return control
        # also the log, or the losses since the last one would be in none; and what the end of an epoch would bring
        # comes before the checkpoint
        control.should_log = control.should_save = True
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        if args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = args.eval_delay <= (state.global_step if by_steps else state.epoch)
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # where someone else has ended the training by now, it is not to go on
        if self._is_round(state) and not control.should_training_stop:
            self.requested = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.requested:  # either it is no epoch's end, or all of that has been done
            control.should_log = control.should_evaluate = control.should_save = False
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps = None

    def _is_round(self, state: TrainerState) -> bool:
        return self.steps is not None and state.global_step in self.steps


class GrowingTrainer(SplitLBITrainer):
    """A `SplitLBITrainer` that starts from a seed of few units and widens it where the support saturates.

    Training goes in stages. At the step of a round a checkpoint is saved, grown (`grow_checkpoint`), and training
    resumes from it: schedule, data order, random states, log, momentum and path of the old units go on as if nothing
    had happened; only `growth_restart` begins anew after the last round. Callbacks see the stages as they see a run
    that was stopped and resumed. Whatever moment a run is killed at, `train(resume_from_checkpoint=True)` with the
    seed model goes on to the same end.

    Which groups grow depends on the training data alone; evaluations are recorded, never used.

    `model` is the grown net after training (the one passed in is left at its size), and `groups`, `path`, `slim` and
    the card are of it. `history` has one row per round and group: `{"round", "step", "group", "from", "to", "support",
    "macs", "params", "training_macs"}` and the metrics of the evaluation at that step. `macs` (of one row) and
    `params` are after the round, `training_macs` is 3 x MACs x rows, summed so far.

    `dense_curve` may hold points of the dense net, `{"training_macs", "accuracy"}`, for the card's picture.

    The arguments are those of `SplitLBITrainer`; `args` must be `GrowingArguments`.

    Raises:
        TypeError: for other arguments.
        ValueError: for what `GrowingArguments` refuses, and at `train()` for bounds below the size of the seed, too
            few steps for the rounds, a hyperparameter search, or a checkpoint of another seed.

    Example:
        >>> trainer = GrowingTrainer(seed, GrowingArguments("out"), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()                                                              # doctest: +SKIP
        >>> trainer.history[-1]["training_macs"]                                         # doctest: +SKIP
    """

    _tag_names = ["hf_effdl", "split-lbi", "growing"]
    _staged = False  # between the stages of one run, when model_init has no say

    def __init__(self, model: Any = None, args: GrowingArguments | None = None, *others: Any, **kwargs: Any) -> None:
        args = GrowingArguments("trainer_output") if args is None else args
        if not isinstance(args, GrowingArguments):
            raise TypeError(f"args must be GrowingArguments, not {type(args).__name__}; it takes the same fields")
        super().__init__(model, args, *others, **kwargs)
        refuse_adapter(self.model, "growing")
        if self.is_fsdp_enabled:
            raise ValueError("growing cannot work with FSDP, which shards parameters of fixed shapes; use DDP")
        if not any(isinstance(callback, GrowthCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(GrowthCallback())
        self.dense_curve: list[dict[str, float]] = []

    @property
    def growth(self) -> GrowthCallback:
        """The callback; a resumed Trainer makes a new one."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, GrowthCallback))

    @property
    def history(self) -> list[Row]:
        """What every group did in every round so far."""
        return self.growth.history

    @property
    def growth_curve(self) -> list[dict[str, float]]:
        """Every evaluation with what training had cost by then: `{"step", "training_macs", "loss", ...}`."""
        first = {row["group"]: row["from"] for row in (by_round(self.history) or [[]])[0]}
        seed_macs = self.groups[0].network.count(self.groups, first)["macs"]
        return growth_curve(self.history, self.state.log_history, seed_macs, self._rows_seen)

    def growth_table(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """One line per round, and the headings of its columns."""
        return growth_table(self.history)

    def plot_growth(self) -> Any:
        """The picture of the run so far, see `plot_growth` in `structure/growing/picture.py`."""
        return plot_growth(self.history, self.growth_curve, self.dense_curve)

    # ---- stages

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `Trainer`, through all stages; the loss and the clocks returned are those of all of them."""
        if trial is not None:
            raise ValueError(
                "a hyperparameter search cannot go through the stages of growth; search with a "
                "SplitLBITrainer, or over GrowingTrainer runs of your own"
            )
        folder: str | Path | None = resume_from_checkpoint or None
        if folder is True:
            folder = last_complete_checkpoint(self.args.output_dir, self.args.world_size)
        self._stages: list[tuple[int, dict[str, float]]] = []
        self._start = 0
        eval_on_start = self.args.eval_on_start
        try:
            if folder is None:
                self.growth.history = []
            else:
                folder = self._grow(folder)
            while True:
                self._staged = folder is not None
                self.args.eval_on_start = eval_on_start and folder is None
                output = super().train(folder and str(folder), None, ignore_keys_for_eval)
                if not self.growth.requested:
                    break
                folder = self._grow(f"{self.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        finally:
            self._staged, self.args.eval_on_start = False, eval_on_start
        return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)

    def train_small(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: a grown net is small by itself."""
        raise ValueError(
            "a GrowingTrainer grows towards its bounds, and train_small cuts down to a budget: take a SplitLBITrainer"
        )

    def _grow(self, folder: str | Path) -> Path:
        """The checkpoint to go on from, with the model, the groups and the history as they are there."""
        together()  # all files of the checkpoint are written
        self._follow(saved_history(folder))
        batch, loss = self._growth_batch() if self.args.growth_init == "gradmax" else (None, None)
        decay = self.get_decay_parameter_names(self.model)
        folder = decided(
            lambda: grow_checkpoint(
                folder,
                self.model,
                self.groups,
                self.args,
                decay=decay,
                rows_seen=self._rows_seen,
                batch=batch,
                loss=loss,
            )
        )
        self._follow(saved_history(folder))
        self._start = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        set_seed(self.args.seed)  # Trainer reads the first batch before it loads the random states
        return folder

    def _follow(self, history: Sequence[Row]) -> None:
        """A fresh copy of the model, of the sizes that a history ends with; its weights come from the checkpoint."""
        model = deepcopy(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
        forget_accelerate(model)  # its wrapper of mixed precision would run the model that it was made for
        self.model, groups = _grown_as(model, regroup(self.groups, model), by_round(history))
        self.model_wrapped = self.model
        self._groups = self.callback.groups = groups
        self.optimizer = self.lr_scheduler = None
        self.growth.history = list(history)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self.model if self._staged else super().call_model_init(trial)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self._staged:
            # thresholds and scales come from the checkpoint; new units may have no norm of their own to take one from
            params = self.args.split_lbi_params(self.model, self.groups, self.get_decay_parameter_names(self.model))
            kwargs = self.args.split_lbi_kwargs(max(self.state.max_steps, 1)) | {"lam_scale": "none"}
            self.optimizer = SplitLBI(params, **kwargs)
        elif self.optimizer is None and self.model_init is not None:
            self._groups = None  # those of the model that was made before
        if not self._staged:
            self._check_bounds()
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        steps = self.args.growth_steps(num_training_steps)
        begun = self.history or not self.args.growth_release  # the first round also releases a seed without room
        over = begun and growth_is_over(self.model, self.groups, self.args, self.history)
        self.growth.steps = () if over else [step for step in steps if step > self.state.global_step]
        return super().create_scheduler(num_training_steps - restarted_at(self.history), optimizer)

    def _check_bounds(self) -> None:
        counts = self.groups[0].network.count()
        sizes = {
            "max_macs": counts["macs"],
            "max_params": counts["params"],
            "max_width": max(group.units for group in self.groups),
        }
        for name, size in sizes.items():
            bound = getattr(self.args, name)
            if bound is not None and bound < size:
                raise ValueError(
                    f"{name}={bound} is below the size of the seed, which has {size}; raise it, or start "
                    "from a smaller seed"
                )

    # ---- what a stage says

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, but one summary of the training at its end instead of one per stage."""
        if "train_loss" in logs:
            self._stages.append((self.state.global_step - self._start, dict(logs)))
            if self.growth.requested:
                return
            steps, seconds = sum(n for n, _ in self._stages), sum(m["train_runtime"] for _, m in self._stages)
            logs["train_loss"] = sum(n * m["train_loss"] for n, m in self._stages) / max(steps, 1)
            for name in ("train_samples_per_second", "train_steps_per_second"):
                if name in logs:
                    done = sum(m[name] * m["train_runtime"] for _, m in self._stages)
                    logs[name] = round(done / max(seconds, 1e-9), 3)
            logs["train_runtime"] = round(seconds, 4)
        super().log(logs, start_time)

    def _rows_seen(self, step: int) -> int:
        """Rows that training went through in so many steps; the last batch of an epoch may be smaller."""
        per_batch = self.args.train_batch_size * self.args.world_size
        per_step = per_batch * self.args.gradient_accumulation_steps
        if isinstance(self.train_dataset, IterableDataset) or not hasattr(self.train_dataset, "__len__"):
            return step * per_step
        rows = len(self.train_dataset)
        if self.args.dataloader_drop_last:
            rows = max(rows // per_batch, 1) * per_batch
        epochs, rest = divmod(step, -(-rows // per_step))
        return epochs * rows + min(rest * per_step, rows)

    def _growth_batch(self) -> tuple[dict[str, Any], Callable[[Any], Tensor] | None]:
        """Training rows with labels, evenly spread, the same on every process and at every attempt."""
        loader = self.get_train_dataloader()
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "growth_init='gradmax' looks at some training rows, and a stream has none to pick; use "
                "another growth_init"
            )
        count = min(self.args.growth_batch, len(dataset))
        with random_state_kept():
            set_seed(self.args.seed)  # rows may be augmented at random
            batch = dict(loader.collate_fn([dataset[i * len(dataset) // count] for i in range(count)]))
        batch.pop("weight", None)
        batch = send_to_device(batch, next(self.model.parameters()).device)
        if self.compute_loss_func is None:
            return batch, None
        labels = batch["labels"]
        return batch, lambda output: self.compute_loss_func(output, labels)

    # ---- the card

    def card_facts(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        args = self.args
        names = [name for name in vars(args) if name.startswith("growth_")]
        names += ["max_macs", "max_params", "max_width", "widths"]
        facts = super().card_facts(folder) | {"recipe": {name: getattr(args, name) for name in names}}
        if not self.history:
            return facts
        growth = {"table": markdown_table(*self.growth_table()), "picture": "growth.png"}
        try:
            write_whole(Path(folder) / growth["picture"], partial(self.plot_growth().savefig, dpi=110))
        except ImportError:  # matplotlib is an extra
            growth["picture"] = None
        return facts | {"whole": "grown", "growth": growth}


def _grown_as(
    model: nn.Module, groups: Sequence[Group], rounds: Sequence[Sequence[Row]]
) -> tuple[nn.Module, Sequence[Group]]:
    """A model and its groups taken through the rounds that it has not been through yet."""
    begun = False
    for rows in rounds:
        begun = begun or _sizes(groups) == {row["group"]: row["from"] for row in rows}
        if begun and (add := grew(rows)):
            model = widen_groups(model, groups, add)
            groups = regroup(groups, model)
    if rounds and _sizes(groups) != {row["group"]: row["to"] for row in rounds[-1]}:
        first = {row["group"]: row["from"] for row in rounds[0]}
        raise ValueError(
            f"this checkpoint grew from another seed: its groups began with {first}, this model has {_sizes(groups)}. "
            "Resume with the model that the run began with"
        )
    return model, groups


def _sizes(groups: Sequence[Group]) -> dict[str, int]:
    return {group.name: group.units for group in groups}
