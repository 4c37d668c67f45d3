# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "pillow>=11",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Pools and queries of the benchmarks of visual in-context learning, read from folders as they are published.

- pascal5i: a VOC2012 folder (`JPEGImages`, `SegmentationClassAug` or `SegmentationClass`), and lists of the folds,
  `trn/fold0.txt` and `val/fold0.txt` and so on, with lines `2007_000033__01`: an image and one of its classes.
- coco20i: a COCO folder: `annotations/instances_train2014.json` and `instances_val2014.json`, or of 2017, and the
  images in `train2014` and `val2014`. Of 80 classes in the order of their numbers, every fourth is of a fold: 0, 4,
  8 and so on of fold 0. An image is a query once for each class of its fold of which something is marked; examples are
  of the training images, or, where their annotations are not there, of the same images as the queries, as few-shot
  segmentation draws them. Crowds belong to their class.
- fss1000: a folder for every class with `1.jpg`, `1.png` and so on, and a list of classes; each image is a query, and
  the others are the pool.
- detection: the same VOC2012 folder, with `Annotations` and `ImageSets/Main/train.txt` and `val.txt`; images with one
  object that covers less than a fifth.
- colourisation: the images of the folds of pascal5i.

`evaluate_vicl.py` uses this file; run by itself it says what there is:

    python examples/voc_folds.py pascal5i --folder VOCdevkit/VOC2012 --lists splits/pascal
"""

import argparse
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image

from hf_effdl.vicl.remote_code.masks import coco_mask


BENCHMARKS = ("pascal5i", "coco20i", "fss1000", "detection", "colourisation")
VOID = 255
FOLDS = {"pascal5i": 4, "colourisation": 4, "coco20i": 4}
LARGEST = 0.2  # share of an image that the object of a detection query covers at most
SHOWN = 3


@dataclass(frozen=True)
class Item:
    """An image and what is asked of it.

    Args:
        id: unique in a pool.
        image, mask: files; no mask for boxes and colours.
        kind: class.
        value: of the class in the mask; None: every value but 0.
        box: corners, for detection.
        regions: of COCO, polygons or runs, instead of a mask.
        size: `(H, W)` that they are of.
    """

    id: str
    image: Path
    kind: str
    mask: Path | None = None
    value: int | None = None
    box: tuple[int, ...] | None = None
    regions: tuple[Any, ...] = ()
    size: tuple[int, int] = (0, 0)

    @property
    def photo(self) -> str:
        """What all items of one photo have in common, whatever class they ask for."""
        return f"{self.image.parent.name}/{self.image.name}"

    def classes(self) -> np.ndarray:
        """`(H, W)` uint8: 1 where the class is, 255 where nothing counts."""
        if self.regions:
            return np.logical_or.reduce([coco_mask(region, self.size) for region in self.regions]).astype(np.uint8)
        mask = np.asarray(Image.open(self.mask))
        mask = mask if mask.ndim == 2 else mask[..., 0]
        if self.value is None:
            return np.uint8(mask > 127)
        return np.where(mask == VOID, VOID, mask == self.value).astype(np.uint8)

    def label(self) -> Any:
        """As a pool's data set has it: a mask, a box, or nothing."""
        return self.classes() == 1 if self.regions or self.mask is not None else self.box


def read(benchmark: str, folder: Path, lists: Path | None, fold: int) -> tuple[list[Item], list[Item]]:
    """Pool and queries of a benchmark.

    Args:
        benchmark: one of `BENCHMARKS`.
        folder: of the images.
        lists: of the folds, or of the classes.
        fold: 0 to 3; of benchmarks without folds 0.

    Raises:
        ValueError: for folders, lists and files that are missing, lines that cannot be read, and lists of nothing.
    """
    if benchmark in ("pascal5i", "colourisation"):
        parts = [_pascal(folder, _needed(lists) / part / f"fold{fold}.txt") for part in ("trn", "val")]
        if benchmark == "colourisation":
            parts = [
                list({item.image: Item(item.image.stem, item.image, "any") for item in part}.values())
                for part in parts
            ]
    elif benchmark == "coco20i":
        parts = [_coco(folder, part, fold) for part in ("train", "val")]
        parts[0] = parts[0] or parts[1]
    elif benchmark == "fss1000":
        parts = [_fss(folder, _needed(lists))] * 2
    else:
        parts = [_single(folder, part) for part in ("train", "val")]
    _check(parts)
    return parts[0], parts[1]


def _needed(lists: Path | None) -> Path:
    if lists is None:
        raise ValueError("pass --lists: the folder with trn/fold0.txt and so on, or the file with the classes")
    return lists


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(
            f"there is no file {file}: --lists must be the folder (pascal5i) or file (fss1000) of the lists"
        )
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _pascal(folder: Path, file: Path) -> list[Item]:
    masks = next(
        (folder / name for name in ("SegmentationClassAug", "SegmentationClass") if (folder / name).is_dir()), None
    )
    if masks is None:
        raise ValueError(f"{folder} has neither SegmentationClassAug nor SegmentationClass: pass a VOC2012 folder")
    items = []
    for number, line in enumerate(_lines(file), start=1):
        name, _, value = line.partition("__")
        if not value.isdigit() or not 1 <= int(value) <= 20:
            raise ValueError(f"{file}, line {number}, is {line!r}: it must be an image and a class, 2007_000033__01")
        kind = value.zfill(2)
        items.append(Item(line, folder / "JPEGImages" / f"{name}.jpg", kind, masks / f"{name}.png", int(value)))
    return items


