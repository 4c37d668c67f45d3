"""Arms of the benchmarks on LoRA ranks: adapters of one rank everywhere, and ways to as many parameters elsewhere.

All arms adapt the same base on the same rows, in as many steps of AdamW at the same rates: warm-up over a tenth, then
constant, and linear decay over the second half.

    uniform          every module has the same rank from the start; below one, only some modules have one
    SVD              of the trained uniform adapter of the largest rank: the largest singular values over all modules
    effect           of the same adapter: the directions of the largest effect, as `order="effect"` has it
    path             `SplitLBITrainer`, and `select_lora_ranks` at the end
    path, effect     the same with order="effect"
    path, strong ridge  the same with `ridge_length=3.7`, as for other fresh weights
    path, columns    the same with ranks as they were trained, by the path alone, order="dual"
    path, early      `select_lora_ranks` after half of the steps; what is left then trains for the other half
    random, early    the same with numbers of ranks by chance, in the leading singular directions
    AdaLoRA          PEFT's, from the largest rank to a mean rank, with a rate of its own
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from rows import RowFile, mean_and_error
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_effdl import SparsePath, SplitLBIArguments, SplitLBITrainer, find_groups, select_lora_ranks
from hf_effdl.structure.groups.group import rows_of


KEYS = ("arm", "budget", "seed")
# an arm, a share of the parameters of all ranks, a model, and of a path how many ranks entered, of how many
Made = Iterator[tuple[str, float, nn.Module] | tuple[str, float, nn.Module, list[int]]]
STRONG = {"ridge_length": 3.7}


@dataclass(frozen=True)
class Task:
    """What all arms share.

    Args:
        base: makes the model to adapt.
        config: more of `LoraConfig`, with `target_modules`.
        rank: the largest.
        rows: of training, as `collate` takes them.
        collate: rows to a batch.
        steps: of a whole run.
        rates: learning rates, of LoRA and of AdaLoRA.
        batch: rows of a step.
        measure: what is reported of a model.
        few: modules that a uniform adapter of less than one rank adapts.
    """

    base: Callable[[], nn.Module]
    config: Mapping[str, Any]
    rank: int
    rows: Sequence[Mapping[str, Any]]
    collate: Callable[[list], Any]
    steps: int
    rates: tuple[float, float]
    batch: int
    measure: Callable[[nn.Module], Mapping[str, float]]
    few: Sequence[str] = ()


def adapted(task: Task, seed: int, config: type[LoraConfig] = LoraConfig, **settings: Any) -> PeftModel:
    """The base with a fresh adapter."""
    set_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about a name of transformers
        return get_peft_model(task.base(), config(**{**task.config, **settings}))


def schedule(task: Task, part: str) -> dict[str, Any]:
    """Steps and rates of a whole run, or of its first or second half."""
    half, warm = task.steps // 2, max(1, task.steps // 10)
    if part == "first":
        return {"max_steps": half, "warmup_steps": warm, "lr_scheduler_type": "constant_with_warmup"}
    if part == "second":
        return {"max_steps": task.steps - half, "warmup_steps": 2, "lr_scheduler_type": "linear"}
    decay = {"num_stable_steps": half - warm, "num_decay_steps": task.steps - half}
    named = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
    return {"max_steps": task.steps, "warmup_steps": warm, **named}


def fit(
    task: Task,
    model: nn.Module,
    seed: int,
    kind: str = "plain",
    part: str = "all",
    watch: Any = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Trainer:
    """Train a model in place; `more` are arguments of the trainer."""
    path = kind == "path"
    trainer_class, arguments = (SplitLBITrainer, SplitLBIArguments) if path else (Trainer, TrainingArguments)
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            folder,
            per_device_train_batch_size=task.batch,
            train_sampling_strategy="group_by_length",
            learning_rate=task.rates[kind == "adalora"],
            max_grad_norm=0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            **schedule(task, part),
            **({"base": "adamw"} if path else {}),
            **more,
        )
        rows = {"train_dataset": task.rows, "data_collator": task.collate}
        trainer = trainer_class(model, settings, callbacks=[watch] if watch else [], **rows)
        trainer.train()
    model.eval()
    return trainer


# ---- ranks in an order of one's own


def path_of(model: PeftModel, scores: Mapping[str, Tensor]) -> SparsePath:
    """A path that has ranks in the order of some scores."""
    groups, units = find_groups(model), {}
    for group in groups:
        score, none = scores[group.name].float(), torch.full((group.units,), -1)
        units[group.name] = {"dual": score, "threshold": torch.ones_like(score), "weight": score}
        units[group.name] |= {"entered": none, "left": none, "gradient": torch.ones_like(score)}
    return SparsePath(groups, units, 0)


def ordered(model: PeftModel, scores: Mapping[str, Tensor], budget: float) -> PeftModel:
    """The ranks of the highest scores."""
    return select_lora_ranks(model, path_of(model, scores), budget, order="dual")


def by_chance(model: PeftModel, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.units, generator=rng) for group in find_groups(model)}


def norms(model: PeftModel, place: int) -> dict[str, Tensor]:
    """Norm of every rank's slice of B (place 0) or A (place 1), by module."""
    parts = {group.name: (group.slices[place], group.units) for group in find_groups(model)}
    return {name: rows_of(model.get_parameter(p.tensor), p, units).norm(dim=1) for name, (p, units) in parts.items()}


