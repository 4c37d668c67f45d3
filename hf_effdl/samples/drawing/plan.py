"""From score columns to a plan: which rows, with which probability, with which weight. Pure; no data are touched.

A score table maps names to tensors of one number a row:

    label, predicted        given class, and the class that the probes vote for
    u_y, u_x                uncertainty with and without the label
    p_label, confidence     mean probability of the given label, and of the likeliest class
    p_clean                 posterior that the label is not drawn at random (see `noise.LabelNoise`)
    entropy, margin, least_confidence, bald, el2n   and any other score of yours

`make_plan` is the toolbox; `default_plan`, `active_plan` and `paper_plan` are three settings of it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_effdl.samples.drawing.draws import (
    _fill,
    _ids,
    check_rows,
    class_quotas,
    clip_scores,
    draw,
    hashed_uniform,
    inclusion_probabilities,
    kish_size,
    loss_weights,
    mix_uniform,
    priority_sample,
    sequential_draw,
    strata,
    top_k,
    without_hardest,
)
from hf_effdl.samples.scores.noise import NOISY


SAMPLERS = ("priority", "poisson", "sequential", "top-k")
QUOTAS = ("label", "predicted", "strata", "none")
# Scores that see the label: drawing by them without weights moves the model towards rows whose label is odd.
LABEL_DEPENDENT = ("u_y", "el2n", "aum", "forgetting", "dyn_unc", "p_label", "p_clean")
# Below these accuracies of a model trained on the budget, hard rows hurt; from the second on they pay. Measured on
# digits, banking77 and CIFAR-10 features.
HARD_ROWS_HELP = 0.86
NEARLY_SOLVED = 0.945
# Rows of a class from which a draw in proportion to uncertainty beats a uniform one.
ENOUGH_ROWS = 20

Trial = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Plan:
    """Rows chosen from a pool.

    Attributes:
        positions: `(r,)` ascending positions in the pool.
        probabilities: `(r,)` inclusion probabilities; NaN where they have no closed form (top-k: 1).
        weights: `(r,)` weights in the loss, mean 1.
        rows: size of the pool.
        settings: everything needed to draw the same rows again from the same scores; plain values.
    """

    positions: Tensor
    probabilities: Tensor
    weights: Tensor
    rows: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def kish(self) -> float:
        """Kish's effective sample size of the weights."""
        return kish_size(self.weights)


