"""Fit both stages of a cascade on what was measured of a pool, without letting an image see its own answers."""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .cascade import FIRST, TURNS
from .cascade_consensus import small
from .cascade_features import MATCHES, ridge, standardised
from .cascade_head import train_heads
from .cascade_lists import FOLDS, MeasuredLists
from .examples import Examples
from .visual_tasks import find_task


PENALTY = 300.0
BATCH = 8  # images encoded, and answered for, at once
ROWS = 64  # images that a row model predicts at once
LEAST = 10  # labelled images that a fit takes
LEARNT = 1000  # of the labelled images, which stage 2 learns on
CHECKED = 50  # of these, on which plain consensus is tried
PIXELS = 8  # every so many of an answer's pixels calibration learns on
SOFTNESS = 0.4  # of the weights in a consensus, in units of the spread of performance inside lists
FUSIONS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # of the weights in a fusion, in the same units


def fit(selector: Any, pool: Any, labels: Any, model: Any, examples: Examples | None, progress: bool) -> None:
    """See `CascadeSelector.fit`."""
    if labels is not None:
        _check_labels(labels, pool)
        model.set_performance(*(value.cpu() for value in labels), pool.fingerprint)
    _check_table(model, pool, selector.passes)
    task = find_task(model.config.task)
    examples = examples if examples is not None else Examples(pool, model, task)
    selector.make_weights(colours=examples.task.name == "colourisation")
    selector.pool_fingerprint, selector._rows = pool.fingerprint, None
    selector.first_heads = selector.second_heads = None
    with torch.no_grad():
        lists = MeasuredLists.read(pool, model)
        features, scores = _fit_first(selector, examples, lists)
        learnt = len(lists.images[:LEARNT])
        selector.report = {
            "images": len(lists.images),
            "nearest": float(lists.performance[:learnt, 0].mean()),
            "stage 1": lists.mean_of(scores[:learnt]),
            "best": lists.pick(torch.arange(lists.rows.shape[1]).expand(learnt, -1)).mean_best(),
        }
    if selector.passes > 1:
        _fit_doubt(selector, examples, lists, scores)
        top = torch.cat(
            [
                selector.shortlist(examples, scores[part], lists.rows[part], lists.images[part], selector.passes)
                for part in torch.arange(learnt).split(ROWS)
            ]
        )
        tried = lists.pick(top)
        selector.report["best tried"] = tried.mean_best()
        first = features[:learnt].gather(1, top[..., None].expand(-1, -1, features.shape[2]))
        _fit_second(selector, examples, lists, tried, first, scores[:learnt].gather(1, top), progress)
    selector.eval()
    _warn(selector)


def _fit_first(selector: Any, examples: Examples, lists: MeasuredLists) -> tuple[Tensor, Tensor]:
    """Features `(L, K, f)` and scores from folds without the image `(L, K)`."""
    raw = torch.cat(
        [
            selector.first_features(
                _views(examples, lists.images[part]),
                examples,
                lists.similarity[part],
                lists.rows[part],
                lists.images[part],
            )
            for part in torch.arange(len(lists.images)).split(BATCH)
        ]
    )
    known, target = lists.known, lists.target
    features, spread = standardised(raw, known)
    selector.first_spread.copy_(spread)
    selector.first_weights.copy_(ridge(features, target, known, PENALTY))
    unit = target[known].square().mean().sqrt()
    selector.temperatures[0], selector.temperatures[1:] = SOFTNESS * unit, 2 * SOFTNESS * unit
    rows = selector._row_model(examples)
    vectors, quarters = (view[rows.position[lists.images]] for view in rows.views)
    rest = len(FIRST) - len(rows.names) - len(rows.among_names)
    matches = raw[..., FIRST.index(MATCHES[0]) :][..., : len(MATCHES)]
    folds = []
    for one in range(FOLDS):
        # what is to be predicted must not stand behind the features that are learnt from either
        fewer = rows.without(lists.images[lists.fold == one])
        learned = torch.cat(
            [
                selector.transferred(
                    fewer, (vectors[part], quarters[part]), matches[part], lists.rows[part], lists.images[part]
                )
                for part in torch.arange(len(raw)).split(ROWS)
            ]
        )
        folds.append(standardised(torch.cat([raw[..., :rest], learned], 2), known, spread)[0])
    scores = _out_of_fold(folds, target, known, lists.fold)
    if selector.head == "listwise":
        selector.first_heads, scores = train_heads(folds, target, known, lists.fold, selector.seed)
    return raw, scores.masked_fill(~known, -torch.inf)


