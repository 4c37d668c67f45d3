"""What `selection_digits.py` and `selection_banking77.py` share: the arms and the table.

An arm makes a plan from a pair: a split with its own flips, probes and initialisation. Of a pair the arms read

- `table`: the columns of scores that probes give, one value a row of the pool; `columns`: the same and those that
  need a net trained on the pool;
- `pool` and `probe`: inputs and labels; `own_p_label`: of the probe rows, the probability of their label by the
  probes that did not train on them;
- `near_median`: large where a row's distance to its class centre is near the median one;
- `trial`: positions and weights -> accuracy on the probe set, of a model trained on these rows.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from rows import mean_and_error
from torch import Tensor

from hf_effdl import Plan, default_plan, make_plan, paper_plan
from hf_effdl.samples.drawing.quotas import without_hardest
from hf_effdl.samples.drawing.weights import loss_weights


Rows = tuple[Tensor, Tensor]  # inputs and labels


class Pair(Protocol):
    pool: Rows
    probe: Rows
    table: dict[str, Tensor]
    columns: dict[str, Tensor]
    own_p_label: Tensor
    near_median: Tensor

    def trial(self, positions: Tensor, weights: Tensor) -> float: ...


Select = Callable[[Pair, int, int], Plan]


def plan(**options) -> Select:
    def select(pair: Pair, budget: int, seed: int) -> Plan:
        table = pair.columns if str(options.get("score", "")).endswith("(pool)") else pair.table
        return make_plan(table, budget, seed=seed, **options)

    return select


def kept(mask: Callable[[dict[str, Tensor]], Tensor], **options) -> Select:
    return lambda pair, budget, seed: make_plan(
        pair.table, budget, seed=seed, **({"keep": mask(pair.table), "score": "uniform"} | options)
    )


def default(with_trial: bool = True, **options) -> Select:
    return lambda pair, budget, seed: default_plan(
        pair.table, budget, trial=pair.trial if with_trial else None, seed=seed, **options
    )


def paper(gauge: str) -> Select:
    return lambda pair, budget, seed: paper_plan(
        pair.table | ({"u_y": pair.table["u_y_drop_first"]} if gauge == "drop-first" else {}), budget, seed=seed
    )


def moderate(pair: Pair, budget: int, seed: int) -> Plan:
    table = pair.table | {"near": pair.near_median}
    return make_plan(table, budget, score="near", sampler="top-k", quotas="none", weights="none")


def agree(table: dict[str, Tensor]) -> Tensor:
    return table["label"] == table["predicted"]


def likely(table: dict[str, Tensor]) -> Tensor:
    return table["p_clean"] >= 0.5


def without_doubted(table: dict[str, Tensor]) -> Tensor:
    return without_hardest(1 - table["p_label"], 0.2)


FREE = {"quotas": "none", "weights": "none", "force": True}
CCS = {"quotas": "strata", "cut_hardest": 0.2, "weights": "none", "force": True}
POOL = ("EL2N", "AUM", "forgetting", "Dyn-Unc")
DEFAULT = "default"
# in order of the tables
ARMS: dict[str, Select] = {
    DEFAULT: default(),
    "default, no trial": default(with_trial=False),
    "default, no quotas": default(quotas="none"),
    "AG50: agree, min(u_x, median), p_label": kept(agree, score="u_x", clip_quantile=0.5),
    "AG: agree, uniform, p_label": kept(agree),
    "agree, uniform, no weights": kept(agree, weights="none"),
    "likely, draw by p_label, p_label": kept(likely, score="p_label"),
    "likely, draw by p_label, no weights": kept(likely, score="p_label", weights="none", force=True),
    "likely, min(u_x, median), p_label": kept(likely, score="u_x", clip_quantile=0.5),
    "likely, uniform, p_label": kept(likely),
    "uniform by class, p_label": plan(score="uniform"),
    "min(u_x, median), p_label": plan(clip_quantile=0.5),
    "u_x, p_label, no quotas": plan(quotas="none"),
    "0.8 u_x + 0.2 uniform, p_label, no quotas": plan(quotas="none", uniform_share=0.2),
    "drop lowest 20 % p_label, uniform": kept(without_doubted, weights="none"),
    "A uniform by class": plan(score="uniform", weights="none"),
    "uniform": plan(score="uniform", **FREE),
    "B uniform by class, damped": plan(score="uniform", weights="damped"),
    "C min(u_y, .005), no weights": plan(score="u_y", clip=0.005, weights="none", force=True),
    "D authors' recipe": paper("drop-first"),
    "D' authors' recipe, invariant": paper("invariant"),
    "E min(u_y, .005), exact": plan(score="u_y", clip=0.005, weights="exact"),
    "F u_y, exact": plan(score="u_y", weights="exact"),
    "G u_x, exact": plan(quotas="none", weights="exact"),
    "entropy, sampled": plan(score="entropy", **FREE),
    "entropy, top": plan(score="entropy", sampler="top-k", **FREE),
    "1 - margin, sampled": plan(score="one_minus_margin", **FREE),
    "1 - margin, top": plan(score="one_minus_margin", sampler="top-k", **FREE),
    "least confidence, sampled": plan(score="least_confidence", **FREE),
    "least confidence, top": plan(score="least_confidence", sampler="top-k", **FREE),
    "EL2N of probes, top": plan(score="el2n", sampler="top-k", **FREE),
    "EL2N of probes, CCS": plan(score="el2n", **CCS),
    "u_y, CCS": plan(score="u_y", **CCS),
    "u_y, CCS, 20 strata": plan(score="u_y", bins=20, **CCS),
    "moderate coreset": moderate,
    **{f"{name}, top (pool)": plan(score=f"{name} (pool)", sampler="top-k", **FREE) for name in POOL},
    **{f"{name}, CCS (pool)": plan(score=f"{name} (pool)", **CCS) for name in POOL},
}


# ---- arms apart: they train on more rows than the budget


def with_probe_rows(pair: Pair, plan: Plan, weighted: bool) -> Rows:
    """A plan and the probe set, as positions in the pool followed by the probe set, and weights."""
    positions = torch.cat([plan.positions, len(pair.pool[1]) + torch.arange(len(pair.probe[1]))])
    if not weighted:
        return positions, torch.ones(len(positions))
    return positions, loss_weights("p_label", p_label=torch.cat([pair.table["p_label"], pair.own_p_label])[positions])


def whole_pool(pair: Pair, weights: str) -> Rows:
    return torch.arange(len(pair.pool[1])), loss_weights(weights, p_label=pair.table["p_label"])


APART: dict[str, Callable[[Pair, int, int], Rows]] = {
    "P uniform by class + probe set": lambda pair, budget, seed: with_probe_rows(
        pair, ARMS["A uniform by class"](pair, budget, seed), False
    ),
    "P default + probe set, p_label": lambda pair, budget, seed: with_probe_rows(
        pair, ARMS[DEFAULT](pair, budget, seed), True
    ),
}
ENSEMBLE = "the probes' mean prediction"


def facts(plan: Plan, noise: Mapping[str, float]) -> dict:
    """What the default preset read off the data, for its row."""
    trial = plan.settings["trial_accuracy"]
    return {"regime": plan.settings["regime"], "trial": trial and round(trial, 4), **noise}


# ---- the table


Column = dict[str, dict[int, float]]  # arm -> pair -> accuracy


def best_arm(column: Column) -> str | None:
    """The arm of highest mean among those that train on the budget and have all pairs."""
    full = max(map(len, column.values()))
    means = {arm: statistics.mean(of.values()) for arm, of in column.items() if arm in ARMS and len(of) == full}
    return max(means, key=means.__getitem__) if means else None


def compare(mine: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Mean and standard error of the paired difference."""
    return mean_and_error([mine[pair] - other[pair] for pair in mine if pair in other])


