"""Pictures of what was shown to the frozen model and what it answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .visual_tasks import PICTURES


COLOUR = (255, 64, 32)
INK, PALE = (36, 41, 47), (87, 96, 106)
GAP, APART, LINE = 4, 20, 16  # APART: before what another strategy would have shown
FONT = ImageFont.load_default(12)
CAPTION = 2 * LINE  # what a panel is, and its number
LEGEND = 24
# what the score of an example is, by the strategy that gives it
SCORES = {
    "nearest": "similarity",
    "dense": "similarity of parts",
    "random": "draw",
    "static": "mean gain",
    "transfer": "expected gain",
    "cascade": "expected gain",
    "ranker": "rank score",
}
LABELS = {
    "segmentation": "object as labelled (examples, truth) or predicted; all else is dimmed",
    "detection": "box as labelled (examples, truth) or predicted",
    "colourisation": "examples, truth and prediction in colour; the query as the model sees it",
    "image-to-image": "an example and what it becomes, the query and what was painted of it",
}
METRICS = {"segmentation": "IoU", "detection": "IoU", "colourisation": "error", "image-to-image": "error"}
# image and caption, its two lines
Panel = tuple[Image.Image, tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    """What was chosen for a query, and what the frozen model made of it.

    Args:
        strategy: by which it was chosen.
        examples: id, image and label of each; a label is a 0/1 mask, a box, or a colour image.
        scores: of each.
        prediction: a mask, a box, or a colour image.
        worth: the task's score of the prediction, where the truth is known.
    """

    strategy: str
    examples: Sequence[tuple[str, Image.Image, Any]]
    scores: Sequence[float]
    prediction: Any
    worth: float | None = None


@dataclass(frozen=True)
class Shown:
    """A query, one or more answers to it, the first one the pipeline's, and, where it is known, its true label."""

    query: Image.Image
    answers: Sequence[Answer]
    truth: tuple[Any, ...] = ()


def draw_panels(rows: Sequence[Shown], task: str, height: int = 160) -> Image.Image:
    """A row for each query: the examples that were chosen, the query, the prediction, the truth, and other answers.

    Args:
        rows: the queries.
        task: "segmentation", "detection", "colourisation" or "image-to-image".
        height: of an image in pixels.
    """
    if not rows:
        raise ValueError("there is nothing to draw: pass at least one image")
    strips = [_strip(_panels(row, task), height) for row in rows]
    legend = _legend(task)
    width = max(legend.width, *(strip.width for strip in strips))
    sheet = Image.new("RGB", (width, LEGEND + sum(strip.height for strip in strips)), "white")
    sheet.paste(legend, (0, 0))
    top = LEGEND
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _panels(row: Shown, task: str) -> list[list[Panel]]:
    """Those of the pipeline's answer, and of every other one."""
    own, *others = row.answers
    panels = _example_panels(own, task, "")
    panels += [(row.query, ("query", "")), _prediction_panel(row.query, own, task, "prediction")]
    panels += [(marked(row.query, label, task), ("truth", "")) for label in row.truth]
    beside = []
    for other in others:
        shown = _example_panels(other, task, f"{other.strategy}: ")
        beside.append([*shown, _prediction_panel(row.query, other, task, f"{other.strategy}: prediction")])
    return [panels, *beside]


def _example_panels(answer: Answer, task: str, before: str) -> list[Panel]:
    measured = answer.strategy == "oracle"
    what = METRICS[task] if measured else SCORES.get(answer.strategy, "score")
    sign = -1 if measured and task in PICTURES else 1  # scores are larger where better, errors are not
    panels: list[Panel] = []
    for (id, image, label), score in zip(answer.examples, answer.scores, strict=True):
        lines = f"{before}{f'row {id}' if id.isdecimal() else id}", f"{what} {sign * score:.3f}"
        if task == "image-to-image":  # what the label is of does not show in it
            panels += [(image, lines), (marked(image, label, task), ("becomes", ""))]
        else:
            panels.append((marked(image, label, task), lines))
    return panels


def _prediction_panel(query: Image.Image, answer: Answer, task: str, what: str) -> Panel:
    worth = "" if answer.worth is None else f"{METRICS[task]} {answer.worth:.3f}"
    return marked(query, answer.prediction, task), (what, worth)


def marked(image: Image.Image, label: Any, task: str) -> Image.Image:
    """The image with a mask tinted, a box drawn, or its colours."""
    if task in PICTURES:
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


def _legend(task: str) -> Image.Image:
    """What the colour means."""
    text, left = LABELS[task], GAP if task in PICTURES else GAP + LINE + GAP
    width = round(FONT.getlength(text)) + left + GAP
    legend = Image.new("RGB", (width, LEGEND), "white")
    draw = ImageDraw.Draw(legend)
    if task not in PICTURES:
        swatch = (GAP, 4, GAP + LINE, LEGEND - 6)
        draw.rectangle(swatch, outline=COLOUR, fill=COLOUR if task == "segmentation" else "white", width=2)
    draw.text((left, 3), text, fill=PALE, font=FONT)
    return legend


def _strip(parts: Sequence[Sequence[Panel]], height: int) -> Image.Image:
    sized = [
        (image.convert("RGB").resize((max(1, round(image.width * height / image.height)), height)), lines)
        for panels in parts
        for image, lines in panels
    ]
    firsts = set(accumulate(map(len, parts))) - {len(sized)}  # of all parts but the first
    width = sum(image.width + GAP for image, _ in sized) + GAP + len(firsts) * APART
    strip = Image.new("RGB", (width, height + CAPTION + GAP), "white")
    draw, left = ImageDraw.Draw(strip), GAP
    for place, (image, lines) in enumerate(sized):
        left += APART if place in firsts else 0
        strip.paste(image, (left, CAPTION))
        for number, (text, ink) in enumerate(zip(lines, (INK, PALE), strict=True)):
            draw.text((left, number * LINE), _fitted(draw, text, image.width), fill=ink, font=FONT)
        left += image.width + GAP
    return strip


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of a text as fits above its image, so that it does not run into the next caption."""
    text = " ".join(text.splitlines())  # of an id
    while text and draw.textlength(text, font=FONT) > width:
        text = text[:-1]
    return text
