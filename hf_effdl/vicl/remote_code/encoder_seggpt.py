"""What SegGPT makes of single images: how they are normalised, how large they are, and its own features of them."""

import torch
from torch import Tensor
from transformers import SegGptForImageSegmentation

from .images import check_pixels


# of ImageNet, which SegGPT's images and labels are normalised by
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class SegGptFeatures:
    """SegGPT's own features of images: the last hidden states of each as a query that has itself as example.

    The labels are black.

    Args:
        model: the model.
        embedding_type: which of SegGPT's two type tokens is added.

    Raises:
        TypeError: where the model is another one.
        ValueError: for a canvas that patches do not divide into two equal halves.
    """

    backbone_class = SegGptForImageSegmentation

    def __init__(self, model: SegGptForImageSegmentation, embedding_type: str = "instance") -> None:
        self.model, self.embedding_type, self.image_size = model, embedding_type, cell_of(model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """`(N, 3, h, w)` in [0, 1], of `image_size`, to `(N, gh, gw, C)`, one vector a patch, in the images' dtype."""
        check_pixels("images", images, ("N", 3, *self.image_size))
        pixels, black = (normalised(self.model, part) for part in (images, torch.zeros_like(images)))
        states = self.model.model(
            pixel_values=pixels,
            prompt_pixel_values=pixels,
            prompt_masks=black,
            embedding_type=self.embedding_type,
            return_dict=True,
        ).last_hidden_state
        return states.chunk(2, dim=1)[1].to(images)


def cell_of(model: SegGptForImageSegmentation) -> tuple[int, int]:
    """Pixels `(h, w)` of half a canvas."""
    if not isinstance(model, SegGptForImageSegmentation):
        raise TypeError(f"model is a {type(model).__name__}: pass a SegGptForImageSegmentation, which can paint")
    size, patch = model.config.image_size, model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    if height % (2 * patch) or width % patch:
        raise ValueError(
            f"image_size={height, width} of the config is no two halves of whole patches of {patch} pixels"
        )
    return height // 2, width


def normalised(model: SegGptForImageSegmentation, pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as the model takes them; transformers casts images to its dtype but not labels."""
    pixels = (pixels - channels(MEAN, pixels)) / channels(STD, pixels)
    return pixels.to(model.device, model.dtype)


def channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """A value for each channel, to be broadcast over pixels."""
    return like.new_tensor(values)[:, None, None]
