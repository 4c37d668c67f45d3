"""Watching the path from inside any transformers Trainer whose optimizer is `SplitLBI`."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction

from hf_effdl.checks import whole_number
from hf_effdl.files import sweep
from hf_effdl.processes import is_first, refuse_lone_processes
from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.finders.lora import has_adapter
from hf_effdl.structure.groups.group import Group, Groups
from hf_effdl.structure.groups.ties import Tie, config_ties
from hf_effdl.structure.optim.schedule import entry_of_noise, entry_share, exit_share
from hf_effdl.structure.optim.sharding import is_sharded, whole
from hf_effdl.structure.optim.split_lbi import SplitLBI, unwrap
from hf_effdl.structure.path.path import FILE_NAME, SparsePath
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.training.arguments import LEARNING_RATES, scheduled_rates
from hf_effdl.structure.training.distill import refuse_without_teacher
from hf_effdl.structure.training.evaluation import evaluator, example_row, loop_metrics, projected, training_inputs


logger = logging.getLogger(__name__)

FSDP1 = (
    "split LBI cannot run under FSDP1, which flattens the parameters, so units are gone: set fsdp_version: 2 in the "
    "accelerate config, or fsdp_config={'version': 2} in the arguments"
)


def check_split_lbi(model: nn.Module, optimizer: Any, purpose: str) -> None:
    """Refuse a run with another optimizer, or under FSDP1; `purpose` begins the sentence, such as "X needs"."""
    if not isinstance(optimizer, SplitLBI):
        raise ValueError(
            f"{purpose} the SplitLBI optimizer, this Trainer has {type(optimizer).__name__}: pass "
            "optimizer_cls_and_kwargs=(SplitLBI, {...}), or use SplitLBITrainer"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(FSDP1)


class SplitLBICallback(TrainerCallback):
    """Reports the groups, logs the support, evaluates the projected model and saves the path beside each checkpoint.

    Works in a plain `Trainer` that was given `optimizer_cls_and_kwargs=(SplitLBI, {"params": param_groups(...),
    ...})`; `SplitLBITrainer` adds it by itself. It keeps no state of its own: everything is read from the optimizer.

    Logged with the training loss: `support` (share of all units in the support), `support/<group>` and `coupling`,
    `||W - Gamma||^2 / (2 nu)` summed over the lifted tensors. With every evaluation: `eval_sparse_loss`, and the
    metrics of `compute_metrics` (by default the accuracy of a classifier) under `eval_sparse_`, for the model whose
    units outside the support are silent, its batch norms re-estimated on training rows.

    Args:
        groups: the groups in the optimizer; default: found with a row of the training data as example.
        compute_metrics: as in `Trainer`, for the projected model.
        bn_batches: training batches that the projected model's batch norms are re-estimated on.
        preprocess_logits_for_metrics: as in `Trainer`, for the projected model.

    The projected model is evaluated by Trainer's own loop. Should that fail, a warning says why and the run goes on.
    After `load_best_model_at_end` everything is of the best checkpoint: weights, path and support.

    Raises:
        ValueError: at the start of training, if the optimizer is not a `SplitLBI`, lifts nothing, its path is too
            short for a unit of unchanged norm to enter, or groups would have to be found in a model that is sharded.

    Example:
        >>> groups = find_groups(model, example)                                               # doctest: +SKIP
        >>> path = derive_path(sum(scheduled_rates(args, steps)))                              # doctest: +SKIP
        >>> kwargs = {"params": param_groups(model, groups), "lr": args.learning_rate, **path} # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=rows, callbacks=[SplitLBICallback(groups)],
        ...         optimizer_cls_and_kwargs=(SplitLBI, kwargs))                               # doctest: +SKIP
    """

    def __init__(
        self,
        groups: Sequence[Group] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        bn_batches: int = 8,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.groups = groups
        self._finds = groups is None
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.evaluate: Callable[[Any], dict[str, Any]] | None = None  # of a trainer that evaluates by itself
        self.is_training = False
        self.compute_metrics = compute_metrics
        self.bn_batches = whole_number("bn_batches", bn_batches, 0)
        self.ties: Sequence[Tie] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_lone_processes()
        model, optimizer = kwargs["model"], unwrap(kwargs["optimizer"])
        check_split_lbi(model, optimizer, "SplitLBICallback needs")
        if not getattr(args, "distills", True):
            refuse_without_teacher(state)
        _warn_if_pretrained(model, optimizer, args.learning_rate)
        lifted = [group for group in optimizer.param_groups if group["penalty"] is not None]
        if not lifted:
            raise ValueError(
                "no param group of SplitLBI has a penalty, so nothing would be selected; pass "
                "params=param_groups(model, find_groups(model))"
            )
        if self.groups is None or (self.evaluate is None and self._finds):  # another model, in a run after the first
            if any(is_sharded(p) for p in model.parameters()):
                raise ValueError(
                    f"{type(model).__name__} is sharded by now, and groups are found in a whole model: call "
                    "find_groups(model, example) before the Trainer starts and pass SplitLBICallback(groups)"
                )
            self.groups = find_groups(model, example_row(kwargs["train_dataloader"], labels=True))
        self.is_training = True
        self.ties = config_ties(model, self.groups)
        epochs = state.max_steps / _steps_per_epoch(args, kwargs["train_dataloader"], state)
        outlook = _describe_path(scheduled_rates(args, state.max_steps), epochs, lifted[0])
        if args.max_grad_norm:
            outlook += (
                f". Note: max_grad_norm={args.max_grad_norm} holds back the loss gradient but not the ridge, so fewer "
                "units enter; max_grad_norm=0 turns it off"
            )
        if is_first():
            print(f"{Groups(self.groups)}\n{outlook}", flush=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            _warn_without_signal(unwrap(kwargs["optimizer"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("optimizer") is None or self.groups is None or not logs:
            return
        optimizer = unwrap(kwargs["optimizer"])
        extra = _support_logs(optimizer) if "loss" in logs else {}
        for prefix in _evaluations(logs):
            metrics = self._evaluate_projected(args, state, **kwargs)
            sparse = prefix.replace("eval", "eval_sparse", 1)
            extra |= {f"{sparse}_{name}": value for name, value in metrics.items()}
        logs |= extra  # what evaluate() returns and what trackers behind this callback see
        if state.log_history and extra:
            state.log_history[-1] |= extra

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = self.path(kwargs["optimizer"])  # on every process: sharded tensors are read together
        if is_first():
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            sweep(folder, FILE_NAME)  # of a run that was killed while it wrote here
            path.save(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_training = False
        path = self.path_of_model(args, state, kwargs["optimizer"])
        if not is_first():
            return
        if args.should_save:
            path.save(args.output_dir)
        inside = {name: int(support.sum()) for name, support in path.support.items()}
        total = sum(len(support) for support in path.support.values())
        print(f"support after {path.step} steps: {sum(inside.values())} of {total} units: {inside}", flush=True)

    def path(self, optimizer: Any) -> SparsePath:
        """The path as the optimizer has it now. With FSDP2 every process must ask."""
        return SparsePath.from_optimizer(optimizer, self.groups, self.ties)

    def path_of_model(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> SparsePath:
        """The path at the moment that the model's weights are of: now, or that of the best checkpoint once loaded."""
        return SparsePath.load(best) if (best := self.best(args, state)) else self.path(optimizer)

    def best(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The checkpoint that the model's weights are from, after `load_best_model_at_end`."""
        if self.is_training or not args.load_best_model_at_end or not state.best_model_checkpoint:
            return None
        folder = Path(state.best_model_checkpoint)
        return folder if (folder / FILE_NAME).is_file() else None

    @contextmanager
    def projection(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any
    ) -> Iterator[nn.Module]:
        """The model projected on the support, both of one moment, for the length of a `with` block."""
        optimizer, best = unwrap(optimizer), self.best(args, state)
        support = None
        if best is not None:
            support = SparsePath.load(best).support
            optimizer = _optimizer_then(optimizer, best)
        with projected(model, optimizer, self.groups, support):
            yield model

    def _evaluate_projected(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> dict[str, Any]:
        model, rows, loader = kwargs["model"], kwargs["train_dataloader"], kwargs["eval_dataloader"]
        try:
            with random_state_kept(), self.projection(args, state, model, kwargs["optimizer"]):
                recalibrate_batch_norm(model, training_inputs(rows, self.bn_batches, model))
                if self.evaluate is not None:
                    return self.evaluate(loader)
                with evaluator(model, args, self.compute_metrics, self.preprocess_logits_for_metrics) as trainer:
                    return loop_metrics(trainer, loader)
        except Exception as error:  # noqa: BLE001 - the run itself is fine, and not to be lost over this
            logger.warning("the projected model was not evaluated: %s: %s", type(error).__name__, error)
            return {}


def _warn_if_pretrained(model: nn.Module, optimizer: SplitLBI, rate: float) -> None:
    """Say what a learning rate for fresh weights does to trained ones."""
    if has_adapter(model):  # its own weights are fresh, and the model's are frozen
        return
    source = getattr(getattr(model, "config", None), "name_or_path", "")
    base = optimizer.param_groups[0]["base"]
    started_empty = optimizer.param_groups[0]["start"] == "empty"
    if source and started_empty and is_first() and rate > LEARNING_RATES[base] / 5:
        logger.warning(
            "the model has weights from %s, and learning_rate=%g is for fresh ones: the path starts with an empty "
            "support, the ridge pulls on every trained unit, and within some dozen steps what was learned can be "
            "gone. Pass start='dense', or a rate of %g or less; see the documentation's page on pretrained models",
            source,
            rate,
            LEARNING_RATES[base] / 10,
        )


def _warn_without_signal(optimizer: SplitLBI) -> None:
    lifted = [group for group in optimizer.param_groups if group["penalty"] is not None]
    silent = [group["name"] for group in lifted if all(p.grad is None for p in group["params"])]
    if silent and is_first():
        logger.warning(
            "no gradient reaches %s: the loss does not use them, so their units would be taken for unneeded; freeze "
            "them before find_groups, or leave them out of groups=",
            ", ".join(silent),
        )


def _optimizer_then(optimizer: SplitLBI, folder: Path) -> SplitLBI:
    """The optimizer as a checkpoint holds it, over the same parameters; needed for weights lifted one at a time."""
    if not any(group["penalty"] == "l1" for group in optimizer.param_groups):
        return optimizer
    file = folder / "optimizer.pt"
    if not file.is_file():
        raise ValueError(
            f"{folder} has no optimizer.pt, so which single weights were zero then is not known; train without "
            "save_only_model"
        )
    then = SplitLBI([dict(group, lam_scale="none") for group in optimizer.param_groups], lr=1.0)
    for group, now in zip(then.param_groups, optimizer.param_groups, strict=True):
        group["lam_scale"] = now["lam_scale"]
    then.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return then


def _evaluations(logs: Mapping[str, Any]) -> list[str]:
    """The prefixes of the evaluations that some logs are of."""
    prefixes = [key.removesuffix("_runtime") for key in logs if key.startswith("eval") and key.endswith("_runtime")]
    return [prefix for prefix in prefixes if f"{prefix}_samples_per_second" in logs]


def _describe_path(rates: Sequence[float], epochs: float, group: Mapping[str, Any]) -> str:
    """One line on the path ahead; raises if it is too short for anything to enter."""
    hyper = {name: group[name] for name in ("lam", "nu", "path_scale")}
    total = sum(rates)
    line = f"split LBI over {len(rates)} steps, summed lr {total:.4g}"
    line += "".join(f", {name}={value:.4g}" for name, value in hyper.items())
    if group["lam_scale"] != "init":
        return line + "; thresholds are not relative to the initial norm, so no entry time can be foretold"
    if group["start"] == "dense":
        return line + _describe_exits(rates, epochs, hyper | {name: group[name] for name in ("rise", "kappa")})
    share = entry_share(total, **hyper)
    if share > 1:
        raise ValueError(
            f"the path is too short: a unit of unchanged norm would enter after {share:.3g} times this run ({line}). "
            "Train longer, raise learning_rate or path_scale, or lower nu; derive_path chooses both so that it fits"
        )
    line += f": a median unit, of unchanged norm, enters at epoch {_epoch_of(share, rates, epochs)}"
    if hyper["nu"] > 100 * group["kappa"] * total:
        return line + ". There is no ridge to speak of: the order of the units says which are large"
    noise = entry_of_noise(total, **hyper, kappa=group["kappa"])
    if noise > 0.8:
        line += (
            f". Warning: units without any signal reach {noise:.2f} of their threshold in a run this short, so the "
            "support says little; the order of the units still does. Train longer or with a higher learning_rate"
        )
    return line


def _describe_exits(rates: Sequence[float], epochs: float, hyper: Mapping[str, float]) -> str:
    """The line's end for a path that starts dense."""
    share = exit_share(sum(rates), **hyper)
    when = f"leaves at epoch {_epoch_of(share, rates, epochs)}" if share <= 1 else "stays"
    return f", rise={hyper['rise']:.4g}: the path starts dense, and a unit of mean, unchanged norm {when}"


def _epoch_of(share: float, rates: Sequence[float], epochs: float) -> str:
    """When a share of the summed learning rate is spent."""
    step = next(k for k, seen in enumerate(accumulate(rates), 1) if seen >= share * sum(rates) * (1 - 1e-9))
    return f"{epochs * step / len(rates):.2f} of {epochs:.2f}"


def _steps_per_epoch(args: TrainingArguments, dataloader: Any, state: TrainerState) -> float:
    try:
        return max(len(dataloader) // args.gradient_accumulation_steps, 1)
    except TypeError:  # a stream has no length: the whole run counts as its epochs
        return state.max_steps / max(state.num_train_epochs, 1)


def _support_logs(optimizer: SplitLBI) -> dict[str, float]:
    logs, inside, units, coupling = {}, 0, 0, 0.0
    for group in optimizer.param_groups:
        if group["penalty"] is None:
            continue
        for p in group["params"]:
            coupling += (whole((p - optimizer.gamma(p)).square().sum()) / (2 * group["nu"])).item()
        state = optimizer.state[group["params"][0]]
        if "norm" in state:
            support = int((state["norm"] > state["threshold"]).sum())
            logs[f"support/{group['name']}"] = support / group["units"]
            inside, units = inside + support, units + group["units"]
    return {"support": inside / max(units, 1), "coupling": coupling, **logs}
