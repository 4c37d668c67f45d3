"""Images of any kind as PIL RGB, as pixels for a model, and as a number to draw by."""

import hashlib
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


Size = tuple[int, int]
# pixels of an image that is read; a small file can hold any number
MOST = 2**27
BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST


def to_rgb(image: Any) -> Image.Image:
    """Any image as PIL RGB, turned as its EXIF orientation says, transparency over white.

    Args:
        image: PIL image of any mode; numpy `(H, W)` or `(H, W, 1|3|4)` of bool, uint8, uint16 or floats in [0, 1];
            path; encoded bytes; `{"bytes", "path"}` of a `datasets.Image(decode=False)` column. PIL modes I and
            I;16 hold 16 bits (scaled by 1 / 257), F holds [0, 1].

    Raises:
        ValueError: for an empty image, values outside the range (NaN too), another shape, unreadable bytes.
        TypeError: for anything else, such as a tensor or an int64 array.

    Example:
        >>> to_rgb(np.array([[0, 65535]], dtype=np.uint16)).getpixel((1, 0))
        (255, 255, 255)
    """
    image = opened(image)
    if not isinstance(image, (Image.Image, np.ndarray)):
        raise TypeError(
            f"got {type(image).__name__}; pass a PIL image, a numpy array (H, W) or (H, W, 3), a path, "
            "bytes or a {'bytes', 'path'} dict"
        )
    if 0 in (image.size if isinstance(image, Image.Image) else image.shape):
        raise ValueError("the image is empty: its width or height is 0: leave it out")
    if isinstance(image, np.ndarray):
        image = _of_array(image)
    elif image.mode == "F" or image.mode[0] == "I":
        image = _of_deep_mode(image)
    if image.has_transparency_data:
        image = _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _of_array(array: np.ndarray) -> Image.Image:
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] not in (3, 4)):
        raise ValueError(f"an image array is (H, W) or (H, W, 1|3|4), channels last; got {array.shape}")
    return Image.fromarray(_eight_bits(array))


def _of_deep_mode(image: Image.Image) -> Image.Image:
    """Of a PIL image with more than eight bits a pixel."""
    array = np.asarray(image)
    if image.mode == "I" and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)
    return Image.fromarray(_eight_bits(array))


def _over_white(image: Image.Image) -> Image.Image:
    # premultiplied modes have no direct way to RGBA
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def opened(image: Any, formats: Sequence[str] | None = None) -> Any:
    """A file or its bytes as a PIL image, turned as its EXIF orientation says; arrays and all else as they are.

    Args:
        image: see `to_rgb`. Of a PIL image that comes from a file, `source_format` then says of what kind.
        formats: of files that may be read; default: all that Pillow can read.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    try:
        if isinstance(image, (bytes, str, os.PathLike)):
            if formats is not None:
                Image.init()  # Pillow loads the readers that it is asked for by name only then
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=formats)
        if not isinstance(image, Image.Image):
            return image
        if image.width * image.height > MOST:
            raise ValueError(f"the image has {image.width} x {image.height} pixels, more than {MOST:,}: shrink it")
        turned = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be read: {error}") from error
    turned.source_format = image.format
    return turned


def _eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind != "f":
        raise TypeError(
            f"got {array.dtype} values {array.min()}..{array.max()}; pass uint8, uint16, bool or floats in [0, 1]"
        )
    if not (array.min() >= 0 and array.max() <= 1):  # NaN fails both
        raise ValueError(f"a float image holds values in [0, 1]; got {array.min()}..{array.max()}")
    return np.floor(array.astype(np.float64) * 255 + 0.5).astype(np.uint8)


def pixels(images: Sequence, size: Size, resample: int = BICUBIC) -> Tensor:
    """Images (anything `to_rgb` takes) squashed to `size = (h, w)`: `(N, 3, h, w)` float32 in [0, 1].

    Example:
        >>> pixels([Image.new("L", (640, 480), 255)], (4, 6)).shape
        torch.Size([1, 3, 4, 6])
    """
    if isinstance(images, (Image.Image, np.ndarray, Tensor, str, bytes, dict)):
        raise TypeError(f"got one {type(images).__name__}; pass a list of images")
    h, w = size
    cells = [np.array(to_rgb(image).resize((w, h), resample)) for image in images]
    if not cells:
        return torch.zeros(0, 3, h, w)
    return torch.from_numpy(np.stack(cells)).permute(0, 3, 1, 2).contiguous().float() / 255


def check_pixels(name: str, pixels: Tensor, shape: tuple[int | str, ...]) -> None:
    """Refuses tensors that are not floating, not of `shape` (a letter is any size from 1), or not within [0, 1]."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise TypeError(f"{name} is of {kind}: pass a floating tensor with values in [0, 1]")
    if pixels.ndim != len(shape) or any(
        size == 0 or not isinstance(want, str) and size != want for size, want in zip(pixels.shape, shape)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} is {tuple(pixels.shape)}: it must be ({wanted}) with at least one of each")
    if not ((pixels >= 0) & (pixels <= 1)).all():  # NaN is neither
        raise ValueError(f"{name} has values outside [0, 1] or NaN: divide by 255, and clamp after resizing")


def image_seed(cell: Tensor, seed: int, use: str = "") -> int:
    """A number from an image's pixels and a seed, so that what is drawn for it does not depend on its batch.

    Args:
        cell: `(3, h, w)`.
        seed: of the caller.
        use: what is drawn; two uses of one image and seed are drawn differently.
    """
    salt = f"{use}:{seed}:" if use else f"{seed}:"
    digest = hashlib.sha256(salt.encode() + cell.cpu().numpy().tobytes()).digest()
    return int.from_bytes(digest[:7], "big")
