"""The two stages of a cascade: what each knows of a candidate, how it scores it, and how it learns to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cascade_consensus import Answers, Consensus
from .cascade_features import MATCHES, STATISTICS, ridge, ridge_by_class, standardised
from .cascade_head import ListHeads, train_heads
from .cascade_lists import FOLDS, MeasuredLists
from .cascade_precedents import CLASS, Precedents
from .cascade_rows import RowModel, quarters_of
from .cascade_shortlist import Relations, best_together
from .examples import Examples


# features of a list's candidates, (B, K, f) each, by name
Columns = dict[str, Tensor]
FIRST = ("similarity", "quarters", "rank", *MATCHES, *STATISTICS, *RowModel.names, *RowModel.among_names)
# turns of stage 2
TURNS = 2
PENALTY = 300.0
OWN = (300.0, 1000.0, 3000.0, 10000.0)  # on what the weights of a class have of their own; what predicts best is taken
ROWS = 64  # images that a row model predicts at once
PIXELS = 8  # every so many of an answer's pixels calibration learns on
SOFTNESS = 0.4  # of the weights in a consensus, in units of the spread of performance inside lists
FUSIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # of the weights in a fusion, in the same units


def gathered(columns: Columns, top: Tensor) -> Columns:
    """Of every list the candidates at places `top (B, m)`."""
    return {name: part.gather(1, top[..., None].expand(-1, -1, part.shape[2])) for name, part in columns.items()}


def joined(parts: Sequence[Columns]) -> Columns:
    """Several batches as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- scores of features


@dataclass(frozen=True)
class Scorer:
    """Scores of candidates by their features relative to the list: a ridge regression, or list-wise networks.

    Args:
        spread: `(f,)` of the features in the lists that were learnt from.
        weights: `(2 f,)` of the regression.
        heads: networks that score instead.
        apart: `(C, 2 f)` how the weights of each class depart from these; None: they do not.
    """

    spread: Tensor
    weights: Tensor
    heads: ListHeads | None = None
    apart: Tensor | None = None

    def scores(self, columns: Columns, known: Tensor) -> Tensor:
        """`(B, K)`, -inf for candidates that do not exist."""
        features, _ = standardised(_flat(columns), known, self.spread)
        if self.heads is not None:
            scores = self.heads(features, known)
        else:
            scores = _linear(features, self.weights, self.apart, columns.get(CLASS))
        return scores.masked_fill(~known, -torch.inf)

    @classmethod
    def fit(
        cls, columns: Columns, lists: MeasuredLists, folds: Sequence[Columns] | None = None, seed: int | None = None
    ) -> tuple["Scorer", Tensor]:
        """Learn from lists; also returns scores `(L, K)` of each list by what was learnt without its fold.

        Args:
            columns: of the lists.
            lists: their performance.
            folds: for each fold the columns made without what it measured; default: `columns` hold nothing of that.
            seed: of list-wise networks; None: none are trained.
        """
        known, target = lists.known, lists.target
        features, spread = standardised(_flat(columns), known)
        if folds is None:
            parts = [features] * FOLDS
        else:
            parts = [standardised(_flat(part), known, spread)[0] for part in folds]
        if seed is not None:
            heads, held = train_heads(parts, target, known, lists.fold, seed)
            found = cls(spread, ridge(features, target, known, PENALTY), heads)
            return found, held.masked_fill(~known, -torch.inf)
        classes = columns.get(CLASS)
        ways: list[float | None] = [None, *(OWN if classes is not None else ())]
        helds = [_out_of_fold(parts, lists, classes, own) for own in ways]
        errors = [float((held - target)[known].square().mean()) for held in helds]
        best = errors.index(min(errors))
        weights, apart = _weights(features, target, known, classes, ways[best])
        return cls(spread, weights, None, apart), helds[best].masked_fill(~known, -torch.inf)


def _flat(columns: Columns) -> Tensor:
    return torch.cat([part for name, part in columns.items() if name != CLASS], 2)


def _linear(features: Tensor, weights: Tensor, apart: Tensor | None, classes: Tensor | None) -> Tensor:
    """`(B, K)` from `(B, K, f)`, with what the class of each candidate adds to the weights."""
    scores = features @ weights
    if apart is None or classes is None:
        return scores
    none = torch.zeros_like(apart[:1])  # the last, which -1 finds
    return scores + (features * torch.cat([apart, none])[classes[..., 0]]).sum(2)


def _weights(
    features: Tensor, target: Tensor, known: Tensor, classes: Tensor | None, own: float | None
) -> tuple[Tensor, Tensor | None]:
    if own is None:
        return ridge(features, target, known, PENALTY), None
    classes = classes[..., 0]
    return ridge_by_class(features, target, known, classes, int(classes.max()) + 1, PENALTY, own)


