"""Pictures that the tabs share."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


RED = (209, 73, 91)
Tile = tuple[Image.Image, str]  # with its caption
STYLE = """
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(var(--wide), 29%), 1fr)); }
.tiles figure { margin: 0; }
.tiles img { width: 100%; border-radius: 4px; }
.tiles figcaption { font-size: 13px; line-height: 1.35; margin-top: 4px; }
.drawing { overflow-x: auto; }
.drawing img { min-width: 640px; width: 100%; background: white; }
#sizes th, #sizes td { word-break: normal; overflow-wrap: normal; padding: 4px 10px; }
#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
"""


def picture(file: io.BytesIO, shows: str) -> str:
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(shows)}">'


def tiles(images: Sequence[Tile], wide: int = 130) -> str:
    """Images beside each other, as far as there is room, with their captions below, as HTML."""
    parts = []
    for image, text in images:
        image.save(file := io.BytesIO(), format="png")
        parts.append(f"<figure>{picture(file, text)}<figcaption>{html.escape(text)}</figcaption></figure>")
    return f'<div class="tiles" style="--wide: {wide}px">{"".join(parts)}</div>'


def drawing(figure: Any, shows: str) -> str:
    """A matplotlib figure as HTML; on a narrow screen it scrolls."""
    figure.savefig(file := io.BytesIO(), format="png")
    return f'<div class="drawing" tabindex="0">{picture(file, shows)}</div>'


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """The longer side with about so many pixels, whose edges stay sharp."""
    scale = max(1, round(side / max(image.size)))
    size = (image.width * scale, image.height * scale)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def painted(image: Image.Image, mask: Any, side: int = 192) -> Image.Image:
    """What is marked in red, what is not in pale grey.

    Args:
        image: of any size.
        mask: of its size, an image or an array; marked is what is not 0.
        side: of the longer side of the result, about.
    """
    big = enlarged(image, side)
    marked = Image.fromarray(np.uint8(np.asarray(mask) > 0) * 255).resize(big.size, Image.Resampling.NEAREST)
    pale = Image.blend(big.convert("L").convert("RGB"), Image.new("RGB", big.size, "white"), 0.45)
    return Image.composite(Image.blend(big, Image.new("RGB", big.size, RED), 0.6), pale, marked)