def make_plan(
    table: Mapping[str, Tensor],
    budget: int,
    *,
    score: str = "u_x",
    sampler: str = "priority",
    clip: float | None = None,
    clip_quantile: float | None = None,
    uniform_share: float = 0.0,
    quotas: str = "label",
    bins: int = 50,
    keep: Tensor | None = None,
    cut_hardest: float = 0.0,
    weights: str = "p_label",
    beta: float = 0.1,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
    force: bool = False,
) -> Plan:
    """Choose `budget` rows by one score.

    Args:
        table: score columns, see the module.
        budget: rows to choose; with `sampler="poisson"` the expected number.
        score: column to draw in proportion to; `"uniform"` for none.
        sampler: `"priority"` (exact size, known probabilities), `"poisson"`, `"sequential"` (as the released code) or
            `"top-k"` (the largest scores).
        clip, clip_quantile: cap of the score, as a value or as a quantile of the pool.
        uniform_share: part of the draw that is uniform; priority and Poisson.
        quotas: equal shares for the given classes (`"label"`), the classes voted for (`"predicted"`), equal-width
            strata of the score with uniform draws inside (`"strata"`), or none of it (`"none"`).
        bins: number of strata.
        keep: `(N,)` mask; rows outside it are drawn only when the kept ones do not suffice.
        cut_hardest: share of rows with the largest score that counts as not kept.
        weights: see `loss_weights`.
        beta: see `loss_weights`.
        seed: of the hash that draws.
        row_ids: see `priority_sample`.
        force: allow a label-dependent score without weights.

    Raises:
        ValueError: for missing columns, unknown names, a budget out of range or below the number of classes, exact
            weights without known probabilities, or an unweighted draw by a label-dependent score.

    Example:
        >>> table = {"u_x": torch.rand(100), "label": torch.arange(100) % 4}
        >>> len(make_plan(table, 20, weights="none"))
        20
    """
    settings = {name: value for name, value in locals().items() if name not in ("table", "keep", "row_ids", "force")}
    _choice("sampler", sampler, SAMPLERS)
    _choice("quotas", quotas, QUOTAS)
    rows = _rows(table)
    budget = check_rows(budget, rows)
    if score in LABEL_DEPENDENT and weights == "none" and not force:
        raise ValueError(
            f"score={score!r} depends on the label, and weights='none' would train on rows chosen for their odd "
            "labels: the model then does not converge to the pool's, however large the budget. Set weights='damped', "
            "'p_label' or 'exact', or force=True"
        )
    if weights == "exact" and sampler in ("sequential", "top-k"):
        raise ValueError(
            f"weights='exact' needs inclusion probabilities, which sampler={sampler!r} does not have; "
            "use 'priority' or 'poisson'"
        )
    if sampler == "top-k" and quotas == "strata":
        raise ValueError(
            "quotas='strata' draws uniformly inside each stratum, so sampler='top-k' has nothing to rank "
            "by; use sampler='priority'"
        )
    if uniform_share and sampler in ("sequential", "top-k"):
        raise ValueError(
            f"uniform_share={uniform_share} has no effect on sampler={sampler!r}; use 'priority' or 'poisson'"
        )
    if cut_hardest and score == "uniform":
        raise ValueError(
            f"cut_hardest={cut_hardest} needs a score that tells the hardest rows, and score='uniform' "
            "does not; pass keep=without_hardest(scores, share)"
        )
    if sampler == "top-k" and budget < 0.3 * rows:
        warnings.warn(
            f"sampler='top-k' keeps {budget / rows:.0%} of the rows: below 30 % the hardest rows alone do "
            "worse than random ones; draw in proportion to the score, or set sampler='priority', "
            "quotas='strata'",
            stacklevel=2,
        )
    values = torch.ones(rows) if score == "uniform" else _column(table, score).float()
    kept = torch.ones(rows, dtype=torch.bool) if keep is None else torch.as_tensor(keep).clone()
    if kept.dtype != torch.bool or kept.shape != (rows,):
        raise ValueError(f"keep is {kept.dtype} of shape {tuple(kept.shape)}; pass a boolean mask of {rows} rows")
    if cut_hardest:
        kept &= without_hardest(values, cut_hardest)
    groups = _groups(table, quotas, values, bins, kept)
    if clip is not None or clip_quantile is not None:
        values = clip_scores(values, clip, clip_quantile)
    if quotas == "strata":
        values = torch.ones(rows)
    ids = _ids(row_ids, rows)

    positions, probabilities = [], []
    # what the kept rows cannot fill is drawn from the others
    for part, wanted in ((kept, min(budget, int(kept.sum()))), (~kept, max(0, budget - int(kept.sum())))):
        if wanted:
            found, chances = _draw_in_groups(
                values, part, groups, wanted, sampler, uniform_share, seed, ids, quotas == "strata" or bool(positions)
            )
            positions.append(found)
            probabilities.append(chances)
    found, chances = torch.cat(positions), torch.cat(probabilities)
    order = found.argsort()
    found, chances = found[order], chances[order]
    if len(found) == 0:
        raise ValueError(f"a Poisson draw with budget={budget} came out empty; sampler='priority' has an exact size")
    needs = {"damped": "u_y" if "u_y" in table and score != "u_x" else "u_x", "p_label": "p_label"}
    given = _column(table, needs[weights])[found] if weights in needs else None
    return Plan(
        found,
        chances,
        loss_weights(weights, probabilities=chances, uncertainty=given, p_label=given, beta=beta),
        rows,
        settings,
    )


def _draw_in_groups(
    values: Tensor,
    part: Tensor,
    groups: Tensor | None,
    budget: int,
    sampler: str,
    uniform_share: float,
    seed: int,
    ids: Tensor,
    tolerant: bool,
) -> tuple[Tensor, Tensor]:
    """Rows of a part of the pool, group by group; positions and probabilities."""
    inside = part.nonzero().flatten()
    if groups is None:
        return _draw(values, inside, budget, sampler, uniform_share, seed, ids)
    counts = torch.bincount(groups[inside])
    if tolerant:  # strata, or the classes of the few rows that the kept ones leave open, may be more than rows
        quotas = _fill(counts, budget, hashed_uniform(seed, torch.arange(len(counts)), salt=1))
    else:
        quotas = class_quotas(counts, budget, seed=seed)
    found = [
        _draw(values, inside[groups[inside] == g], int(quota), sampler, uniform_share, seed, ids)
        for g, quota in enumerate(quotas.tolist())
        if quota
    ]
    return torch.cat([f for f, _ in found]), torch.cat([p for _, p in found])


