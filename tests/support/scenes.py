"""Scenes with one object each, pools of them and a tiny random encoder, for the tests of prompt selection."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_effdl import ExamplePool, FeatureMatching, VisionEncoder, VisualInContextModel


SIZE = 32  # of a cell, with a grid of 4 x 4
TASKS = ("segmentation", "detection", "colourisation")
LABELS = {"segmentation": "mask", "detection": "box", "colourisation": "none"}


def scene(number: int) -> tuple[Image.Image, Image.Image, list[int]]:
    """A noisy photo, the mask of its object (1 on 0) and its box; photos have different sizes."""
    rng = np.random.default_rng(number)
    width, height = (int(value) for value in rng.integers(34, 60, 2))
    w, h = (int(value) for value in rng.integers(18, 30, 2))
    x, y = (int(rng.integers(0, side - own)) for side, own in ((width, w), (height, h)))
    image = rng.integers(0, 60, (height, width, 3)) + rng.integers(0, 60, 3)
    image[y : y + h, x : x + w] += rng.integers(60, 130, 3)
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return Image.fromarray(image.astype(np.uint8)), Image.fromarray(mask), [x, y, x + w, y + h]


def label_of(task: str, number: int) -> Any:
    image, mask, box = scene(number)
    return {"segmentation": mask, "detection": box, "colourisation": image}[task]


def rows(count: int, first: int = 0) -> Dataset:
    images, masks, boxes = zip(*(scene(number) for number in range(first, first + count)))
    table = {
        "image": list(images),
        "mask": list(masks),
        "box": list(boxes),
        "name": [f"scene {number}" for number in range(first, first + count)],
    }
    return Dataset.from_dict(table).cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())


def tiny_vit(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=SIZE, patch_size=8, initializer_range=0.3)
    return ViTModel(config, add_pooling_layer=False)


def tiny_encoder(seed: int = 0) -> VisionEncoder:
    return VisionEncoder(tiny_vit(seed))


def make_pool(
    folder: Path,
    task: str = "segmentation",
    count: int = 12,
    encoder: VisionEncoder | None = None,
    first: int = 0,
    groups: list | None = None,
    classes: list | None = None,
    **options: Any,
) -> ExamplePool:
    data = rows(count, first)
    for name, values in (("group", groups), ("class", classes)):
        data = data if values is None else data.add_column(name, values)
    return ExamplePool.from_dataset(
        data,
        "image",
        LABELS[task],
        encoder=encoder or tiny_encoder(),
        task=task,
        id_column="name",
        group_column=None if groups is None else "group",
        class_column=None if classes is None else "class",
        cache_dir=folder,
        rows_per_shard=7,
        progress=False,
        **options,
    )


def make_model(task: str = "segmentation", encoder: VisionEncoder | None = None, **options: Any) -> Any:
    frozen = {name: options.pop(name) for name in ("matching", "temperature", "carry") if name in options}
    frozen.setdefault("temperature", 0.003)  # random features are all alike
    if task == "colourisation":
        frozen.setdefault("carry", "difference")
    return VisualInContextModel.from_parts(FeatureMatching(encoder or tiny_encoder(), **frozen), task=task, **options)
