"""What a visual in-context model is made of, as plain values."""

from typing import Any

from transformers import PreTrainedConfig

from .counts import counted


class VisualInContextConfig(PreTrainedConfig):
    """Configuration of a `VisualInContextModel`.

    A backbone is either `{"id": ..., "revision": ...}`, loaded from its own repository, or `{"config": {...}}`, whose
    weights stand in this model's file.

    Args:
        task: "segmentation", "detection", "colourisation" or "image-to-image".
        frozen_model: `{"kind": ..., "backbone": ..., settings of that kind}`, the kind one of the keys of `FROZEN`.
        encoder: `{"backbone": ..., settings of VisionEncoder}` of the encoder that the pool was built with; None: the
            frozen model's own.
        strategy: how examples are chosen by default.
        candidates: length K of the list of nearest examples that a strategy chooses from.
        pool: repository, or folder inside this model's folder, of the pool.
        pool_revision: commit of the pool.
        pool_fingerprint: of the pool that `performance` was measured on.
        performance: shape `[n, K]` of the table of measured performance in the weights; None: there is none.
        selector: the selector that the model keeps, as plain values; None: there is none.
        absence: when an object counts as absent, see `VisualInContextPipeline.calibrate_absence`; None: not learnt.
    """

    model_type = "effdl-visual-in-context"

    task: str = "segmentation"
    frozen_model: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None
    strategy: str = "nearest"
    candidates: int = 50
    pool: str | None = None
    pool_revision: str | None = None
    pool_fingerprint: str | None = None
    performance: list[int] | None = None
    selector: dict[str, Any] | None = None
    absence: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.candidates = counted("candidates", self.candidates)
        super().__post_init__(**kwargs)


VisualInContextConfig.register_for_auto_class()
