# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""The strategies on pictures that nothing in them was set on: photos of objects cut out and pasted onto other photos.

A CIFAR-10 picture of the asked category, in a blob of a random shape, size and place, on a CIFAR-10 picture of another
category; the mask is the blob, by construction. What was chosen by hand in the strategies was chosen on digits and
pets (`vicl_digits.py`, `vicl_pets.py`); this set was made afterwards, and measured once. A pool holds one category;
its 400 scenes are queries in turn, in four parts. The frozen model and its encoder are those of `vicl_pets.py`.

    python examples/benchmarks/vicl_cutouts.py                     # five categories: about 20 minutes on one thread
    python examples/benchmarks/vicl_cutouts.py --categories horse --frozen soft
    python examples/benchmarks/vicl_cutouts.py --table

The pictures are looked for in `cifar10-travel` under HF_EFFDL_DATA. Rows go to `--out` as one JSON line per (category,
frozen, arm); rows already there are skipped.
"""

import gzip
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from rows import RowFile, machine, parser_of
from vicl_arms import ARMS, print_tables
from vicl_pets import DATA, LAYER, prepare, run_fold, say

from hf_effdl import VisionEncoder


CATEGORIES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ASKED = ("automobile", "cat", "frog", "horse", "ship")
TILE, SIDE, SCENES, FOLDS = 32, 224, 400, 4
OBJECT = (90, 150)  # pixels of the pasted picture
WAVES = 5  # of a blob's outline


# ---- scenes


def tiles() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test pictures and their categories."""
    folder = DATA / "cifar10-travel"
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}: set HF_EFFDL_DATA")
    mosaic = np.array(Image.open(folder / "test_batch.webp").convert("RGB"))
    rows = mosaic.reshape(mosaic.shape[0] // TILE, TILE, 100, TILE, 3).transpose(0, 2, 1, 3, 4)
    labels = gzip.open(folder / "labels_filenames.tsv.gz", "rt").read().split("\n")[50000:60000]
    return rows.reshape(-1, TILE, TILE, 3), np.array([int(row.split("\t")[0]) for row in labels])


def blob(side: int, rng: np.random.RandomState) -> np.ndarray:
    """A smooth outline in a square: `r(t) = r_0 (1 + sum_k a_k cos(k t + p_k))`, as a mask."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    waves = sum(rng.uniform(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(1, WAVES + 1))
    return radius <= 0.38 * side * (1 + waves)


def scene(thing: np.ndarray, behind: np.ndarray, rng: np.random.RandomState) -> tuple[Image.Image, Image.Image]:
    """A picture with a piece of another one in it, and the mask of that piece, 0 and 1."""
    picture = np.array(Image.fromarray(behind).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    side = rng.randint(*OBJECT)
    piece = np.array(Image.fromarray(thing).resize((side, side), Image.Resampling.BICUBIC))
    shape, (top, left) = blob(side, rng), rng.randint(0, SIDE - side, 2)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[top : top + side, left : left + side] = shape
    picture[mask == 1] = piece[shape]
    return Image.fromarray(picture), Image.fromarray(mask)


def make_scenes(category: str, count: int, folder: Path) -> Dataset:
    """Scenes of a category as files, each with pictures of its own."""
    pictures, labels = tiles()
    rng = np.random.RandomState(CATEGORIES.index(category))
    there = labels == CATEGORIES.index(category)
    things, behind = (rng.permutation(np.flatnonzero(part))[:count] for part in (there, ~there))
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list] = {"image": [], "label": []}
    for number, pair in enumerate(zip(things, behind, strict=True)):
        for name, part in zip(columns, scene(*pictures[list(pair)], rng), strict=True):
            columns[name].append(str(folder / f"{name}-{number:03}.png"))
            part.save(columns[name][-1])
    return Dataset.from_dict(columns)


# ---- rows


def rows_of(category: str, matching: str, options, encoder: VisionEncoder) -> list[dict]:
    """All arms on one category."""
    data = make_scenes(category, options.scenes, options.cache / category)
    photos = prepare("segmentation", matching, data, encoder, options.cache / category)
    order, folds = torch.randperm(options.scenes, generator=torch.Generator().manual_seed(0)), []
    with tempfile.TemporaryDirectory(dir=options.cache) as folder:
        for number, queries in enumerate(order.chunk(FOLDS)):
            members = order[~torch.isin(order, queries)]
            folds.append(run_fold(photos, queries, members, Path(folder) / str(number), check=False))
    of = {"task": "segmentation", "frozen": matching, "category": category, "seed": ASKED.index(category)}
    of |= {"scenes": options.scenes, "metric": photos.task.metric}
    return [
        of | {"arm": arm, "passes": ARMS[arm], "folds": [round(fold[arm], 5) for fold in folds]} | machine()
        for arm in folds[0]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "vicl_cutouts")
    parser.add_argument("--categories", nargs="+", choices=ASKED, default=ASKED)
    parser.add_argument("--frozen", nargs="+", choices=("soft", "nearest", "prototype"), default=("soft", "nearest"))
    parser.add_argument("--scenes", type=int, default=SCENES, help="of a category")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/vicl_cutouts"))
    options = parser.parse_args(arguments)
    file = RowFile(options.out, ("category", "frozen", "scenes"))
    if options.table:
        return print_tables(file.rows)
    torch.set_num_threads(options.threads)
    encoder = VisionEncoder.from_pretrained(str(DATA / "weights" / "mobilenet_v2_1.0_224"), layer=LAYER)
    for category, matching in ((c, f) for c in options.categories for f in options.frozen):
        if (category, matching, options.scenes) not in file:
            start = time.perf_counter()
            found = rows_of(category, matching, options, encoder)
            file.add(*found)
            say(f"{category}, {matching}: {len(found)} arms, {time.perf_counter() - start:.0f} s")
    print_tables(file.rows)


if __name__ == "__main__":
    main(sys.argv[1:])
