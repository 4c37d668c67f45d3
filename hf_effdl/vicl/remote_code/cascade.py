"""The cascade: score the candidates without the frozen model, try a few with it, and let the answers decide."""

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .borrowing import borrow
from .cascade_consensus import ANSWERS, MAPS, Answers, small
from .cascade_fit import Fitted, check_enough, check_measured, check_model, fit, warn_of
from .cascade_head import ListHeads
from .cascade_lists import MeasuredLists
from .cascade_precedents import Precedents
from .cascade_stages import FIRST, TURNS, FirstStage, Scorer, SecondStage, Tried, Turn, first_columns, gathered
from .examples import Examples, Queries
from .pool_rows import column_of, group_numbers, groups_of
from .strategies import best
from .visual_tasks import PICTURES, find_task


HEADS = ("ridge", "listwise")


class CascadeSelector(nn.Module):
    """Chooses examples in two stages, both learned from what the pool's examples do on each other.

    Stage 1 scores the K nearest candidates without running the frozen model F: similarity, dense matching (also inside
    and outside the labelled object), where and how large the label is, and what was measured on pool images like the
    query, the best matching candidates among them (`RowModel`). Stage 2 runs F with `passes` of them and looks at the
    answers: how much each agrees with their weighted consensus, which was calibrated on pool images (`Consensus`); in
    two turns, since the scores of the first give a better consensus. Both stages are ridge regressions in closed form
    on features relative to the list,

        w = argmin sum_(q, c) (m(q, c) - mean_c m(q, .) - w x(q, c))^2 + 300 |w|^2,

    with m(q, c) the measured performance of example c on pool image q. The examples that are tried are not just those
    of the highest scores: where stage 1 is unsure and examples do well and badly together, it takes some of each kind,
    so that the best of them can be expected to be best (`best_together`). What a pool image itself measured, or
    another of its group (video, patient), never enters its own features (leave-one-out), and stage 2 learns on scores
    of stage 1 from folds without the image and its group.

    A strategy of the pipeline: `model.set_selector(cascade)` keeps it in the model, with which it is saved and pushed
    and whose default it then is; or pass it as `selector=`. Scores are expected performance less the mean of the
    examples that were tried, so that `fusion="weighted"` can weigh answers by them.

    Args:
        model: a `VisualInContextModel`; may also be given to `fit`.
        passes: runs of F on a query, m; 1 leaves out stage 2, and only the chosen example is shown.
        head: of both stages: "ridge", or "listwise", ten small `ListwiseRanker`s each over the same features, which
            see the candidates beside each other. Slower to fit (minutes); with many labels better for one pass.
        seed: of the training of a list-wise head.
        by_class: in a pool of many classes, let each class depart from the weights that all share, as far as that
            predicts better on images that were not learnt from (`ridge_by_class`); a small class borrows from the
            others. Default: all classes share them. Of the head "ridge" alone.

    Raises:
        ValueError: for other values; when called before `fit`, or with a pool that is not the fitted one, or was
            changed since.

    Example:
        ```python
        measure_examples(model, pool, queries=100)                  # 100 pool images x 50 examples
        cascade = CascadeSelector(model).fit(pool)
        print(cascade.report)                                       # what it gains on the pool's own images
        pipe = VisualInContextPipeline(model=model.set_selector(cascade), pool=pool)
        pipe(image)                                                 # 10 runs of F
        pipe(image, num_examples=10, fusion="weighted")             # their weighted mean: better still
        ```

    Source: the setting and its measure, Xu et al., arXiv 2405.15279; the two stages and the choice of what is tried
    are this package's own.
    """

    kind = "cascade"

    def __init__(
        self, model: Any = None, *, passes: int = 10, head: str = "ridge", seed: int = 0, by_class: bool = False
    ) -> None:
        super().__init__()
        if isinstance(passes, bool) or not isinstance(passes, Integral) or passes < 1:
            raise ValueError(f"passes={passes!r}: pass a whole number of runs of the frozen model, at least 1")
        if head not in HEADS:
            raise ValueError(f"head={head!r}: choose one of {HEADS}")
        if by_class and head != "ridge":
            raise ValueError(f"by_class=True with head={head!r}: only head='ridge' has weights by class")
        self.passes, self.head, self.seed, self.by_class = int(passes), head, seed, bool(by_class)
        self.classes: list[str] = []  # whose weights were learnt
        borrow(self, "model", model)  # the model keeps the selector, not the other way round
        self._known: tuple[Tensor, Precedents] | None = None
        self.pool_fingerprint: str | None = None
        self.report: dict[str, float] = {}
        self.confidence: list[float] | None = None
        self.first_heads: ListHeads | None = None
        self.second_heads: ListHeads | None = None
        self.make_weights(colours=False)

    def make_weights(self, colours: bool, classes: int = 0) -> None:
        """Room for what `fit` learns, with weights of `classes` classes.

        Spreads and weights of both stages; how far performance is from the scores of stage 1, and how much of that
        related examples share; calibration; temperatures of the consensus in each turn, and of a fusion at last.
        """
        first, second = len(FIRST), len(FIRST) + 1 + ANSWERS[colours]
        for name, size in (
            ("first_spread", (first,)),
            ("first_weights", (2 * first,)),
            ("doubt", (2,)),
            ("calibration", (TURNS, MAPS)),
            ("second_spread", (TURNS, second)),
            ("second_weights", (TURNS, 2 * second)),
            ("temperatures", (TURNS + 1,)),
        ):
            self.register_buffer(name, torch.zeros(size))
        apart = {"first_apart": (classes, 2 * first), "second_apart": (TURNS, classes, 2 * second)}
        for name, size in apart.items():  # not saved where there are none
            self.register_buffer(name, torch.zeros(size) if classes else None)
        self.colours = colours

    @property
    def temperature(self) -> float:
        """How soft the weights `softmax(scores / temperature)` of a fusion are: what was best on pool images."""
        return float(self.temperatures[-1])

    def fit(
        self,
        pool: Any,
        measured: tuple[Tensor, Tensor] | None = None,
        *,
        labels: tuple[Tensor, Tensor] | None = None,
        model: Any = None,
        groups: Sequence[int | str | None] | None = None,
        examples: Examples | None = None,
        progress: bool = True,
    ) -> "CascadeSelector":
        """Learn both stages from measured performance, and say what they gain on the pool's own images.

        Stage 2 runs the frozen model with the `passes` best examples of up to 1,000 labelled images. Processes of
        `accelerate launch` or `torchrun` share these runs; all of them return the same selector.

        Args:
            pool: the examples.
            measured: candidates and performance `(n, K)` as `measure_examples` returns them, which are set on the
                model too; default: what was set there before.
            labels: the name that `measured` had before; will go.
            model: a `VisualInContextModel`; default: the one of the constructor.
            groups: what each row of the pool belongs to (a video, a patient), None for nothing: nothing is learnt for
                an image from its own group. Default: the groups that the pool keeps.
            examples: the pool as the model sees it, where there already is one.
            progress: show a bar on the first process.

        Returns:
            the selector. Its `report` holds mean performance on labelled pool images: of the nearest example, of the
            choice of either stage (folds without the image), of plain consensus, of the best example of those tried,
            and of the best candidate.

        Raises:
            ValueError: for performance on another pool, NaN in it, the same performance everywhere, fewer than 10
                labelled images, images of one group alone, or not more candidates than `passes`.
        """
        if labels is not None:
            warnings.warn("labels= is called measured= now: cascade.fit(pool, measured=...)", FutureWarning, 2)
            measured = labels
        model = model if model is not None else self.model
        if model is None:
            raise ValueError("a cascade is fitted for one frozen model: pass model=, here or to the constructor")
        if measured is None:
            check_model(model, pool)
            measured = model.measured_candidates, model.measured_performance
        else:
            check_measured(measured, pool)
        numbers = group_numbers(groups_of(pool, groups), len(pool))
        check_enough(measured, model.config.candidates, self.passes, numbers)
        if measured[1] is not model.measured_performance:  # there they are looked up for every prediction
            model.set_performance(*(part.cpu() for part in measured), pool.fingerprint)
        examples = examples if examples is not None else Examples(pool, model, find_task(model.config.task))
        if self.by_class:
            kept = column_of(pool, "class", "by_class=True")
            self.classes = sorted({one for one in kept if one is not None})
        with torch.no_grad():
            lists = MeasuredLists.read(pool, measured, model.config.candidates, numbers)
            precedents = Precedents.of(
                pool, tuple(part.cpu() for part in measured), lists, numbers, self._class_numbers(pool)
            )
            seed = self.seed if self.head == "listwise" else None
            fitted = fit(examples, lists, precedents, passes=self.passes, seed=seed, progress=progress)
        self._keep(fitted, colours=examples.task.name in PICTURES)
        self._known, self.pool_fingerprint = (model.measured_performance, precedents), pool.fingerprint
        warn_of(self.report)
        return self.eval()

    @torch.no_grad()
    def forward(self, queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, ...]:
        """Scores and rows `(B, count)`, best first, and, after stage 2, the answers `(B, count, 3, h, w)` to each."""
        precedents, own = self.precedents(examples), queries.exclude
        first, second = self.stages()
        similarity, rows = examples.nearest(queries, candidates)
        columns = first_columns(queries.views, examples, precedents, similarity, rows, own)
        scores = first.scores(columns, rows >= 0)
        if self.passes == 1:
            return best(scores, rows, count)
        top = first.shortlist(precedents.relations, scores, rows, own, max(count, self.passes))
        rows, scores, columns = rows.gather(1, top), scores.gather(1, top), gathered(columns, top)
        answers = examples.answers(examples.model.frozen.encode(queries.cells), rows)
        seen = Answers(examples.task, small(answers).cpu(), queries.views["grid"].cpu(), rows >= 0)
        scores = second.scores(Tried(seen, columns), scores)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        answers = answers[torch.arange(len(order))[:, None].to(answers.device), order.to(answers.device)]
        return scores.gather(1, order), rows.gather(1, order), answers

    # ---- what was learnt

    def precedents(self, examples: Examples) -> Precedents:
        """What was measured of the pool that it was fitted on, made once for a table of performance.

        Raises:
            ValueError: before `fit`; for another pool, one that was changed since, or a model without a table of it.
        """
        pool, model = examples.pool, examples.model
        self._check_fitted()
        if pool.fingerprint != self.pool_fingerprint:
            raise ValueError(
                f"the cascade was fitted on the pool {self.pool_fingerprint}, but this is "
                f"{pool.fingerprint}: another one, or it was changed since. Run "
                "measure_examples and cascade.fit again"
            )
        if model.config.performance is None or model.config.pool_fingerprint != pool.fingerprint:
            raise ValueError(
                "the cascade needs the measured performance that it was fitted on, and the model has "
                "none of this pool: run measure_examples and cascade.fit again"
            )
        # a table that was measured anew, or moved, is another tensor
        known = self._known  # another thread may put another one there
        if known is None or known[0] is not model.measured_performance:
            measured = model.measured_candidates.cpu(), model.measured_performance.cpu()
            groups = group_numbers(pool.groups, len(pool))
            lists = MeasuredLists.read(pool, measured, model.config.candidates, groups)
            known = self._known = (
                model.measured_performance,
                Precedents.of(pool, measured, lists, groups, self._class_numbers(pool)),
            )
        return known[1]

    def _class_numbers(self, pool: Any) -> Tensor | None:
        """`(n,)` of the pool's rows, in the order of `classes`, -1 for others; None where classes do not count."""
        if not self.classes:
            return None
        number = {name: at for at, name in enumerate(self.classes)}
        return torch.tensor([number.get(one, -1) for one in pool.classes or [None] * len(pool)])

    def stages(self) -> tuple[FirstStage, SecondStage]:
        """Both stages, with weights as features are: on the CPU in single precision, of a model in half too."""
        # copies: sums round by where in memory their terms lie, and weights that were read lie as in their file
        weights = {name: buffer.float().cpu().clone() for name, buffer in self.named_buffers(recurse=False)}
        first = Scorer(weights["first_spread"], weights["first_weights"], self.first_heads, weights.get("first_apart"))
        apart = weights.get("second_apart", [None] * TURNS)
        turns = []
        for turn in range(TURNS if self.passes > 1 else 0):
            heads = self.second_heads if turn == TURNS - 1 else None
            scorer = Scorer(weights["second_spread"][turn], weights["second_weights"][turn], heads, apart[turn])
            turns.append(Turn(float(weights["temperatures"][turn]), weights["calibration"][turn], scorer))
        return FirstStage(first, weights["doubt"]), SecondStage(tuple(turns))

    def _keep(self, fitted: Fitted, colours: bool) -> None:
        """Put what was fitted where it is saved with a model."""
        self.make_weights(colours, len(self.classes))
        first = fitted.first
        for buffer, value in (
            (self.first_spread, first.scorer.spread),
            (self.first_weights, first.scorer.weights),
            (self.doubt, first.doubt),
            (self.temperatures, fitted.temperatures),
        ):
            buffer.copy_(value)
        for number, turn in enumerate(fitted.turns):
            self.calibration[number] = turn.calibration
            self.second_spread[number], self.second_weights[number] = turn.scorer.spread, turn.scorer.weights
        for number, scorer in enumerate((first.scorer, *(turn.scorer for turn in fitted.turns))):
            if scorer.apart is not None:  # classes of which nothing was measured are the last, if any
                room = self.first_apart if number == 0 else self.second_apart[number - 1]
                room[: len(scorer.apart)] = scorer.apart
        self.first_heads = first.scorer.heads
        self.second_heads = fitted.turns[-1].scorer.heads if fitted.turns else None
        self.report, self.confidence = fitted.report, fitted.confidence

    def _check_fitted(self) -> None:
        if self.pool_fingerprint is None:
            raise ValueError("the cascade was not fitted: measure_examples(model, pool), then cascade.fit(pool)")

    # ---- as plain values, for the model's config

    def settings(self, config: Any) -> dict[str, Any]:
        """What is needed to make it again for a model of this config, beside the weights."""
        self._check_fitted()
        if self.pool_fingerprint != config.pool_fingerprint:
            raise ValueError(
                f"the cascade was fitted on the pool {self.pool_fingerprint}, and the model's measured "
                f"performance is of {config.pool_fingerprint}: a model keeps a cascade with the "
                "performance that it was fitted on"
            )
        return {
            "kind": self.kind,
            "passes": self.passes,
            "head": self.head,
            "colours": self.colours,
            "pool_fingerprint": self.pool_fingerprint,
            "report": self.report,
            "confidence": self.confidence,
            "classes": self.classes,
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "CascadeSelector":
        """A selector with room for the weights, which are then loaded."""
        made = cls(passes=settings["passes"], head=settings["head"])
        made.classes = settings.get("classes", [])  # as also confidence, not before 0.2
        made.by_class = bool(made.classes)
        made.make_weights(settings["colours"], len(made.classes))
        made.pool_fingerprint, made.report = settings["pool_fingerprint"], settings["report"]
        made.confidence = settings.get("confidence")
        if made.head == "listwise":
            made.first_heads = ListHeads(len(made.first_weights))
            made.second_heads = ListHeads(made.second_weights.shape[1]) if made.passes > 1 else None
        return made.eval()