def _coco(folder: Path, part: str, fold: int) -> list[Item]:
    """Images and classes of a part, in the order of images; none where the training part is not there."""
    file = next(iter(sorted((folder / "annotations").glob(f"instances_{part}*.json"))), None)
    if file is None:
        if part == "train":
            return []
        raise ValueError(f"{folder / 'annotations'} holds no instances_{part}*.json: pass the folder of a COCO")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        names = {one["id"]: one["name"] for one in content["categories"]}
        kinds = set(sorted(names)[fold :: FOLDS["coco20i"]])
        regions: dict[tuple[int, int], list[Any]] = {}
        for one in content["annotations"]:
            image, kind = images[one["image_id"]], names[one["category_id"]]
            _check_marks(one["segmentation"], (image["height"], image["width"]), f"{image['file_name']}, {kind}")
            if one["category_id"] in kinds and one["segmentation"]:  # one of nothing shows and asks nothing
                regions.setdefault((one["image_id"], one["category_id"]), []).append(one["segmentation"])
        return [
            Item(
                f"{Path(images[image]['file_name']).stem}__{kind:02d}",
                folder / file.stem.removeprefix("instances_") / images[image]["file_name"],
                names[kind],
                regions=tuple(found),
                size=(images[image]["height"], images[image]["width"]),
            )
            for (image, kind), found in sorted(regions.items())
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read as instances of COCO ({type(error).__name__}: {str(error)[:160]}): download it "
            "again"
        ) from error


def _check_marks(marks: Any, size: tuple[int, int], what: str) -> None:
    """Refuse, before any mask is drawn, what would only be seen at its query."""
    if isinstance(marks, dict):
        fits = "counts" in marks and list(marks.get("size", ())) == list(size)
    else:
        fits = isinstance(marks, list) and all(isinstance(part, list) and len(part) % 2 == 0 for part in marks)
    if not fits:
        raise ValueError(f"{what}: {str(marks)[:30]} is neither polygons of x and y nor runs of {size[0]} x {size[1]}")


def _fss(folder: Path, file: Path) -> list[Item]:
    items = []
    for kind in _lines(file):
        images = sorted((folder / kind).glob("*.jpg"))
        if len(images) < 2:
            raise ValueError(
                f"{folder / kind} holds {len(images)} images: each class needs two or more, 1.jpg with 1.png"
            )
        items += [Item(f"{kind}/{image.stem}", image, kind, image.with_suffix(".png")) for image in images]
    return items


def _single(folder: Path, part: str) -> list[Item]:
    items = []
    for name in _lines(folder / "ImageSets" / "Main" / f"{part}.txt"):
        file = folder / "Annotations" / f"{name.split()[0]}.xml"
        if not file.is_file():
            raise ValueError(f"there is no file {file}, which {part}.txt names")
        root = ElementTree.parse(file).getroot()
        objects = root.findall("object")
        if len(objects) != 1:
            continue
        x0, y0, x1, y1 = (
            round(float(objects[0].findtext(f"bndbox/{side}"))) for side in ("xmin", "ymin", "xmax", "ymax")
        )
        width, height = (int(root.findtext(f"size/{side}")) for side in ("width", "height"))
        if (x1 - x0 + 1) * (
            y1 - y0 + 1
        ) < LARGEST * width * height:  # corners are counted from 1, and belong to the box
            image = folder / "JPEGImages" / f"{file.stem}.jpg"
            items.append(Item(file.stem, image, objects[0].findtext("name"), box=(x0 - 1, y0 - 1, x1, y1)))
    return items


def _check(parts: Sequence[list[Item]]) -> None:
    """Refuse what would stop a long run in its middle."""
    if not all(parts):
        raise ValueError("the lists name no image for the pool, or no query")
    files = {file for part in parts for item in part for file in (item.image, item.mask) if file is not None}
    if missing := sorted(str(file) for file in files if not file.is_file()):
        raise ValueError(f"{len(missing)} of {len(files)} files are missing, such as {', '.join(missing[:SHOWN])}")
    for part in parts:
        if len({item.id for item in part}) < len(part):
            raise ValueError("a list names the same image and class twice: take the line out")


def as_dataset(items: Sequence[Item], task: str) -> Dataset:
    """Rows for `ExamplePool.from_dataset`: image, label, id, class and photo."""
    rows = {"image": [str(item.image) for item in items], "id": [item.id for item in items]}
    rows |= {"class": [item.kind for item in items], "photo": [item.photo for item in items]}
    if task == "segmentation":
        rows["label"] = [{"bytes": _png(item.label()), "path": None} for item in items]
    elif task == "detection":
        rows["label"] = [list(item.box) for item in items]
    data = Dataset.from_dict(rows)
    return data.cast_column("label", datasets.Image()) if task == "segmentation" else data


def _png(mask: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.uint8(mask) * 255).save(stream, "PNG")
    return stream.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--lists", type=Path)
    options = parser.parse_args(arguments)
    for fold in range(FOLDS.get(options.benchmark, 1)):
        pool, queries = read(options.benchmark, options.folder, options.lists, fold)
        kinds = sorted({item.kind for item in pool})
        print(f"fold {fold}: {len(pool):,} examples, {len(queries):,} queries, classes {', '.join(kinds[:10])}")


if __name__ == "__main__":
    main()
