"""A map of several classes from one answer for each: every pixel has the class that is surest of it."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from .counts import counted
from .pipeline_inputs import ONE_OF, check_each, is_image, walkable
from .pool_rows import as_list, column_of, name_of


def label_maps(
    pipe: Any, images: Any, classes: Sequence[str] | None, batch_size: int, options: dict[str, Any]
) -> dict[str, Any] | list[dict[str, Any]]:
    """Maps of some images; see `VisualInContextPipeline.label_map`."""
    classes, batch_size = _classes(pipe, classes), counted("batch_size", batch_size)
    if told := options.keys() & {"soft_map", "presence"}:
        raise TypeError(f"label_map sets {' and '.join(sorted(told))} itself: leave it out")
    given = {name: options.pop(name) for name in ONE_OF if options.get(name) is not None}
    if alone := is_image(images):
        images, given = [images], {name: [value] for name, value in given.items()}
    images = walkable(images)
    for name, values in given.items():
        check_each(name, values, images)
    maps = list(_stream(pipe, images, given, classes, batch_size, options))
    if empty := sum(not any(one.get("present", {0: True}).values()) for one in maps):
        warnings.warn(
            f"in {empty} of {len(maps)} images no class is taken to be present, so their maps are all 0: calibrate "
            "with a larger false_alarms=, if that is too few",
            stacklevel=3,
        )
    return maps[0] if alone else maps


def _classes(pipe: Any, classes: Sequence[str] | None) -> list[str]:
    """The classes that are asked for, which the pool must have."""
    if pipe.visual_task.name != "segmentation":
        raise ValueError(
            f"a label map is of masks, and this pipeline is for {pipe.visual_task.name}: call it by class"
        )
    known = sorted(set(filter(None, column_of(pipe.pool, "class", "label_map"))))
    if classes is None:
        return known
    classes = as_list(classes)
    names = [name_of(one, "classes") for one in classes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"classes={classes!r}: name one class or more, each once")
    if missing := [one for one, name in zip(classes, names, strict=True) if name not in known]:
        raise ValueError(f"classes= holds {missing[0]!r}, of which the pool has no example; it has {known[:10]}")
    return names


def _stream(
    pipe: Any, images: Any, given: dict[str, Any], classes: list[str], batch_size: int, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    images, walks = iter(images), {name: iter(values) for name, values in given.items()}
    options = options | {"soft_map": True, "presence": pipe.model.config.absence is not None}
    while chunk := list(islice(images, batch_size)):
        each = {name: list(islice(walk, len(chunk))) for name, walk in walks.items()}
        asked = {
            one: pipe(chunk, classes=[one] * len(chunk), batch_size=batch_size, **each, **options) for one in classes
        }
        for i in range(len(chunk)):
            yield joined({one: answers[i] for one, answers in asked.items()})


def joined(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One map from an answer for each class."""
    confidence = {one: answer["confidence"] * answer.get("presence", 1.0) for one, answer in answers.items()}
    there = {one: answer.get("present", True) for one, answer in answers.items()}
    whites = np.stack([answer["soft_map"] * there[one] for one, answer in answers.items()])
    weights = np.array(list(confidence.values()))
    weights = weights - min(0.0, weights.min())  # what is expected of answers by a metric that falls is below 0
    sure = np.where(whites >= 0.5, whites * weights[:, None, None], -1.0)
    winner = sure.argmax(0) + 1
    found = {
        "label_map": np.where(sure.max(0) >= 0, winner, 0).astype(np.uint8 if len(answers) < 256 else np.int32),
        "classes": list(answers),
        "confidence": confidence,
        "example_ids": {one: answer["example_ids"] for one, answer in answers.items()},
    }
    return found | ({"present": there} if any("present" in answer for answer in answers.values()) else {})
