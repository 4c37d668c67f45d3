"""`SplitLBITrainer`: train once, get the model and its path, take smaller models from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_effdl.structure.callbacks import SplitLBICallback, evaluate_model, example_row, projected, scheduled_rates, training_inputs
from hf_effdl.structure.groups import Group, param_groups
from hf_effdl.structure.path import FILE_NAME, SparsePath, unwrap
from hf_effdl.structure.slim import effdl_report, measure_latency, random_state_kept, recalibrate_batch_norm, slim
from hf_effdl.structure.split_lbi import LAM_SCALES, SplitLBI, derive_path
from hf_effdl.structure.tracing import find_groups


# What the released LeNet recipe of arXiv 2007.02010 sets: rows as units, one absolute threshold, single linear weights.
PAPER = {"lam_scale": "none", "nu": 20.0, "path_scale": 1.0}


@dataclass
class SplitLBIArguments(TrainingArguments):
    """`TrainingArguments` with the settings of split LBI. The base optimizer is SGD, so `learning_rate` defaults to 0.1.

    Args:
        preset: `"default"`, or `"paper"`: the units, thresholds and path of the released code (filter rows, every weight of
            a linear layer alone, threshold `lam`, nu 20), and sizes chosen by entry step.
        kappa: see `SplitLBI`.
        nu: see `SplitLBI`; default: derived from the learning rate schedule, `kappa sum(lr) / ridge_length`.
        path_scale: see `SplitLBI`; default: derived, `path_length lam nu / sum(lr)`.
        lam: see `SplitLBI`.
        lam_scale: see `SplitLBI`; default: what the preset says, `"init"` or `"none"`.
        momentum: see `SplitLBI`.
        path_length: see `derive_path`.
        ridge_length: see `derive_path`.
        bn_batches: training batches for the batch norms of the projected model at each evaluation.

    Raises:
        ValueError: for a number out of range, an unknown preset, or DeepSpeed.
    """

    learning_rate: float = field(default=0.1, metadata={"help": "Learning rate of the SGD base."})
    preset: str = field(default="default", metadata={"help": "'default' or 'paper'."})
    kappa: float = field(default=1.0, metadata={"help": "Damping of split LBI."})
    nu: float | None = field(default=None, metadata={"help": "Coupling; derived from the schedule if not given."})
    path_scale: float | None = field(default=None, metadata={"help": "Step of the path; derived if not given."})
    lam: float = field(default=1.0, metadata={"help": "Strength of the penalty."})
    lam_scale: str | None = field(default=None, metadata={"help": "'init' or 'none'."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of the SGD base."})
    path_length: float = field(default=2.5, metadata={"help": "Path length, in entry times of an unchanged unit."})
    ridge_length: float = field(default=3.7, metadata={"help": "Run length, in time constants of the ridge."})
    bn_batches: int = field(default=8, metadata={"help": "Training batches for the projected model's batch norms."})

    def __post_init__(self) -> None:
        if self.deepspeed:
            raise ValueError("split LBI cannot run under DeepSpeed, which flattens the parameters so that units are gone; "
                             "use DDP (accelerate launch or torchrun)")  # fmt: skip
        super().__post_init__()
        if self.preset not in ("default", "paper"):
            raise ValueError(f"preset={self.preset!r}: it must be 'default' or 'paper'")
        for name in ("learning_rate", "kappa", "nu", "path_scale", "lam", "path_length", "ridge_length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: it must be a positive finite number")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: it must be in [0, 1)")
        if self.lam_scale not in (None, *LAM_SCALES):
            raise ValueError(f"lam_scale={self.lam_scale!r}: it must be one of {LAM_SCALES}")

    def split_lbi_kwargs(self, steps: int) -> dict[str, Any]:
        """The keyword arguments of `SplitLBI` for a run of `steps` optimizer steps.

        Example:
            >>> SplitLBIArguments("out", lr_scheduler_type="constant").split_lbi_kwargs(steps=370)["nu"]
            10.0
        """
        given = {"nu": self.nu, "path_scale": self.path_scale, "lam_scale": self.lam_scale}
        if self.preset == "paper":
            base: dict[str, Any] = dict(PAPER)
        else:
            total = sum(scheduled_rates(self, steps))
            lengths = {"path_length": self.path_length, "ridge_length": self.ridge_length}
            base = {"lam_scale": "init", **derive_path(total, lam=self.lam, kappa=self.kappa, **lengths)}
            if self.nu is not None:
                base["path_scale"] = self.path_length * self.lam * self.nu / total
        chosen = base | {name: value for name, value in given.items() if value is not None}
        rounded = {name: float(f"{value:.12g}") if name != "lam_scale" else value for name, value in chosen.items()}
        return {"lr": self.learning_rate, "kappa": self.kappa, "momentum": self.momentum, "lam": self.lam, **rounded}

    def split_lbi_params(
        self, model: nn.Module, groups: Sequence[Group], decay: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """The param groups of `SplitLBI`: every lifted group, and the other parameters by weight decay."""
        l1 = []
        if self.preset == "paper":
            l1 = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        return param_groups(model, groups, weight_decay=self.weight_decay, decay=decay, l1=l1)


class SplitLBITrainer(Trainer):
    """A `Trainer` whose optimizer is `SplitLBI`: one run gives the dense model and the whole path of smaller ones.

    Args:
        groups: the groups to lift; default: found with one training row as example.
        results: rows of the model card's table, by name; `evaluate` and `slim` add theirs, a baseline measured elsewhere
            can be added.

    All other arguments are those of `Trainer`; `args` must be `SplitLBIArguments`.

    Raises:
        ValueError: for an empty training set, DeepSpeed or DataParallel, another optimizer, or no groups.

    Example:
        >>> trainer = SplitLBITrainer(model, SplitLBIArguments("out"), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()                                                                 # doctest: +SKIP
        >>> small = trainer.slim(macs=0.5)                                                  # doctest: +SKIP
    """

    _tag_names = ["hf_effdl", "split-lbi"]

    def __init__(
        self, model: Any = None, args: SplitLBIArguments | None = None, *more: Any,
        groups: Sequence[Group] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        args = SplitLBIArguments("trainer_output") if args is None else args
        if not isinstance(args, SplitLBIArguments):
            raise TypeError(f"args must be SplitLBIArguments, not {type(args).__name__}; it takes the same fields")
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs, for which Trainer would use DataParallel: split LBI cannot follow its "
                "replicas. Start one process per GPU: torchrun --nproc_per_node or accelerate launch"
            )
        super().__init__(model, args, *more, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError("split LBI cannot run under DeepSpeed, which flattens the parameters; use DDP")
        if self.optimizer is not None and not isinstance(self.optimizer, SplitLBI):
            raise ValueError(f"optimizers= holds {type(self.optimizer).__name__}; SplitLBITrainer trains with SplitLBI")
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__") and len(self.train_dataset) == 0:
            raise ValueError("train_dataset is empty; pass a data set with at least one row")
        self._groups = groups
        self.results: dict[str, dict[str, float]] = {}
        self.curve: list[dict[str, float]] = []
        self.callback = SplitLBICallback(groups, self.compute_metrics, args.bn_batches)
        # in front of the trackers, so that they see what it adds to the logs
        self.callback_handler.callbacks.insert(0, self.callback)

    # ---- training

    @property
    def groups(self) -> Sequence[Group]:
        """The groups of the model; found at first use."""
        if self._groups is None:
            unit = "paper" if self.args.preset == "paper" else "default"
            self._groups = self.callback.groups = find_groups(self.model, self.example(), unit=unit)
        return self._groups

    def example(self) -> dict[str, Any]:
        """One training (or evaluation) row as the model receives it."""
        if self.train_dataset is not None:
            return example_row(self.get_train_dataloader())
        if self.eval_dataset is None:
            raise ValueError("SplitLBITrainer has neither train_dataset nor eval_dataset to take an example row from")
        return example_row(self.get_eval_dataloader())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            params = self.args.split_lbi_params(model, self.groups, self.get_decay_parameter_names(model))
            # nu and path_scale follow when the length of the run is known
            self.optimizer = SplitLBI(params, **self.args.split_lbi_kwargs(max(self.state.max_steps, 1)))
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        hyper = self.args.split_lbi_kwargs(num_training_steps)
        for group in (self.optimizer if optimizer is None else optimizer).param_groups:
            group |= {name: hyper[name] for name in ("nu", "path_scale")}
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, resume_from_checkpoint: str | bool | None = None, *more: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, self.args.world_size)
        return super().train(resume_from_checkpoint, *more, **kwargs)

    @property
    def path(self) -> SparsePath:
        """The path of the run so far; with `load_best_model_at_end`, after training, that of the best checkpoint."""
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and not self.is_in_train and best and (Path(best) / FILE_NAME).is_file():
            path = SparsePath.load(best)
        elif self.optimizer is None:
            raise ValueError("there is no path yet: call train() first, or SparsePath.load(folder) for a saved one")
        else:
            path = SparsePath.from_optimizer(self.optimizer, self.groups, self.callback.ties)
        path.curve = self.curve
        return path

    # ---- the smaller model

    def slim(
        self,
        macs: float | None = None,
        params: float | None = None,
        latency: float | None = None,
        keep: float | None = None,
        *,
        order: str | None = None,
        widths: str = "stock",
        round_to: int = 1,
        bn_batches: int = 0,
        latency_batch: int = 32,
    ) -> nn.Module:
        """A physically smaller model that holds one budget, chosen along the path.

        Args:
            macs, params, latency, keep: the budget, a share in (0, 1]; exactly one. See `SparsePath.select`.
            order: see `SparsePath.scores`; default `"dual"`, or `"entry"` with the paper preset.
            widths: `"stock"`: sizes that the stock config can say, so that anyone's `from_pretrained` loads it; `"free"`:
                every group on its own, which `from_pretrained` loads after `import hf_effdl`.
            round_to: sizes are multiples of this.
            bn_batches: re-estimate the batch norms on so many training batches (0: keep the dense model's statistics).
            latency_batch: rows per forward pass when latency is measured.

        Returns:
            The smaller model; the report (MACs, parameters and latency before and after, units) stands in
            `small.config.effdl_report` (`small.effdl_report` for a module without a config).
        """
        path, model = self.path, self.accelerator.unwrap_model(self.model)
        inputs = self._latency_inputs(latency_batch)
        order = order or ("entry" if self.args.preset == "paper" else "dual")
        budget = {"macs": macs, "params": params, "latency": latency, "keep": keep}

        def measure(kept: Mapping[str, Tensor]) -> float:
            whole, part = measure_latency([model, slim(model, self.groups, kept)], inputs)
            return part / whole

        options = {"order": order, "widths": widths, "round_to": round_to, "measure": measure}
        # one process decides: measured latencies differ between processes, the chosen units must not
        [kept] = broadcast_object_list([path.select(**budget, **options)])
        small = slim(model, self.groups, kept)
        if bn_batches:
            with random_state_kept():
                recalibrate_batch_norm(small, training_inputs(self.get_train_dataloader(), bn_batches, small))
        asked = {name: value for name, value in budget.items() if value is not None}
        [report] = broadcast_object_list([effdl_report(model, small, inputs, self.groups, asked)])
        getattr(small, "config", small).effdl_report = report
        return small

    def _latency_inputs(self, rows: int) -> dict[str, Any]:
        example = self.example()
        device = next(self.model.parameters()).device
        return {
            name: value.repeat(rows, *[1] * (value.ndim - 1)).to(device) if isinstance(value, Tensor) else value
            for name, value in example.items()
        }

    @torch.no_grad()
    def evaluate_model(self, model: nn.Module, eval_dataset: Any = None) -> dict[str, float]:
        """Loss and metrics of any model (a slim one, say) on the evaluation set."""
        return evaluate_model(model, self.get_eval_dataloader(eval_dataset), self.compute_metrics)

    def evaluate_path(
        self, shares: Sequence[float] = (0.75, 0.5, 0.25, 0.1), budget: str = "macs", bn_batches: int = 8
    ) -> list[dict[str, float]]:
        """Slim the trained model to several budgets and evaluate each, without training: the path's curve.

        Budgets that the model cannot be slimmed to are left out. The points also stand in `trainer.path.curve`.
        """
        curve = []
        for share in shares:
            try:
                small = self.slim(**{budget: share}, bn_batches=bn_batches)
            except ValueError as error:
                print(f"left out of the curve: {error}", flush=True)
                continue
            report = getattr(small, "config", small).effdl_report
            curve.append({
                "macs": report["macs"]["ratio"], "params": report["params"]["ratio"], **self.evaluate_model(small)
            })  # fmt: skip
        self.curve = curve
        return curve

    def evaluate_masked(self, bn_batches: int = 8) -> dict[str, float]:
        """Loss and metrics of the model projected on the support as it is now."""
        model = self.accelerator.unwrap_model(self.model)
        with random_state_kept(), projected(model, unwrap(self.optimizer), self.groups):
            recalibrate_batch_norm(model, training_inputs(self.get_train_dataloader(), bn_batches, model))
            return self.evaluate_model(model)

    # ---- Hub

    def create_model_card(self, *more: Any, **kwargs: Any) -> None:
        """The card of the dense model and its path; see `hf_effdl.hub.cards`."""
        if self.is_world_process_zero():
            from hf_effdl.hub.cards import write_structure_card

            self.path.save(self.args.output_dir)  # with the curve, if one was measured after training
            write_structure_card(self, self.args.output_dir, None, *more, **kwargs)

    def save_slim(self, small: nn.Module, folder: str, **card: Any) -> Path:
        """Save a slim model with its processor, path, picture and card into a folder."""
        from hf_effdl.hub.cards import write_structure_card

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        small.save_pretrained(target)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(target)
        self.path.save(target)
        write_structure_card(self, target, small, **card)
        return target

    def push_slim(self, small: nn.Module, repo_id: str, *, private: bool | None = None, **card: Any) -> str:
        """Push a slim model with its card to the Hub; returns the commit's URL."""
        import tempfile

        from huggingface_hub import create_repo, upload_folder

        repo_id = create_repo(repo_id, private=private, exist_ok=True, token=self.args.hub_token).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_slim(small, folder, model_name=repo_id.split("/")[-1], repo_id=repo_id, **card)
            return str(upload_folder(repo_id=repo_id, folder_path=folder, token=self.args.hub_token,
                                     commit_message="Slim model chosen along its sparse path"))  # fmt: skip


def last_complete_checkpoint(folder: str, processes: int = 1) -> str:
    """The newest checkpoint whose saving was not cut off.

    Trainer writes its state after everything else, so a checkpoint is complete once that file reads.

    Raises:
        ValueError: if there is none.
    """
    checkpoints = sorted(
        Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True
    )
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        if processes == 1 or all((checkpoint / f"rng_state_{rank}.pth").is_file() for rank in range(processes)):
            return str(checkpoint)
    raise ValueError(f"no complete checkpoint in {folder} ({len(checkpoints)} begun); train without resume_from_checkpoint")
