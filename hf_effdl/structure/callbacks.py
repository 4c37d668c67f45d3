"""Watching the path from inside any transformers Trainer whose optimizer is `SplitLBI`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalPrediction

from hf_effdl.structure.groups import Group, Groups, mask
from hf_effdl.structure.path import SparsePath, unwrap
from hf_effdl.structure.slim import random_state_kept, recalibrate_batch_norm
from hf_effdl.structure.split_lbi import SplitLBI, entry_of_noise, entry_share
from hf_effdl.structure.stock import config_ties
from hf_effdl.structure.tracing import find_groups


NOT_MODEL_INPUTS = ("labels", "label", "weight")


class SplitLBICallback(TrainerCallback):
    """Reports the groups, logs the support, evaluates the projected model and saves the path beside each checkpoint.

    Works in a plain `Trainer` that was given `optimizer_cls_and_kwargs=(SplitLBI, {"params": param_groups(...), ...})`;
    `SplitLBITrainer` adds it by itself. It keeps no state of its own: everything is read from the optimizer.

    Logged with the training loss: `support` (share of all units in the support), `support/<group>` and `coupling`,
    `||W - Gamma||^2 / (2 nu)` summed over the lifted tensors. With every evaluation: `eval_sparse_loss`, and the metrics
    of `compute_metrics` (by default the accuracy of a classifier) under `eval_sparse_`, for the model whose units outside
    the support are silent, its batch norms re-estimated on training rows.

    Args:
        groups: the groups in the optimizer; default: found with a row of the training data as example.
        compute_metrics: as in `Trainer`, for the projected model.
        bn_batches: training batches that the projected model's batch norms are re-estimated on.

    Raises:
        ValueError: at the start of training, if the optimizer is not a `SplitLBI`, lifts nothing, or its path is too short
            for a unit of unchanged norm to enter.

    Example:
        >>> groups = find_groups(model, example)                                               # doctest: +SKIP
        >>> kwargs = {"params": param_groups(model, groups), "lr": 0.1, **derive_path(sum(scheduled_rates(args, steps)))}
        ...                                                                                    # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=rows, callbacks=[SplitLBICallback(groups)],
        ...         optimizer_cls_and_kwargs=(SplitLBI, kwargs))                               # doctest: +SKIP
    """

    def __init__(
        self,
        groups: Sequence[Group] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        bn_batches: int = 8,
    ) -> None:
        self.groups = groups
        self.compute_metrics = compute_metrics
        self.bn_batches = bn_batches
        self.ties: Sequence[Any] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], unwrap(kwargs["optimizer"])
        if not isinstance(optimizer, SplitLBI):
            raise ValueError(
                f"SplitLBICallback needs the SplitLBI optimizer, this Trainer has {type(optimizer).__name__}: pass "
                "optimizer_cls_and_kwargs=(SplitLBI, {...}), or use SplitLBITrainer"
            )
        lifted = [group for group in optimizer.param_groups if group["penalty"] is not None]
        if not lifted:
            raise ValueError("no param group of SplitLBI has a penalty, so nothing would be selected; pass "
                             "params=param_groups(model, find_groups(model))")  # fmt: skip
        if self.groups is None:
            self.groups = find_groups(model, example_row(kwargs["train_dataloader"]))
        self.ties = config_ties(model, self.groups)
        epochs = state.max_steps / _steps_per_epoch(args, kwargs["train_dataloader"], state)
        outlook = _describe_path(scheduled_rates(args, state.max_steps), epochs, lifted[0])
        if state.is_world_process_zero:
            print(f"{Groups(self.groups)}\n{outlook}", flush=True)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        optimizer = kwargs.get("optimizer")
        if optimizer is None or self.groups is None or not logs:
            return
        extra: dict[str, float] = {}
        if "loss" in logs:
            extra |= _support_logs(unwrap(optimizer))
        for prefix in [key.removesuffix("_loss") for key in logs if key.startswith("eval") and key.endswith("_loss")]:
            metrics = self._evaluate_projected(
                kwargs["model"], unwrap(optimizer), kwargs["train_dataloader"], kwargs["eval_dataloader"]
            )
            extra |= {prefix.replace("eval", "eval_sparse", 1) + "_" + name: value for name, value in metrics.items()}
        logs |= extra  # what evaluate() returns and what trackers behind this callback see
        if state.log_history and extra:
            state.log_history[-1] |= extra

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.path(kwargs["optimizer"]).save(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        path = self.path(kwargs["optimizer"])
        if args.should_save:
            path.save(args.output_dir)
        inside = {name: int(support.sum()) for name, support in path.support.items()}
        total = sum(len(support) for support in path.support.values())
        print(f"support after {path.step} steps: {sum(inside.values())} of {total} units: {inside}", flush=True)

    def path(self, optimizer: Any) -> SparsePath:
        """The path as the optimizer has it now."""
        return SparsePath.from_optimizer(optimizer, self.groups, self.ties)

    def _evaluate_projected(
        self, model: nn.Module, optimizer: SplitLBI, train_dataloader: Any, eval_dataloader: Any
    ) -> dict[str, float]:
        with random_state_kept(), projected(model, optimizer, self.groups):
            recalibrate_batch_norm(model, training_inputs(train_dataloader, self.bn_batches, model))
            return evaluate_model(model, eval_dataloader, self.compute_metrics)


def scheduled_rates(args: TrainingArguments, steps: int) -> list[float]:
    """The learning rate of each of `steps` optimizer steps, as the arguments schedule it."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=args.learning_rate)
    scheduler = get_scheduler(
        args.lr_scheduler_type, dummy, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(dummy.param_groups[0]["lr"])
        dummy.step()
        scheduler.step()
    return rates


def _describe_path(rates: Sequence[float], epochs: float, group: Mapping[str, Any]) -> str:
    """One line on the path ahead; raises if it is too short for anything to enter."""
    hyper = {name: group[name] for name in ("lam", "nu", "path_scale")}
    total = sum(rates)
    line = f"split LBI over {len(rates)} steps, summed lr {total:.4g}"
    line += "".join(f", {name}={value:.4g}" for name, value in hyper.items())
    if group["lam_scale"] != "init":
        return line + "; thresholds are not relative to the initial norm, so no entry time can be foretold"
    share = entry_share(total, **hyper)
    if share > 1:
        raise ValueError(
            f"the path is too short: a unit of unchanged norm would enter after {share:.3g} times this run ({line}). Train "
            "longer, raise learning_rate or path_scale, or lower nu; derive_path chooses nu and path_scale that fit"
        )
    step = next(k for k, seen in enumerate(accumulate(rates), 1) if seen >= share * total * (1 - 1e-9))
    line += f": a median unit, of unchanged norm, enters at epoch {epochs * step / len(rates):.2f} of {epochs:.2f}"
    noise = entry_of_noise(total, **hyper, kappa=group["kappa"])
    if noise > 0.8:
        line += (
            f". Warning: units without any signal reach {noise:.2f} of their threshold in a run this short, so the support "
            "says little; the order of the units still does. Train longer or with a higher learning_rate"
        )
    return line


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
            coupling += ((p - optimizer.gamma(p)).square().sum() / (2 * group["nu"])).item()
        state = optimizer.state[group["params"][0]]
        if "norm" in state:
            support = int((state["norm"] > state["threshold"]).sum())
            logs[f"support/{group['name']}"] = support / group["units"]
            inside, units = inside + support, units + group["units"]
    return {"support": inside / max(units, 1), "coupling": coupling, **logs}


@contextmanager
def projected(model: nn.Module, optimizer: SplitLBI, groups: Iterable[Group]) -> Iterator[nn.Module]:
    """The model projected on the support, in place and for the length of a `with` block.

    Units outside the support are silent; weights lifted one at a time are zero where Gamma is. Parameters and buffers
    are put back afterwards.
    """
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with torch.no_grad():
            support = {}
            for group in optimizer.param_groups:
                if group["penalty"] == "l1":
                    for p in group["params"]:
                        p.mul_(optimizer.gamma(p) != 0)
                elif group["penalty"] == "group":
                    state = optimizer.state[group["params"][0]]
                    inside = state["norm"] > state["threshold"] if "norm" in state else torch.zeros(group["units"])
                    support[group["name"]] = inside.nonzero().flatten()
            mask(model, groups, support)
        yield model
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(saved[name])


@torch.no_grad()
def evaluate_model(
    model: nn.Module, dataloader: Iterable[Mapping[str, Any]],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Loss and metrics of a model over an evaluation dataloader, over all processes if the dataloader is prepared.

    Returns:
        `{"loss": ..., **compute_metrics(...)}`; without `compute_metrics` and with class logits also `"accuracy"`.
    """
    modes = [module.training for module in model.modules()]
    model.eval()
    device, accelerator = next(model.parameters()).device, Accelerator()
    losses, logits, labels = [], [], []
    try:
        for batch in dataloader:
            batch = send_to_device(dict(batch), device)
            batch.pop("weight", None)  # evaluation counts every row alike
            output = model(**batch)
            rows = len(batch["labels"])
            gathered = accelerator.gather_for_metrics((output["loss"].float().repeat(rows), output["logits"], batch["labels"]))
            for store, value in zip((losses, logits, labels), gathered, strict=True):
                store.append(value.cpu())
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
    metrics = {"loss": torch.cat(losses).mean().item()}
    logits, labels = torch.cat(logits), torch.cat(labels)
    if compute_metrics is not None:
        found = compute_metrics(EvalPrediction(predictions=logits.float().numpy(), label_ids=labels.numpy()))
        metrics |= {name: float(value) for name, value in found.items()}
    elif logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
        metrics["accuracy"] = (logits.argmax(1) == labels).double().mean().item()
    return metrics


def training_inputs(dataloader: Any, batches: int, model: nn.Module) -> Iterator[dict[str, Any]]:
    """A few batches of training inputs without labels, spread evenly over the data, the same on every process."""
    dataset, size = dataloader.dataset, getattr(dataloader, "batch_size", None) or 1
    if isinstance(dataset, IterableDataset):
        rows: Any = list(islice(dataset, batches * size))
    else:
        count = min(len(dataset), batches * size)
        rows = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    device = next(model.parameters()).device
    for batch in DataLoader(rows, batch_size=size, collate_fn=dataloader.collate_fn):
        yield send_to_device({k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS}, device)


def example_row(dataloader: Any) -> dict[str, Any]:
    """One training row as the model receives it, without its label."""
    dataset = dataloader.dataset
    row = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[0]
    with random_state_kept():
        batch = dataloader.collate_fn([row])
    return {k: v for k, v in batch.items() if k not in NOT_MODEL_INPUTS}