@dataclass(frozen=True)
class Turned:
    """An adapter with its ranks in singular directions, the largest first.

    Args:
        model: that computes what it did.
        sizes: the singular values by module.
        effects: these, times the root mean square of the gradient, where a plain AdamW's state is given.
    """

    model: PeftModel
    sizes: Mapping[str, Tensor]
    effects: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: PeftModel, optimizer: Any = None) -> "Turned":
        turned = select_lora_ranks(model, path_of(model, by_chance(model, 0)), 1.0)
        sizes, others, effects = norms(turned, 0), norms(model, 1), {}
        for group in find_groups(model) if optimizer is not None else ():
            square = optimizer.state[model.get_parameter(group.slices[0].tensor)]["exp_avg_sq"]
            factor = square.mean().sqrt() / others[group.name].square().mean().sqrt()
            effects[group.name] = sizes[group.name] * factor
        return cls(turned, sizes, effects)

    def cut_to(self, ranks: Mapping[str, int]) -> PeftModel:
        """The leading directions, so many of each module."""
        places = {name: torch.arange(len(size)) for name, size in self.sizes.items()}
        path = path_of(self.model, {name: (place < ranks[name]).float() for name, place in places.items()})
        return select_lora_ranks(self.model, path, sum(ranks.values()), unit="ranks", order="dual")


def parameters(model: PeftModel) -> int:
    """Of A and B; AdaLoRA's of the ranks that it left, with their singular values."""
    config = model.active_peft_config
    if config.peft_type != "ADALORA":
        return sum(group.params * group.units for group in find_groups(model))
    count = 0
    for name, ranks in config.rank_pattern.items():
        layer = model.get_submodule(name.partition(".lora_E")[0])
        count += sum(ranks) * (layer.in_features + layer.out_features + 1)
    return count


# ---- arms


def uniform(task: Task, budgets: Sequence[float], seed: int) -> Made:
    model = adapted(task, seed, r=task.rank, lora_alpha=task.rank)
    run = fit(task, model, seed)
    yield "uniform", 1.0, model
    turned = Turned.of(model, run.optimizer.optimizer)
    for budget in budgets:
        yield "SVD", budget, ordered(turned.model, turned.sizes, budget)
        yield "effect", budget, ordered(turned.model, turned.effects, budget)
    for budget in budgets:
        rank = round(task.rank * budget)
        fewer = {} if rank else {"target_modules": list(task.few)}
        model = adapted(task, seed, r=rank or 1, lora_alpha=rank or 1, **fewer)
        fit(task, model, seed)
        yield "uniform", budget, model


def path(task: Task, budgets: Sequence[float], seed: int) -> Made:
    model = adapted(task, seed, r=task.rank, lora_alpha=task.rank)
    run = fit(task, model, seed, "path")
    yield "path", 1.0, model, entered(run)
    for budget in budgets:
        yield "path", budget, select_lora_ranks(model, run.path, budget), entered(run)
        yield "path, effect", budget, select_lora_ranks(model, run.path, budget, order="effect")
        yield "path, columns", budget, select_lora_ranks(model, run.path, budget, order="dual")


