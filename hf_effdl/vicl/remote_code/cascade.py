"""The cascade: score the candidates without the frozen model, try a few with it, and let the answers decide."""

from typing import Any

import torch
from torch import Tensor, nn

from .cascade_consensus import ANSWERS, MAPS, Consensus, small
from .cascade_features import MATCHES, STATISTICS, label_statistics, standardised
from .cascade_head import ListHeads
from .cascade_lists import MeasuredLists
from .cascade_rows import MATCHED, RowModel, quarters_of
from .cascade_shortlist import Relations, best_together
from .examples import Examples, Queries


FIRST = ("similarity", "quarters", "rank", *MATCHES, *STATISTICS, *RowModel.names, *RowModel.among_names)
HEADS = ("ridge", "listwise")
# turns of stage 2
TURNS = 2


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
    so that the best of them can be expected to be best (`best_together`). What a pool image itself measured never
    enters its own features (leave-one-out), and stage 2 learns on scores of stage 1 from folds without the image.

    A strategy of the pipeline: `model.set_selector(cascade)` keeps it in the model, with which it is saved and pushed
    and whose default it then is; or pass it as `selector=`. Scores are expected performance less the mean of the
    examples that were tried, so that `fusion="weighted"` can weigh answers by them.

    Args:
        model: a `VisualInContextModel`; may also be given to `fit`.
        passes: runs of F on a query, m; 1 leaves out stage 2, and only the chosen example is shown.
        head: of both stages: "ridge", or "listwise", ten small `ListwiseRanker`s each over the same features, which
            see the candidates beside each other. Slower to fit (minutes); with many labels better for one pass.
        seed: of the training of a list-wise head.

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

    def __init__(self, model: Any = None, *, passes: int = 10, head: str = "ridge", seed: int = 0) -> None:
        super().__init__()
        if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
            raise ValueError(f"passes={passes!r}: pass a whole number of runs of the frozen model, at least 1")
        if head not in HEADS:
            raise ValueError(f"head={head!r}: choose one of {HEADS}")
        self.passes, self.head, self.seed = passes, head, seed
        self._model = (model,)  # not registered: the model keeps the selector, not the other way round
        self._rows: tuple[Any, RowModel, Relations] | None = None
        self.pool_fingerprint: str | None = None
        self.report: dict[str, float] = {}
        self.first_heads: ListHeads | None = None
        self.second_heads: ListHeads | None = None
        self.make_weights(colours=False)

    def make_weights(self, colours: bool) -> None:
        """Room for what `fit` learns.

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
        self.colours = colours

    @property
    def temperature(self) -> float:
        """How soft the weights `softmax(scores / temperature)` of a fusion are: what was best on pool images."""
        return float(self.temperatures[-1])

    def fit(
        self,
        pool: Any,
        labels: tuple[Tensor, Tensor] | None = None,
        *,
        model: Any = None,
        examples: Examples | None = None,
        progress: bool = True,
    ) -> "CascadeSelector":
        """Learn both stages from measured performance, and say what they gain on the pool's own images.

        Stage 2 runs the frozen model with the `passes` best examples of up to 1,000 labelled images. Processes of
        `accelerate launch` or `torchrun` share these runs; all of them return the same selector.

        Args:
            pool: the examples.
            labels: candidates and performance `(n, K)` as `measure_examples` returns them, which are set on the model;
                default: what was set there before.
            model: a `VisualInContextModel`; default: the one of the constructor.
            examples: the pool as the model sees it, where there already is one.
            progress: show a bar on the first process.

        Returns:
            the selector. Its `report` holds mean performance on labelled pool images: of the nearest example, of the
            choice of either stage (folds without the image), of plain consensus, of the best example of those tried,
            and of the best candidate.

        Raises:
            ValueError: for labels of another pool, NaN in them, the same performance everywhere, fewer than 10
                labelled images, or not more candidates than `passes`.
        """
        from .cascade_fit import fit

        model = model if model is not None else self._model[0]
        if model is None:
            raise ValueError("a cascade is fitted for one frozen model: pass model=, here or to the constructor")
        fit(self, pool, labels, model, examples, progress)
        return self

    @torch.no_grad()
    def forward(self, queries: Queries, examples: Examples, count: int, candidates: int) -> tuple[Tensor, ...]:
        """Scores and rows `(B, count)`, best first, and, after stage 2, the answers `(B, count, 3, h, w)` to each."""
        if self.pool_fingerprint is None:
            raise ValueError("the cascade was not fitted: measure_examples(model, pool), then cascade.fit(pool)")
        if examples.pool.fingerprint != self.pool_fingerprint:
            raise ValueError(
                f"the cascade was fitted on the pool {self.pool_fingerprint}, but this is "
                f"{examples.pool.fingerprint}: another one, or it was changed since. Run "
                "measure_examples and cascade.fit again"
            )
        similarity, rows = examples.pool.search(queries.views["vector"].cpu(), candidates, exclude=queries.exclude)
        known = rows >= 0
        features = self.first_features(queries.views, examples, similarity, rows, queries.exclude)
        scores = self.first_scores(features, known)
        if self.passes == 1:
            top = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
            return scores.gather(1, top), rows.gather(1, top)
        top = self.shortlist(examples, scores, rows, queries.exclude, max(count, self.passes))
        rows, scores = rows.gather(1, top), scores.gather(1, top)
        features = features.gather(1, top[..., None].expand(-1, -1, features.shape[2]))
        answers = examples.answers(examples.model.frozen.encode(queries.cells), rows)
        painted, grid, known = small(answers).cpu(), queries.views["grid"].cpu(), rows >= 0
        for turn, calibration in enumerate(_plain(self.calibration)):
            consensus = self.consensus(examples, painted, scores, grid, known, turn)
            calibrated = consensus.calibrate(consensus.maps(), calibration)
            scores = self.second_scores(self.second_features(consensus, calibrated, features, scores), known, turn)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        answers = answers[torch.arange(len(order))[:, None].to(answers.device), order.to(answers.device)]
        return scores.gather(1, order), rows.gather(1, order), answers

    # ---- the two stages, as fitting sees them

    def first_features(
        self, views: dict[str, Tensor], examples: Examples, similarity: Tensor, rows: Tensor, own: Tensor | None
    ) -> Tensor:
        """What stage 1 knows of each candidate, `(B, K, f)` in the order of `FIRST`; the candidates nearest first."""
        safe = rows.clamp(min=0)
        vectors, tokens = views["vector"].float().cpu(), views["tokens"].float().cpu()
        asked = quarters_of(tokens)
        quarters = quarters_of(examples.pool.tokens(safe).flatten(0, 1)).unflatten(0, rows.shape)
        simple = [
            similarity.nan_to_num(neginf=0.0),
            (quarters @ asked[..., None])[..., 0],
            torch.arange(rows.shape[1]).expand(rows.shape).float(),
        ]
        matches, statistics = examples.matches(views, safe).cpu(), label_statistics(examples.small_labels(safe)).cpu()
        learned = self.transferred(self._row_model(examples), (vectors, asked), matches, rows, own)
        return torch.cat([torch.stack(simple, 2), matches, statistics, learned], 2)

    @staticmethod
    def transferred(
        model: RowModel, views: tuple[Tensor, Tensor], matches: Tensor, rows: Tensor, own: Tensor | None
    ) -> Tensor:
        """What of `first_features` rests on measured performance, the last of them."""
        alike = matches[..., [MATCHES.index(name) for name in MATCHED]]
        alike = standardised(alike, rows >= 0)[0][..., : len(MATCHED)]
        return torch.cat([model.predict(*views, rows, own), model.among(alike, rows, own)], 2)

    def shortlist(self, examples: Examples, scores: Tensor, rows: Tensor, own: Tensor | None, count: int) -> Tensor:
        """Places `(B, count)` of the candidates to try, the one of the highest score first."""
        spread, shared = _plain(self.doubt)
        related = shared * self._relations(examples).between(rows, own)
        related.diagonal(dim1=1, dim2=2).fill_(1.0)
        return best_together(scores, spread.double().square() * related, rows >= 0, count)

    def consensus(
        self, examples: Examples, painted: Tensor, scores: Tensor, grid: Tensor, known: Tensor, turn: int
    ) -> Consensus:
        """Of answers (see `small`) that have these scores before a turn of stage 2."""
        return Consensus(examples.task, painted, scores, float(self.temperatures[turn]), grid, known)

    def second_features(self, consensus: Consensus, calibrated: Tensor, first: Tensor, scores: Tensor) -> Tensor:
        """What stage 2 knows of each candidate: what stage 1 did, its score, and the answers."""
        area = first[..., FIRST.index("area")]
        return torch.cat([first, scores[..., None], consensus.features(calibrated, area)], 2)

    def first_scores(self, features: Tensor, known: Tensor) -> Tensor:
        """Of stage 1, `(B, K)`; -inf where not known."""
        features, _ = standardised(features, known, _plain(self.first_spread))
        return _scores(features, known, self.first_heads, _plain(self.first_weights))

    def second_scores(self, features: Tensor, known: Tensor, turn: int) -> Tensor:
        """Of a turn of stage 2, `(B, m)`; -inf where not known."""
        features, _ = standardised(features, known, _plain(self.second_spread[turn]))
        heads = self.second_heads if turn == TURNS - 1 else None
        return _scores(features, known, heads, _plain(self.second_weights[turn]))

    def _row_model(self, examples: Examples) -> RowModel:
        return self._learned(examples)[1]

    def _relations(self, examples: Examples) -> Relations:
        return self._learned(examples)[2]

    def _learned(self, examples: Examples) -> tuple[Any, RowModel, Relations]:
        pool, model = examples.pool, examples.model
        if model.config.performance is None or model.config.pool_fingerprint != pool.fingerprint:
            raise ValueError(
                "the cascade needs the measured performance that it was fitted on, and the model has "
                "none of this pool: run measure_examples and cascade.fit again"
            )
        # a table that was measured anew, or moved, is another tensor
        if self._rows is None or self._rows[0] is not model.measured_performance:
            table = model.measured_candidates.cpu(), model.measured_performance.cpu()
            quarters = torch.cat([quarters_of(pool.tokens(rows)) for rows in torch.arange(len(pool)).split(4096)])
            lists = MeasuredLists.read(pool, model)
            self._rows = (
                model.measured_performance,
                RowModel(pool.vectors.float(), quarters, *table),
                Relations(lists.images, lists.rows, lists.target, len(pool)),
            )
        return self._rows

    # ---- as plain values, for the model's config

    def settings(self, config: Any) -> dict[str, Any]:
        """What is needed to make it again for a model of this config, beside the weights."""
        if self.pool_fingerprint is None:
            raise ValueError("the cascade was not fitted: measure_examples(model, pool), then cascade.fit(pool)")
        if self.pool_fingerprint != config.pool_fingerprint:
            raise ValueError(
                f"the cascade was fitted on the pool {self.pool_fingerprint}, and the model's measured "
                f"performance is of {config.pool_fingerprint}: a model keeps a cascade with the labels "
                "that it was fitted on"
            )
        return {
            "kind": self.kind,
            "passes": self.passes,
            "head": self.head,
            "colours": self.colours,
            "pool_fingerprint": self.pool_fingerprint,
            "report": self.report,
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "CascadeSelector":
        """A selector with room for the weights, which are then loaded."""
        made = cls(passes=settings["passes"], head=settings["head"])
        made.make_weights(settings["colours"])
        made.pool_fingerprint, made.report = settings["pool_fingerprint"], settings["report"]
        if made.head == "listwise":
            made.first_heads = ListHeads(len(made.first_weights))
            made.second_heads = ListHeads(made.second_weights.shape[1]) if made.passes > 1 else None
        return made.eval()


def _plain(weights: Tensor) -> Tensor:
    """As features are: of a model in half precision too."""
    return weights.float().cpu()


def _scores(features: Tensor, known: Tensor, heads: ListHeads | None, weights: Tensor) -> Tensor:
    scores = features @ weights if heads is None else heads(features, known)
    return scores.masked_fill(~known, -torch.inf)
