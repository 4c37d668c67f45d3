"""What a call of the pipeline is given, as lists and tensors; queries that are answered together, and their mean."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_utils import load_image

from .examples import Queries
from .images import to_rgb


# what is given for each image of a call
ONE_OF = {"labels": "label", "exclude": "list of ids", "groups": "group", "classes": "class"}


def array_of(image: Tensor) -> np.ndarray:
    """A tensor `(h, w)` or `(c, h, w)`, as torchvision has them, as an array with channels last."""
    if image.dim() == 3 and image.shape[0] in (1, 3, 4):
        image = image.permute(1, 2, 0)
    elif image.dim() != 2:
        raise ValueError(f"an image tensor is (h, w) or (1|3|4, h, w), channels first; got {tuple(image.shape)}")
    image = image.detach().cpu()
    return (image.float() if image.is_floating_point() else image).numpy()


def soft_map(painted: Tensor, size: tuple[int, int]) -> np.ndarray:
    white = painted.float().mean(0)[None, None]
    return nn.functional.interpolate(white, tuple(size), mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


def plain_instances(found: dict[str, Tensor], size: tuple[int, int], masks: bool) -> list[dict[str, Any]]:
    """Objects of one query, as `Sam3InContext.instances` gives them, in pixels of the query `(H, W)`, best first."""
    height, width = size
    boxes = (found["boxes"].float().cpu() * torch.tensor([width, height] * 2)).round().int().tolist()
    instances = [{"score": score, "box": box} for score, box in zip(found["scores"].tolist(), boxes, strict=True)]
    if masks:
        for one, mask in zip(instances, found["masks"], strict=True):
            one["mask"] = np.uint8(soft_map(mask[None], size) >= 0.5)
    return instances


def alike(queries: Queries, longest: int) -> Iterator[tuple[Tensor, Queries]]:
    """Queries that may be shown the same number of examples, with their places: lists of one length are a tensor."""
    if queries.allowed is None:
        yield torch.arange(len(queries)), queries
        return
    counts = queries.allowed.sum(1).clamp(max=longest)
    for count in counts.unique().tolist():
        places = (counts == count).nonzero()[:, 0]
        if len(places) == len(queries):
            yield places, queries
            continue
        here = places.to(queries.cells.device)
        views = {name: view[places.to(view.device)] for name, view in queries.views.items()}
        truth = None if queries.truth is None else queries.truth[here]
        yield (
            places,
            replace(queries, cells=queries.cells[here], views=views, truth=truth, allowed=queries.allowed[places]),
        )


def fused(answers: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of answers `(B, m, 3, h, w)`."""
    if answers.shape[1] == 1:
        return answers[:, 0]
    return torch.einsum("bm,bmchw->bchw", weights.to(answers), answers)


def check_each(name: str, values: Any, images: Any) -> None:
    if isinstance(values, str | bytes | dict) or not (isinstance(values, Iterable) or hasattr(values, "__getitem__")):
        raise ValueError(f"{name}= must hold one {ONE_OF[name]} for each image")
    if hasattr(values, "__len__") and hasattr(images, "__len__") and len(values) != len(images):
        raise ValueError(f"{len(values)} {name} for {len(images)} images: pass one each")


def opened_query(image: Any) -> Image.Image:
    """PIL RGB of whatever a pipeline is asked with."""
    if isinstance(image, dict):
        image = image_of(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        image = downloaded(image)
    if isinstance(image, Tensor):
        image = array_of(image)
    return to_rgb(image)


def downloaded(url: str) -> Image.Image:
    """The image at a URL.

    Raises:
        ValueError: where it cannot be had.
    """
    try:
        return load_image(url)
    except Exception as error:  # upstream's client, and with it its errors, are not the same in every version
        raise ValueError(f"the image at {url} cannot be fetched: {error}; pass a file") from error


def image_of(row: dict[str, Any]) -> Any:
    """The image in a row of a whole data set: its column `image`, or the only one that holds an image.

    Raises:
        TypeError: where that is not clear.
    """
    if row.keys() & {"bytes", "path"}:
        return row
    held = [name for name, value in row.items() if isinstance(value, Image.Image) or is_file(value)]
    name = "image" if "image" in held else held[0] if len(held) == 1 else None
    if name is None:
        raise TypeError(f"got a row with the columns {sorted(row)}: pass the column of images, dataset['image']")
    return row[name]


def is_file(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def walkable(images: Any) -> Any:
    """Images one after the other; of what only has numbered items, as data sets of torch, these."""
    if isinstance(images, Iterable):
        return images
    return Numbered(images)


class Numbered:
    """The items of a data set of torch, such as a `KeyDataset`."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return (self.items[i] for i in range(len(self)))


def is_image(images: Any) -> bool:
    # an array of four axes is a batch of images; strings, bytes and the dicts of datasets are single ones
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return images.ndim < 4
    several = isinstance(images, Iterable) or (hasattr(images, "__getitem__") and hasattr(images, "__len__"))
    return isinstance(images, (Image.Image, str, bytes, dict, os.PathLike)) or not several