def _out_of_fold(
    features: Sequence[Tensor], lists: MeasuredLists, classes: Tensor | None, own: float | None
) -> Tensor:
    """Scores by ridge regressions that each go without one fold, of features `(L, K, f)` for each fold."""
    target, known = lists.target, lists.known
    scores = torch.zeros(target.shape)
    for one, part in enumerate(features):
        train, test = lists.fold != one, lists.fold == one
        shown, asked = (None if classes is None else classes[some] for some in (train, test))
        weights, apart = _weights(part[train], target[train], known[train], shown, own)
        if apart is not None and asked is not None:  # a class that is in this fold alone
            apart = torch.cat([apart, apart.new_zeros(max(0, int(asked.max()) + 1 - len(apart)), apart.shape[1])])
        scores[test] = _linear(part[test], weights, apart, asked)
    return scores


# ---- stage 1: before the frozen model has seen anything


def first_columns(
    views: dict[str, Tensor],
    examples: Examples,
    precedents: Precedents,
    similarity: Tensor,
    rows: Tensor,
    own: Tensor | None,
) -> Columns:
    """What stage 1 knows of each candidate, in the order of `FIRST`.

    Args:
        views: of the queries, see `Queries`.
        examples: the pool.
        precedents: what was measured of it.
        similarity, rows: `(B, K)` the candidates, nearest first.
        own: `(B,)` rows of the pool that the queries themselves are, -1 for none.
    """
    candidates = rows.clamp(min=0)
    vectors, quarters = views["vector"].float().cpu(), quarters_of(views["tokens"].float().cpu())
    matches = examples.matches(views, candidates).cpu()
    return {
        "similarity": similarity.nan_to_num(neginf=0.0)[..., None],
        "quarters": examples.quarters(candidates) @ quarters[..., None],
        "rank": torch.arange(rows.shape[1]).expand(rows.shape).float()[..., None],
        "matches": matches,
        "statistics": examples.statistics(candidates).cpu(),
        **precedents.columns(vectors, quarters, matches, rows, own),
    }


@dataclass(frozen=True)
class FirstStage:
    """Scores candidates without running the frozen model, and says which of them to try.

    Args:
        scorer: of `first_columns`.
        doubt: how far performance is from the scores, and how much of that related examples share.
    """

    scorer: Scorer
    doubt: Tensor

    def scores(self, columns: Columns, known: Tensor) -> Tensor:
        """`(B, K)`, -inf for candidates that do not exist."""
        return self.scorer.scores(columns, known)

    def shortlist(self, relations: Relations, scores: Tensor, rows: Tensor, own: Tensor | None, count: int) -> Tensor:
        """Places `(B, count)` of the candidates to try, the one of the highest score first."""
        spread, shared = self.doubt
        related = shared * relations.between(rows, own)
        related.diagonal(dim1=1, dim2=2).fill_(1.0)
        return best_together(scores, spread.double().square() * related, rows >= 0, count)

    @classmethod
    def fit(
        cls, columns: Columns, precedents: Precedents, lists: MeasuredLists, seed: int | None, tries: bool
    ) -> tuple["FirstStage", Tensor]:
        """Learn from lists; also returns scores `(L, K)` from folds without the image.

        Args:
            columns: `first_columns` of the lists.
            precedents: with what all of them measured.
            lists: the measured performance.
            seed: of list-wise networks; None: none are trained.
            tries: whether there will be a second stage, for which `doubt` is learnt.
        """
        model = precedents.rows
        vectors, quarters = (view[model.position[lists.images]] for view in model.views)
        folds = []
        for one in range(FOLDS):
            # what is to be predicted must not stand behind the features that are learnt from either
            fewer = precedents.without(lists.images[lists.fold == one])
            learnt = [
                fewer.columns(
                    vectors[part], quarters[part], columns["matches"][part], lists.rows[part], lists.images[part]
                )
                for part in torch.arange(len(lists.images)).split(ROWS)
            ]
            folds.append(columns | joined(learnt))
        scorer, scores = Scorer.fit(columns, lists, folds, seed)
        return cls(scorer, _doubt(precedents.relations, lists, scores) if tries else torch.zeros(2)), scores


def _doubt(relations: Relations, lists: MeasuredLists, scores: Tensor) -> Tensor:
    """How far performance is from scores of stage 1, and how much of that related examples have in common.

    With e the residuals of a list and rho how related two examples are, e_c e_d / mean e^2 is regressed on rho over
    all pairs; what is shared is the slope, in [0, 1].
    """
    known = lists.known
    residual = torch.where(known, lists.target - scores, 0.0)
    mean = residual.sum(1, keepdim=True) / known.sum(1, keepdim=True)
    residual = torch.where(known, residual - mean, 0.0)
    variance = residual[known].square().mean()
    others = ~torch.eye(known.shape[1], dtype=torch.bool)
    sums = torch.zeros(5, dtype=torch.float64)
    for part in torch.arange(len(residual)).split(ROWS):
        related = relations.between(lists.rows[part], lists.images[part])
        pairs = known[part][:, :, None] & known[part][:, None] & others
        x, y = related[pairs].double(), (residual[part][:, :, None] * residual[part][:, None])[pairs].double()
        sums += torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum(), (x * x).sum(), (x * y).sum()])
    count, x, y, squares, products = sums
    slope = (products - x * y / count) / (squares - x * x / count).clamp(min=1e-12) / variance.clamp(min=1e-12)
    return torch.stack([variance.sqrt(), slope.float().clamp(0, 1)])


