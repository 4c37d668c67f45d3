"""Three settings of `make_plan`: the default for pools with labels, the one for pools without, the released code's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_effdl.samples.drawing.checks import check_rows, read_column, read_probabilities, row_count
from hf_effdl.samples.drawing.hashing import ranked
from hf_effdl.samples.drawing.plan import Plan, class_groups, make_plan
from hf_effdl.samples.drawing.quotas import check_quotas, class_turns, even_shares
from hf_effdl.samples.scores.noise import NOISY


# Below these accuracies of a model trained on the budget, hard rows hurt; from the second on they pay. Measured on
# digits, banking77 and CIFAR-10 features.
HARD_ROWS_HELP = 0.86
NEARLY_SOLVED = 0.945
# Probabilities of a label that differ by less are equal: the last digits depend on a row's neighbours in its batch.
EQUALLY_LIKELY = 2.0**-12
# Rows a class from which a draw in proportion to uncertainty beats a uniform one under label noise, and from which on
# solved data the most uncertain rows pay; below the second, no draw by uncertainty does. Measured on classes of
# banking77: unclipped draws of 5, 8 and 10 rows a class lost 0.19, 0.13 and 0.08, clipped ones of 3 lost 0.02.
ENOUGH_ROWS = 20
FEW_ROWS = 8


Trial = Callable[[Tensor, Tensor], float]


def default_plan(
    table: Mapping[str, Tensor],
    budget: int,
    *,
    trial: Trial | None = None,
    trials: int = 3,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
    **overrides: Any,
) -> Plan:
    """The default for pools with labels: filter, quotas, clipped uncertainty, and weights by the label's probability.

    The regime follows from three readings, all free of the logits' scale: the noise rate (`table_noise`), the
    accuracy `a0` of a model trained on `budget` class-balanced uniform rows (`trial`), and the rows a class that the
    budget allows:

        "agreement"  noisy (above 0.05), or a0 < 0.86, or no trial, or under 8 rows a class: rows whose label is the
                     probes' vote; class quotas; uniform under 20 rows a class, else `pi ~ min(u_x, median)`
        "unclipped"  clean, a0 >= 0.945, and 20 rows a class: rows with `p_clean >= 1/2`; no quotas; `pi ~ u_x`
        "clipped"    else: rows with `p_clean >= 1/2`; class quotas; `pi ~ min(u_x, median)`

    and in all of them loss weights `p_label`. Where the rows of a class are fewer than its quota, its rows with the
    largest `p_label` join them, those with `p_clean >= 1/2` first and the others only if the budget needs them.

    Quotas aim at a test set whose classes count alike; `quotas="none"` keeps the pool's shares.

    Args:
        table: `label`, `predicted`, `u_x`, `p_label`, `confidence`, `p_clean`.
        budget: rows to choose.
        trial: `(positions, weights) -> accuracy` trains a cheap model on these rows of the pool and measures it on
            the probe set.
        trials: draws that `a0` is the mean of.
        seed, row_ids: see `make_plan`.
        overrides: any argument of `make_plan`, which then wins; another `score` comes without the preset's cap.

    Example:
        >>> n = torch.arange(400) % 4
        >>> table = {"label": n, "predicted": n, "u_x": torch.rand(400), "p_label": torch.rand(400)}
        >>> plan = default_plan(table | {"confidence": torch.ones(400), "p_clean": torch.ones(400)}, 100)
        >>> plan.settings["regime"], len(plan)
        ('agreement', 100)
    """
    budget = check_rows(budget, row_count(table))
    noise = table_noise(table)
    likely = read_probabilities(table, "p_clean") >= 0.5
    shared = {"seed": seed, "row_ids": row_ids}
    accuracy, classes = None, len(read_column(table, "label").unique())
    if noise <= NOISY and trial is not None:
        balance = {"quotas": overrides["quotas"]} if "quotas" in overrides else {}
        accuracy = _tried_out(table, budget, trial, trials, {"keep": likely} | shared | balance)
    regime = "agreement" if noise > NOISY or accuracy is None else _regime(accuracy, budget / classes, "agreement")
    agree = read_column(table, "label") == read_column(table, "predicted")
    keep = agree if regime == "agreement" else likely
    options = {"clip_quantile": 0.5}
    if regime == "unclipped":
        options = {"quotas": "none"}
    elif regime == "agreement" and budget / classes < ENOUGH_ROWS:
        options = {"score": "uniform"}
    arguments = overridden(shared | {"keep": keep} | options, overrides)
    if "keep" not in overrides:
        quotas = arguments.get("quotas", "label")
        arguments["keep"] = filled_up(table, keep, likely, budget, quotas, arguments["seed"], arguments["row_ids"])
    plan, kept = make_plan(table, budget, **arguments), arguments["keep"]
    readings = {
        "preset": "default",
        "regime": regime,
        "noise_rate": noise,
        "trial_accuracy": accuracy,
        "classes": classes,
        "kept_rows": plan.rows if kept is None else int(kept.sum()),
    }
    return replace(plan, settings=readings | plan.settings)


def _regime(accuracy: float | None, rows_a_class: float, weak: str) -> str:
    """How far a draw goes by uncertainty where labels are right; not at all, `weak`, for a weak model or few rows."""
    if rows_a_class < FEW_ROWS or (accuracy is not None and accuracy < HARD_ROWS_HELP):
        return weak
    strong = accuracy is not None and accuracy >= NEARLY_SOLVED and rows_a_class >= ENOUGH_ROWS
    return "unclipped" if strong else "clipped"


def _tried_out(table: Mapping[str, Tensor], budget: int, trial: Trial, trials: int, options: dict[str, Any]) -> float:
    """The mean accuracy of a model trained on uniform draws."""
    first = options["seed"] + 1
    plans = [
        make_plan(table, budget, **(options | {"score": "uniform", "seed": seed}))
        for seed in range(first, first + trials)
    ]
    return sum(trial(plan.positions, plan.weights) for plan in plans) / trials


def filled_up(
    table: Mapping[str, Tensor],
    keep: Tensor,
    likely: Tensor,
    budget: int,
    quotas: str,
    seed: int,
    row_ids: Tensor | Sequence[int | str] | None = None,
) -> Tensor:
    """The rows kept, and for classes that have fewer than their quota the surest of their other rows.

    The probes' vote drops most rows of classes that they are bad at. Drawing other classes' rows instead loses these
    classes. Measured with class counts that fall tenfold and 20 % wrong labels (digits, MNIST): filling up within the
    class is worth 0.006 to 0.039 on a test set of even classes, and costs up to 0.007 on one with the pool's shares.
    On pools of (nearly) even classes it is worth up to 0.007 where the budget nears the rows kept, else nothing.
    """
    groups = torch.zeros_like(keep, dtype=torch.long)
    if quotas in ("label", "predicted"):
        groups = class_groups(table, quotas)
    fits = keep | likely
    if int(fits.sum()) < budget:
        fits = torch.ones_like(fits)
    classes, groups, counts = groups.unique(return_inverse=True, return_counts=True)
    fitting = torch.bincount(groups[fits], minlength=len(classes))
    if quotas != "predicted":
        check_quotas(fitting, budget)
    shares = even_shares(fitting, budget, class_turns(seed, classes))
    p_label = read_probabilities(table, "p_label").double()
    if row_ids is not None:
        p_label = (p_label / EQUALLY_LIKELY).round() * EQUALLY_LIKELY
    surest = ranked(p_label + 2 * keep + 2 * fits, seed, row_ids)
    order = surest[groups[surest].argsort(stable=True)]
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[groups[order]]
    filled = keep.clone()
    filled[order[place < shares[groups[order]]]] = True
    return filled


def active_plan(
    table: Mapping[str, Tensor],
    budget: int,
    *,
    accuracy: float | None = None,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
    **overrides: Any,
) -> Plan:
    """The default for pools without labels: which rows to have labelled.

    Quotas by the class voted for; uniform if the model is weak (accuracy below 0.86) or the budget allows fewer than 8
    rows a class, in proportion to `u_x` if it is strong (0.945 and above) and there are 20 rows a class, else and if
    the accuracy is unknown to `min(u_x, median)`: the rule of `default_plan`, of labels that will be right. Weights
    are 1: a choice by x alone does not bias a model that can fit the pool.

    Args:
        table: `predicted`, `u_x`.
        accuracy: of the probes on rows they were not trained on.
        budget, seed, row_ids, overrides: see `default_plan`.
    """
    budget = check_rows(budget, row_count(table))
    classes = len(read_column(table, "predicted").unique()) if "predicted" in table else 1
    regime = _regime(accuracy, budget / classes, "uniform")
    options = {"uniform": {"score": "uniform"}, "unclipped": {}, "clipped": {"clip_quantile": 0.5}}[regime]
    options = {"quotas": "predicted", "weights": "none", "seed": seed, "row_ids": row_ids} | options
    plan = make_plan(table, budget, **overridden(options, overrides))
    readings = {"preset": "default", "regime": regime, "trial_accuracy": accuracy, "classes": classes}
    return replace(plan, settings=readings | plan.settings)


def decisions_plan(
    table: Mapping[str, Tensor],
    budget: int,
    *,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
    **overrides: Any,
) -> Plan:
    """The default for rows with several labels, or with a label for each token.

    Such rows have no class, so there are neither quotas nor a vote to filter by: `pi ~ min(u_x, median)` over the
    whole pool, and with labels the loss weights `p_label`, the mean probability of a row's labels. No benchmark chose
    this.

    Args:
        table: `u_x`, and with labels `p_label`: means over a row's decisions.
        budget, seed, row_ids, overrides: see `default_plan`.
    """
    weights = "p_label" if "p_label" in table else "none"
    options = {"quotas": "none", "clip_quantile": 0.5, "weights": weights, "seed": seed, "row_ids": row_ids}
    plan = make_plan(table, budget, **overridden(options, overrides))
    return replace(plan, settings={"preset": "default"} | plan.settings)


def paper_plan(
    table: Mapping[str, Tensor],
    budget: int,
    *,
    labelled: bool = True,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
    **overrides: Any,
) -> Plan:
    """The released code's recipe: sequential draws in proportion to `min(u, 0.005)`, weights `1 / max(0.1, u)`.

    With labels by class, without them from the whole pool. Its uncertainties are those of `gauge="drop-first"`. The
    released training loop also divides by the sum of weights of each mini batch; `WeightedTrainer` does not, since
    weights have mean 1 over the selection.
    """
    options = {
        "score": "u_y" if labelled else "u_x",
        "quotas": "label" if labelled else "none",
        "clip": 0.005,
        "beta": 0.1,
        "sampler": "sequential",
        "weights": "damped",
        "seed": seed,
        "row_ids": row_ids,
    }
    plan = make_plan(table, budget, **overridden(options, overrides))
    return replace(plan, settings={"preset": "paper"} | plan.settings)


def table_noise(table: Mapping[str, Tensor], share: float = 0.1, least: int = 100) -> float:
    """The noise rate of `noise.noise_rate`, read off a score table.

    The fitted rate is the mean posterior of a random label, times `(C - 1) / C`.
    """
    label, predicted = read_column(table, "label"), read_column(table, "predicted")
    confidence = read_probabilities(table, "confidence")
    surest = confidence >= confidence.topk(min(len(label), max(least, round(share * len(label))))).values[-1]
    confident = (label[surest] != predicted[surest]).double().mean().item()
    classes = int(torch.maximum(label.max(), predicted.max())) + 1
    # sorted, as a sum depends on the order in its last digit
    random = (1 - read_column(table, "p_clean").double()).sort().values.mean().item()
    return max(confident, random * (classes - 1) / classes)


def overridden(options: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides win; the preset's cap goes with its score, and one given as a value takes the place of a quantile."""
    caps = {"clip", "clip_quantile"}
    if not {*caps, "score"}.isdisjoint(overrides):
        options = {k: v for k, v in options.items() if k not in caps}
    return options | overrides
