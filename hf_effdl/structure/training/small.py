"""Training a small net in earnest: fine-tuning one, or the whole way from a net that has not been trained."""

import json
import os
from collections.abc import Iterable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from transformers import Trainer, TrainerState

from hf_effdl.checks import instance, one_of, real_number
from hf_effdl.processes import decided, forget_accelerate, together
from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.calibration.compensate import SCORES
from hf_effdl.structure.groups.ties import config_ties
from hf_effdl.structure.path.budget import one_budget
from hf_effdl.structure.path.path import SparsePath
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.slim.report import forget_report, get_report, set_report
from hf_effdl.structure.slim.slim import cut_copy, set_config
from hf_effdl.structure.training.card import logged_rows
from hf_effdl.structure.training.checkpoints import has_checkpoints, load_finished, newest
from hf_effdl.structure.training.distill import Distillation, DistillationMixin, frozen_copy, refuse_without_teacher
from hf_effdl.structure.training.evaluation import explain_half_precision, training_inputs
from hf_effdl.structure.training.settled import SettledCallback
from hf_effdl.structure.training.start import FILE_NAME, Start, read_weights
from hf_effdl.weighting import WeightedLossMixin


WITHIN = 0.2
FOLDER = "small"  # of the output folder: the small net's start and its checkpoints
SIZES = {"params": "params", "macs": "macs", "latency_ms": "latency_ms"}
# what a net learns from, and how, by the trainer that has it
TRAINING = ("compute_loss", "training_step", "get_train_dataloader", "_get_train_sampler")


def longest_search(share: float) -> float:
    """The share of a run that a search may take: no more than what the small net costs, a tenth to a fifth."""
    return min(WITHIN, max(WITHIN / 2, share))


class SmallTrainer(DistillationMixin, WeightedLossMixin, Trainer):
    """The `Trainer` that a small net has by itself."""


