"""From the scores of answers to the rows worth training on. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.checks import one_of
from hf_effdl.samples.drawing.hashing import hashed_uniform, integer_ids
from hf_effdl.samples.drawing.plan import Plan, make_plan


METHODS = (
    "default",
    "random",
    "balanced",
    "length",
    "mid-perplexity",
    "top-perplexity",
    "ifd",
    "el2n",
    "uncertainty",
    "nearest",
)
UNITS = ("rows", "tokens")
NEEDED = {"ifd": ["ifd"], "uncertainty": ["u_x"], "nearest": ["embedding"]}
# rows that are left out for each that is expected to have an answer to another prompt
SPARE = 1.5
# robust standard deviations above the median from which the end of an answer counts as missing
CUT_OFF = 4.0
DUPLICATE = 0.995
CHUNK = 2048


# ---- rows that are not to be trained on


def mismatched_rows(match: Tensor, spare: float = SPARE) -> Tensor:
    """Rows whose answer may belong to another prompt: the `2 * spare * #(match < 0)` of least `match`, as a mask.

    `match` is how much likelier an answer is under its own prompt than under another row's. Where the answer belongs
    to neither, both prompts are alike to it, so such rows lie around zero, as often on one side as on the other, and
    hardly any other row is below: there are about twice as many of them as rows below zero. Neither labels nor a
    second model are needed to tell.

    Args:
        match: `(N,)`.
        spare: how many rows are left out for each that is expected to be mismatched, as they overlap with others.

    Example:
        >>> mismatched_rows(torch.tensor([-0.2, 0.1, 0.2, 0.6, 0.7, 0.8]), spare=1.0).tolist()
        [True, True, False, False, False, False]
    """
    count = min(len(match), round(2 * spare * int((match < 0).sum())))
    left_out = torch.zeros(len(match), dtype=torch.bool)
    left_out[match.topk(count, largest=False).indices] = True
    return left_out


def damaged_rows(table: Mapping[str, Tensor], groups: Tensor) -> dict[str, Tensor]:
    """Masks of rows that look damaged, by what is wrong with them.

        mismatched    see `mismatched_rows`: the answer is as likely after another row's prompt
        cut off       `loss_end` far above its cluster's median: the end of the answer comes as a surprise. NaN, of
                      rows that `max_length` cut off, is no sign
        repeated      nearly the same as another row, which the probes find likelier

    Args:
        table: `match`, `loss_end`, `loss` and `embedding`; what lacks its column is left out.
        groups: `(N,)` clusters.
    """
    found = {}
    if "match" in table and table["match"].any():
        found["mismatched"] = mismatched_rows(table["match"])
    if "loss_end" in table:
        found["cut off"] = outliers(table["loss_end"], groups) > CUT_OFF
    if "embedding" in table:
        found["repeated"] = near_copies(table["embedding"], table["loss"], groups)
    return found


def outliers(values: Tensor, groups: Tensor) -> Tensor:
    """How many robust standard deviations (1.4826 times the median distance) values are above their group's median.

    NaN stays NaN, and counts for no median.
    """
    found = torch.zeros_like(values)
    for group in groups.unique():
        inside = groups == group
        middle = values[inside].nanmedian()
        spread = 1.4826 * (values[inside] - middle).abs().nanmedian()
        found[inside] = (values[inside] - middle) / spread.clamp(min=1e-6)
    return found


def near_copies(embeddings: Tensor, loss: Tensor, groups: Tensor, least: float = DUPLICATE) -> Tensor:
    """Rows to which another one of their group with less loss, of equals an earlier one, is near: cosine `least`."""
    copies = torch.zeros(len(loss), dtype=torch.bool)
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        rows = rows[loss[rows].sort(stable=True).indices]  # a row can only be a copy of one before it
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            near = unit[part] @ unit[rows[: start + len(part)]].T >= least
            before = torch.arange(start + len(part))[None] < torch.arange(start, start + len(part))[:, None]
            copies[part] = (near & before).any(1)
    return copies


# ---- rows that are


def choose(
    table: Mapping[str, Tensor],
    budget: int,
    *,
    unit: str = "rows",
    method: str = "default",
    groups: Tensor | None = None,
    query: Tensor | None = None,
    seed: int = 0,
    row_ids: Tensor | Sequence[int | str] | None = None,
) -> Plan:
    """Rows by one of the methods, as many as a budget of rows or tokens allows.

    ================  ==================================================================================
    method            rows
    ================  ==================================================================================
    `default`         uniform, among rows that are in none of `damaged_rows`
    `random`          uniform
    `balanced`        uniform, equal shares for clusters
    `length`          the longest answers
    `mid-perplexity`  those nearest to the median perplexity
    `top-perplexity`  those of the largest
    `ifd`             the largest ratio of perplexities with and without the prompt, below 1
    `el2n`            the largest error of the predicted tokens
    `uncertainty`     in proportion to `u_x`, cut off at its median, equal shares for clusters
    `nearest`         nearest to the rows of a query set: each query takes its next in turn
    ================  ==================================================================================

    Args:
        table: score columns, see `SFTScorer`.
        budget: rows, or tokens (column `tokens`) that all chosen rows together stay within.
        unit: `"rows"` or `"tokens"`.
        method: a line of the table.
        groups: `(N,)` clusters, for those that take shares, and for `default`: a row looks damaged beside its own
            cluster.
        query: `(Q, d)` embeddings, for `nearest`.
        seed, row_ids: see `make_plan`.

    Raises:
        ValueError: for unknown names, a budget below a single row or above all, or a method without what it needs.

    Source: what the methods are: arXiv 2308.12032 (IFD), 2309.04564 (perplexity), 2402.04833 (length), 2107.07075
    (EL2N), 2503.01807 (nearest: RDS+).
    """
    one_of("unit", unit, UNITS)
    one_of("method", method, METHODS)
    if groups is None and method in ("default", "balanced", "uncertainty"):
        raise ValueError(f"method={method!r} looks at clusters; score with embed=True, or pass groups=")
    if missing := [name for name in NEEDED.get(method, ()) if name not in table]:
        raise ValueError(
            f"method={method!r} needs the columns {missing}; score with contrast=True, embed=True and two probes"
        )
    options = {"seed": seed, "row_ids": row_ids, "weights": "none"}
    plan = _planner(dict(table), method, groups, query, options)
    settings = {"method": method, "unit": unit, "budget": budget}
    if unit == "tokens":
        budget = _rows_within(plan, table["tokens"], budget)
    made = plan(budget)
    return Plan(made.positions, made.probabilities, made.weights, made.rows, made.settings | settings)


def _planner(
    table: dict[str, Any], method: str, groups: Tensor | None, query: Tensor | None, options: dict[str, Any]
) -> Callable[[int], Plan]:
    """The plan for any number of rows."""
    rows = len(table["tokens"])
    if groups is not None:
        table["predicted"] = groups
    if method in ("random", "balanced", "default", "uncertainty"):
        shares = {"quotas": "none" if method in ("random", "default") else "predicted", "score": "uniform"}
        if method == "uncertainty":
            shares |= {"score": "u_x", "clip_quantile": 0.5}
        if method == "default":
            bad = damaged_rows(table, table["predicted"]).values()
            shares["keep"] = ~torch.stack([torch.zeros(rows, dtype=torch.bool), *bad]).any(0)
        return lambda budget: make_plan(table, budget, **shares, **options)
    order = _order(table, method, query, options)

    def first(budget: int) -> Plan:
        if not 0 < budget <= rows:
            raise ValueError(f"budget={budget}: choose 1 to {rows} rows")
        chosen = order[:budget].sort().values
        ones = torch.ones(budget, dtype=torch.float64)
        return Plan(chosen, ones, ones, rows, {"seed": options["seed"]})

    return first


def _order(table: Mapping[str, Tensor], method: str, query: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """All rows, the best first; equal ones by the hash of their ids."""
    if method == "nearest":
        if query is None:
            raise ValueError("method='nearest' needs query=, rows of what the model is to be good at")
        return nearest_first(table["embedding"], query)
    perplexity = table["perplexity"]
    scores = {
        "length": lambda: table["answer_tokens"],
        "mid-perplexity": lambda: -(perplexity.argsort().argsort() - (len(perplexity) - 1) / 2).abs(),
        "top-perplexity": lambda: perplexity,
        "ifd": lambda: torch.where(table["ifd"] < 1, table["ifd"], table["ifd"] - table["ifd"].max() - 1),
        "el2n": lambda: table["el2n"],
    }[method]()
    ids = integer_ids(options["row_ids"], len(scores))
    turns = hashed_uniform(options["seed"], ids).argsort()
    return turns[scores.double()[turns].sort(descending=True, stable=True).indices]


def nearest_first(embeddings: Tensor, query: Tensor) -> Tensor:
    """All rows, `(N,)`: every query row in turn takes the nearest that is left."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=1)
    near = torch.nn.functional.normalize(query.float(), dim=1) @ unit.T
    turn = near.sort(dim=1, descending=True, stable=True).indices.argsort(1).amin(0)  # the first that any query gives
    best = near.amax(0)
    order = best.sort(descending=True, stable=True).indices
    return order[turn[order].sort(stable=True).indices]


def _rows_within(plan: Callable[[int], Plan], tokens: Tensor, budget: int) -> int:
    """The largest number of rows that stay within so many tokens, by bisection."""
    fits, too_many = 0, len(tokens) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if int(tokens[plan(middle).positions].sum()) <= budget:
            fits = middle
        else:
            too_many = middle
    if not fits:
        raise ValueError(f"budget={budget} tokens is less than a row has; set more, or unit='rows'")
    return fits
