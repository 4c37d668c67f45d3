"""One model for the Hub: a frozen in-context model, the encoder of its pool, and what is known of the examples."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from .backbones import check_whole, is_named, plain_errors, source_of
from .borrowing import borrow
from .cascade import CascadeSelector
from .configuration_visual_in_context import VisualInContextConfig
from .frozen_mae_vqgan import MaeVqganInContext
from .frozen_matching import FeatureMatching
from .frozen_model import FrozenModel
from .frozen_painter import PainterInContext
from .frozen_sam2 import Sam2InContext
from .frozen_sam3 import Sam3InContext
from .frozen_seggpt import SegGptInContext
from .images import BICUBIC
from .ranker_selector import RankerSelector
from .strategies import AUTO
from .vision_encoder import VisionEncoder
from .writing import check_folder, save_whole


DEFAULT = "BAAI/seggpt-vit-large"
# frozen models that can be saved, by the name of their kind; a Painter is a SegGPT too
FROZEN: dict[str, type[FrozenModel]] = {
    frozen.kind: frozen
    for frozen in (
        *(PainterInContext, SegGptInContext, Sam3InContext, Sam2InContext, MaeVqganInContext),
        FeatureMatching,  # of whatever no other takes
    )
}
# selectors that a model can keep, by the name of the strategy
KINDS = {selector.kind: selector for selector in (CascadeSelector, RankerSelector)}


def frozen_class(config: Any) -> type[FrozenModel]:
    """What a model of transformers is made into: the kind that takes its config, else feature matching on it."""
    return next((frozen for frozen in FROZEN.values() if frozen.takes(config)), FeatureMatching)


class VisualInContextModel(PreTrainedModel):
    """A frozen vision model that is shown examples, with all that is needed to choose them.

    Its parts: `frozen`, the in-context model F; `encoder`, which the pool's vectors were made with; where it was
    measured, the performance of the pool's examples on each other (`set_performance`); and, where one was fitted, the
    `selector` that learnt from it (`set_selector`). A backbone that has a
    repository of its own is named in the config (id and revision) and not copied; weights that have none are embedded.

    Make one with `from_backbone` or `from_parts`, then `save_pretrained`, `push_to_hub` and `from_pretrained` as with
    any model of transformers. The pool is a repository of its own, named in the config with its revision.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = VisualInContextModel.from_parts(FeatureMatching(VisionEncoder(ViTModel(config), image_size=64)))
        >>> model.image_size, model.config.task
        ((64, 64), 'segmentation')
    """

    config: VisualInContextConfig
    base_model_prefix = "frozen"
    main_input_name = "queries"

    def __init__(self, config: VisualInContextConfig) -> None:
        super().__init__(config)
        self.frozen: nn.Module | None = None
        self.separate_encoder: VisionEncoder | None = None
        borrow(self, "own_encoder", None)  # of the frozen model, whose weights it shares
        self.register_buffer("format", torch.tensor(1))  # a model of named backbones alone would have an empty file
        self._make_table(config.performance)
        kept = config.selector
        self.selector: nn.Module | None = None if kept is None else KINDS[kept["kind"]].from_settings(kept)
        # here the embedded parts, whose weights from_pretrained then reads; named ones in load_backbones
        self._build(embedded=True)
        self.post_init()

    # ---- making one

    @classmethod
    def from_backbone(
        cls,
        backbone: str = DEFAULT,
        *,
        task: str = "segmentation",
        encoder: str | VisionEncoder | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **settings: Any,
    ) -> "VisualInContextModel":
        """A model from a repository or folder: its SegGPT, Painter, SAM 3, SAM 2 or MAE-VQGAN, else feature matching.

        Args:
            backbone: e.g. `BAAI/seggpt-vit-large` or `facebook/dinov2-base`.
            task: "segmentation", "detection", "colourisation" or "image-to-image".
            encoder: encoder for retrieval; default: the backbone itself. SAM 2, SAM 3 and MAE-VQGAN need one.
            revision: of the backbone.
            settings: for `SegGptInContext` (`embedding_type`, `ensemble`), `PainterInContext` (`ensemble`) or
                `Sam3InContext` (`text`, `threshold`, `paint`), or for `FeatureMatching` (`matching`, `temperature`,
                `carry`, `layers`, `positions`) and its encoder (`image_size`, `layer`).
        """
        check_folder(backbone, revision)
        config = AutoConfig.from_pretrained(backbone, revision=revision, token=token, trust_remote_code=False)
        frozen = frozen_class(config).from_pretrained(backbone, task=task, revision=revision, token=token, **settings)
        if isinstance(encoder, str):
            encoder = VisionEncoder.from_pretrained(encoder, token=token)
        return cls.from_parts(frozen, encoder, task=task)

    @classmethod
    def from_parts(
        cls,
        frozen: nn.Module,
        encoder: VisionEncoder | None = None,
        *,
        task: str = "segmentation",
        embed: bool | None = None,
        **config: Any,
    ) -> "VisualInContextModel":
        """A model from modules.

        Args:
            frozen: a `FrozenModel`, such as `SegGptInContext` or `FeatureMatching`, or any module with its
                `image_size`, `encode` and `predict`; of a kind that `FROZEN` does not hold it works here and now, but
                cannot be saved.
            encoder: of the pool; default: the frozen model's own.
            task: "segmentation", "detection", "colourisation" or "image-to-image".
            embed: True puts all weights into this model's file, False none; default: those without a repository.
            config: further fields of `VisualInContextConfig`; `strategy` is "auto" here, for what does best on images
                of the pool.
        """
        own = _own_encoder(frozen)
        if encoder is None and own is None:
            raise ValueError(
                f"{type(frozen).__name__} has no encoder of its own: pass encoder=VisionEncoder.from_pretrained(...)"
            )
        if hasattr(frozen, "check_task"):
            frozen.check_task(task)
        separate = None if encoder is own else encoder
        model = cls(VisualInContextConfig(task=task, **{"strategy": AUTO} | config))
        if getattr(frozen, "kind", None) in FROZEN:
            source = source_of(frozen.backbone, frozen.id, frozen.revision, embed)
            model.config.frozen_model = {"kind": frozen.kind, "backbone": source, **frozen.settings()}
        if separate is not None:
            source = source_of(separate.backbone, separate.id, separate.revision, embed)
            model.config.encoder = {"backbone": source, **separate.settings()}
        model.frozen, model.separate_encoder = frozen, separate
        borrow(model, "own_encoder", own)
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "VisualInContextModel":
        """Load a saved model, and the backbones that its config names.

        Args:
            pretrained_model_name_or_path, args, kwargs: as for any model of transformers. `dtype` is that of the
                frozen model and the encoder; what was measured and learnt stays in single precision. With
                `trust_remote_code=True` backbones that the config names may run code of theirs, which is refused
                otherwise.

        Raises:
            ValueError: where the file lacks tensors that the config names, or a backbone asks to run its code.
        """
        token, trust = kwargs.get("token"), bool(kwargs.get("trust_remote_code"))
        with_info = kwargs.pop("output_loading_info", False)
        dtype = as_dtype(kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None))
        if dtype is not None:  # cast at last, when it is known which encoder it is
            kwargs["dtype"] = torch.float32
        check_folder(pretrained_model_name_or_path, kwargs.get("revision"))
        where = pretrained_model_name_or_path
        with plain_errors(where):
            model, info = super().from_pretrained(where, *args, **kwargs, output_loading_info=True)
            check_whole(set(info["missing_keys"]) - {"format"}, where)
            model.load_backbones(token, trust)
        if dtype is not None:
            model.cast(dtype)
        return (model, info) if with_info else model

    def cast(self, dtype: torch.dtype) -> "VisualInContextModel":
        """Have the frozen model and the encoder compute in another precision; the encoder stays the one it is."""
        for part in (self.separate_encoder, self.own_encoder):
            if part is not None:
                _ = part.fingerprint  # of the weights as they were loaded: rounding makes no other encoder of it
        for part in (self.frozen, self.separate_encoder):
            if part is not None:
                part.to(dtype)
        return self

    def load_backbones(self, token: str | bool | None = None, trust: bool = False) -> None:
        """Load the parts that stand in repositories of their own; done by `from_pretrained`."""
        self._build(embedded=False, token=token, trust=trust)
        if self.frozen is None:
            raise ValueError(
                "config.frozen_model is empty, as for a model of parts that cannot be saved: make the "
                "model with from_backbone or from_parts"
            )
        if self.separate_encoder is None:
            borrow(self, "own_encoder", _own_encoder(self.frozen))
        self.eval()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save config, embedded weights and the table of performance; named backbones stay where they are."""
        if self.config.frozen_model is None:
            raise ValueError(
                f"a {type(self.frozen).__name__} cannot be saved: how to build it is not known. "
                f"{', '.join(kind.__name__ for kind in FROZEN.values())} can be saved"
            )
        state = kwargs.pop("state_dict", None) or self.state_dict()
        named = [
            prefix
            for prefix, spec in (("frozen.", self.config.frozen_model), ("separate_encoder.", self.config.encoder))
            if spec is not None and is_named(spec["backbone"])
        ]
        state = {
            # a backbone that both parts share is written for each of them
            name: value.clone() if name.startswith("separate_encoder.") else value
            for name, value in state.items()
            if not name.startswith(tuple(named))
        }
        save_whole(super().save_pretrained, save_directory, *args, state_dict=state, **kwargs)

    # ---- parts

    @property
    def encoder(self) -> VisionEncoder:
        """The encoder of the pool."""
        return self.separate_encoder if self.separate_encoder is not None else self.own_encoder

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels `(h, w)` of a cell."""
        return tuple(self.frozen.image_size)

    @property
    def resample(self) -> int:
        """How images are resized to a cell, as PIL numbers it: as the frozen model wants it, else bicubic."""
        return getattr(self.frozen, "resample", BICUBIC)

    def set_performance(self, candidates: Tensor, performance: Tensor, pool_fingerprint: str) -> None:
        """Keep what was measured of the pool: `performance[j, k]` of example `candidates[j, k]` on pool image j.

        Args:
            candidates: `(n, K)` rows of the pool, -1 where there is none.
            performance: `(n, K)`, larger is better.
            pool_fingerprint: of that pool.

        Raises:
            ValueError: for other shapes, or values that are not finite.
        """
        if candidates.shape != performance.shape or candidates.dim() != 2:
            raise ValueError(
                f"candidates {tuple(candidates.shape)} and performance {tuple(performance.shape)} must both be (n, K)"
            )
        if not performance[candidates >= 0].isfinite().all():
            raise ValueError("performance holds values that are not finite: measure these pairs again")
        self.config.performance, self.config.pool_fingerprint = list(candidates.shape), pool_fingerprint
        self._make_table(self.config.performance)
        self.measured_candidates.copy_(candidates)
        self.measured_performance.copy_(performance)

    def set_selector(self, selector: CascadeSelector | RankerSelector | None) -> "VisualInContextModel":
        """Keep a selector, which is saved with the model and chooses by default from now on; None forgets it.

        Raises:
            TypeError: for what is neither a `CascadeSelector` nor a `RankerSelector`.
            ValueError: for a cascade that was not fitted, or on other labels than the model's.
        """
        if selector is None:
            self.selector, self.config.selector = None, None
            self.config.strategy = AUTO if self.config.strategy in KINDS else self.config.strategy
            return self
        if not isinstance(selector, tuple(KINDS.values())):
            raise TypeError(
                f"selector is a {type(selector).__name__}: a model keeps a CascadeSelector or a "
                "RankerSelector; pass others to the pipeline"
            )
        self.config.selector = selector.settings(self.config)
        self.selector, self.config.strategy = selector.to(self.device), selector.kind
        return self

    @torch.no_grad()
    def forward(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The frozen model's answer: `(B, 3, h, w)`, `(B, m, 3, h, w)`, `(B, m, 3, h, w)` to `(B, 3, h, w)`."""
        return self.frozen(queries, images, labels, arrangement)

    def train(self, mode: bool = True) -> "VisualInContextModel":
        """Everything here is frozen and stays in evaluation mode."""
        return super().train(False)

    def _init_weights(self, module: nn.Module) -> None:
        pass  # what is not loaded was built by the part itself

    def _make_table(self, shape: list[int] | None) -> None:
        rows, count = shape or (0, 0)
        self.register_buffer("measured_candidates", torch.full((rows, count), -1, dtype=torch.int32))
        self.register_buffer("measured_performance", torch.zeros(rows, count))

    def _build(self, embedded: bool, token: str | bool | None = None, trust: bool = False) -> None:
        spec = self.config.frozen_model
        if spec is not None and self.frozen is None and is_named(spec["backbone"]) != embedded:
            self.frozen = _make_frozen(spec, token, trust)
        spec = self.config.encoder
        if spec is not None and self.separate_encoder is None and is_named(spec["backbone"]) != embedded:
            self.separate_encoder = VisionEncoder.from_settings(spec, token, trust)


def _own_encoder(frozen: nn.Module) -> VisionEncoder | None:
    return frozen.own_encoder() if hasattr(frozen, "own_encoder") else getattr(frozen, "encoder", None)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A precision by name or itself; None for that of the file."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: pass a floating precision, such as torch.bfloat16, or 'auto'")
    return found


def _make_frozen(spec: dict[str, Any], token: str | bool | None, trust: bool) -> FrozenModel:
    if spec["kind"] not in FROZEN:
        raise ValueError(
            f"config.frozen_model names kind={spec['kind']!r}; known are {' and '.join(map(repr, FROZEN))}"
        )
    return FROZEN[spec["kind"]].from_settings(spec, token, **({"trust": True} if trust else {}))


VisualInContextModel.register_for_auto_class("AutoModel")
