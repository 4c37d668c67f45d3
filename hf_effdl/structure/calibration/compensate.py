"""Going through the groups, layer after layer: who goes, and how the layers behind do without."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hf_effdl.checks import one_of, real_number
from hf_effdl.processes import is_first, same_fate
from hf_effdl.random_state import evaluating
from hf_effdl.structure.calibration.batches import Calibration, answer, first_rows, split_rows
from hf_effdl.structure.calibration.grams import Ensemble, Gram, Pair, answer_sizes, geometric_mean
from hf_effdl.structure.calibration.joints import joints_of
from hf_effdl.structure.calibration.judge import Divergence, Judge
from hf_effdl.structure.calibration.readers import Readers, Weights
from hf_effdl.structure.calibration.replay import replay_of
from hf_effdl.structure.calibration.scores import activation, check_finite, fisher, obs
from hf_effdl.structure.calibration.taps import Joint, count_calls
from hf_effdl.structure.calibration.widths import Loss, divide
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.inputs import copy_of


logger = logging.getLogger(__name__)

SCORES = ("magnitude", "activation", "obs", "fisher")
RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)  # in units of the mean diagonal
SLOW = 60.0  # seconds that a calibration may take without a word
GAIN = 1e-5  # of a relative error: less is lost in rounding
SAFE_RIDGE = 0.1  # the least where there are fewer positions than inputs to fit on them
FURTHEST = 0.9  # of a group's units: more never goes where sizes are free


@dataclass(frozen=True)
class Wish:
    """What is to stay of a group.

    Args:
        size: how many units.
        chosen: those that are certain to stay, or None; the score says which others do.
    """

    size: int
    chosen: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether a score has a say."""
        return self.chosen is None or len(self.chosen) < self.size

    @classmethod
    def all_of(cls, group: Group) -> "Wish":
        """Every unit of a group."""
        return cls(group.units, torch.arange(group.units))

    def kept(self, score: Tensor) -> Tensor:
        """Ascending indices of the units that stay: the chosen ones, then those of the highest score."""
        score = score.clone()
        if self.chosen is not None:
            score[self.chosen] = float("inf")
        return score.topk(self.size).indices.sort().values


@dataclass
class Compensated:
    """A model whose layers do without some units, all of which it still has.

    Args:
        model: a copy at full size; the layers behind read nothing of the units that go.
        kept: ascending indices of the units that stay, by group.
        report: rows, errors and, by group, the ridge that was taken; plain values.
    """

    model: nn.Module
    kept: dict[str, Tensor]
    report: dict[str, Any] = field(default_factory=dict)


def check_settings(score: str, ridge: float | None, intercept: bool) -> None:
    """Refuse settings of a compensation that are out of range."""
    if score == "path":
        raise ValueError(
            'score="path" is the order of a training run: trainer.slim takes it, or pass keep=path.select(...)'
        )
    one_of("score", score, SCORES)
    one_of("intercept", intercept, (True, False))
    if ridge is not None and not 0 <= real_number("ridge", ridge) < float("inf"):
        raise ValueError(f"ridge={ridge}: it must be a number of at least 0, in units of the Gram's mean diagonal")