def print_arms(columns: Mapping[str, Column], arms: Sequence[str], apart: Sequence[str]) -> None:
    """One line per arm: mean accuracy of every column (paired difference to the column's best arm +- its error)."""
    print(f"| arm | {' | '.join(columns)} | worst |")
    print("|---|" + "---|" * (len(columns) + 1))
    for arm in [*arms, None, *apart]:
        if arm is None:
            print("| *apart: more rows or labels in training* |" + " |" * (len(columns) + 1))
            continue
        cells, worst = [], []
        for column in columns.values():
            best = best_arm(column)
            if arm not in column:
                cells.append("-")
                continue
            difference, error = compare(column[arm], column[best])
            worst.append(difference)
            mean = f"{statistics.mean(column[arm].values()):.3f}"
            cells.append(f"**{mean}**" if arm == best else f"{mean} ({difference:+.3f}±{error:.3f})")
        if worst:
            print(f"| {arm} | {' | '.join(cells)} | {min(worst):+.3f} |")


def print_default(columns: Mapping[str, Column], rows_of: Mapping[str, list[dict]]) -> None:
    """One line per column: how the default preset did, and what it read off the data."""
    print("\n| cell | pairs | best arm | default | conf10 | mix | regimes | trial |")
    print("|---|---|---|---|---|---|---|---|")
    for name, column in columns.items():
        rows = [row for row in rows_of[name] if row["arm"] == DEFAULT]
        if not rows:
            continue
        regimes = [row["regime"] for row in rows]
        counts = ", ".join(f"{regime} {regimes.count(regime)}" for regime in sorted(set(regimes)))
        trials = [row["trial"] for row in rows if row["trial"] is not None]
        trial = f"{statistics.mean(trials):.3f}" if trials else "-"
        best = best_arm(column)
        difference, error = compare(column[DEFAULT], column[best])
        rates = " | ".join(f"{statistics.mean(row[name] for row in rows):.3f}" for name in ("conf10", "mix"))
        print(f"| {name} | {len(rows)} | {best} | {difference:+.4f}±{error:.4f} | {rates} | {counts} | {trial} |")
