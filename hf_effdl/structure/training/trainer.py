"""`SplitLBITrainer`: train once, get the model and its path, take smaller models from it."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from huggingface_hub import create_repo, upload_folder
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_effdl.checks import whole_number
from hf_effdl.files import filled_beside, locked, sweep
from hf_effdl.processes import forget_accelerate, is_first, refuse_lone_processes
from hf_effdl.random_state import evaluating, random_state_kept
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.group import Group, Groups
from hf_effdl.structure.optim.sharding import is_sharded
from hf_effdl.structure.optim.split_lbi import SplitLBI
from hf_effdl.structure.path.path import SparsePath
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.slim.report import get_report
from hf_effdl.structure.training.arguments import WALK, SplitLBIArguments, start_for
from hf_effdl.structure.training.callbacks import FSDP1, SplitLBICallback
from hf_effdl.structure.training.card import write_structure_card
from hf_effdl.structure.training.checkpoints import last_complete_checkpoint
from hf_effdl.structure.training.distill import DistillationMixin
from hf_effdl.structure.training.evaluation import example_row, explain_half_precision, loop_metrics, training_inputs
from hf_effdl.structure.training.family import FamilyMixin, check_loadable
from hf_effdl.structure.training.slimming import SlimMixin
from hf_effdl.structure.training.small import SmallMixin
from hf_effdl.weighting import WeightedLossMixin


class SplitLBITrainer(FamilyMixin, SmallMixin, SlimMixin, DistillationMixin, WeightedLossMixin, Trainer):
    """A `Trainer` whose optimizer is `SplitLBI`: one run gives the dense model and the whole path of smaller ones.

    Args:
        groups: the groups to lift; default: found with one training row as example.
        teacher: the model that `args.distill` takes its part of the loss from; default: a frozen copy of the model as
            it was given. No checkpoint holds it.

    All other arguments are those of `Trainer`; `args` must be `SplitLBIArguments`, and there is no
    `optimizer_cls_and_kwargs`. Where the training data has a column `weight`, it weights the rows' losses, see
    `WeightedLossMixin`.

    `results` holds the rows of the model card's table by name, e.g. `{"dense, plain SGD": {"accuracy": 0.98, "params":
    78394}}`; left empty, the card shows `measured`, which `finetune` and `train_small` fill, or else the last
    evaluation of the dense and of the projected model.

    Processes: DDP, and FSDP2 with whole weights on every process at the start. `path`, `slim` and what evaluates are
    then for all processes to call; saving and pushing a slim model is for one.

    Raises:
        ValueError: for an empty training set, DeepSpeed, DataParallel or FSDP1, another optimizer, or no groups.

    Example:
        >>> trainer = SplitLBITrainer(model, SplitLBIArguments("out"), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()                                                                 # doctest: +SKIP
        >>> small = trainer.slim(macs=0.5)                                                  # doctest: +SKIP
    """

    _tag_names = ["hf_effdl", "split-lbi"]

    @wraps(Trainer.__init__)
    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: SplitLBIArguments | None = None,
        *others: Any,
        groups: Sequence[Group] | None = None,
        teacher: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = SplitLBIArguments("trainer_output") if args is None else args
        _check_arguments(args)
        super().__init__(model, args, *others, **kwargs)
        self.args = args = start_for(self.model, args)
        self._check_set_up()
        self.take_teacher(teacher)
        self._groups = groups
        self._found = groups is None
        self._path: SparsePath | None = None
        self._skeleton: nn.Module | None = None
        self.results: dict[str, dict[str, float]] = {}
        self.measured: dict[str, dict[str, float]] = {}
        self.tuner: Trainer | None = None  # of the last small net
        self._loads_best = args.load_best_model_at_end
        self.curve: list[dict[str, float]] = []
        self.callback = SplitLBICallback(groups, self.compute_metrics, args.bn_batches)
        self.callback.evaluate = self._evaluate_again
        self._ignore_keys: list[str] | None = None
        # in front of the trackers, so that they see what it adds to the logs
        self.callback_handler.callbacks.insert(0, self.callback)

    def _check_set_up(self) -> None:
        refuse_lone_processes()
        if self.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                "SplitLBITrainer makes its own optimizer, so optimizer_cls_and_kwargs has no use here; "
                "set SplitLBIArguments, or use a plain Trainer with SplitLBICallback"
            )
        if self.is_deepspeed_enabled:
            raise ValueError("split LBI cannot run under DeepSpeed, which flattens the parameters; use DDP or FSDP2")
        if self.is_fsdp_enabled:
            _check_fsdp(self.accelerator.state.fsdp_plugin)
        if self.optimizer is not None and not isinstance(self.optimizer, SplitLBI):
            raise ValueError(
                f"optimizers= holds {type(self.optimizer).__name__}; SplitLBITrainer trains with SplitLBI; drop it"
            )
        if self.train_dataset is not None and hasattr(self.train_dataset, "__len__") and len(self.train_dataset) == 0:
            raise ValueError("train_dataset is empty; pass a data set with at least one row")

    # ---- training

    @property
    def groups(self) -> Sequence[Group]:
        """The groups of the model; found at first use."""
        if self._groups is None:
            unit = "paper" if self.args.preset == "paper" else "default"
            row = example_row(self.rows(), labels=True)
            self._groups = self.callback.groups = find_groups(self.model, row, unit=unit)
        return self._groups

    def example(self) -> dict[str, Any]:
        """One training (or evaluation) row as the model receives it."""
        return example_row(self.rows(), self.model)

    def rows(self) -> Any:
        """The loader that example rows come from: of training, or else of evaluation."""
        if self.train_dataset is not None:
            return self.get_train_dataloader()
        if self.eval_dataset is None:
            raise ValueError("SplitLBITrainer has neither train_dataset nor eval_dataset to take an example row from")
        if isinstance(self.eval_dataset, Mapping):
            return self.get_eval_dataloader(next(iter(self.eval_dataset.values())))
        return self.get_eval_dataloader()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        if getattr(self, "_found", False):  # the groups of the model that was made before
            self._groups = self.callback.groups = None
        return super().call_model_init(trial)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            params = self.args.split_lbi_params(model, self.groups, self.get_decay_parameter_names(model))
            # nu and path_scale follow when the length of the run is known
            self.optimizer = SplitLBI(params, **self.args.split_lbi_kwargs(self.state.max_steps or 100))
            if self.is_fsdp_enabled:  # next the model is sharded, in place
                self._skeleton = _copy_without_weights(model, "meta")
                # groups that hold the whole tensors would keep them in memory
                self._groups = self.callback.groups = Groups(replace(group, tensors={}) for group in self.groups)
                _answer_for_embeddings(model)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        hyper = self.args.split_lbi_kwargs(num_training_steps)
        names = ["nu", "path_scale", "rise", *(["lam"] if self.args.lam_scale == WALK else [])]
        for group in (self.optimizer if optimizer is None else optimizer).param_groups:
            group |= {name: hyper.get(name) for name in names}
        return super().create_scheduler(num_training_steps, optimizer)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `Trainer`; `resume_from_checkpoint=True` skips a checkpoint whose saving was cut off."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir, self.args.world_size)
        self._path, self.curve = None, []  # what was measured before is of another moment
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        # here all processes are together; cards and slim models are saved by one
        self._path = SparsePath.from_optimizer(self.optimizer, self.groups, self.callback.ties)
        return output

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; a half-precision model that does not take the floats of its batches is told what to be."""
        with explain_half_precision(model, inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    @property
    def path(self) -> SparsePath:
        """The path of the run so far; with `load_best_model_at_end`, after training, that of the best checkpoint.

        During a run with FSDP2 every process must ask.
        """
        best = None if self.is_in_train else self.callback.best(self.args, self.state)
        if best is not None:
            path = SparsePath.load(best)
        elif self._path is not None:
            path = self._path
        elif self.optimizer is None:
            raise ValueError("there is no path yet: call train() first, or SparsePath.load(folder) for a saved one")
        else:
            path = SparsePath.from_optimizer(self.optimizer, self.groups, self.callback.ties)
        path.curve = self.curve
        return path

    # ---- the smaller model

    def plain_model(self) -> nn.Module:
        """The model as an ordinary module: itself, or under FSDP2, where every process must ask, a gathered copy."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not any(is_sharded(p) for p in model.parameters()):
            return model
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        copy = _copy_without_weights(self._skeleton, self.args.device).to(self.args.device)
        copy.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        for buffer, trained in zip(copy.buffers(), model.buffers(), strict=True):
            buffer.copy_(trained)  # also those that no checkpoint holds
        broadcast(dict(copy.named_buffers()))  # every process has its own batch statistics; the first one's are saved
        return copy.train(model.training)

    def evaluation_loop(self, *args: Any, ignore_keys: list[str] | None = None, **kwargs: Any) -> EvalLoopOutput:
        self._ignore_keys = ignore_keys  # the projected model is evaluated in the same way
        return super().evaluation_loop(*args, ignore_keys=ignore_keys, **kwargs)

    def _evaluate_again(self, dataloader: Any) -> dict[str, Any]:
        return loop_metrics(self, dataloader, ignore_keys=self._ignore_keys)

    def evaluate_model(self, model: nn.Module, eval_dataset: Any = None) -> dict[str, Any]:
        """Loss and metrics of any model (a slim one, say) on the evaluation set, by `evaluation_loop` of this trainer.

        Of a dict of evaluation sets every name has the set's in front.
        """
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(datasets, Mapping):
            return {
                f"{name}_{key}": value
                for name in datasets
                for key, value in self.evaluate_model(model, datasets[name]).items()
            }
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            model = deepcopy(model)  # the loop casts it
        prepared = "_is_accelerate_prepared" in vars(model)
        mine = self.model, self.model_wrapped
        self.model = self.model_wrapped = model
        try:
            with evaluating(model), random_state_kept():
                return loop_metrics(self, self.get_eval_dataloader(eval_dataset))
        finally:
            self.model, self.model_wrapped = mine
            if not prepared:
                forget_accelerate(model)

    def evaluate_path(
        self, shares: Sequence[float] = (0.75, 0.5, 0.25, 0.1), budget: str = "macs", bn_batches: int = 8
    ) -> list[dict[str, float]]:
        """Slim the trained model to several budgets and evaluate each, without training: the path's curve.

        Budgets that the model cannot be slimmed to are left out. The points also stand in `trainer.path.curve`.
        """
        self._check_trained("evaluate_path")
        if self.eval_dataset is None:
            raise ValueError(
                "evaluate_path evaluates every size, and there are no rows to do it on: set eval_dataset="
            )
        bn_batches = whole_number("bn_batches", bn_batches, 0)
        curve = []
        for share in shares:
            try:
                timed = 32 if budget == "latency" else 0  # the curve shows no latency
                small = self.slim(**{budget: share}, bn_batches=bn_batches, latency_batch=timed)
            except ValueError as error:
                print(f"left out of the curve: {error}", flush=True)
                continue
            report = get_report(small)
            curve.append(
                {"macs": report["macs"]["ratio"], "params": report["params"]["ratio"], **self.evaluate_model(small)}
            )
        self.curve = curve
        return curve

    def evaluate_masked(self, bn_batches: int = 8) -> dict[str, float]:
        """Loss and metrics of the model projected on the support as it is now."""
        self._check_trained("evaluate_masked")
        bn_batches = whole_number("bn_batches", bn_batches, 0)
        model = self.accelerator.unwrap_model(self.model)
        with random_state_kept(), self.callback.projection(self.args, self.state, model, self.optimizer):
            recalibrate_batch_norm(model, training_inputs(self.get_train_dataloader(), bn_batches, model))
            return self.evaluate_model(model)

    def _check_trained(self, method: str) -> None:
        if self.optimizer is None:
            raise ValueError(f"{method}() needs a trained model: call train() first")

    # ---- Hub

    def card_facts(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """What the card says of this kind of training alone; its pictures go into the folder.

        Returns:
            `{"whole": what the trained net is called, "recipe": more settings, "growth": see the template, or None}`.
        """
        return {"whole": "dense", "recipe": {}, "growth": None}

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """The card of the dense model and its path, and the path's file and picture, in `args.output_dir`."""
        if not is_first():
            return
        self.path.save(self.args.output_dir)  # with the curve, if one was measured after training
        write_structure_card(
            self,
            self.args.output_dir,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset=dataset or dataset_tags,
            dataset_args=dataset_args,
        )

    def save_slim(self, small: nn.Module, folder: str | os.PathLike[str], **card: Any) -> Path:
        """Save a slim model, or an adapter of chosen ranks, with its processor, path, picture and card into a folder.

        `card` takes the arguments of `create_model_card`, `repo_id` for the loading snippet, and `benchmark`, which
        puts results where the Hub's leaderboards look: `{"accuracy": "default"}`, a metric and the task id that the
        `eval.yaml` of the data set has for it.
        """
        check_loadable(small)
        target = Path(folder)
        with locked(target):
            for name in ("README.md", "*.png"):  # of a run that was killed as it wrote the card
                sweep(target, name)
            with filled_beside(target) as part:
                small.save_pretrained(part)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(part)
                self.path.save(part)
            write_structure_card(self, target, small, **card)
        return target

    def push_slim(self, small: nn.Module, repo_id: str, *, private: bool | None = None, **card: Any) -> str:
        """Push a slim model, or an adapter of chosen ranks, with its card to the Hub; returns the commit's URL."""
        repo_id = create_repo(repo_id, private=private, exist_ok=True, token=self.args.hub_token).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_slim(small, folder, **{"model_name": repo_id.split("/")[-1], **card}, repo_id=repo_id)
            return str(
                upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    token=self.args.hub_token,
                    commit_message="Units chosen along the sparse path",
                )
            )


def _check_arguments(args: Any) -> None:
    if not isinstance(args, SplitLBIArguments):
        raise TypeError(f"args must be SplitLBIArguments, not {type(args).__name__}; it takes the same fields")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, for which Trainer would use DataParallel: split LBI cannot "
            "follow its replicas. Start one process per GPU: torchrun --nproc_per_node or accelerate launch"
        )
    if args.fsdp and int(args.fsdp_config.get("version", 2)) == 1:
        raise ValueError(FSDP1)


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version == 1:
        raise ValueError(FSDP1)
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "with cpu_ram_efficient_loading only one process has the weights, but each of them finds the groups and "
            "their scales: set fsdp_cpu_ram_efficient_loading: false in the accelerate config"
        )


def _answer_for_embeddings(model: nn.Module) -> None:
    # accelerate asks for the input embeddings, to shard them apart; convolutional models of transformers raise there
    try:
        getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        model.get_input_embeddings = lambda: None


def _copy_without_weights(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy whose parameters are new, empty ones on a device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in model.parameters()
    }
    return deepcopy(model, memo)