def _draw(
    values: Tensor, inside: Tensor, budget: int, sampler: str, uniform_share: float, seed: int, ids: Tensor
) -> tuple[Tensor, Tensor]:
    scores, names = values[inside], ids[inside]
    if sampler in ("sequential", "top-k"):
        chosen = (
            top_k(scores, budget) if sampler == "top-k" else sequential_draw(scores, budget, seed=seed, row_ids=names)
        )
        certain = sampler == "top-k" or budget == len(inside)
        return inside[chosen], torch.full((len(chosen),), 1.0 if certain else float("nan"), dtype=torch.float64)
    if uniform_share:
        # in proportion to the mixture, which priority sampling then follows as far as no row is capped
        scores = mix_uniform(inclusion_probabilities(scores, budget), uniform_share)
    if sampler == "priority":
        chosen, inverse = priority_sample(scores, budget, seed=seed, row_ids=names)
    else:
        chosen, inverse = draw(inclusion_probabilities(scores, budget), seed=seed, row_ids=names)
    return inside[chosen], 1 / inverse


def _groups(table: Mapping[str, Tensor], quotas: str, values: Tensor, bins: int, kept: Tensor) -> Tensor | None:
    if quotas == "none":
        return None
    if quotas == "strata":
        # bins of the kept range: a few far rows that are cut anyway must not squeeze all others into one bin
        inside = values[kept] if kept.any() else values
        return strata(values.clamp(inside.min().item(), inside.max().item()), bins)
    groups = _column(table, quotas).long()
    if (groups < 0).any():
        raise ValueError(
            f"column {quotas!r} holds {int((groups < 0).sum())} negative classes; leave rows without a "
            "label out, or set quotas='predicted' or 'none'"
        )
    return groups


# ---- presets


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

    The regime follows from two readings, both free of the logits' scale: the noise rate (`table_noise`), and the
    accuracy `a0` of a model trained on `budget` class-balanced uniform rows (`trial`):

        "agreement"  noisy (above 0.05), or a0 < 0.86, or no trial: rows whose label is the probes' vote; class
                     quotas; uniform under 20 rows a class, else `pi ~ min(u_x, median)`
        "clipped"    clean and a0 < 0.945: rows with `p_clean >= 1/2`; class quotas; `pi ~ min(u_x, median)`
        "unclipped"  clean and solved: rows with `p_clean >= 1/2`; no quotas; `pi ~ u_x`

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
    budget = check_rows(budget, _rows(table))
    noise = table_noise(table)
    likely = _column(table, "p_clean") >= 0.5
    classes = len(_column(table, "label").unique())
    shared = {"seed": seed, "row_ids": row_ids}
    balance = {"quotas": overrides["quotas"]} if "quotas" in overrides else {}
    accuracy = None
    if noise <= NOISY and trial is not None:
        draws = [
            make_plan(table, budget, score="uniform", keep=likely, **(shared | balance | {"seed": seed + 1 + k}))
            for k in range(trials)
        ]
        accuracy = sum(trial(plan.positions, plan.weights) for plan in draws) / trials
    if noise > NOISY or accuracy is None or accuracy < HARD_ROWS_HELP:
        regime = "agreement"
        keep = _column(table, "label") == _column(table, "predicted")
        options = {"score": "uniform"} if budget / classes < ENOUGH_ROWS else {"clip_quantile": 0.5}
    elif accuracy < NEARLY_SOLVED:
        regime, keep, options = "clipped", likely, {"clip_quantile": 0.5}
    else:
        regime, keep, options = "unclipped", likely, {"quotas": "none"}
    arguments = _override(shared | {"keep": keep} | options, overrides)
    if "keep" not in overrides:
        arguments["keep"] = _filled(table, keep, likely, budget, arguments.get("quotas", "label"), seed)
    plan = make_plan(table, budget, **arguments)
    keep = arguments["keep"]
    found = {
        "preset": "default",
        "regime": regime,
        "noise_rate": noise,
        "trial_accuracy": accuracy,
        "kept_rows": plan.rows if keep is None else int(keep.sum()),
    }
    return Plan(plan.positions, plan.probabilities, plan.weights, plan.rows, found | plan.settings)


