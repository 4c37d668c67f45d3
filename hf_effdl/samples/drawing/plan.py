"""From score columns to a plan: which rows, with which probability, with which weight. Pure; no data are touched.

A score table maps names to tensors of one number a row:

    label, predicted        given class, and the class that the probes vote for
    u_y, u_x                uncertainty with and without the label
    p_label, confidence     mean probability of the given label, and of the likeliest class
    p_clean                 posterior that the label is not drawn at random (see `noise.LabelNoise`)
    entropy, margin, least_confidence, bald, el2n   and any other score of yours

`make_plan` is the toolbox; `presets.py` has three settings of it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from hf_effdl.checks import flag, real_number, whole_number
from hf_effdl.samples.drawing.checks import (
    check_choice,
    check_rows,
    check_seed,
    read_column,
    read_probabilities,
    row_count,
)
from hf_effdl.samples.drawing.draws import draw, priority_sample, sequential_draw, top_k
from hf_effdl.samples.drawing.hashing import integer_ids
from hf_effdl.samples.drawing.probabilities import clip_scores, inclusion_probabilities, mix_uniform, read_scores
from hf_effdl.samples.drawing.quotas import check_quotas, class_turns, even_shares, strata, without_hardest
from hf_effdl.samples.drawing.weights import WEIGHTS, check_bias, kish_size, loss_weights, weight_column
from hf_effdl.samples.scores.numbers import as_numbers


SAMPLERS = ("priority", "poisson", "sequential", "top-k")
QUOTAS = ("label", "predicted", "strata", "none")


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


@dataclass(frozen=True)
class PlanSettings:
    """The settings of `make_plan`, plain values that fit together; see there for what they mean.

    Raises:
        ValueError: for unknown names, and for settings that contradict each other or have no effect.

    Example:
        >>> PlanSettings(20, sampler="top-k", quotas="none").score
        'u_x'
    """

    budget: int
    score: str = "u_x"
    sampler: str = "priority"
    clip: float | None = None
    clip_quantile: float | None = None
    uniform_share: float = 0.0
    quotas: str = "label"
    bins: int = 50
    cut_hardest: float = 0.0
    weights: str = "p_label"
    beta: float = 0.1
    seed: int = 0
    log_scores: bool = False

    def __post_init__(self) -> None:
        self._keep_plain("seed", check_seed(self.seed))
        self._keep_plain("bins", whole_number("bins", self.bins, 1))
        self._keep_plain("log_scores", flag("log_scores", self.log_scores))
        for name in ("uniform_share", "cut_hardest", "beta", "clip", "clip_quantile"):
            if (value := getattr(self, name)) is not None:
                self._keep_plain(name, real_number(name, value))
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("quotas", self.quotas, QUOTAS)
        check_choice("weights", self.weights, WEIGHTS)
        without_probabilities = self.sampler in ("sequential", "top-k")
        contradictions = {
            f"weights='exact' needs inclusion probabilities, which sampler={self.sampler!r} does not have; "
            "use 'priority' or 'poisson'": self.weights == "exact" and without_probabilities,
            "quotas='strata' draws uniformly inside each stratum, so sampler='top-k' has nothing to rank by; use "
            "sampler='priority'": self.quotas == "strata" and self.sampler == "top-k",
            f"uniform_share={self.uniform_share} has no effect on sampler={self.sampler!r}; use 'priority' or "
            "'poisson'": self.uniform_share and without_probabilities,
            f"clip={self.clip} is a value of the score, and log_scores=True gives logarithms; use clip_quantile=": (
                self.log_scores and self.clip is not None
            ),
            f"cut_hardest={self.cut_hardest} needs a score that tells the hardest rows, and score='uniform' does "
            "not; pass keep=without_hardest(scores, share)": self.cut_hardest and self.score == "uniform",
        }
        for why, contradictory in contradictions.items():
            if contradictory:
                raise ValueError(why)

    def _keep_plain(self, name: str, value: int | float | bool) -> None:
        object.__setattr__(self, name, value)  # of Python, as a plan's settings are written to a file

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Those of a plan, whose `settings` may hold other things beside them."""
        return cls(**{one.name: settings[one.name] for one in fields(cls) if one.name in settings})


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
    log_scores: bool = False,
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
        row_ids: see `priority_sample`. With ids no order of the rows changes which are drawn, also among equal scores.
        force: allow a label-dependent score without weights.
        log_scores: the column `score` holds logarithms of scores, as of importance weights that no float holds.

    Raises:
        ValueError: for missing columns, unknown names, a budget out of range or below the number of classes, exact
            weights without known probabilities, or an unweighted draw by a label-dependent score.

    Example:
        >>> table = {"u_x": torch.rand(100), "label": torch.arange(100) % 4}
        >>> len(make_plan(table, 20, weights="none"))
        20
    """
    budget = check_rows(budget, rows := row_count(table))
    settings = PlanSettings(
        budget=budget,
        score=score,
        sampler=sampler,
        clip=clip,
        clip_quantile=clip_quantile,
        uniform_share=uniform_share,
        quotas=quotas,
        bins=bins,
        cut_hardest=cut_hardest,
        weights=weights,
        beta=beta,
        seed=seed,
        log_scores=log_scores,
    )
    check_bias(score, weights, flag("force", force))
    if sampler == "top-k" and budget < 0.3 * rows:
        warnings.warn(
            f"sampler='top-k' keeps {budget / rows:.0%} of the rows: below 30 % the hardest rows alone do "
            "worse than random ones; draw in proportion to the score, or set sampler='priority', "
            "quotas='strata'",
            stacklevel=2,
        )
    positions, probabilities = _Urn.of(table, settings, keep, row_ids).draw()
    name = weight_column(weights, score, table)
    read = read_probabilities if weights == "p_label" else read_column
    given = None if name is None else read(table, name)[positions]
    shares = loss_weights(weights, probabilities=probabilities, uncertainty=given, p_label=given, beta=settings.beta)
    return Plan(positions, probabilities, shares, rows, asdict(settings))


@dataclass(frozen=True)
class _Urn:
    """What rows are drawn from: for each its score, whether it is kept, its group and its id."""

    settings: PlanSettings
    scores: Tensor
    kept: Tensor
    groups: Tensor | None
    ids: Tensor
    named: bool

    @classmethod
    def of(
        cls,
        table: Mapping[str, Tensor],
        settings: PlanSettings,
        keep: Tensor | None,
        row_ids: Tensor | Sequence[int | str] | None,
    ) -> Self:
        rows = row_count(table)
        scores = torch.ones(rows)
        if settings.score != "uniform":
            scores = read_column(table, settings.score)
            scores = read_scores(scores, log_scores=True) if settings.log_scores else scores
        kept = torch.ones(rows, dtype=torch.bool) if keep is None else as_numbers(keep, "keep").clone()
        if kept.dtype != torch.bool or kept.shape != (rows,):
            raise ValueError(f"keep is {kept.dtype} of shape {tuple(kept.shape)}; pass a boolean mask of {rows} rows")
        if settings.cut_hardest:
            kept &= without_hardest(scores, settings.cut_hardest, seed=settings.seed, row_ids=row_ids)
        groups = None
        if settings.quotas == "strata":
            groups = _strata(scores, kept, settings.bins)
        elif settings.quotas != "none":
            groups = class_groups(table, settings.quotas)
        if settings.clip is not None or settings.clip_quantile is not None:
            scores = clip_scores(scores, settings.clip, settings.clip_quantile)
        if settings.quotas == "strata":
            scores = torch.ones(rows)
        return cls(settings, scores, kept, groups, integer_ids(row_ids, rows), row_ids is not None)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Positions, ascending, and their probabilities: kept rows, and others where these do not suffice."""
        budget, parts = self.settings.budget, []
        first = min(budget, int(self.kept.sum()))
        for part, wanted in ((self.kept, first), (~self.kept, budget - first)):
            if wanted:
                # strata, or the classes of the few rows that the kept ones leave open, may be more than rows
                # and a round of labelling asks about fewer rows than there are classes
                some_left_out = self.settings.quotas in ("strata", "predicted") or bool(parts)
                parts.append(self._by_group(part.nonzero().flatten(), wanted, some_left_out))
        positions, probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
        if len(positions) == 0:
            raise ValueError(
                f"a Poisson draw with budget={budget} came out empty; sampler='priority' has an exact size"
            )
        order = positions.argsort()
        return positions[order], probabilities[order]

    def _by_group(self, rows: Tensor, budget: int, some_left_out: bool) -> tuple[Tensor, Tensor]:
        if self.groups is None:
            return self._from(rows, budget)
        # the classes that there are, as their numbers may be anything
        classes, groups, counts = self.groups[rows].unique(return_inverse=True, return_counts=True)
        if not some_left_out:
            check_quotas(counts, budget)
        quotas = even_shares(counts, budget, class_turns(self.settings.seed, classes))
        parts = [self._from(rows[groups == g], quota) for g, quota in enumerate(quotas.tolist()) if quota]
        positions, probabilities = zip(*parts, strict=True)
        return torch.cat(positions), torch.cat(probabilities)

    def _from(self, rows: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """Of these rows, as many as the budget says, by the sampler."""
        scores, how = self.scores[rows], self.settings
        chance = {"seed": how.seed, "row_ids": self.ids[rows]}
        if how.sampler == "top-k":
            ties = chance if self.named else {}
            return rows[top_k(scores, budget, **ties)], torch.ones(budget, dtype=torch.float64)
        if how.sampler == "sequential":
            likely = 1.0 if budget == len(rows) else float("nan")
            return rows[sequential_draw(scores, budget, **chance)], torch.full((budget,), likely, dtype=torch.float64)
        if how.uniform_share:
            # in proportion to the mixture, which priority sampling then follows as far as no row is capped
            scores = mix_uniform(inclusion_probabilities(scores, budget), how.uniform_share)
        if how.sampler == "priority":
            places, inverse = priority_sample(scores, budget, **chance)
        else:
            places, inverse = draw(inclusion_probabilities(scores, budget), **chance)
        return rows[places], 1 / inverse


def _strata(scores: Tensor, kept: Tensor, bins: int) -> Tensor:
    # bins of the kept range: a few far rows that are cut anyway must not squeeze all others into one bin
    inside = scores[kept] if kept.any() else scores
    return strata(scores.clamp(inside.min().item(), inside.max().item()), bins)


def class_groups(table: Mapping[str, Tensor], name: str) -> Tensor:
    """A column of classes, `(N,)` int64.

    Raises:
        ValueError: where some are negative.
    """
    values = read_column(table, name)
    groups = values.long()
    if (groups != values).any():
        raise ValueError(f"column {name!r} holds {values.dtype} that are no whole numbers; pass one class a row")
    if (groups < 0).any():
        raise ValueError(
            f"column {name!r} holds {int((groups < 0).sum())} negative classes; leave rows without a "
            "label out, or set quotas='predicted' or 'none'"
        )
    return groups