def _fit_doubt(selector: Any, examples: Examples, lists: MeasuredLists, scores: Tensor) -> None:
    """How far performance is from scores of stage 1, and how much of that related examples have in common.

    With e the residuals of a list and rho how related two examples are, e_c e_d / mean e^2 is regressed on rho over
    all pairs; what is shared is the slope, in [0, 1].
    """
    known = lists.known
    left = torch.where(known, lists.target - scores, 0.0)
    left = torch.where(known, left - left.sum(1, keepdim=True) / known.sum(1, keepdim=True), 0.0)
    variance = left[known].square().mean()
    pairs = ~torch.eye(known.shape[1], dtype=torch.bool)
    sums = torch.zeros(5, dtype=torch.float64)
    for part in torch.arange(len(left)).split(ROWS):
        related = selector._relations(examples).between(lists.rows[part], lists.images[part])
        there = known[part][:, :, None] & known[part][:, None] & pairs
        x, y = related[there].double(), (left[part][:, :, None] * left[part][:, None])[there].double()
        sums += torch.stack([torch.ones_like(x).sum(), x.sum(), y.sum(), (x * x).sum(), (x * y).sum()])
    count, x, y, squares, products = sums
    slope = (products - x * y / count) / (squares - x * x / count).clamp(min=1e-12) / variance.clamp(min=1e-12)
    selector.doubt.copy_(torch.stack([variance.sqrt(), slope.float().clamp(0, 1)]))


def _fit_second(
    selector: Any,
    examples: Examples,
    all_lists: MeasuredLists,
    lists: MeasuredLists,
    first: Tensor,
    scores: Tensor,
    progress: bool,
) -> None:
    parts = torch.arange(len(lists.images)).split(BATCH)
    painted = _answers(examples, lists, progress, "fitting")
    truth = torch.cat([examples.small_labels(lists.images[part]).cpu() for part in parts])
    for turn in range(TURNS):
        scores = _fit_turn(selector, examples, lists, painted, truth, first, scores, turn)
        _fit_fusion(selector, examples, painted, truth, scores, lists.known, turn)
    selector.report["stage 2"] = lists.mean_of(scores)
    _check_consensus(selector, examples, all_lists, progress)


def _fit_turn(
    selector: Any,
    examples: Examples,
    lists: MeasuredLists,
    painted: Tensor,
    truth: Tensor,
    first: Tensor,
    scores: Tensor,
    turn: int,
) -> Tensor:
    """Calibration and weights of one turn; scores from folds without the image."""
    parts, fold, known = torch.arange(len(lists.images)).split(BATCH), lists.fold, lists.known

    def consensus(part: Tensor) -> Any:
        grid = _views(examples, lists.images[part])["grid"].cpu()
        return selector.consensus(examples, painted[part], scores[part], grid, known[part], turn)

    # calibration: of an image's own consensus by the pixels of the other folds
    drawn = torch.Generator().manual_seed(0)
    pixels_of, labels_of = [], []
    for part in parts:
        made = consensus(part)
        maps, target = made.maps(), made.target(truth[part])
        some = torch.randperm(maps.shape[2] * maps.shape[3], generator=drawn)[::PIXELS]
        pixels_of.append(maps.flatten(2, 3)[:, :, some])
        labels_of.append(target.flatten(2)[:, :, some])
    sampled, wanted = torch.cat(pixels_of), torch.cat(labels_of)
    calibrations = torch.stack(
        [made.fit_calibration(sampled[fold != one], wanted[fold != one]) for one in range(FOLDS)]
    )
    selector.calibration[turn] = made.fit_calibration(sampled, wanted)
    raw = []
    for part in parts:
        made = consensus(part)
        maps = made.maps()
        calibrated = torch.cat(
            [made.calibrate(maps[i : i + 1], calibrations[fold[row]]) for i, row in enumerate(part.tolist())]
        )
        raw.append(selector.second_features(made, calibrated, first[part], scores[part]))
    raw, target = torch.cat(raw), lists.target
    features, spread = standardised(raw, known)
    selector.second_spread[turn] = spread
    selector.second_weights[turn] = ridge(features, target, known, PENALTY)
    held = _out_of_fold([features] * FOLDS, target, known, fold)
    if selector.head == "listwise" and turn == TURNS - 1:
        selector.second_heads, held = train_heads([features] * FOLDS, target, known, fold, selector.seed)
    return held