def compensate(
    model: nn.Module,
    groups: Sequence[Group],
    wishes: Mapping[str, Wish],
    batches: Any,
    *,
    score: str = "activation",
    ridge: float | None = None,
    intercept: bool = False,
) -> Compensated:
    """Choose units by what the model does on calibration rows, and refit the layers that read those that go.

    Group after group in the order in which the forward pass reaches the layers behind, each on the model as the groups
    before have left it. A fifth of the rows is held out: a refit is taken, and its ridge chosen, only if what the
    layers behind say there comes nearer to what they should say; and in the end the model's own outputs on those rows
    must come nearer to what they were with all refits than with none at all.

    Args:
        model: left as it is.
        groups: of the model.
        wishes: what stays, by group; other groups stay whole, and the layers behind them make up for what
            is lost before.
        batches: an iterable of inputs, see `split_rows`; on several processes each has its own share.
        score: which units stay where a wish leaves that open: one of `SCORES`.
        ridge: in units of the mean diagonal of the Gram; default: the best of `RIDGES`.
        intercept: also fit the bias of layers that have one.
    """
    check_settings(score, ridge, intercept)
    slim = copy_of(model).eval()
    asked, wishes = wishes, {group.name: wishes.get(group.name) or Wish.all_of(group) for group in groups}
    with evaluating(model):
        walk = _Walk.of(model, slim, groups, split_rows(batches, model))
        walk.ridge, walk.intercept = ridge, intercept
        losses = walk.losses() if score == "fisher" and any(wish.is_open for wish in wishes.values()) else {}
        kept = {group.name: torch.arange(group.units) for group in groups}
        steps: dict[str, Any] = {}
        for group in transformers_logging.tqdm(walk.groups, desc="refitting", unit=" groups", disable=not is_first()):
            wish = wishes[group.name]
            if steps or wish.size < group.units:  # else nothing is lost yet
                walk.advance(group)
                grams = walk.grams(group)
                if wish.size < group.units:
                    kept[group.name] = walk.chosen(wish, group, grams[0], score, losses)
                steps[group.name] = walk.settle(group, grams, kept[group.name])
        report = {"rows": walk.rows.rows[0], "held_out": walk.rows.rows[1], "score": score}
        report |= walk.against_none(kept)
    for copied, module in zip(slim.modules(), model.modules(), strict=True):
        copied.training = module.training
    return Compensated(slim, {name: kept[name] for name in asked}, report | {"groups": steps})


def unit_scores(
    model: nn.Module, groups: Sequence[Group], batches: Any, score: str = "activation", share: float = 0.5
) -> dict[str, Tensor]:
    """What every unit of some groups is worth to the whole model on calibration rows, `(units,)` by group.

    Args:
        model: left as it is.
        groups: of the model.
        batches: see `compensate`.
        score: one of `SCORES`; those of `"obs"` are ranks.
        share: of the units that are to be left, for `"obs"`: the others leave before the order of those is taken.
    """
    check_settings(score, None, False)
    with evaluating(model):
        walk = _Walk.of(model, copy_of(model).eval(), groups, split_rows(batches, model))
        losses = walk.losses() if score == "fisher" else {}
        found = {}
        for group in walk.groups:
            walk.advance(group)
            grams = [] if score in ("fisher", "magnitude") else walk.grams(group)[0]
            values = losses.get(group.name)
            if values is None:
                values = walk.worth(score, group, grams, max(1, round(share * group.units)))
            found[group.name] = check_finite(values, group.name)
    return {group.name: found[group.name] for group in groups}


def free_wishes(
    model: nn.Module,
    groups: Sequence[Group],
    wishes: Mapping[str, Wish],
    batches: Sequence[Any],
    *,
    score: str = "activation",
    ridge: float | None = None,
    intercept: bool = False,
    round_to: int = 1,
) -> dict[str, Wish]:
    """The same budget divided otherwise: a group loses the more, the less the model's outputs miss.

    Each group is cut alone, to its wish, with its readers refitted, and it is measured on rows held out how far the
    model's outputs have moved: their probabilities (`Divergence`) where it gives any, else all of them (`Judge`). How
    that grows is taken from the error of the readers when twice as much goes (at most `FURTHEST`); no group loses more
    than that. See `divide` for the rest.

    Args:
        model, groups, batches, score, ridge, intercept: see `compensate`.
        wishes: those with chosen units stay as they are. The budget is what the others save in multiply-accumulates.
        round_to: see `divide`.
    """
    check_settings(score, ridge, intercept)
    cut = [group for group in groups if group.name in wishes and _is_free(wishes[group.name], group)]
    if not cut:
        return dict(wishes)
    with evaluating(model):
        walk = _Walk.of(model, copy_of(model).eval(), cut, split_rows(batches, model))
        walk.ridge, walk.intercept = ridge, intercept
        walk.judge = Divergence.of(walk.ensemble.whole, walk.judge.batches) or walk.judge
        losses = walk.losses() if score == "fisher" else {}
        found = {}
        for group in transformers_logging.tqdm(walk.groups, desc="measuring", unit=" groups", disable=not is_first()):
            walk.advance(group)
            found[group.name] = walk.alone(group, wishes[group.name].size, score, losses)
    budget = sum(found[group.name].cost * (group.units - wishes[group.name].size) for group in cut)
    return dict(wishes) | {name: Wish(size) for name, size in divide(found, budget, round_to).items()}


