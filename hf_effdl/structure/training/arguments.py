"""`SplitLBIArguments`: the settings of a split LBI run, and what they mean for a run of a given length."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from hf_effdl.checks import flag, real_number, whole_number
from hf_effdl.processes import is_first
from hf_effdl.structure.groups.finders.lora import has_adapter, lora_groups
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.param_groups import param_groups
from hf_effdl.structure.optim.checks import BASES, LAM_SCALES, STARTS
from hf_effdl.structure.optim.schedule import PATH_LENGTHS, derive_path, threshold_rise, walk_path
from hf_effdl.structure.training.distill import check_distillation


# What the released LeNet recipe of arXiv 2007.02010 sets: rows as units, one absolute threshold, single linear
# weights.
PAPER = {"lam_scale": "none", "nu": 20.0, "path_scale": 1.0}

PRESETS = ("default", "paper")
WALK = "walk"
LEARNING_RATES = {"sgd": 0.1, "adamw": 0.003}
DENSE_LEARNING_RATES = {"sgd": 0.01, "adamw": 1e-4}  # for trained weights
ADAPTER_LEARNING_RATE = 1e-3  # for a fresh LoRA adapter, with AdamW


@dataclass
class SplitLBIArguments(TrainingArguments):
    """`TrainingArguments` with the settings of split LBI. `optim` has no say: the optimizer is `SplitLBI`.

    Args:
        preset: `"default"`, or `"paper"`: the units, thresholds and path of the released code (filter rows, every
            weight of a linear layer alone, threshold `lam`, nu 20), and sizes chosen by entry step.
        kappa: see `SplitLBI`.
        nu: see `SplitLBI`; default: derived from the learning rate schedule, `kappa sum(lr) / ridge_length`.
        path_scale: see `SplitLBI`; default: derived, `path_length lam nu / sum(lr)`.
        lam: see `SplitLBI`.
        lam_scale: see `SplitLBI`; default: what the preset says, `"init"` or `"none"`. `"walk"`: in units of what
            AdamW's steps add up to by chance, see `walk_path`; the default for a fresh LoRA adapter, which starts at
            zero.
        base: `"sgd"` or `"adamw"`, see `SplitLBI`. `adam_beta1`, `adam_beta2` and `adam_epsilon` are its settings.
        start: `"empty"`, a path from no unit to all of them, for fresh weights; `"dense"`, from all of them to few,
            for trained ones, see `SplitLBI`. Default: `SplitLBITrainer` takes `"dense"` for a model that came from
            `from_pretrained` (`is_pretrained`) and says so, else `"empty"`. A resumed run goes on as it started.
        learning_rate: defaults to 0.1 with SGD and 0.003 with AdamW; with a dense start to 0.01 and 0.0001; for a
            fresh LoRA adapter to 0.001.
        momentum: of the SGD base.
        nesterov: of the SGD base.
        decoupled_weight_decay: see `SplitLBI`; default: as the base has it. Lifted tensors get no weight decay.
        fused: `True` for the compiled step, see `SplitLBI`.
        path_length: see `derive_path`; default 2.5, with a dense start 1.25.
        ridge_length: see `derive_path`; default 3.7, with a dense start 1.5, of a fresh LoRA adapter 1.
        path_share: share of the run, from its start, that is as long as one path, for finding tickets early and for
            growing: with 0.2 a unit of unchanged norm enters after `0.2 / path_length` of the summed learning rate.
        max_grad_norm: defaults to 0, no clipping: it would hold back the loss gradient but not the ridge, and fewer
            units would enter.
        bn_batches: training batches for the batch norms of the projected model at each evaluation.
        distill: share of the loss that is what a teacher says, by default the model as it was at the start, see
            `Distillation`; 0 trains without one.
        distill_temperature: see `Distillation`.
        distill_hidden: see `Distillation`.

    Raises:
        ValueError: for a number out of range, an unknown preset, or DeepSpeed.
    """

    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 0.1 (SGD) or 0.003 (AdamW); dense start: 0.01 or 0.0001."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 does not clip."})
    preset: str = field(
        default="default", metadata={"help": "Which settings to start from.", "choices": ["default", "paper"]}
    )
    kappa: float = field(default=1.0, metadata={"help": "Damping of split LBI."})
    nu: float | None = field(default=None, metadata={"help": "Coupling; derived from the schedule if not given."})
    path_scale: float | None = field(default=None, metadata={"help": "Step of the path; derived if not given."})
    lam: float = field(default=1.0, metadata={"help": "Strength of the penalty."})
    lam_scale: str | None = field(
        default=None, metadata={"help": "What thresholds are in units of.", "choices": ["init", "none", "walk"]}
    )
    base: str = field(default="sgd", metadata={"help": "The optimizer below.", "choices": ["sgd", "adamw"]})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of the SGD base."})
    nesterov: bool = field(default=False, metadata={"help": "Nesterov momentum for the SGD base."})
    decoupled_weight_decay: bool | None = field(default=None, metadata={"help": "Default: only for AdamW."})
    fused: bool | None = field(default=None, metadata={"help": "Compiled optimizer step; needs a compiler."})
    start: str | None = field(
        default=None,
        metadata={"help": "Where the path starts; default: dense if pretrained.", "choices": list(STARTS)},
    )
    path_length: float | None = field(
        default=None, metadata={"help": "Path length, in entry (dense start: exit) times of an unchanged unit."}
    )
    ridge_length: float | None = field(default=None, metadata={"help": "Run length, in time constants of the ridge."})
    path_share: float = field(default=1.0, metadata={"help": "Share of the run that is as long as one path."})
    distill: float = field(default=0.0, metadata={"help": "Share of the loss that a teacher has, in [0, 1]."})
    distill_temperature: float = field(default=2.0, metadata={"help": "Temperature of teacher and student."})
    distill_hidden: float = field(default=0.0, metadata={"help": "Factor on the gap between hidden states."})
    bn_batches: int = field(default=8, metadata={"help": "Training batches for the projected model's batch norms."})

    def __post_init__(self) -> None:
        if self.deepspeed:
            raise ValueError(
                "split LBI cannot run under DeepSpeed, which flattens the parameters, so units are gone; "
                "use DDP (accelerate launch or torchrun)"
            )
        if self.base not in BASES:
            raise ValueError(f"base={self.base!r}: it must be one of {BASES}")
        self.takes_default_rate = self.learning_rate is None
        if self.learning_rate is None:
            self.learning_rate = (DENSE_LEARNING_RATES if self.start == "dense" else LEARNING_RATES)[self.base]
        super().__post_init__()
        _check_schedule(self)
        self._check_numbers()
        for name, choices in (
            ("preset", PRESETS),
            ("lam_scale", (None, *LAM_SCALES, WALK)),
            ("start", (None, *STARTS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: it must be one of {choices}")
        self.bn_batches = whole_number("bn_batches", self.bn_batches, 0)
        flag("nesterov", self.nesterov)
        for name in ("fused", "decoupled_weight_decay"):
            if getattr(self, name) is not None:
                flag(name, getattr(self, name))
        if self.nesterov and (self.base != "sgd" or not self.momentum):
            raise ValueError(
                f"nesterov=True needs base='sgd' and momentum > 0; here base={self.base!r} and "
                f"momentum={self.momentum}"
            )

    def _check_numbers(self) -> None:
        for name in ("learning_rate", "kappa", "nu", "path_scale", "lam", "path_length", "ridge_length"):
            value = getattr(self, name)
            if value is not None:
                real_number(name, value)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: it must be a positive finite number")
        check_distillation(self.distill, self.distill_temperature, self.distill_hidden)
        real_number("path_share", self.path_share), real_number("momentum", self.momentum)
        if not 0 < self.path_share <= 1:
            raise ValueError(f"path_share={self.path_share}: it is a share of the run, in (0, 1]")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: it must be in [0, 1)")

    @property
    def distills(self) -> bool:
        """Whether a teacher has a part in the loss."""
        return self.distill > 0 or self.distill_hidden > 0

    def split_lbi_kwargs(self, steps: int) -> dict[str, Any]:
        """The keyword arguments of `SplitLBI` for a run of `steps` optimizer steps.

        Example:
            >>> SplitLBIArguments("out", lr_scheduler_type="constant").split_lbi_kwargs(steps=370)["nu"]
            10.0
        """
        start = self.start or "empty"
        rates = scheduled_rates(self, steps)[: max(1, round(self.path_share * steps))]
        chosen = self._walk(rates) if self.lam_scale == WALK else self._path(sum(rates), start)
        rounded = {name: float(f"{value:.12g}") if name != "lam_scale" else value for name, value in chosen.items()}
        settings = {
            name: getattr(self, name)
            for name in ("kappa", "lam", "base", "momentum", "nesterov", "fused", "decoupled_weight_decay")
        }
        settings |= {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon, "start": start}
        return {"lr": self.learning_rate, **settings, **rounded}

    def _path(self, total: float, start: str) -> dict[str, Any]:
        """Where thresholds are in units of initial norms, or absolute."""
        lengths = {"lam": self.lam, "kappa": self.kappa, "path_length": self.path_length}
        if self.preset == "paper":
            chosen: dict[str, Any] = dict(PAPER)
        else:
            ridge = {"ridge_length": self.ridge_length, "base": self.base, "start": start, "nu": self.nu}
            chosen = {"lam_scale": "init", **derive_path(total, **lengths, **ridge)}
        given = {"nu": self.nu, "path_scale": self.path_scale, "lam_scale": self.lam_scale}
        chosen |= {name: value for name, value in given.items() if value is not None}
        if start == "dense":
            lengths["path_length"] = self.path_length or PATH_LENGTHS[start]
            chosen["rise"] = threshold_rise(total, nu=chosen["nu"], path_scale=chosen["path_scale"], **lengths)
        return chosen

    def _walk(self, rates: Sequence[float]) -> dict[str, Any]:
        """Where thresholds are in units of a random walk."""
        if self.base != "adamw" or self.start == "dense":
            raise ValueError(
                f"lam_scale='walk' with base={self.base!r} and start={self.start!r}: it rests on the size of AdamW's "
                "steps from zero on; pass base='adamw' and leave start open"
            )
        given = {"lam": self.lam, "kappa": self.kappa, "ridge_length": self.ridge_length, "nu": self.nu}
        return {"lam_scale": "none", **walk_path(rates, **given, path_scale=self.path_scale or 1.0)}

    def split_lbi_params(
        self, model: nn.Module, groups: Sequence[Group], decay: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """The param groups of `SplitLBI`: every lifted group, and the other parameters by weight decay."""
        l1 = []
        if self.preset == "paper":
            l1 = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        return param_groups(model, groups, weight_decay=self.weight_decay, decay=decay, l1=l1)


def _check_schedule(args: TrainingArguments) -> None:
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"lr_scheduler_type={schedule!r} sets the learning rate by what the run finds, and the path's length "
            "follows from the learning rates of the whole run: take one that is known beforehand, such as 'cosine' or "
            "'linear'"
        )


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model came from `from_pretrained`.

    It has a name then, and is in evaluation mode, also inside a PEFT model that wraps it. One made from a named
    config alone is in training mode, as is one that was trained since.
    """
    named = getattr(getattr(model, "config", None), "name_or_path", "")
    return bool(named) and not all(module.training for module in model.modules())


