"""SegGPT as a frozen in-context model: it paints the label of a query after one or several labelled examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import SegGptForImageSegmentation

from .encoder_seggpt import MEAN, STD, SegGptFeatures, cell_of, channels, normalised
from .frozen_model import FrozenModel, check_prompts
from .vision_encoder import VisionEncoder


EMBEDDING_TYPES = ("instance", "semantic")
ENSEMBLES = ("original", "upstream", "answers")
# examples of each query and half of the query, while this thread paints with several; a model may serve many threads
ENSEMBLE: ContextVar[tuple[int, int] | None] = ContextVar("ENSEMBLE", default=None)
# attention modules that look there
LOOKING: WeakSet[nn.Module] = WeakSet()


class SegGptInContext(FrozenModel):
    """A `SegGptForImageSegmentation` that takes pixels in [0, 1] and batches of different queries.

    SegGPT sees two tall canvases of two halves each, an example over a query:

        arrangement 0     image canvas [example; query],  label canvas [label; hidden]      the one it was trained for
        arrangement 1     image canvas [query; example],  label canvas [hidden; label]

    and paints the hidden half. Several examples of one query make one canvas pair each, joined by feature ensemble:
    after every attention, the query's half is replaced by its mean over the m pairs of that query,

        a[s, b, i, query half]  <-  1/m sum_j a[s, b, j, query half],

    with `s` the image or the label stream, which are two up to and including block `merge_index` and one after it. The
    m painted halves then differ only in the row of pixels next to the example, through the last convolution; they are
    averaged, so that the order of the examples does not matter (the authors keep the first).

    `ensemble="original"` is that formula, the authors' code (`examples/benchmarks/seggpt_original.py`). transformers'
    own `feature_ensemble=True`, here `"upstream"`, also averages over the two streams in block `merge_index`, and so
    paints something else; it does so even for a single example, for which this class never sets it. `"answers"` joins
    nothing: each example is shown by itself, and the answers are averaged.

    Args:
        model: the model. It is frozen in place: evaluation mode, no gradients.
        embedding_type: `"instance"` (default) or `"semantic"`, which of SegGPT's two type tokens is added.
        ensemble: `"original"` (default) or `"answers"`, any number of queries at once, or `"upstream"`, one query
            after the other, in arrangement 0 only.

    Raises:
        TypeError: where the model is another one.
        ValueError: for an unknown name, or a canvas that patches do not divide into two equal halves.

    Example:
        >>> from transformers import SegGptConfig
        >>> config = SegGptConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, decoder_hidden_size=4,
        ...     image_size=(64, 32), patch_size=8, merge_index=0, intermediate_hidden_state_indices=(0, 1))
        >>> f = SegGptInContext(SegGptForImageSegmentation(config))
        >>> queries, (images, labels) = torch.rand(2, 3, 32, 32), torch.rand(2, 2, 5, 3, 32, 32)  # 5 examples each
        >>> f.image_size, f(queries, images, labels).shape
        ((32, 32), torch.Size([2, 3, 32, 32]))

    Source: Wang et al., "SegGPT: Segmenting Everything In Context", arXiv 2304.03284, "Context Ensemble".
    """

    kind = "seggpt"
    model_types = ("seggpt",)
    backbone_class = SegGptForImageSegmentation
    kept: ClassVar[tuple[str, ...]] = ("embedding_type", "ensemble")

    def __init__(
        self, model: SegGptForImageSegmentation, embedding_type: str = "instance", ensemble: str = "original"
    ) -> None:
        super().__init__()
        self.image_size = cell_of(model)
        if embedding_type not in EMBEDDING_TYPES:
            raise ValueError(f"embedding_type={embedding_type!r}: it must be one of {EMBEDDING_TYPES}")
        if ensemble not in ENSEMBLES:
            raise ValueError(f"ensemble={ensemble!r}: it must be one of {ENSEMBLES}")
        self.model = model.eval().requires_grad_(False)
        for layer in self.model.model.encoder.layers:
            _have_look(layer.attention)
        self.embedding_type, self.ensemble = embedding_type, ensemble
        # upstream's ensemble averages the lower half wherever the query is
        self.arrangements = 1 if ensemble == "upstream" else 2

    # ---- the contract of a frozen model

    @property
    def backbone(self) -> SegGptForImageSegmentation:
        """The SegGPT."""
        return self.model

    @property
    def id(self) -> str | None:
        """Repository or folder that the model was loaded from."""
        return self.model.config.name_or_path or None

    def own_encoder(self) -> VisionEncoder:
        """SegGPT's own features, with these weights."""
        return VisionEncoder(self.model, id=self.id, revision=self.revision)

    # ---- painting

    @torch.no_grad()
    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The labels of the queries.

        Args:
            queries: `(B, 3, h, w)` in [0, 1], of `image_size`.
            images: `(B, m, 3, h, w)` in [0, 1], the m >= 1 examples of each query.
            labels: `(B, m, 3, h, w)` in [0, 1], their labels as images.
            arrangement: 0, example over query; 1, query over example.

        Returns:
            `(B, 3, h, w)` in [0, 1], in the queries' dtype and on their device, computed in the model's.

        Raises:
            TypeError: for tensors that are not floating.
            ValueError: for other sizes, no example, values outside [0, 1] or NaN, or an unknown arrangement.
        """
        if arrangement not in range(self.arrangements):
            raise ValueError(
                f"arrangement={arrangement!r}: ensemble={self.ensemble!r} has {list(range(self.arrangements))}"
            )
        check_prompts(queries, images, labels, self.image_size)
        b, m = images.shape[:2]
        prompts = (queries[:, None].expand_as(images), images, labels)
        query, example, label = (normalised(self.model, pixels.flatten(0, 1)) for pixels in prompts)
        above, below = (example, query) if arrangement == 0 else (query, example)
        half = 1 - arrangement  # the query's: 0 is the upper one
        if m > 1 and self.ensemble == "upstream":
            parts = zip(above.split(m), below.split(m), label.split(m))
            painted = torch.cat([self._paint(*part, half, feature_ensemble=True) for part in parts])
        else:
            with _ensemble(1 if self.ensemble == "answers" else m, half):
                painted = self._paint(above, below, label, half)
        painted = painted.chunk(2, dim=2)[half].to(queries).unflatten(0, (b, m)).mean(1)
        return (painted * channels(STD, painted) + channels(MEAN, painted)).clamp(0, 1)

    def features(self, images: Tensor) -> Tensor:
        """SegGPT's own features of images, see `SegGptFeatures`."""
        return SegGptFeatures(self.model, self.embedding_type)(images)

    def _paint(self, above: Tensor, below: Tensor, label: Tensor, half: int, feature_ensemble: bool = False) -> Tensor:
        # without labels= the label fills both halves of its canvas, and the mask alone says which is hidden
        patches = self.model.model.embeddings.patch_embeddings.num_patches
        hidden = torch.arange(patches, device=above.device) // (patches // 2) == half
        return self.model(
            pixel_values=below,
            prompt_pixel_values=above,
            prompt_masks=label,
            bool_masked_pos=hidden[None],
            feature_ensemble=feature_ensemble,
            embedding_type=self.embedding_type,
            return_dict=True,
        ).pred_masks


@contextmanager
def _ensemble(m: int, half: int) -> Iterator[None]:
    """Within, attention of this thread takes the query's half for its mean over the m examples of a query."""
    token = ENSEMBLE.set((m, half) if m > 1 else None)
    try:
        yield
    finally:
        ENSEMBLE.reset(token)


def _have_look(attention: nn.Module) -> None:
    """Hang the one hook on an attention module, for good: hooks that come and go would be seen by other threads."""
    if attention not in LOOKING:
        attention.register_forward_hook(_averaged)
        LOOKING.add(attention)


def _averaged(module: nn.Module, args: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """A hook: the output with the query's half averaged, where this thread asks for it."""
    asked = ENSEMBLE.get()
    if asked is None:
        return None
    m, half = asked
    # rows are (stream, query, example) before the streams merge and (query, example) after: examples are last
    halves = list(output[0].unflatten(0, (-1, m)).chunk(2, dim=2))
    halves[half] = halves[half].mean(1, keepdim=True).expand_as(halves[half])
    return torch.cat(halves, dim=2).flatten(0, 1), *output[1:]