def _is_free(wish: Wish, group: Group) -> bool:
    return wish.chosen is None and wish.size < group.units


@dataclass
class _Walk:
    """A copy of the model on its way from group to group.

    Args:
        ensemble: the model and its copy, on all rows.
        readers: of every group, layers of the copy.
        joints: of every reader.
        calls: of the readers of every group and their joints in a forward pass.
        groups: in the order in which a forward pass reaches the first layer behind them.
        rows: fitted on and held out.
        judge: of the rows held out.
    """

    ensemble: Ensemble
    readers: Mapping[str, Readers]
    joints: Mapping[str, Sequence[Joint | None]]
    calls: Mapping[str, int]
    groups: Sequence[Group]
    rows: Calibration
    judge: Judge | Divergence
    ridge: float | None = None
    intercept: bool = False

    @classmethod
    def of(cls, model: nn.Module, slim: nn.Module, groups: Sequence[Group], rows: Calibration) -> "_Walk":
        readers = {group.name: Readers.of(slim, group) for group in groups}
        layers = [consumer.name for behind in readers.values() for consumer in behind.consumers]
        held_out = {-1 - number: batch for number, batch in enumerate(rows.held_out)}
        with same_fate():
            example = first_rows(rows)
            whole, copy = replay_of(model, layers, example), replay_of(slim, layers, example)
            consumers = {name: behind.consumers for name, behind in readers.items()}
            joints = joints_of(slim, consumers, example)
            calls = count_calls(slim, consumers, joints, lambda: answer(slim, example))
            order = _order(slim, readers, example)
        whole.is_settled = True
        start = time.perf_counter()
        with answer_sizes([c.in_model(model) for behind in readers.values() for c in behind.consumers]) as sums:
            judge = Judge(whole, held_out)
        _say_cost(time.perf_counter() - start, rows.rows)
        device = next(model.parameters()).device
        sizes = {name: geometric_mean(total, device) for name, total in sums.items()}
        ordered = sorted(groups, key=lambda group: order.get(group.name, len(order)))
        batches = dict(enumerate(rows.fit)) | held_out
        return cls(Ensemble(whole, copy, batches, sizes), readers, joints, calls, ordered, rows, judge)

    def losses(self) -> dict[str, Tensor]:
        """Scores by the loss, of all groups, on the model as it was."""
        consumers = {name: behind.consumers for name, behind in self.readers.items()}
        return fisher(self.ensemble.slim.model, consumers, self.rows.fit)

    def advance(self, group: Group) -> None:
        """Pass over what comes before a group's readers in both models from now on."""
        batches, slim = self.ensemble.batches, self.ensemble.slim
        start = slim.block_of([consumer.layer for consumer in self.readers[group.name].consumers])
        with same_fate():
            slim.advance(start, batches)
            self.ensemble.whole.advance(start, batches)

    def grams(self, group: Group) -> Pair:
        """What the readers of a group are given by now, and should say; on rows to fit on and on those held out."""
        name = group.name
        return self.ensemble.grams(self.readers[name].consumers, self.joints[name], self.calls[name])

    def chosen(
        self, wish: Wish, group: Group, grams: Sequence[Gram], score: str, losses: Mapping[str, Tensor]
    ) -> Tensor:
        """Ascending indices of the units of a group that stay."""
        if not wish.is_open:
            return wish.chosen
        values = losses[group.name] if losses else self.worth(score, group, grams, wish.size)
        return wish.kept(check_finite(values, group.name))

    def worth(self, score: str, group: Group, grams: Sequence[Gram], size: int) -> Tensor:
        """What the units of a group are worth by now."""
        if score == "magnitude":
            return group.norm(self.ensemble.slim.model)
        consumers = self.readers[group.name].consumers
        return activation(consumers, grams) if score == "activation" else obs(consumers, grams, size)

    def settle(self, group: Group, grams: Pair, kept: Tensor) -> dict[str, Any]:
        """Take the units that go from the layers behind, in the way that moves least what those say."""
        behind, (fit, held_out) = self.readers[group.name], grams
        cut = behind.without(kept)
        without = behind.error(held_out, cut)
        tries: list[tuple[float, float | None, Weights]] = [(without - GAIN, None, cut)]

        def error(ridge: float) -> float:
            weights = behind.refitted(fit, kept, ridge, self.intercept)
            tries.append((behind.error(held_out, weights), ridge, weights))
            return tries[-1][0]

        _descend(self._ridges(group, fit, kept), error)
        least, ridge, best = min(tries, key=lambda entry: entry[0])
        behind.write(best)
        return {"ridge": ridge, "error": without if ridge is None else least, "error_without": without}

    def alone(self, group: Group, size: int, score: str, losses: Mapping[str, Tensor]) -> Loss:
        """What it costs to cut this group and no other; the layers behind are afterwards as they were."""
        grams, units = self.grams(group), group.units
        gone = units - size
        further = max(gone, min(2 * gone, int(FURTHEST * units)))
        errors = []
        for wish in (Wish(size), Wish(units - further)):
            step = self.settle(group, grams, self.chosen(wish, group, grams[0], score, losses))
            errors.append(step["error"])
            if len(errors) == 1:
                of_outputs = self.judge.error(self.ensemble.slim)
        self.readers[group.name].write(self.readers[group.name].original)
        growth = errors[1] / errors[0] if errors[0] > 0 else 1.0
        return Loss.of(units, gone / units, further / units, (of_outputs, growth * of_outputs), max(group.macs, 1))

    def _ridges(self, group: Group, grams: Sequence[Gram], kept: Tensor) -> list[float]:
        columns = self.readers[group.name].kept_columns(kept)
        seen = [(gram.positions, len(index)) for gram, index in zip(grams, columns, strict=True) if gram.positions]
        wanted = sorted(RIDGES) if self.ridge is None else [float(self.ridge)]
        if not seen:
            logger.warning("no calibration row reaches the layers behind %s: they are not refitted", group.name)
            return []
        short = [pair for pair in seen if pair[0] < pair[1]]
        if short:
            logger.warning(
                "%d calibration positions are fewer than the %d inputs to fit on them behind %s: the ridge is at "
                "least %s; pass more rows",
                *short[0],
                group.name,
                SAFE_RIDGE,
            )
            wanted = sorted({max(ridge, SAFE_RIDGE) for ridge in wanted})
        return wanted

    def against_none(self, kept: Mapping[str, Tensor]) -> dict[str, Any]:
        """The error of all refits together and without any; where none at all is nearer, none is taken."""
        fitted = {
            name: [(consumer.matrix.clone(), consumer.bias) for consumer in behind.consumers]
            for name, behind in self.readers.items()
        }
        error = self.judge.error(self.ensemble.slim)
        self.ensemble.slim.rewind()
        for name, behind in self.readers.items():
            behind.write(behind.without(kept[name]))
        without = self.judge.error(self.ensemble.slim)
        if error < without:
            for name, behind in self.readers.items():
                behind.write(fitted[name])
        return {"error": min(error, without), "error_without": without, "refitted": error < without}