def start_for(model: nn.Module, args: SplitLBIArguments) -> SplitLBIArguments:
    """The arguments, or where they leave it open and the model is pretrained, a copy with a dense start, said once.

    Adapters start as `_start_for_adapter` says.
    """
    if has_adapter(model):
        return _start_for_adapter(model, args)
    if args.start is not None or not is_pretrained(model):
        return args
    args = copy(args)
    args.start = "dense"
    if args.takes_default_rate:
        args.learning_rate = DENSE_LEARNING_RATES[args.base]
    if is_first():
        print(
            f"split LBI: the model has weights from {model.config.name_or_path}, so the path starts dense, with "
            f"learning_rate={args.learning_rate:g}; start='empty' trains them as if they were fresh",
            flush=True,
        )
    return args


def _start_for_adapter(model: nn.Module, args: SplitLBIArguments) -> SplitLBIArguments:
    """A copy of the arguments as an adapter needs them: empty from zero on, or dense where it has been trained."""
    from_zero = {group.from_zero for group in lora_groups(model)}
    if len(from_zero) > 1:
        raise ValueError(
            "some modules of the LoRA adapter start at zero and others do not, so their ranks cannot be compared: "
            "train all of them, or begin with a fresh adapter"
        )
    args = copy(args)
    if from_zero == {False}:
        args.start = args.start or "dense"
        rate = DENSE_LEARNING_RATES[args.base] if args.start == "dense" else args.learning_rate
    else:
        _check_fresh_adapter(args)
        args.start, args.lam_scale = "empty", args.lam_scale or WALK
        rate = ADAPTER_LEARNING_RATE
    if args.takes_default_rate:
        args.learning_rate = rate
    return args


def _check_fresh_adapter(args: SplitLBIArguments) -> None:
    """Refuse what cannot be for ranks that start at zero."""
    wrong = None
    if args.base != "adamw":
        wrong = f"base={args.base!r}", "pass base='adamw'"
    elif args.preset != "default":
        wrong = f"preset={args.preset!r}", "leave it out"
    elif args.start == "dense" or args.lam_scale == "init":
        wrong = f"start={args.start!r} and lam_scale={args.lam_scale!r}", "leave both out"
    if wrong:
        raise ValueError(
            f"{wrong[0]} with a fresh LoRA adapter: its ranks start at zero, and thresholds are in units of what "
            f"AdamW's steps add up to by chance; {wrong[1]}"
        )


def scheduled_rates(args: TrainingArguments, steps: int) -> list[float]:
    """The learning rate of each of `steps` optimizer steps, as the arguments schedule it."""
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"args is a {type(args).__name__}: pass the TrainingArguments of the run")
    steps = whole_number("steps", steps, 0)
    _check_schedule(args)
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