def strong(task: Task, budgets: Sequence[float], seed: int) -> Made:
    model = adapted(task, seed, r=task.rank, lora_alpha=task.rank)
    run = fit(task, model, seed, "path", more=STRONG)
    yield "path, strong ridge", 1.0, model, entered(run)
    for budget in budgets:
        yield "path, strong ridge", budget, select_lora_ranks(model, run.path, budget), entered(run)


def entered(run: SplitLBITrainer) -> list[int]:
    """How many ranks are in the support at the end, and how many there are."""
    ratios = torch.cat([unit["dual"] / unit["threshold"] for unit in run.path.units.values()])
    return [int((ratios > 1).sum()), len(ratios)]


def early(task: Task, budgets: Sequence[float], seed: int) -> Made:
    model = adapted(task, seed, r=task.rank, lora_alpha=task.rank)
    run = fit(task, model, seed, "path", "first")
    turned, chance = Turned.of(model), by_chance(model, seed)
    for budget in budgets:
        drawn = ordered(model, chance, budget).effdl_report["units"]
        smaller = {
            "path, early": select_lora_ranks(model, run.path, budget),
            "random, early": turned.cut_to({name: pair["after"] for name, pair in drawn.items()}),
        }
        for name, small in smaller.items():
            fit(task, small, 1000 + seed, part="second")
            yield name, budget, small


class Allocation(TrainerCallback):
    """AdaLoRA decides after every step, while the gradients are there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


def adalora(task: Task, budgets: Sequence[float], seed: int) -> Made:
    times = {"total_step": task.steps, "tinit": task.steps // 10, "tfinal": task.steps // 3}
    for budget in budgets:
        ranks = {"init_r": task.rank, "target_r": max(1, round(task.rank * budget)), "lora_alpha": task.rank}
        model = adapted(task, seed, AdaLoraConfig, **ranks, **times)
        allocator = model.base_model.rankallocator
        allocator.target_bgt = round(task.rank * budget * len(allocator.name_set))  # also below one rank a module
        fit(task, model, seed, "adalora", watch=Allocation())
        yield "AdaLoRA", budget, model


FAMILIES: dict[Callable[..., Made], tuple[str, ...]] = {
    uniform: ("uniform", "SVD", "effect"),
    early: ("path, early", "random, early"),
    path: ("path", "path, effect", "path, columns"),
    strong: ("path, strong ridge",),
    adalora: ("AdaLoRA",),
}
ARMS = tuple(arm for arms in FAMILIES.values() for arm in arms)


def add_rows(task: Task, arms: Sequence[str], budgets: Sequence[float], seed: int, file: RowFile) -> None:
    """The rows of a seed that are missing."""
    for make, names in FAMILIES.items():
        wanted = [(arm, budget, seed) for arm in names if arm in arms for budget in budgets]
        if all(key in file for key in wanted):
            continue
        for arm, budget, model, *support in make(task, budgets, seed):
            if arm in arms and (arm, budget, seed) not in file:
                row = {"arm": arm, "budget": budget, "seed": seed, "params": parameters(model)}
                row |= {"entered": support[0]} if support else {}
                file.add(row | dict(task.measure(model)), hide=())


# ---- the table


def table(rows: Sequence[Mapping[str, Any]], name: str, digits: int = 2) -> str:
    """Means over seeds, by arm and budget, and the difference from SVD, paired by seed."""
    values = {tuple(row[key] for key in KEYS): row[name] for row in rows}
    sizes = {key[:2]: [row["params"] for row in rows if (row["arm"], row["budget"]) == key[:2]] for key in values}
    lines = [
        f"| share of the parameters | arm | parameters | {name} | minus SVD | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        for arm in ARMS:
            mine = {seed: value for (a, b, seed), value in values.items() if (a, b) == (arm, budget)}
            ahead = [v - values["SVD", budget, s] for s, v in mine.items() if ("SVD", budget, s) in values]
            if mine:
                count = sum(sizes[arm, budget]) / len(mine)
                gap = "" if arm == "SVD" or not ahead else cell(ahead, digits, "+")
                cells = [f"{budget:.4g}", arm, f"{count:,.0f}", cell(list(mine.values()), digits), gap, str(len(mine))]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    """`mean ± standard error` over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")
