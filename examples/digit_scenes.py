# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "pillow>=11",
#     "scikit-learn>=1.6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Scenes of handwritten digits for in-context painting: what an example shows is what a model should paint.

A scene is a textured 48 x 48 picture with two or three digits of different classes from scikit-learn's 8 x 8 digits.
One of them is the target. Three tasks share the pictures:

- segmentation: a mask of the target;
- detection: the box around the target;
- colourisation: the tints of background and ink, from the luminance.

What an example tells is drawn anew for every training pair (`make_pair`): which digit is the target, and which tint
each class has in this pair; in colourisation, the two tints. A digit's tint is the easy cue, its shape the hard one.
Lights and darks, textures, sizes and angles are each scene's own, so of two examples with the same target one can be
closer to a query than the other. In the rows of `make_scenes` the looks are fixed and the target is the largest digit,
so that a picture alone tells what kind of example would help.

    from datasets import Dataset
    pool = Dataset.from_list(make_scenes(300, split="train", task="segmentation", seed=0))

Other examples import this file. Run by itself it draws some scenes of every task with their labels:

    python examples/digit_scenes.py --out scenes.png
"""

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


SIZE = 48
SPLITS = ("train", "test")
TASKS = ("segmentation", "detection", "colourisation")
LUMINANCE = np.array([0.299, 0.587, 0.114])


@cache
def digits(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures in [0, 1], classes and row numbers of one split: every fourth of the 1,797 digits is a test digit."""
    data = load_digits()
    rows = np.arange(len(data.target))
    rows = rows[(rows % 4 == 3) == (split == "test")]
    return (data.images[rows] / 16).astype(np.float32), data.target[rows], rows


@cache
def rows_of_class(split: str, label: int) -> np.ndarray:
    return np.flatnonzero(digits(split)[1] == label)


@dataclass
class Scene:
    """A colour picture (height, width, 3) in [0, 1], the target's mask (height, width), and the digits' classes.

    `label` is the target's class, `others` are the other digits' classes, `rows` the numbers of all digits it shows.
    """

    colour: np.ndarray
    mask: np.ndarray
    label: int
    others: list[int]
    rows: list[int]

    @property
    def box(self) -> list[int]:
        """[x0, y0, x1, y1] in pixels, x1 and y1 exclusive."""
        ys, xs = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return [int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1]

    @property
    def grey(self) -> np.ndarray:
        """The luminance of the picture, three times."""
        return np.repeat((self.colour @ LUMINANCE)[..., None], 3, -1).astype(np.float32)

    def painting(self, task: str) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees and what it paints, both (height, width, 3) in [0, 1]."""
        if task == "colourisation":
            return self.grey, self.colour
        label = self.mask.astype(np.float32) if task == "segmentation" else fill_box(self.box)
        return self.colour, np.repeat(label[..., None], 3, -1)


def fill_box(box: list[int], size: int = SIZE) -> np.ndarray:
    """A float mask (size, size) with ones inside of `[x0, y0, x1, y1]`."""
    mask = np.zeros((size, size), np.float32)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def tint(hue: float, strength: float) -> np.ndarray:
    """A colour difference of zero luminance; `hue` in turns."""
    cb, cr = strength * np.cos(2 * np.pi * hue), strength * np.sin(2 * np.pi * hue)
    return np.array([1.402 * cr, -0.344136 * cb - 0.714136 * cr, 1.772 * cb])


def texture(rng: np.random.Generator, kind: int) -> np.ndarray:
    """A field (SIZE, SIZE) in [-1, 1]: a ramp (0), stripes (1) or blobs (2)."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    if kind == 0:
        return 1.4 * along
    if kind == 1:
        return np.sin(2 * np.pi * (along * rng.uniform(3, 7) + rng.uniform()))
    coarse = Image.fromarray(rng.uniform(-1, 1, (6, 6)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(-1, 1)


def place(rng: np.random.Generator, sizes: list[float]) -> list[tuple[float, float]]:
    """Centres of squares that hardly overlap; a third one without room is left out."""
    centres: list[tuple[float, float]] = []
    while len(centres) < 2:
        centres = []
        for size in sizes:
            for _ in range(10):
                x, y = rng.uniform(size / 2, SIZE - size / 2, 2).tolist()
                if all(max(abs(x - u), abs(y - v)) >= 0.48 * (size + s) for (u, v), s in zip(centres, sizes)):
                    centres.append((x, y))
                    break
            else:
                break
    return centres


def stamp(picture: np.ndarray, size: float, angle: float, centre: tuple[float, float]) -> np.ndarray:
    """An 8 x 8 digit as a field (SIZE, SIZE) in [0, 1], `size` pixels wide, turned by `angle` about its centre."""
    padded = Image.fromarray(np.pad(picture, 2))
    scale = 8 / size
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    x, y = centre
    matrix = (cos, sin, 6 - cos * x - sin * y, -sin, cos, 6 + sin * x - cos * y)
    return np.asarray(padded.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


@dataclass
class Look:
    """What the scenes of a pair have in common: the tint of each class, or of background and ink, in turns."""

    classes: np.ndarray | None = None
    background: float | None = None
    ink: float | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator, task: str) -> "Look":
        """A look that only an example can tell."""
        if task == "colourisation":
            return cls(background=rng.uniform(), ink=rng.uniform())
        return cls(classes=rng.permutation(10) / 10 + rng.uniform())


def draw_scene(
    rng: np.random.Generator, split: str, label: int, look: Look, largest: bool = False, kind: int | None = None
) -> Scene:
    """One scene with a target of class `label`.

    Args:
        rng: source of every choice.
        split: "train" or "test" digits.
        label: class of the target; the other digits have other classes.
        look: tints; each is met with a little noise.
        largest: the target is the largest digit; else any.
        kind: texture and sign of the ink's contrast, 0 to 5; default: any.
    """
    pictures, _, rows = digits(split)
    sizes = [rng.uniform(22, 28), *sorted(rng.uniform(14, 20, rng.integers(1, 3)), reverse=True)]
    centres = place(rng, sizes)
    target = 0 if largest else int(rng.integers(len(centres)))
    others = rng.permutation([c for c in range(10) if c != label])[: len(centres) - 1].tolist()
    classes = others[:target] + [label] + others[target:]
    kind = int(rng.integers(6)) if kind is None else kind
    sign = 1.0 if kind < 3 else -1.0
    light = 0.5 - sign * rng.uniform(0.05, 0.2) + rng.uniform(0.03, 0.08) * texture(rng, kind % 3)
    if look.classes is None:
        background, inks = tint(look.background + rng.normal(0, 0.02), 0.12), [look.ink] * len(classes)
    else:
        background, inks = tint(rng.uniform(), rng.uniform(0, 0.06)), look.classes[classes]
    colour = np.empty((SIZE, SIZE, 3))
    colour[:] = background
    used, mask = [], None
    for i, (size, centre) in enumerate(zip(sizes, centres)):
        row = rng.choice(rows_of_class(split, classes[i]))
        used.append(int(rows[row]))
        ink = np.clip(1.3 * stamp(pictures[row], size, rng.uniform(-0.35, 0.35), centre), 0, 1)
        light = light + ink * (0.5 + sign * rng.uniform(0.05, 0.25) - light)
        colour += ink[..., None] * (tint(inks[i] + rng.normal(0, 0.02), rng.uniform(0.12, 0.2)) - colour)
        if i == target:
            mask = ink > 0.5
    light = light + rng.normal(0, 0.015, light.shape)
    picture = np.clip(light[..., None] + colour, 0, 1).astype(np.float32)
    return Scene(picture, mask, label, others, used)


def make_pair(rng: np.random.Generator, task: str, split: str = "train") -> tuple[Scene, Scene]:
    """An example and a query with the same class of target and the same look; any digit may be the target."""
    label, look = int(rng.integers(10)), Look.draw(rng, task)
    return draw_scene(rng, split, label, look), draw_scene(rng, split, label, look)


def draw_scenes(n: int, split: str, task: str, seed: int) -> list[Scene]:
    """`n` scenes whose target is the largest digit; the classes take turns. The same seed draws the same scenes.

    Here the looks are fixed, so that a picture tells which others could be its examples: in colourisation each of the
    six kinds has its tints, otherwise each class has.
    """
    if task not in TASKS:
        raise ValueError(f"task is one of {TASKS}, not {task!r}")
    if split not in SPLITS:
        raise ValueError(f"split is one of {SPLITS}, not {split!r}")
    scenes = []
    for i in range(n):
        rng = np.random.default_rng([seed, i, SPLITS.index(split), TASKS.index(task)])
        kind = int(rng.integers(6))
        look = Look(background=kind / 6, ink=kind / 6 + 0.4) if task == "colourisation" else Look(np.arange(10) / 10)
        scenes.append(draw_scene(rng, split, i % 10, look, largest=True, kind=kind))
    return scenes


def to_image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255 * picture).astype(np.uint8))