def _fit_fusion(
    selector: Any, examples: Examples, painted: Tensor, truth: Tensor, scores: Tensor, known: Tensor, turn: int
) -> None:
    """The softness with which weighted means of the answers are best."""
    unit, task = selector.temperatures[0] / SOFTNESS, examples.task
    worth = []
    for softness in FUSIONS:
        weights = (scores / (softness * unit)).masked_fill(~known, -torch.inf).softmax(1)
        mean = torch.einsum("lm,lmchw->lchw", weights, painted).expand(-1, 3, -1, -1)
        worth.append(float(task.score(mean, truth).mean()) * (1 if task.greater_is_better else -1))
    selector.temperatures[turn + 1] = FUSIONS[max(range(len(FUSIONS)), key=worth.__getitem__)] * unit


def _check_consensus(selector: Any, examples: Examples, lists: MeasuredLists, progress: bool) -> None:
    """What the answer most like the plain mean of the nearest examples' answers is worth, with no learning."""
    some = min(CHECKED, LEARNT, len(lists.images))
    near = torch.arange(min(selector.passes, lists.rows.shape[1])).expand(some, -1)
    lists = lists.pick(near)
    painted = _answers(examples, lists, progress, "checking")
    chosen = []
    for part in torch.arange(some).split(BATCH):
        grid = _views(examples, lists.images[part])["grid"].cpu()
        even = torch.zeros(len(part), near.shape[1])
        chosen.append(selector.consensus(examples, painted[part], even, grid, lists.known[part], 0).medoid())
    picked = lists.performance.gather(1, torch.cat(chosen)[:, None])
    selector.report |= {
        "plain consensus": float(picked.mean()),
        "nearest, of the same": float(lists.performance[:, 0].mean()),
    }


