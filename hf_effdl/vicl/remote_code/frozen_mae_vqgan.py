"""MAE-VQGAN as a frozen in-context model: the yardstick of the papers on choosing visual prompts."""

from typing import Any

import torch
from torch import Tensor

from .backbones import check_sizes, is_named
from .configuration_mae_vqgan import MaeVqganConfig
from .frozen_canvas import PATCHES, SIDE, CanvasModel
from .modeling_mae_vqgan import MaeVqganForImageInpainting


class MaeVqganInContext(CanvasModel):
    """A `MaeVqganForImageInpainting` that fills the hidden quarter of a canvas, see `CanvasModel`.

    Args:
        model: for canvases of 224 pixels in patches of 16. It is frozen in place: evaluation mode, no gradients.

    Raises:
        TypeError: where the model is another one.
        ValueError: for canvases of another geometry.

    Example:
        >>> config = MaeVqganConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, decoder_hidden_size=16,
        ...     decoder_num_hidden_layers=1, decoder_num_attention_heads=2, codebook_size=8, code_size=4,
        ...     latent_channels=8, level_channels=(32, 32, 32, 32, 32), blocks=1)
        >>> f = MaeVqganInContext(MaeVqganForImageInpainting(config))
        >>> queries, images = torch.rand(1, 3, 111, 111), torch.rand(1, 2, 3, 111, 111)
        >>> f(queries, images, images, arrangement=3).shape
        torch.Size([1, 3, 111, 111])

    Source: Bar et al., "Visual Prompting via Image Inpainting", arXiv 2209.00647.
    """

    kind = "mae-vqgan"
    model_types = (MaeVqganConfig.model_type,)
    backbone_class = MaeVqganForImageInpainting

    def __init__(self, model: MaeVqganForImageInpainting) -> None:
        super().__init__()
        if getattr(getattr(model, "config", None), "model_type", None) != MaeVqganConfig.model_type:
            raise TypeError(f"model is a {type(model).__name__}: pass a MaeVqganForImageInpainting")
        size, patch = model.config.image_size, model.config.patch_size
        if (size, size // patch) != (SIDE, PATCHES):
            raise ValueError(
                f"the model is of {size} pixels in patches of {patch}: a canvas is of {SIDE} in patches of "
                f"{SIDE // PATCHES}"
            )
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def paint(self, canvas: Tensor, mask: Tensor) -> Tensor:
        """The canvas as the likeliest codes paint it."""
        return self.model.paint(canvas, mask.flatten(1)).to(canvas)

    @property
    def backbone(self) -> MaeVqganForImageInpainting:
        """The MAE-VQGAN."""
        return self.model

    @property
    def id(self) -> str | None:
        """Repository or folder that the model was loaded from."""
        return self.model.config.name_or_path or None

    @classmethod
    def load(
        cls, source: dict[str, Any], token: str | bool | None = None, trust: bool = False
    ) -> MaeVqganForImageInpainting:
        """The backbone at a source; its classes are of this folder, which transformers need not know."""
        if is_named(source):
            return super().load(source, token, trust)
        values = {name: value for name, value in source["config"].items() if name not in ("model_type", "auto_map")}
        check_sizes(values)
        return MaeVqganForImageInpainting(MaeVqganConfig(**values))