def make_scenes(n: int, split: str = "train", task: str = "segmentation", seed: int = 0) -> list[dict[str, object]]:
    """Rows for `datasets.Dataset.from_list`.

    Args:
        n: number of scenes.
        split: "train" or "test"; the two share no digit.
        task: "segmentation", "detection" or "colourisation".
        seed: the same seed gives the same rows, of which a smaller `n` gives the first ones.

    Returns:
        Rows with `image` (PIL, RGB), `digit` (class of the target, which no model is told) and the label: `mask` (PIL,
        mode L, 0 and 1), or `box` ([x0, y0, x1, y1] in pixels, x1 and y1 exclusive), or none in colourisation, where
        the image is the label of its own luminance.
    """
    rows = []
    for scene in draw_scenes(n, split, task, seed):
        row: dict[str, object] = {"image": to_image(scene.colour), "digit": scene.label}
        if task == "segmentation":
            row["mask"] = Image.fromarray(scene.mask.astype(np.uint8))
        if task == "detection":
            row["box"] = scene.box
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scenes.png"), help="picture to write")
    parser.add_argument("--scenes", type=int, default=8, help="scenes of each task")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    side, gap = 2 * SIZE, 4
    sheet = Image.new("RGB", (options.scenes * (side + gap) + gap, 2 * len(TASKS) * (side + gap) + gap), "white")
    for line, task in enumerate(TASKS):
        for column, scene in enumerate(draw_scenes(options.scenes, options.split, task, options.seed)):
            for half, picture in enumerate(scene.painting(task)):  # what is shown, and what is to be painted
                tile = to_image(picture).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(tile, (gap + column * (side + gap), gap + (2 * line + half) * (side + gap)))
    sheet.save(options.out)
    print(f"{', '.join(TASKS)}, each with the labels below: {options.out}")


if __name__ == "__main__":
    main()