# ---- stage 2: with the answers of the frozen model


@dataclass(frozen=True)
class Tried:
    """Candidates that the frozen model was shown one by one, for a batch of queries.

    Args:
        answers: what it painted.
        columns: what stage 1 knew of them.
    """

    answers: Answers
    columns: Columns

    def consensus(self, scores: Tensor, temperature: float) -> Consensus:
        """Of the answers, weighted by scores `(B, m)`."""
        return Consensus(self.answers, scores, temperature)


def second_columns(tried: Tried, consensus: Consensus, calibrated: Tensor, scores: Tensor) -> Columns:
    """What stage 2 knows of each candidate: what stage 1 did, its score so far, and the answers."""
    area = tried.columns["statistics"][..., STATISTICS.index("area")]
    answers = consensus.features(calibrated, area)
    return {**tried.columns, "score": scores[..., None], "answers": answers}


@dataclass(frozen=True)
class Turn:
    """One look at the answers, weighted by the scores of the turn before.

    Args:
        temperature: of the weights in the consensus.
        calibration: makes its estimate of the label one of chances.
        scorer: of `second_columns`.
    """

    temperature: float
    calibration: Tensor
    scorer: Scorer

    def scores(self, tried: Tried, scores: Tensor) -> Tensor:
        """`(B, m)`, -inf for candidates that do not exist."""
        consensus = tried.consensus(scores, self.temperature)
        calibrated = consensus.calibrate(consensus.maps(), self.calibration)
        return self.scorer.scores(second_columns(tried, consensus, calibrated, scores), tried.answers.known)

    @classmethod
    def fit(
        cls,
        temperature: float,
        tried: Callable[[Tensor], Tried],
        parts: Sequence[Tensor],
        truth: Tensor,
        lists: MeasuredLists,
        scores: Tensor,
        seed: int | None,
    ) -> tuple["Turn", Tensor]:
        """Learn from lists; also returns scores `(L, m)` from folds without the image.

        Args:
            temperature: of the weights in the consensus.
            tried: gives what was tried on some of the images.
            parts: places of images, as many as are looked at together.
            truth: `(L, 3, h, w)` labels of the images, see `small`.
            lists: measured performance of what was tried.
            scores: `(L, m)` of the turn before.
            seed: of list-wise networks; None: none are trained.
        """
        calibration, calibrations = _calibrated_by_folds(temperature, tried, parts, truth, lists, scores)
        learnt = []
        for part in parts:
            some = tried(part)
            consensus = some.consensus(scores[part], temperature)
            maps = consensus.maps()
            each = [
                consensus.calibrate(maps[i : i + 1], calibrations[fold])
                for i, fold in enumerate(lists.fold[part].tolist())
            ]
            learnt.append(second_columns(some, consensus, torch.cat(each), scores[part]))
        scorer, held = Scorer.fit(joined(learnt), lists, seed=seed)
        return cls(temperature, calibration, scorer), held


def _calibrated_by_folds(
    temperature: float,
    tried: Callable[[Tensor], Tried],
    parts: Sequence[Tensor],
    truth: Tensor,
    lists: MeasuredLists,
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """Calibration by a share of all images' pixels, and for each fold by those of the others."""
    generator = torch.Generator().manual_seed(0)
    maps_of, truth_of = [], []
    for part in parts:
        consensus = tried(part).consensus(scores[part], temperature)
        maps, target = consensus.maps(), consensus.target(truth[part])
        some = torch.randperm(maps.shape[2] * maps.shape[3], generator=generator)[::PIXELS]
        maps_of.append(maps.flatten(2, 3)[:, :, some])
        truth_of.append(target.flatten(2)[:, :, some])
    maps, target = torch.cat(maps_of), torch.cat(truth_of)
    by_fold = [consensus.fit_calibration(maps[lists.fold != one], target[lists.fold != one]) for one in range(FOLDS)]
    return consensus.fit_calibration(maps, target), torch.stack(by_fold)


def best_temperature(task: Any, painted: Tensor, truth: Tensor, scores: Tensor, known: Tensor, unit: Tensor) -> float:
    """The temperature, `unit` times one of `FUSIONS`, at which the weighted mean of the answers is best."""
    worth = []
    for softness in FUSIONS:
        weights = (scores / (softness * unit)).masked_fill(~known, -torch.inf).softmax(1)
        mean = torch.einsum("lm,lmchw->lchw", weights, painted).expand(-1, 3, -1, -1)
        worth.append(float(task.score(mean, truth).mean()) * (1 if task.greater_is_better else -1))
    return float(FUSIONS[max(range(len(FUSIONS)), key=worth.__getitem__)] * unit)


@dataclass(frozen=True)
class SecondStage:
    """Scores the candidates that were tried by what the frozen model answered, in turns."""

    turns: tuple[Turn, ...]

    def scores(self, tried: Tried, scores: Tensor) -> Tensor:
        """`(B, m)` from the scores of stage 1; -inf for candidates that do not exist."""
        for turn in self.turns:
            scores = turn.scores(tried, scores)
        return scores
