"""Painter as a frozen in-context model: it paints the answer to a query after a picture and its painted answer."""

from typing import Any

from transformers import SegGptForImageSegmentation

from .frozen_seggpt import SegGptInContext


class PainterInContext(SegGptInContext):
    """A converted Painter, whose labels are pictures of any kind: masks, colours, cleaned photos, depth.

    Painter is SegGPT without its type tokens, see `SegGptInContext` for the canvases, and SegGPT's architecture in
    transformers, with type tokens of zeros, computes it to the last digits. `examples/convert_painter.py` converts the
    published checkpoint so; the config then says `in_context_model="painter"`, by which this class knows its own.

    Painter was published with one example. Of several each is shown by itself and the answers are averaged; SegGPT's
    feature ensemble, which came later and needs no training, is a choice.

    Args:
        model: a converted Painter. It is frozen in place: evaluation mode, no gradients.
        ensemble: `"answers"` (default), or `"original"` or `"upstream"`, see `SegGptInContext`.

    Raises:
        TypeError: where the model is another one.
        ValueError: for a SegGPT that is no converted Painter, an unknown name, or a canvas that patches do not divide
            into two equal halves.

    Example:
        >>> import torch
        >>> from transformers import SegGptConfig
        >>> config = SegGptConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, decoder_hidden_size=4,
        ...     image_size=(64, 32), patch_size=8, merge_index=0, intermediate_hidden_state_indices=(0, 1),
        ...     in_context_model="painter")
        >>> f = PainterInContext(SegGptForImageSegmentation(config))
        >>> queries, images = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 3, 32, 32)  # 5 examples each
        >>> f.image_size, f(queries, images, images).shape
        ((32, 32), torch.Size([2, 3, 32, 32]))

    Source: Wang et al., "Images Speak in Images: A Generalist Painter for In-Context Visual Learning", arXiv
    2212.02499.
    """

    kind = "painter"
    kept = ("ensemble",)

    def __init__(self, model: SegGptForImageSegmentation, ensemble: str = "answers") -> None:
        super().__init__(model, ensemble=ensemble)
        if not self.takes(model.config):
            said = getattr(model.config, "in_context_model", None)
            raise ValueError(
                f"config.in_context_model={said!r}: this is a SegGPT and no converted Painter; pass it to "
                "SegGptInContext, or convert a Painter with examples/convert_painter.py"
            )

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Whether a config is of a converted Painter."""
        return super().takes(config) and getattr(config, "in_context_model", None) == cls.kind