def _answers(examples: Examples, lists: MeasuredLists, progress: bool, what: str) -> Tensor:
    """Small answers `(L, m, c, h, w)`, shared among processes."""
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if many else (0, 1)
    parts = torch.arange(len(lists.images)).split(BATCH)
    found = []
    for part in logging.tqdm(parts[rank::world], desc=what, unit=" batches", disable=not progress or rank > 0):
        asked, _ = examples.encoded(lists.images[part])
        answers = small(examples.answers(asked, lists.rows[part])).cpu()
        found.append(answers if examples.task.name == "colourisation" else answers.mean(2, keepdim=True))
    if many:
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, found)
        found = [gathered[number % world][number // world] for number in range(len(parts))]
    return torch.cat(found)


def _views(examples: Examples, images: Tensor) -> dict[str, Tensor]:
    """Of images of the pool, as `Queries` have them; the grid with its two sides."""
    pool, encoder = examples.pool, examples.model.encoder
    flat = examples.grids(images)
    side = tuple(encoder.grid_size)
    return {
        "vector": F.normalize(pool.vectors[images].float(), dim=1),
        "tokens": pool.tokens(images),
        "grid": flat.unflatten(1, side),
    }


def _out_of_fold(features: list[Tensor], target: Tensor, known: Tensor, fold: Tensor) -> Tensor:
    """Scores by ridge regressions that each go without one fold, of features `(L, K, f)` for each fold."""
    scores = torch.zeros(target.shape)
    for one, part in enumerate(features):
        train, test = fold != one, fold == one
        scores[test] = part[test] @ ridge(part[train], target[train], known[train], PENALTY)
    return scores


def _check_labels(labels: Any, pool: Any) -> None:
    if not isinstance(labels, (tuple, list)) or len(labels) != 2 or not all(isinstance(v, Tensor) for v in labels):
        raise TypeError("labels= must be (candidates, performance), as measure_examples returns them")
    candidates, performance = labels
    if candidates.dim() != 2 or candidates.shape != performance.shape:
        raise ValueError(
            f"labels: candidates {tuple(candidates.shape)} and performance {tuple(performance.shape)} "
            "must both be (n, K), as measure_examples returns them"
        )
    largest = int(candidates.max()) if candidates.numel() else -1
    if len(candidates) != len(pool) or largest >= len(pool):
        raise ValueError(
            f"labels of {len(candidates)} images, with candidates up to {largest}, for a pool of "
            f"{len(pool)}: they are of another pool; run measure_examples on this one"
        )
    own = torch.arange(len(pool), device=candidates.device)[:, None]
    if itself := (candidates == own).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"labels hold row {itself[0]} of the pool as an example for itself, which tells nothing of "
            "other images: set candidates to -1 there"
        )
    if not performance[candidates >= 0].isfinite().all():
        raise ValueError(
            "labels hold performance that is NaN or infinite: measure these pairs again with a metric "
            "that is defined for every prediction"
        )


def _check_table(model: Any, pool: Any, passes: int) -> None:
    if model.config.performance is None:
        raise ValueError("there are no labels: pass labels=measure_examples(model, pool), or measure first")
    if model.config.pool_fingerprint != pool.fingerprint:
        raise ValueError(
            f"the labels were measured on the pool {model.config.pool_fingerprint}, but this is "
            f"{pool.fingerprint}: another pool, or it was changed since; run measure_examples "
            "again"
        )
    known = model.measured_candidates.cpu() >= 0
    labelled, values = known.any(1), model.measured_performance.cpu()[known]
    if labelled.sum() < LEAST:
        raise ValueError(
            f"{int(labelled.sum())} pool images were measured on, and a cascade needs {LEAST} or more "
            "(50 to 100 are enough): run measure_examples with more queries="
        )
    if float(values.max()) == float(values.min()):
        raise ValueError(
            f"the measured performance is {float(values[0]):g} everywhere: no example is better than "
            "another, and there is nothing to learn; look at the metric and the labels"
        )
    most = min(int(known.sum(1).max()), model.config.candidates)
    if most <= passes and passes > 1:
        raise ValueError(
            f"passes={passes}, but at most {most} candidates are ranked for an image: the list must be "
            "longer than what is tried of it; measure more candidates= or lower passes="
        )


def _warn(selector: Any) -> None:
    report = selector.report
    last = report.get("stage 2", report["stage 1"])
    if last <= report["nearest"]:
        warnings.warn(
            f"on the pool's own images the cascade chooses examples of mean performance {last:.4g}, no "
            f"better than the nearest ({report['nearest']:.4g}): measure on more images, or use "
            "'nearest'",
            stacklevel=4,
        )
    if report.get("plain consensus", 0) < report.get("nearest, of the same", 0):
        warnings.warn(
            f"on the pool's own images the answer that the others agree with most is worse "
            f"({report['plain consensus']:.4g}) than the nearest example's "
            f"({report['nearest, of the same']:.4g}): the frozen model errs the same way with many "
            "examples. The cascade has learnt to weigh that; plain means and votes over examples will not "
            "help",
            stacklevel=4,
        )
