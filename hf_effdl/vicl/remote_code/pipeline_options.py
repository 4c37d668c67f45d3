"""The options of a pipeline's call: which there are, and what goes together."""

import warnings
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .counts import counted
from .examples import Queries
from .visual_tasks import PICTURES


FUSIONS = ("mean", "weighted", "model")
EXTRA = ("instances", "presence")  # options that add to what is said of each query


@dataclass(frozen=True)
class Options:
    """How queries are answered; see `VisualInContextPipeline`."""

    strategy: Any = None
    num_examples: int = 1
    fusion: str = "mean"
    vote: bool = False
    candidates: int = 50
    seed: int = 0
    soft_map: bool = False
    instances: bool = False
    presence: bool = False

    def __post_init__(self) -> None:
        for name in ("num_examples", "candidates"):
            object.__setattr__(self, name, counted(name, getattr(self, name)))
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion={self.fusion!r}: choose one of {FUSIONS}")


# the options of a call, or of the pipeline, that are passed on to it
FORWARD = tuple(field.name for field in fields(Options))


def check_chosen(chosen: Any, queries: Queries, size: int) -> Any:
    """What a selector gave, if it can be that.

    Args:
        chosen: `(scores, rows)`, or with answers too.
        queries: that it was asked for.
        size: of the pool.

    Raises:
        TypeError: for other things than such tensors.
        ValueError: for other shapes, rows that the pool does not have, and rows that a query must not be shown.
    """
    pair = isinstance(chosen, tuple) and len(chosen) in (2, 3)
    if not pair or not all(isinstance(part, Tensor) for part in chosen):
        raise TypeError(
            f"the selector gave {type(chosen).__name__}: it must return (scores, rows) or (scores, rows, "
            "answers), tensors (B, count)"
        )
    scores, rows = chosen[:2]
    fits = rows.dim() == 2 and rows.shape == scores.shape and len(rows) == len(queries) and rows.shape[1] > 0
    if not fits or int(rows.min()) < 0 or int(rows.max()) >= size:
        raise ValueError(
            f"the selector gave scores {tuple(scores.shape)} and rows {tuple(rows.shape)} for {len(queries)} "
            f"queries: both must be (B, count), with rows of the pool, 0 to {size - 1}"
        )
    if queries.allowed is not None and not queries.allowed.gather(1, rows.cpu()).all():
        raise ValueError(
            "the selector chose an example that exclude=, groups=, classes= or candidates_where= rules out: have "
            "it search with examples.nearest(queries, count)"
        )
    return chosen


def check_options(options: Options, pipe: Any, choose: Any, said: str) -> None:
    """Refuse options that do not go with what a pipeline is made of, and say which can be met in part only.

    Args:
        options: of the call.
        pipe: the pipeline.
        choose: its selector for this call.
        said: what that is, in words.

    Raises:
        ValueError: naming the option.
    """
    frozen, pool, kept = pipe.model.frozen, pipe.pool, pipe.model.selector
    for name, without in (("soft_map", ("colourisation",)), ("presence", PICTURES)):
        if getattr(options, name) and pipe.visual_task.name in without:
            raise ValueError(f"{name}=True, but pictures are not cut in two: the prediction is all there is")
    if options.instances:
        _check_instances(options, frozen)
    if options.vote and getattr(frozen, "arrangements", 1) == 1:
        raise ValueError(
            f"vote=True, but {type(frozen).__name__} has no canvas whose cells could be "
            "arranged in another way: leave vote out"
        )
    if options.fusion == "weighted" and not hasattr(choose, "temperature"):
        is_kept = getattr(kept, "kind", None) == "cascade"
        remedy = "pass strategy='cascade' for the one that the model keeps" if is_kept else "fit one"
        raise ValueError(
            "fusion='weighted' weighs answers by what is expected of their examples, which a fitted "
            f"CascadeSelector says, but here {said} chooses: {remedy}, or choose "
            "'mean'"
        )
    if not len(pool):
        raise ValueError("the pool is empty: add examples to it")
    if options.num_examples > len(pool):
        warnings.warn(
            f"num_examples={options.num_examples}, but the pool has {len(pool)} examples: a query is shown at most "
            "these",
            stacklevel=2,
        )


def _check_instances(options: Options, frozen: Any) -> None:
    if not hasattr(frozen, "instances"):
        raise ValueError(
            f"instances=True, but a {type(frozen).__name__} paints one picture and tells no objects apart: use a "
            "Sam3InContext, or leave instances out"
        )
    if options.vote or (options.num_examples > 1 and options.fusion != "model"):
        raise ValueError(
            "instances=True, but objects of several answers are not joined: pass fusion='model', which shows all "
            "examples at once, and leave vote out"
        )
