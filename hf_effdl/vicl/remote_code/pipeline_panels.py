"""What a pipeline's picture shows of each image: examples with their labels, the prediction, and what it is worth."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .images import to_rgb
from .pipeline_picture import Answer, Shown
from .visual_tasks import PICTURES


def rows_shown(
    pipe: Any, images: Sequence[Any], answers: Sequence[tuple[str, Sequence[dict[str, Any]]]], labels: Any
) -> list[Shown]:
    """A row for each image.

    Args:
        pipe: the pipeline.
        images: that it was asked with.
        answers: a name and outputs for each strategy.
        labels: of the images; None where they are not known.
    """
    rows = []
    for i, (image, *of_image) in enumerate(zip(images, *(outputs for _, outputs in answers), strict=True)):
        truth = () if labels is None else (labels[i],)
        shown = [_answer(pipe, name, one, image, *truth) for (name, _), one in zip(answers, of_image)]
        drawn = tuple(_drawn(pipe, label, to_rgb(image), pipe.label_task) for label in truth)
        rows.append(Shown(pipe.visual_task.query(image), shown, drawn))
    return rows


def _answer(pipe: Any, strategy: str, output: dict[str, Any], image: Any, *label: Any) -> Answer:
    """With what it is worth where the label is known."""
    examples = []
    for id in output["example_ids"]:
        row = pipe.pool.position(id)
        example = pipe.pool.image(row)
        examples.append((id, pipe.visual_task.query(example), _drawn(pipe, pipe.pool.label(row), example)))
    worth = None
    if label:
        cells = [
            task.labels([one], [image], pipe.model.image_size)
            for task, one in ((pipe.visual_task, output["prediction"]), (pipe.label_task, *label))
        ]
        worth = float(pipe.visual_task.score(*cells))
    return Answer(strategy, examples, output["scores"], output["prediction"], worth)


def _drawn(pipe: Any, label: Any, image: Any, task: Any = None) -> Any:
    """A label as a picture marks it: a 0/1 mask, a box, or a colour image."""
    task = pipe.visual_task if task is None else task
    if task.name == "detection":
        return task.corners(label)
    drawn = task.label(label, image)
    return drawn if pipe.visual_task.name in PICTURES else np.asarray(drawn)[:, :, 0] // 255
