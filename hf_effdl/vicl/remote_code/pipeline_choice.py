"""Who chooses the examples of a pipeline: a call, its selector, the model's config, or a look at the pool."""

import warnings
from operator import is_not
from threading import RLock
from typing import Any

from .modeling_visual_in_context import KINDS
from .strategies import AUTO, find_strategy
from .strategy_check import check_strategies


LOOKING = RLock()  # of all pipelines, so that threads of one look at its pool once; a lock of its own is not copied


class Choice:
    """Finds the selector of each call.

    Args:
        pipe: the pipeline, whose model, pool and options may change.

    Raises:
        ValueError, TypeError: for a selector of the pipeline, or of its model's config, that there is not.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.kept = pipe.model.selector  # as far as the user of this pipeline has been told
        self._checked: tuple[Any, Any, dict[str, Any]] | None = None
        if not _is_auto(self._asked_for(None)):  # which is tried when it is needed
            self.selector(None)

    @property
    def self_check(self) -> dict[str, Any]:
        """See `check_strategies`; made anew when what it goes by changes: pool, measurements, selector, its fit, K."""
        pipe, model = self.pipe, self.pipe.model
        candidates = pipe.options_of({}).get("candidates", model.config.candidates)
        values = pipe.pool.fingerprint, candidates
        objects = model.measured_performance, model.selector, getattr(model.selector, "report", None)
        with LOOKING:
            before = self._checked
            if before is None or before[0] != values or any(map(is_not, before[1], objects)):
                self._checked = values, objects, check_strategies(pipe.examples, candidates, model.selector)
            return self._checked[2]

    def strategy(self, given: Any) -> Any:
        """A name, or what is called, from what a call says."""
        asked = self._asked_for(given)
        return self.self_check["strategy"] if _is_auto(asked) else asked

    def selector(self, given: Any) -> Any:
        """What is called."""
        strategy, kept = self.strategy(given), self.pipe.model.selector
        if strategy not in KINDS:
            return find_strategy(strategy)
        if kept is None or kept.kind != strategy:
            raise ValueError(
                f"strategy={strategy!r}, but the model keeps {'none' if kept is None else kept.kind}: "
                "model.set_selector(...) with a fitted CascadeSelector, or a RankerSelector"
            )
        return kept

    def said(self, given: Any) -> str:
        """What chooses, and who said so."""
        strategy = self.strategy(given)
        name = repr(strategy) if isinstance(strategy, str) else f"a {type(strategy).__name__}"
        if _is_auto(self._asked_for(given)):
            return f"{name}, which 'auto' found best on the pool,"
        if given is not None:
            return f"strategy={name}"
        return (
            f"selector={name} of the pipeline" if self.pipe.selector is not None else f"{name} of the model's config"
        )

    def tell_unused(self, given: Any, own: Any) -> None:
        """Say once that a selector which was set on the model since this pipeline was made is not what chooses.

        Args:
            given: strategy of the call.
            own: strategy of the pipeline's options.
        """
        kept, before = self.pipe.model.selector, self.kept
        if kept is before or given is not own or _is_auto(self._asked_for(own)):
            return  # nothing new, or this call says who chooses, or the new one is looked at
        self.kept = kept
        if kept is not None and self.strategy(own) not in (kept.kind, kept):
            warnings.warn(
                f"the model keeps a {type(kept).__name__} since set_selector, but {self.said(own)} chooses, as "
                f"before: pass strategy={kept.kind!r}, or make the pipeline without selector=",
                stacklevel=2,
            )

    def _asked_for(self, given: Any) -> Any:
        asked = given, self.pipe.selector, self.pipe.model.config.strategy
        return next(value for value in asked if value is not None)


def _is_auto(asked: Any) -> bool:
    return isinstance(asked, str) and asked == AUTO
