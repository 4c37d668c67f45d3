"""The tab on prompts, without its looks: a pool of scenes, a frozen tiny SegGPT, and a pool of each visitor's own."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from pictures import enlarged, painted, tiles
from PIL import Image
from transformers import SegGptForImageSegmentation

from hf_effdl import ExamplePool, SegGptInContext, VisualInContextModel, VisualInContextPipeline


HERE = Path(__file__).parent
POOL, QUERIES = HERE / "assets" / "pool", HERE / "assets" / "queries"
PLACES = (HERE / "assets" / "tiny-seggpt-digits", HERE.parents[1] / "model_cards" / "tiny-seggpt-digits")
STRATEGIES = {"dense": "by matching the parts of the scenes", "nearest": "the most similar scene, by one vector"}
SHOWN, LARGEST, MOST = 6, 1024, 20  # candidates; pixels of the longer side of an image; examples that one may add


class Answer(NamedTuple):
    """A sentence; chosen example, query and prediction, and the candidates, best first, as HTML."""

    text: str
    story: str
    candidates: str


@cache
def frozen() -> VisualInContextModel:
    """The model, which also encodes the scenes."""
    folder = next(place for place in PLACES if place.is_dir())
    seggpt = SegGptForImageSegmentation.from_pretrained(folder, dtype=torch.float32)
    return VisualInContextModel.from_parts(SegGptInContext(seggpt), embed=True)


def pipeline(own: str = "") -> VisualInContextPipeline:
    """The model with the pool of a folder; without one with the pool that all begin with."""
    return VisualInContextPipeline(frozen(), "dense", ExamplePool(Path(own) if own else POOL))


def queries() -> list[str]:
    """Files of the images to begin with; `truth` knows their masks."""
    return [str(file) for file in sorted(QUERIES.glob("*.png"))]


def truth(image: Image.Image) -> np.ndarray | None:
    """The true mask of an image to begin with, found by its pixels; None for any other."""
    for file in queries():
        with Image.open(file) as known:
            if known.size == image.size and known.convert("RGB").tobytes() == image.convert("RGB").tobytes():
                return np.asarray(Image.open(Path(file).with_suffix(".mask"), formats=["png"])) > 0
    return None


def checked(image: Any) -> Image.Image:
    """An image to ask about, at most `LARGEST` pixels wide and high.

    Raises:
        ValueError: for none.
    """
    if image is None:
        raise ValueError("there is no image: drop one, or click one of the scenes")
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    return image


def ask(image: Any, strategy: str = "dense", own: str = "") -> Answer:
    """What the pool offers for an image, what was chosen, and what the model says with it.

    Args:
        image: PIL image, or None, which is refused.
        strategy: one of `STRATEGIES`.
        own: folder of the visitor's pool, or "".
    """
    image, pipe = checked(image), pipeline(own)
    offered = pipe(image, strategy=strategy, num_examples=SHOWN)
    answer = pipe(image, strategy=strategy)
    candidates = []
    for id, score in zip(offered["example_ids"], offered["scores"], strict=True):
        row = pipe.pool.position(id)
        whose = "yours" if row >= len(ExamplePool(POOL)) else f"scene {id}"
        candidates.append((painted(pipe.pool.image(row), pipe.pool.label(row)), f"{whose}, score {score:.3f}"))
    text = (
        f"**Confidence {answer['confidence']:.2f}** (how far from grey the answer is; not calibrated). "
        f"The example was chosen among {len(pipe.pool)} scenes, {STRATEGIES[strategy]}."
    )
    mask = truth(image)
    if mask is not None:
        text += f" **IoU with the true mask {iou(answer['prediction'], mask):.2f}.**"
    story = [
        (candidates[0][0], f"Shown to the model: {candidates[0][1]}"),
        (enlarged(image, 192), "Your image"),
        (painted(image, answer["prediction"]), "The prediction, in red"),
    ]
    return Answer(text, tiles(story, 192), tiles(candidates))


def iou(prediction: np.ndarray, mask: np.ndarray) -> float:
    both, either = (prediction > 0) & mask, (prediction > 0) | mask
    return float(both.sum() / max(either.sum(), 1))


def to_paint_on(image: Any) -> Image.Image:
    """An image, large enough for a brush."""
    return enlarged(checked(image), 384)


def mask_of(painting: Any) -> tuple[Image.Image, Image.Image]:
    """Image and mask of what an image editor gives: marked is what any layer covers.

    Raises:
        ValueError: where there is no image or nothing was painted.
    """
    if not painting or painting.get("background") is None:
        raise ValueError("there is no image to paint on: drop one, or click one of the scenes")
    image = painting["background"].convert("RGB")
    covered = [np.asarray(layer.convert("RGBA").resize(image.size))[..., 3] > 0 for layer in painting["layers"]]
    mask = np.any(covered, axis=0) if covered else np.zeros(1, bool)
    if not mask.any():
        raise ValueError("nothing is painted: paint the object with the brush, then add it")
    return image, Image.fromarray(mask.astype(np.uint8))


def add(painting: Any, own: str = "") -> str:
    """A painted image as an example of the visitor's pool, which is a copy of the first one.

    Args:
        painting: see `mask_of`.
        own: folder of the pool, or "" where there is none yet.

    Returns:
        The folder.
    """
    image, mask = mask_of(painting)
    size = (48, 48)  # what the model sees anyway
    row = {"image": image.resize(size), "mask": mask.resize(size, Image.Resampling.NEAREST)}
    if not own:
        own = tempfile.mkdtemp(prefix="pool-")
        ExamplePool(POOL).copied_to(Path(own))
    pool = ExamplePool(Path(own))
    if len(pool) >= len(ExamplePool(POOL)) + MOST:
        raise ValueError(f"{MOST} examples are all that one visitor may add")
    pool.add(Dataset.from_list([row]), encoder=frozen().encoder, progress=False)
    return own


def forget(own: str) -> None:
    """Removes a visitor's pool."""
    if own:
        shutil.rmtree(own, ignore_errors=True)
