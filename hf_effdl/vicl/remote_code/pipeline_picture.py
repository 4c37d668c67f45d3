"""Pictures of what was shown to the frozen model and what it answered."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


COLOUR = (255, 64, 32)
GAP, CAPTION = 4, 14


def draw_panels(
    rows: Sequence[tuple[Image.Image, Sequence[tuple[str, Image.Image, Any]], dict[str, Any]]],
    task: str,
    height: int = 160,
) -> Image.Image:
    """One row for each query: its chosen examples with their labels, then the query, then the prediction.

    Args:
        rows: (query, [(id, example image, its label)], output of the pipeline); a label is a 0/1 mask, a box, or a
            colour image.
        task: "segmentation", "detection" or "colourisation".
        height: of an image in pixels.
    """
    if not rows:
        raise ValueError("there is nothing to draw: pass at least one image")
    strips = []
    for query, examples, output in rows:
        panels = [
            (marked(image, label, task), f"{id}  {score:.3f}")
            for (id, image, label), score in zip(examples, output["scores"], strict=True)
        ]
        panels += [(query, "query"), (marked(query, output["prediction"], task), "prediction")]
        strips.append(_strip(panels, height))
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def marked(image: Image.Image, label: Any, task: str) -> Image.Image:
    """The image with a mask tinted, a box drawn, or its colours."""
    if task == "colourisation":
        return label if isinstance(label, Image.Image) else image
    image = image.convert("RGB")
    if label is None:
        return image
    if task == "detection":
        image = image.copy()
        x0, y0, x1, y1 = label
        ImageDraw.Draw(image).rectangle(
            (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=COLOUR, width=max(1, min(image.size) // 60)
        )
        return image
    pixels = np.asarray(image).astype(np.float32)
    mask = (np.asarray(label) > 0)[..., None]
    # the rest is dimmed too, so that the object stands out in any colour
    tinted = np.where(mask, 0.45 * pixels + 0.55 * np.array(COLOUR), 0.6 * pixels)
    return Image.fromarray(tinted.round().astype(np.uint8))


def _strip(panels: Sequence[tuple[Image.Image, str]], height: int) -> Image.Image:
    sized = [
        (image.convert("RGB").resize((max(1, round(image.width * height / image.height)), height)), text)
        for image, text in panels
    ]
    width = sum(image.width + GAP for image, _ in sized) + GAP
    strip = Image.new("RGB", (width, height + CAPTION + GAP), "white")
    draw, left = ImageDraw.Draw(strip), GAP
    for image, text in sized:
        strip.paste(image, (left, CAPTION))
        text = " ".join(text.splitlines())  # of an id
        # what does not fit under its image would run into the next caption
        while text and draw.textlength(text) > image.width:
            text = text[:-1]
        draw.text((left, 1), text, fill="black")
        left += image.width + GAP
    return strip
