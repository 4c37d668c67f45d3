"""What several answers of the frozen model say of each other, and of the one answer they add up to."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from .cascade_features import products
from .visual_tasks import PICTURES


# how many features and maps there are; features by whether labels are colours
ANSWERS, MAPS = {False: 31, True: 22}, 17
# sides of the maps that answers are compared at
SIDE = 56
LOWEST = 0.01
# of the softmax over the cells of a query's own feature map
AFFINITIES = (0.05, 0.1)


def small(painted: Tensor, side: int = SIDE) -> Tensor:
    """Label images `(..., 3, h, w)` averaged to at most `side` pixels a side, float32."""
    h, w = painted.shape[-2:]
    if h <= side and w <= side:
        return painted.float()
    flat = F.adaptive_avg_pool2d(painted.flatten(0, -4).float(), (min(h, side), min(w, side)))
    return flat.unflatten(0, painted.shape[:-3])


class Answers:
    """The answers of one frozen model to a batch of queries, each shown m examples one by one.

    What does not depend on what was expected of the examples is here, and made once for every `Consensus`.

    Args:
        task: of the pipeline.
        painted: `(B, m, 3, h, w)` in [0, 1], see `small`.
        grid: `(B, gh, gw, d)` features of the queries, along which answers are smoothed: a cell takes the mean of the
            cells that look like it.
        known: `(B, m)` bool; answers that exist.
    """

    def __init__(self, task: object, painted: Tensor, grid: Tensor, known: Tensor) -> None:
        self.task, self.colours = task, task.name in PICTURES
        # masks have one channel
        self.painted = painted if self.colours else painted.mean(2, keepdim=True)
        self.rounded = self.painted if self.colours else (self.painted >= 0.5).float()
        self.grid, self.known = grid, known
        self.even = known / known.sum(1, keepdim=True)

    @cached_property
    def plain(self) -> Tensor:
        """`(B, c, h, w)` their mean."""
        return _mean(self.even, self.painted)

    @cached_property
    def maps(self) -> dict[str, Tensor]:
        """Estimates of the label by name, see `Consensus.maps`."""
        exists = self.known[:, :, None, None, None]
        each = {
            "plain": self.plain,
            "plain votes": _mean(self.even, self.rounded),
            "least": self.painted.masked_fill(~exists, 1).amin(1),
            "most": self.painted.masked_fill(~exists, 0).amax(1),
        }
        return dict(zip(each, self.numbers(list(each.values()))))

    @cached_property
    def apart(self) -> Tensor:
        """`(B, c, h, w)` their standard deviation."""
        return _mean(self.even, (self.painted - self.plain[:, None]).square()).sqrt()

    @cached_property
    def affinities(self) -> Tensor:
        """How much each cell of the queries looks like each other, softmax of cosines: `(2, B, G, G)`."""
        cells = F.normalize(self.grid.flatten(1, 2).float(), dim=2)
        alike = torch.cat([products(one, one[None]) for one in cells])
        return torch.stack([(alike / temperature).softmax(2) for temperature in AFFINITIES])

    @cached_property
    def alike(self) -> Tensor:
        """`(B, m, m)` agreement of every two."""
        flat = self.rounded.flatten(2)
        if self.colours:
            return -torch.cdist(flat, flat).square() / flat.shape[2]
        both, area = flat @ flat.transpose(1, 2), flat.sum(2)
        either = area[:, :, None] + area[:, None] - both
        return torch.where(either > 0, both / either.clamp(min=1), 1.0)

    @cached_property
    def area(self) -> Tensor:
        """`(B, m)` how white each is."""
        return self.painted.mean((2, 3, 4))

    @cached_property
    def decided(self) -> list[Tensor]:
        """`(B, m)` each: spread and decidedness, and entropy of masks."""
        count = self.painted[0, 0].numel()
        # the same as std, in a tenth of the time
        apart = (self.painted - self.area[:, :, None, None, None]).square().sum((2, 3, 4)) / (count - 1)
        values = [apart.sqrt(), (2 * self.painted - 1).abs().mean((2, 3, 4))]
        if not self.colours:
            chance = self.painted.clamp(1e-4, 1 - 1e-4)
            values.append(-(chance * chance.log() + (1 - chance) * (1 - chance).log()).mean((2, 3, 4)))
        return values

    def numbers(self, estimates: list[Tensor]) -> list[Tensor]:
        """Estimates `(B, c, h, w)` as a regression sees them: of masks their log-odds."""
        if self.colours:
            return estimates
        return list(torch.stack(estimates).clamp(LOWEST, 1 - LOWEST).logit())


class Consensus:
    """The one answer that several add up to, weighted by `softmax(scores / temperature)`.

    Their means (weighted, plain, of the answers and of the answers rounded to black and white) are estimates of the
    label, but biased ones: `maps` describes every pixel by them, and a linear or logistic model fitted on pool images,
    whose labels are known, turns that into a calibrated estimate (`fit_calibration`, `calibrate`).

    Args:
        answers: the answers.
        scores: `(B, m)` what was expected of the examples.
        temperature: of the weights, in units of the scores.
    """

    def __init__(self, answers: Answers, scores: Tensor, temperature: float) -> None:
        self.answers, self.task, self.colours = answers, answers.task, answers.colours
        gone = ~answers.known
        self.weights = (scores / temperature).masked_fill(gone, -torch.inf).softmax(1)
        self.sharp = (scores / (temperature / 3)).masked_fill(gone, -torch.inf).softmax(1)
        self.means = {
            "weighted": _mean(self.weights, answers.painted),
            "votes": _mean(self.weights, answers.rounded),
            "plain": answers.plain,
        }

    def maps(self) -> Tensor:
        """Every pixel in numbers, `(B, c, h, w, 17)`; of masks they are log-odds."""
        of, (weighted, votes, _) = self.answers, self.means.values()
        sharp, smooth = _mean(self.sharp, of.painted), self._smooth(weighted, votes)
        by_weight, by_vote, sharp, *smooth = of.numbers([weighted, votes, sharp, *smooth])
        plain, plain_votes, least, most = of.maps.values()
        estimates = [by_weight, by_vote, plain, plain_votes, sharp, *smooth, least, most]
        around = 2 * (weighted.shape[-1] // 14) + 1
        estimates += [_blurred(estimate, around) for estimate in (by_weight, by_vote)]
        estimates += [mean.mean((2, 3), keepdim=True).expand_as(mean) for mean in (weighted, votes)]
        return torch.stack([*estimates, 4 * of.apart - 2, torch.ones_like(weighted)], -1)

    def target(self, truth: Tensor) -> Tensor:
        """What calibration is fitted to, `(B, c, h, w)`, of labels `(B, 3, h, w)`."""
        return truth if self.colours else (truth.mean(1, keepdim=True) >= 0.5).float()

    def fit_calibration(self, maps: Tensor, target: Tensor) -> Tensor:
        """Weights `(17,)` of logistic (masks) or linear (colours) regression of `target (...)` on `maps (..., 17)`."""
        rows, target = maps.flatten(0, -2).double(), target.flatten().double()
        penalty = torch.eye(rows.shape[1], dtype=torch.float64) * (1.0 if not self.colours else 1e-4 * len(rows))
        if self.colours:
            # drawn to the weighted mean, which needs no labels
            start = torch.zeros(rows.shape[1], dtype=torch.float64)
            start[0] = 1
            return (start + torch.linalg.solve(rows.T @ rows + penalty, rows.T @ (target - rows @ start))).float()
        weights = torch.zeros(rows.shape[1], dtype=torch.float64)
        for _ in range(8):  # Newton
            chance = (rows @ weights).clamp(-20, 20).sigmoid()
            slope = rows.T @ (chance - target) + penalty @ weights
            curvature = (rows * (chance * (1 - chance))[:, None]).T @ rows + penalty
            weights = weights - torch.linalg.solve(curvature, slope)
        return weights.float()

    def calibrate(self, maps: Tensor, weights: Tensor) -> Tensor:
        """The estimate of the label, `(B, c, h, w)` in [0, 1]."""
        estimate = maps @ weights
        return estimate.clamp(0, 1) if self.colours else estimate.sigmoid()

    def features(self, calibrated: Tensor, areas: Tensor) -> Tensor:
        """What is known of each answer beside the others, `(B, m, f)`.

        Against each of the four estimates: the task's score, the mean difference, the score to be expected if the
        estimate is a chance and their soft overlap (masks), and the difference in area, with and without sign. Then:
        agreement with the other answers (plain and weighted), area, spread, decidedness, difference to the area of
        the example's label, and entropy (masks).

        Args:
            calibrated: of `calibrate`.
            areas: `(B, m)` of the examples' labels.
        """
        of, sign = self.answers, 1 if self.task.greater_is_better else -1
        # all four at once, (B, 4, m) each: small tensors cost what their calls cost
        each = torch.stack([*self.means.values(), calibrated], 1)[:, :, None]
        painted, rounded = of.painted[:, None], of.rounded[:, None]
        wide = [value.expand(*value.shape[:3], 3, *value.shape[4:]) for value in (painted, each)]
        beside = [self.task.score(*wide) * sign, -(painted - each).abs().mean((3, 4, 5))]
        if not self.colours:
            least, most = torch.minimum(painted, each), torch.maximum(painted, each)
            soft = least.sum((3, 4, 5)) / most.sum((3, 4, 5)).clamp(min=1e-6)
            beside += [_overlap(rounded, each), soft]
        apart = of.area[:, None] - each.mean((3, 4, 5))
        columns = list(torch.stack([*beside, apart, apart.abs()], 2).flatten(1, 2).unbind(1))
        columns += [(of.alike * weights[:, None]).sum(2) for weights in (of.even, self.weights)]
        spread, decided, *entropy = of.decided
        columns += [of.area, spread, decided, (of.area - areas).abs(), *entropy]
        return torch.stack(columns, 2)

    def medoid(self) -> Tensor:
        """`(B,)` which answer is most like the plain mean of all, as the task counts."""
        sign = 1 if self.task.greater_is_better else -1
        painted = self.answers.painted
        each = self.means["plain"][:, None].expand_as(painted)
        wide = [value.expand(-1, -1, 3, -1, -1) for value in (painted, each)]
        return (self.task.score(*wide) * sign).masked_fill(~self.answers.known, -torch.inf).argmax(1)

    def _smooth(self, *means: Tensor) -> list[Tensor]:
        alike = self.answers.affinities
        sides, channels = self.answers.grid.shape[1:3], [mean.shape[1] for mean in means]
        coarse = F.adaptive_avg_pool2d(torch.cat(means, 1), sides).flatten(2).transpose(1, 2)
        smooth = (alike @ coarse).transpose(2, 3).flatten(0, 1).unflatten(2, sides)
        smooth = F.interpolate(smooth, size=means[0].shape[-2:], mode="bilinear", align_corners=False)
        each = smooth.unflatten(0, alike.shape[:2]).split(channels, 2)
        return [one for of_mean in each for one in of_mean]


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bm,bmchw->bchw", weights, values)


def _overlap(rounded: Tensor, chance: Tensor) -> Tensor:
    """IoU that a mask can expect where every pixel is white with some chance."""
    both = (rounded * chance).sum((-3, -2, -1))
    either = rounded.sum((-3, -2, -1)) + chance.sum((-3, -2, -1)) - both
    return torch.where(either > 0, both / either.clamp(min=1e-6), 1.0)


def _blurred(values: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(values, size, 1, size // 2, count_include_pad=False)
