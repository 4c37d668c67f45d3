"""The contract of a frozen in-context model: a new one is one file with one subclass, and one entry in `FROZEN`."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .backbones import commit_of, load_backbone
from .images import check_pixels
from .vision_encoder import VisionEncoder
from .writing import check_folder


class FrozenModel(nn.Module, ABC):
    """A vision model that is shown labelled examples and paints the label of a query.

    A subclass has `image_size`, the pixels `(h, w)` of a cell, and `predict`. To be saved with a
    `VisualInContextModel` it also has a `kind`, which the table `FROZEN` of `modeling_visual_in_context` knows, and
    is made from its backbone alone and what is `kept`; one that is not has `settings`, `from_settings` and
    `from_pretrained` of its own.
    """

    kind: ClassVar[str] = ""
    # of transformers, whose models this class is made from where only a name is given
    model_types: ClassVar[tuple[str, ...]] = ()
    # of transformers, what its backbone is, which its constructor takes first; None: it has none
    backbone_class: ClassVar[Any] = None
    # other arguments of the constructor that it is made from again, attributes too
    kept: ClassVar[tuple[str, ...]] = ()
    # arguments of `from_pretrained` that shape its own encoder
    encoder_options: ClassVar[tuple[str, ...]] = ()
    # layouts of a canvas that `predict` can be asked for
    arrangements: int = 1
    # where the backbone's weights are from, as far as that is known
    id: str | None = None
    revision: str | None = None

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Whether it is made from models of transformers with this config."""
        return getattr(config, "model_type", None) in cls.model_types

    @property
    def backbone(self) -> PreTrainedModel | None:
        """The model of transformers inside, whose weights may be in a repository of their own; None: all are here."""
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values that `from_settings` makes it from again, beside the weights."""
        return {name: getattr(self, name) for name in self.kept}

    @classmethod
    def load(cls, source: dict[str, Any], token: str | bool | None = None, trust: bool = False) -> PreTrainedModel:
        """The backbone at a source, see `load_backbone`."""
        return load_backbone(source, cls.backbone_class, token, trust)

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], token: str | bool | None = None, trust: bool = False
    ) -> "FrozenModel":
        """Made from `settings`, with `settings["backbone"]`, the source of the backbone (see `load_backbone`)."""
        kept = {name: settings[name] for name in cls.kept}
        if cls.backbone_class is None:
            return cls(**kept)
        source = settings["backbone"]
        frozen = cls(cls.load(source, token, trust), **kept)
        frozen.revision = source.get("revision")
        return frozen

    @classmethod
    def from_pretrained(
        cls,
        id: str,
        *,
        task: str = "segmentation",
        revision: str | None = None,
        token: str | bool | None = None,
        **settings: Any,
    ) -> "FrozenModel":
        """Made from the weights in a repository or folder, for a task; `settings` are the constructor's."""
        if cls.backbone_class is None:
            raise TypeError(f"{id}: a {cls.__name__} is not made from a name alone; pass one to from_parts")
        check_folder(id, revision)
        frozen = cls(cls.load({"id": id, "revision": revision}, token), **settings)
        frozen.check_task(task)
        frozen.revision = commit_of(id, revision, token) or revision
        return frozen

    def check_task(self, task: str) -> None:
        """Refuse a task, by ValueError, whose labels it cannot carry over; default: none."""

    def own_encoder(self) -> VisionEncoder | None:
        """The encoder that pools are made with where no other is given; None: there is none."""
        return None

    def encode(self, images: Tensor) -> Tensor:
        """What `predict` takes of images, and what is kept of the pool's; here the images themselves.

        One that takes a single batch axis needs a `forward` that knows of it.
        """
        return images

    @abstractmethod
    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """From encoded `(B, ...)`, `(B, m, ...)` and labels `(B, m, 3, h, w)`: the queries' labels `(B, 3, h, w)`."""

    def forward(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The same from pixels: `(B, 3, h, w)`, `(B, m, 3, h, w)` and `(B, m, 3, h, w)` to `(B, 3, h, w)`."""
        return self.predict(self.encode(queries), self.encode(images), labels, arrangement)

    def train(self, mode: bool = True) -> "FrozenModel":
        """The model is frozen and stays in evaluation mode."""
        return super().train(False)


def check_prompts(queries: Tensor, images: Tensor, labels: Tensor, image_size: tuple[int, int]) -> None:
    """Refuses what is not `(B, 3, h, w)` and twice `(B, m, 3, h, w)` of pixels, with m >= 1."""
    check_pixels("queries", queries, ("B", 3, *image_size))
    check_pixels("images", images, (len(queries), "m", 3, *image_size))
    check_pixels("labels", labels, tuple(images.shape))