class SmallMixin:
    """`finetune` and `train_small` for a `SplitLBITrainer`."""

    def finetune(
        self,
        small: nn.Module,
        *,
        epochs: float,
        learning_rate: float | None = None,
        distill: float | None = None,
        teacher: nn.Module | None = None,
        bn_batches: int | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        resume_from_checkpoint: bool = False,
    ) -> nn.Module:
        """Train a slim model on the training set, on a whole learning rate schedule, in place.

        Batch norms are re-estimated first. The optimizer is the base of the path (SGD or AdamW with its settings), the
        data, batches, schedule, evaluation and precision are those of the trainer's arguments; callbacks stay with the
        path's run. The accuracy before and after is on the card of `push_slim` and in `effdl_report`, where there is
        an evaluation set.

        Args:
            small: from `slim`. Under DDP every process passes the same.
            epochs: how many.
            learning_rate: at its peak; default: half of the arguments'.
            distill: the teacher's share of the loss, see `Distillation`; default: as in the arguments.
            teacher: default: the path's own teacher, else the dense net as it is now.
            bn_batches: training batches for the batch norms, 0: leave them; default: as in the arguments.
            output_dir: for the checkpoints; default: `tuned-<parameters>` in the trainer's.
            resume_from_checkpoint: go on from the newest checkpoint there, if there is one. `small` must be the model
                that the run began with.

        Returns:
            `small`.

        Raises:
            ValueError: for numbers out of range, a teacher without a share, checkpoints of an earlier run in the
                folder, a model that is all frozen, a streamed data set, or a subclass that trains in its own way: the
                small net has a Trainer of its own.

        Example:
            >>> small = trainer.finetune(trainer.slim(macs=0.25), epochs=3)  # doctest: +SKIP
            >>> trainer.push_slim(small, "your-name/quarter")                # doctest: +SKIP
        """
        if not any(p.requires_grad for p in instance("small", small, nn.Module, "a model from slim").parameters()):
            raise ValueError("small has no parameter that is trained: call requires_grad_(True) on what is to learn")
        settings = self._settings(epochs, learning_rate, self.args.learning_rate / 2, distill)
        _check_teacher(teacher, settings["distill"])
        size = sum(p.numel() for p in small.parameters())
        folder = Path(output_dir or Path(self.args.output_dir) / f"tuned-{size}")
        if has_checkpoints(folder) and not resume_from_checkpoint:
            raise ValueError(
                f"{folder} has checkpoints of an earlier run: pass resume_from_checkpoint=True to go on with it, or "
                "another output_dir"
            )
        teacher = self._teacher_for(teacher, settings["distill"])
        if not self.measured:
            self.measured = {row.pop("name"): row for row in logged_rows(self, "dense")}
        name = self._name(small)
        with explain_half_precision(small):
            self._estimate_norms(small, self.args.bn_batches if bn_batches is None else bn_batches)
            self._measure(f"{name}, as cut", small)
            self._tune(small, folder, settings, teacher, resume_from_checkpoint)
        self._conclude(small, f"{name}, {epochs:g} more epochs", settings)
        return small

    def train_small(
        self,
        macs: float | None = None,
        params: float | None = None,
        keep: float | None = None,
        *,
        within: float | None = None,
        epochs: float | None = None,
        learning_rate: float | None = None,
        distill: float = 0.0,
        teacher: nn.Module | None = None,
        order: str = "even",
        widths: str = "stock",
        calibration: bool | Iterable[Any] = False,
        score: str = "path",
        bn_batches: int | None = None,
        resume_from_checkpoint: bool = False,
        **settling: Any,
    ) -> nn.Module:
        """From fresh weights to a small net, in one call.

        1. The dense net trains until the units that the budget would keep no longer change, as in `find_ticket`; the
           path is travelled in the first `within` of the run.
        2. The other units are cut out, batch norms re-estimated, and with `calibration` the layers behind refitted.
        3. The small net trains for the rest of the run, on a whole learning rate schedule of its own.

        A run that is killed at any moment and started again with `resume_from_checkpoint=True` goes on to the same
        end. Under DDP every process calls it. The accuracy, where there is an evaluation set, is on the card of
        `push_slim` and in `effdl_report`, beside the step at which the order had settled.

        Args:
            macs, params, keep: the budget, a share of the model in (0, 1]; exactly one.
            within: share of the run after which the units are cut at the latest; default: a fifth, or the budget's
                share where that is less, so that the search takes no more than the small net, but at least a tenth.
            epochs: of the small net; default: what is left of the run.
            learning_rate: of the small net at its peak; default: that of the arguments.
            distill: the teacher's share of the small net's loss, see `Distillation`.
            teacher: default: the path's own teacher if there is one, else the dense net where its search stopped.
            order, widths: see `SparsePath.select`. So early the path's own widths are rough: these lie halfway to one
                share of every group. What that changes is in the benchmarks.
            calibration, score: see `slim`. By default nothing is refitted: the path's nets, which train this long
                afterwards, have been no better for it, see the benchmarks.
            bn_batches: training batches for the batch norms; default: as in the arguments.
            resume_from_checkpoint: go on from what the output folder holds, from the beginning where that is nothing.
            settling: others of `EarlyTicketCallback`: `every`, `threshold`, `window`, `patience`, `min_path`.

        Returns:
            The small net, trained; its report stands in `small.config.effdl_report`.

        Raises:
            ValueError: before any training, for numbers out of range, a path that starts dense, FSDP, a trainer that
                has trained, an output folder with another run's files, `epochs` of a stream, or a subclass that
                trains in its own way.

        Example:
            >>> small = SplitLBITrainer(model, args, train_dataset=rows).train_small(macs=0.25)  # doctest: +SKIP
        """
        budget = dict([one_budget(macs=macs, params=params, keep=keep)])
        settings = self._settings(epochs, learning_rate, self.args.learning_rate, distill)
        one_of("score", score, ("path", *SCORES))
        settling["within"] = longest_search(*budget.values()) if within is None else within
        callback = SettledCallback(self.groups, **budget, order=order, widths=widths, **settling)
        folder = Path(self.args.output_dir) / FOLDER
        self._check_search(folder, resume_from_checkpoint)
        _check_teacher(teacher, settings["distill"])
        bn_batches = self.args.bn_batches if bn_batches is None else bn_batches
        self.args.load_best_model_at_end = False  # the net is taken where the search stops, not where it was best
        how = {"search": callback.settings, "score": score, "bn_batches": bn_batches, "small": dict(settings)}
        if (folder / FILE_NAME).is_file():
            small, facts = self._taken_up(folder, how)
        else:
            self._search(callback, resume_from_checkpoint)
            cut = partial(self.slim, **budget, order=order, widths=widths, calibration=calibration, score=score)
            small, facts = self._cut(callback, cut, folder, how)
        if epochs is None:
            settings["steps"] = max(1, facts["of"] - facts["step"])
        self._tune(small, folder, settings, self._teacher_for(teacher, settings["distill"]), resume_from_checkpoint)
        self._conclude(small, f"{self._name(small)}, trained", settings)
        return small

    # ---- the search, and what is cut

    def _check_search(self, folder: Path, resumes: bool) -> None:
        """Refuse what cannot be searched, or would mix with another run's files."""
        if self.state.global_step > 0:
            raise ValueError(
                f"this trainer has trained for {self.state.global_step} steps, and train_small starts from fresh "
                "weights: make a new one; or take small = trainer.slim(...) and trainer.finetune(small, epochs=...)"
            )
        if self.args.start == "dense":
            raise ValueError(
                "train_small begins with fresh weights, and this path starts dense, from trained ones: take "
                "trainer.train(), small = trainer.slim(...) and trainer.finetune(small, epochs=...), or start='empty'"
            )
        if self.is_fsdp_enabled:
            raise ValueError("train_small cuts whole weights, and FSDP shards them: run it on one process or by DDP")
        is_begun = decided(lambda: (folder / FILE_NAME).is_file() or has_checkpoints(self.args.output_dir))
        if is_begun and not resumes:
            raise ValueError(
                f"{self.args.output_dir} has files of an earlier run: pass resume_from_checkpoint=True to go on with "
                "it, or give the arguments another output_dir"
            )

    def _search(self, callback: SettledCallback, resumes: bool) -> None:
        if self.args.path_share == 1:
            self.args.path_share = callback.settings["within"]
        self.add_callback(callback)
        try:
            self.train(newest(self.args.output_dir, self.args.world_size) if resumes else None)
        finally:
            self.pop_callback(SettledCallback)

    def _cut(self, callback: SettledCallback, cut: Any, folder: Path, how: dict[str, Any]) -> tuple[nn.Module, dict]:
        """The small net at its start; written down by the first process, and as that has it on every other."""
        step, settled = callback.found
        small = cut()
        self._estimate_norms(small, how["bn_batches"])
        report = get_report(small) | {"search": {"step": step, "of": self.state.max_steps, "settled": settled}}
        set_report(small, report)
        self.measured = {}
        self._measure(f"dense, at step {step}, where the order had settled" if settled else f"dense, at step {step}")
        self._measure(f"{self._name(small)}, as cut", small)
        facts = {"step": step, "of": self.state.max_steps, "report": report, "measured": self.measured}
        start = Start(read_weights(self.plain_model()), read_weights(small), facts | {"how": _plain(how)})

        def write() -> None:
            self.path.save(folder)
            start.save(folder)  # last: it says that all is there

        decided(write)
        small.load_state_dict(start.small)
        return small, facts

    def _taken_up(self, folder: Path, how: dict[str, Any]) -> tuple[nn.Module, dict]:
        """The small net of a run that was killed after its search, and trainer and dense net as they were then."""
        start = Start.load(folder)
        facts = start.facts
        changed = [name for name, value in _plain(how).items() if facts["how"][name] != value]
        if changed:
            raise ValueError(
                f"{folder} holds a small net of a run with {changed[0]}={facts['how'][changed[0]]}, not "
                f"{_plain(how)[changed[0]]}: pass the same again, or another output_dir"
            )
        model = self.plain_model()
        sizes = {name: units["after"] for name, units in facts["report"]["units"].items()}
        small = cut_copy(model, self.groups, {name: torch.arange(size) for name, size in sizes.items()})
        forget_report(small)
        if hasattr(small, "config"):
            units = {group.name: group.units for group in self.groups}
            set_config(small, config_ties(model, self.groups), units | sizes)
        set_report(small, facts["report"])
        model.load_state_dict(start.dense), small.load_state_dict(start.small)
        self.create_optimizer_and_scheduler(facts["of"])  # the card speaks of their settings
        self._path, self.measured = SparsePath.load(folder), dict(facts["measured"])
        return small, facts

    # ---- training it

    def _settings(
        self, epochs: float | None, rate: float | None, default: float, distill: float | None
    ) -> dict[str, Any]:
        """Checked; plain numbers, as the report has them."""
        self._check_training(epochs)
        found = {"learning_rate": default if rate is None else real_number("learning_rate", rate)}
        found["distill"] = self.args.distill if distill is None else real_number("distill", distill)
        if epochs is not None:
            found["epochs"] = real_number("epochs", epochs)
        for name in ("epochs", "learning_rate"):
            if name in found and not 0 < found[name] < float("inf"):
                raise ValueError(f"{name}={found[name]}: it must be a positive finite number")
        if not 0 <= found["distill"] <= 1:
            raise ValueError(f"distill={found['distill']}: it is the teacher's share of the loss, in [0, 1]")
        return found

    def _check_training(self, epochs: float | None) -> None:
        """Refuse what the small net's own Trainer would not do."""
        functions = {name: getattr(self, name) for name in TRAINING}
        ours = ("hf_effdl.", "transformers.")
        if own := [name for name, one in functions.items() if not getattr(one, "__module__", "").startswith(ours)]:
            raise ValueError(
                f"{type(self).__name__} has its own {own}, and the small net trains in a Trainer that has not: pass "
                "compute_loss_func=, data_collator= or train_dataset= instead, or train small in a Trainer of yours"
            )
        if epochs is not None and not hasattr(self.train_dataset, "__len__"):
            raise ValueError(
                f"epochs={epochs} of a streamed train_dataset have no known number of steps: pass a data set with a "
                "length, or train small in a Trainer with max_steps"
            )

    def _teacher_for(self, teacher: nn.Module | None, share: float) -> nn.Module | None:
        if share == 0:
            return None
        if teacher is None and self.distillation is not None:
            return self.distillation.teacher
        return frozen_copy(self.plain_model()) if teacher is None else teacher

    def _tune(self, small: nn.Module, folder: Path, settings: dict, teacher: nn.Module | None, resumes: bool) -> None:
        """A whole run of the small net's own."""
        args = copy(self.args)
        args.output_dir, args.learning_rate, args.push_to_hub = str(folder), settings["learning_rate"], False
        args.load_best_model_at_end = self._loads_best
        if "steps" in settings:
            args.max_steps = settings["steps"]
        else:
            args.max_steps, args.num_train_epochs = -1, settings["epochs"]
        tuner = SmallTrainer(
            small.train(),
            args,
            data_collator=self.data_collator,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            processing_class=self.processing_class,
            compute_metrics=self.compute_metrics,
            preprocess_logits_for_metrics=self.preprocess_logits_for_metrics,
            compute_loss_func=self.compute_loss_func,
            optimizer_cls_and_kwargs=self._plain_optimizer(settings["learning_rate"]),
        )
        if teacher is not None:
            tuner.teach(Distillation(teacher, settings["distill"], args.distill_temperature, args.distill_hidden))
        checkpoint = newest(folder, args.world_size) if resumes else None
        if checkpoint and teacher is None:
            refuse_without_teacher(TrainerState.load_from_json(f"{checkpoint}/trainer_state.json"))
        together()
        if checkpoint is None or not load_finished(tuner, checkpoint):
            tuner.train(checkpoint)
        broadcast(dict(small.named_buffers()))  # every process has its own batch statistics
        forget_accelerate(small)
        self.tuner = tuner

    def _plain_optimizer(self, rate: float) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        args = self.args
        if args.base == "sgd":
            return torch.optim.SGD, {"lr": rate, "momentum": args.momentum, "nesterov": args.nesterov}
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW, {"lr": rate, "betas": betas, "eps": args.adam_epsilon}

    def _estimate_norms(self, small: nn.Module, batches: int) -> None:
        if batches:
            with random_state_kept():
                recalibrate_batch_norm(small, training_inputs(self.get_train_dataloader(), batches, small))

    # ---- what is said of it

    def _name(self, small: nn.Module) -> str:
        report = get_report(small) or {}
        what = next((name for name in ("macs", "params") if name in report), None)
        named = {"macs": "MACs", "params": "parameters"}
        return type(small).__name__ if what is None else f"{report[what]['ratio']:.0%} of the {named[what]}"

    def _measure(self, name: str, small: nn.Module | None = None) -> dict[str, float]:
        """A row of the card's table: metrics on the evaluation set, if there is one, and sizes."""
        metrics = {}
        if self.eval_dataset is not None:
            metrics = self.evaluate_model(self.plain_model() if small is None else small)
        report = None if small is None else get_report(small)
        counts = self.groups[0].network.count()
        sizes = counts if report is None else {key: report[key]["after"] for key in SIZES if key in report}
        self.measured[name] = {**metrics, **sizes}
        return metrics

    def _conclude(self, small: nn.Module, name: str, settings: dict[str, Any]) -> None:
        metrics = self._measure(name, small)
        steps = {"steps": self.tuner.state.global_step}
        if (report := get_report(small)) is not None:  # others than from slim have none to be told in
            set_report(small, report | {"tuned": settings | steps | {"metrics": metrics}})


def _check_teacher(teacher: nn.Module | None, share: float) -> None:
    if share == 0 and teacher is not None:
        raise ValueError("teacher= has no say with distill=0: set distill, such as 0.5, or leave the teacher out")


def _plain(how: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(how))
