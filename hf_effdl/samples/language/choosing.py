"""From the scores of answers to the rows worth training on. Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_effdl.checks import one_of, whole_number
from hf_effdl.samples.drawing.checks import check_seed
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
# a row whose answer belongs to another prompt does as much harm as so many good ones do good
PRICE = 4.0
# robust standard deviations above the median from which the end of an answer counts as missing
CUT_OFF = 4.0
DUPLICATE = 0.995
CHUNK = 2048


# ---- rows that are not to be trained on


def match_threshold(match: Tensor, price: float = PRICE) -> float:
    """The `match`, 0 or more, above which answers pass for their prompt's own.

    `match` is how much likelier an answer is under its own prompt than under another row's. Where the answer belongs
    to neither, both prompts are alike to it, so such rows lie around zero, as often on one side as on the other. So
    there are about as many of them above t as there are rows below -t, which neither labels nor a second model need
    to tell; and t is where

        price * #(match < -t)  +  #(0 < match <= t) - #(-t <= match < 0)
        mismatched rows kept      rows lost that were none

    is least.

    Args:
        match: `(N,)`.
        price: of a mismatched row that is kept, in good rows that are lost.

    Example:
        >>> match_threshold(torch.tensor([-0.2, 0.2, 0.5, 0.6, 0.7, 0.8])) == torch.tensor(0.2).item()
        True
    """
    bad = (-match[match < 0]).sort().values.contiguous()
    good = match[match > 0].sort().values.contiguous()
    steps = torch.cat([bad.new_zeros(1), bad, good]).unique()
    below = torch.searchsorted(bad, steps, right=True)
    cost = price * (len(bad) - below) + torch.searchsorted(good, steps, right=True) - below
    return steps[cost.argmin()].item()


def damaged_rows(table: Mapping[str, Tensor], groups: Tensor) -> dict[str, Tensor]:
    """Masks of rows that look damaged, by what is wrong with them.

        mismatched    `match` not above `match_threshold`: the answer is as likely after another row's prompt
        cut off       `loss_end` far above its cluster's median: the end of the answer comes as a surprise
        repeated      nearly the same as another row, which the probes find likelier

    Args:
        table: `match`, `loss_end`, `loss` and `embedding`; what lacks its column is left out.
        groups: `(N,)` clusters.
    """
    found = {}
    if "match" in table and table["match"].any():
        found["mismatched"] = table["match"] <= match_threshold(table["match"])
    if "loss_end" in table:
        found["cut off"] = outliers(table["loss_end"], groups) > CUT_OFF
    if "embedding" in table:
        found["repeated"] = near_copies(table["embedding"], table["loss"], groups)
    return found


def outliers(values: Tensor, groups: Tensor) -> Tensor:
    """How many robust standard deviations (1.4826 times the median distance) values are above their group's median."""
    found = torch.zeros_like(values)
    for group in groups.unique():
        inside = groups == group
        middle = values[inside].median()
        spread = 1.4826 * (values[inside] - middle).abs().median()
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


def clusters(embeddings: Tensor, count: int | None = None, seed: int = 0, rounds: int = 25) -> Tensor:
    """k-means of embeddings of unit length, `(N,)` int64.

    Args:
        embeddings: `(N, d)`.
        count: of clusters; default: the root of half the rows, 100 at most.
        seed: of the start, by k-means++.
        rounds: of Lloyd's algorithm, at most.

    Source: Arthur and Vassilvitskii, "k-means++", SODA 2007.
    """
    rows = len(embeddings)
    count = max(1, min(100, round((rows / 2) ** 0.5))) if count is None else whole_number("clusters", count, 1)
    if count > rows:
        raise ValueError(f"clusters={count} of {rows} rows; set fewer")
    x = torch.nn.functional.normalize(embeddings.double(), dim=1)
    generator = torch.Generator().manual_seed(check_seed(seed) % 2**63)
    centres = x[torch.randint(rows, (1,), generator=generator)]
    while len(centres) < count:
        far = (2 - 2 * (x @ centres.T).amax(1)).clamp(min=1e-12)
        centres = torch.cat([centres, x[torch.multinomial(far, 1, generator=generator)]])
    nearest = (x @ centres.T).argmax(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, nearest, x)
        full = sums.norm(dim=1) > 0
        centres[full] = torch.nn.functional.normalize(sums[full], dim=1)
        moved = (x @ centres.T).argmax(1)
        if moved.equal(nearest):
            break
        nearest = moved
    return nearest


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
    `default`         uniform with equal shares for clusters, among rows that are in none of `damaged_rows`
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
        groups: `(N,)` clusters, for those that take shares.
        query: `(Q, d)` embeddings, for `nearest`.
        seed, row_ids: see `make_plan`.

    Raises:
        ValueError: for unknown names, a budget below a single row or above all, or a method without what it needs.

    Source: what the methods are: arXiv 2308.12032 (IFD), 2309.04564 (perplexity), 2402.04833 (length), 2107.07075
    (EL2N), 2503.01807 (nearest: RDS+).
    """
    one_of("unit", unit, ("rows", "tokens"))
    one_of("method", method, METHODS)
    if groups is None and method in ("default", "balanced", "uncertainty"):
        raise ValueError(f"method={method!r} takes shares of clusters; pass groups=")
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
        shares = {"quotas": "none" if method == "random" else "predicted", "score": "uniform"}
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