def _say_cost(seconds: float, rows: tuple[int, int]) -> None:
    """Say how long it will take, where that is long, from how long one pass over the rows held out took."""
    fit, held_out = rows
    # over all rows once through the whole model, twice through its copy; over those held out twice more
    seconds *= 3 * (fit + held_out) / held_out + 2
    if seconds > SLOW and is_first():
        logger.warning(
            "calibration on %d rows will take about %.0f minutes; fewer rows, or shorter ones, take less",
            fit + held_out,
            max(1, seconds / 60),
        )


def _order(model: nn.Module, readers: Mapping[str, Readers], batch: Any) -> dict[str, int]:
    """By group, its place in the order in which a forward pass reaches the first layer behind it."""
    reached: dict[str, int] = {}

    def hook_for(name: str) -> Any:
        def hook(*_: Any) -> None:
            reached.setdefault(name, len(reached))

        return hook

    layers = [(name, consumer.layer) for name, behind in readers.items() for consumer in behind.consumers]
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers]
    try:
        with torch.no_grad():
            answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def _descend(values: Sequence[float], error: Callable[[float], float]) -> None:
    """Look from the middle of ascending values to the side on which an error falls, for as long as it falls."""
    if not values:
        return
    middle = len(values) // 2
    least = start = error(values[middle])
    for side in (reversed(values[:middle]), values[middle + 1 :]):
        for value in side:
            if (found := error(value)) >= least:
                break
            least = found
        if least < start:
            return