def _filled(table: Mapping[str, Tensor], keep: Tensor, likely: Tensor, budget: int, quotas: str, seed: int) -> Tensor:
    """The rows kept, and for classes that have fewer than their quota the surest of their other rows.

    The probes' vote drops most rows of classes that they are bad at. Drawing other classes' rows instead loses these
    classes. Measured with class counts that fall tenfold and 20 % wrong labels (digits, MNIST): filling up within the
    class is worth 0.006 to 0.039 on a test set of even classes, and costs up to 0.007 on one with the pool's shares.
    On pools of (nearly) even classes it is worth up to 0.007 where the budget nears the rows kept, else nothing.
    """
    groups = torch.zeros_like(keep, dtype=torch.long)
    if quotas in ("label", "predicted"):
        groups = _groups(table, quotas, _column(table, "p_label"), 0, keep)
    fits = keep | likely
    if int(fits.sum()) < budget:
        fits = torch.ones_like(fits)
    shares = class_quotas(torch.bincount(groups[fits], minlength=int(groups.max()) + 1), budget, seed=seed)
    surest = (_column(table, "p_label") + 2 * keep + 2 * fits).argsort(descending=True, stable=True)
    order = surest[groups[surest].argsort(stable=True)]
    counts = torch.bincount(groups)
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

    Quotas by the class voted for; uniform if the model is weak (accuracy below 0.86), in proportion to `u_x` if it is
    strong (0.945 and above), else and if the accuracy is unknown to `min(u_x, median)`. Weights are 1: a choice by x
    alone does not bias a model that can fit the pool.

    Args:
        table: `predicted`, `u_x`.
        accuracy: of the probes on rows they were not trained on.
        budget, seed, row_ids, overrides: see `default_plan`.
    """
    if accuracy is not None and accuracy < HARD_ROWS_HELP:
        regime, options = "uniform", {"score": "uniform"}
    elif accuracy is not None and accuracy >= NEARLY_SOLVED:
        regime, options = "unclipped", {}
    else:
        regime, options = "clipped", {"clip_quantile": 0.5}
    options = {"quotas": "predicted", "weights": "none", "seed": seed, "row_ids": row_ids} | options
    plan = make_plan(table, budget, **_override(options, overrides))
    found = {"preset": "default", "regime": regime, "trial_accuracy": accuracy}
    return Plan(plan.positions, plan.probabilities, plan.weights, plan.rows, found | plan.settings)


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
    plan = make_plan(table, budget, **_override(options, overrides))
    return Plan(plan.positions, plan.probabilities, plan.weights, plan.rows, {"preset": "paper"} | plan.settings)


def table_noise(table: Mapping[str, Tensor], share: float = 0.1, least: int = 100) -> float:
    """The noise rate of `noise.noise_rate`, read off a score table.

    The fitted rate is the mean posterior of a random label, times `(C - 1) / C`.
    """
    label, predicted = _column(table, "label"), _column(table, "predicted")
    surest = _column(table, "confidence").topk(min(len(label), max(least, round(share * len(label))))).indices
    confident = (label[surest] != predicted[surest]).double().mean().item()
    classes = int(torch.maximum(label.max(), predicted.max())) + 1
    return max(confident, (1 - _column(table, "p_clean").double()).mean().item() * (classes - 1) / classes)


def _column(table: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in table:
        raise ValueError(
            f"the score table has no column {name!r}, only {sorted(table)}; score the rows first, or "
            "choose another score=, quotas= or weights="
        )
    column = table[name]
    if not column.isfinite().all():
        bad = (~column.isfinite()).nonzero().flatten()
        raise ValueError(
            f"column {name!r} has {len(bad)} NaN or infinite values, the first at row {bad[0]}; score "
            "these rows again, or leave them out"
        )
    return column


def _rows(table: Mapping[str, Tensor]) -> int:
    lengths = {name: len(column) for name, column in table.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the score table has columns of {lengths} rows; pass columns of one length")
    return next(iter(lengths.values()))


def _override(options: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides win; the preset's cap goes with its score, and one given as a value takes the place of a quantile."""
    caps = {"clip", "clip_quantile"}
    if not {*caps, "score"}.isdisjoint(overrides):
        options = {k: v for k, v in options.items() if k not in caps}
    return options | overrides


def _choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: it must be one of {tuple(known)}")
