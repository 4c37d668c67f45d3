"""What the values of a mask mean, decided from all of its pixels; and masks that are given as polygons or runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


ANY = "any"
# two values that are so far apart are black and white, and not two classes
APART = 64
# of a mask's pixels, how many are black or white at least where there is more between
DOMINANT = 0.6
# distinct values from which a mask may be a grey picture, whose black and white are off by some; in a JPEG by more
MANY, NOISE, LOSSY_NOISE = 5, 8, 24
# how unequal that is between black and white: edges ring to both sides, classes have numbers on one side only
UNEQUAL, LOSSY_UNEQUAL = 5, 15
# where there are few values, those so near to black or white are no grey of an edge
NEAR = 32
# a soft edge has black and white within so many pixels; where there are many values it may be a blurred one
EDGE, BLURRED = 4, 8
# of the smaller of black and white: stray pixels; and of all: those inside areas of one other value, as classes have
STRAY, FLAT = 0.01, 0.0003
LOSSY = ("JPEG", "MPO")
SHOWN = 8
GREY = 100  # values in one mask
LARGEST = 2.0**53  # of whole numbers that floats tell apart
NAME = 'name the object by foreground=, one value or several, or foreground="any" for every value but 0 and void'


@dataclass(frozen=True)
class Reading:
    """A mask and what it was taken for.

    Args:
        white: `(H, W)` bool, the object.
        kind: in words, such as "binary 0/255".
        value: that the object's pixels held; None: nothing is marked, or the values were named.
        soft: share of pixels between black and white.
        threshold: at which they were decided; None: there are none.
        grey: whether it has as many values as pictures have, and class maps hardly ever.
    """

    white: np.ndarray
    kind: str
    value: int | None = None
    soft: float = 0.0
    threshold: int | None = None
    grey: bool = False

    def picture(self) -> Image.Image:
        """White on black, PIL L."""
        return Image.fromarray(self.white.astype(np.uint8) * 255)


def read_mask(
    mask: np.ndarray, foreground: Sequence[int] | str | None = None, void: int | None = 255, lossy: bool = False
) -> Reading:
    """Say what of a mask is the object.

    Without `foreground` a mask is one of

        binary      0 and one other value, whatever it is;
        soft        two values that dominate, at least 64 apart, and grey between them at their edges: decided at the
                    middle;
        one class   0, one class and `void`;

    and all else is refused: several classes, of which one has to be named.

    Args:
        mask: `(H, W)`, whole numbers from 0.
        foreground: values that are the object; "any" for every value but 0 and void.
        void: value of pixels that belong to nothing.
        lossy: whether it comes from a file format that changes values.

    Raises:
        ValueError: for several classes, grey without edges, and classes in a lossy file.

    Example:
        >>> reading = read_mask(np.array([[0, 0, 7, 255]]))
        >>> reading.kind, reading.white.tolist()
        ('class 7, void 255', [[False, False, True, False]])
    """
    values, counts = _histogram(mask)
    if foreground == ANY:
        return Reading(_marked(mask, values, void), "every value but 0 and void", grey=len(values) > GREY)
    if len(values) > 2 and (soft := _soft(mask, values, counts, lossy)) is not None:
        low, high, threshold = soft
        if foreground is None or (high in foreground and low not in foreground):
            return _thresholded(mask, low, high, threshold)
    if lossy and len(values) > 2:
        raise ValueError(
            f"the mask is a JPEG with {len(values)} values, and JPEG changes values: save masks as PNG; only black "
            "and white can be told apart in one"
        )
    if foreground is not None:
        kind = f"values {', '.join(map(str, foreground))} of a class map"
        return Reading(np.isin(mask, foreground), kind, grey=len(values) > GREY)
    return _unnamed(mask, values, void)


def _histogram(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values that occur, in ascending order, and how often."""
    if mask.dtype in (np.uint8, np.bool_):
        counts = np.bincount(mask.reshape(-1).view(np.uint8), minlength=256)
        values = counts.nonzero()[0]
        return values, counts[values]
    return np.unique(mask, return_counts=True)


def _marked(mask: np.ndarray, values: np.ndarray, void: int | None) -> np.ndarray:
    """Every value but 0 and void; in a mask of nothing but 0 and void, void."""
    others = set(values.tolist()) - {0}
    return (mask != 0) & (others == {void} or mask != void)


def _unnamed(mask: np.ndarray, values: np.ndarray, void: int | None) -> Reading:
    """A mask of few values, none of which was named."""
    others = [int(value) for value in values if value != 0]
    if not others:
        return Reading(mask != 0, "nothing marked")
    if len(others) == 1:
        return Reading(mask != 0, f"binary 0/{others[0]}", others[0])
    classes = [value for value in others if value != void]
    if len(classes) == 1 and classes[0] < APART:
        return Reading(mask == classes[0], f"class {classes[0]}, void {void}", classes[0])
    shown = ", ".join(map(str, values[:SHOWN].tolist())) + (", ..." if len(values) > SHOWN else "")
    raise ValueError(f"the mask holds {len(values)} values, {shown}, which may be classes: {NAME}")


# ---- soft edges


def _soft(mask: np.ndarray, values: np.ndarray, counts: np.ndarray, lossy: bool) -> tuple[int, int, int] | None:
    """Black, white and the middle of a mask with soft edges; None for one that is none."""
    low, high = int(values[0]), int(values[-1])
    middle = (low + high + 1) // 2
    dark = values < middle
    if high - low < APART or not dark.any():
        return None
    black, white = (int(values[some][counts[some].argmax()]) for some in (dark, ~dark))
    noise_of, unequal = (LOSSY_NOISE, LOSSY_UNEQUAL) if lossy else (NOISE, UNEQUAL)
    around, edge = (0, EDGE) if len(values) < MANY else (noise_of * (high - low) // 255, BLURRED)
    near_black, near_white = mask <= black + around, mask >= white - around
    of_black, of_white = int(near_black.sum()), int(near_white.sum())
    noise = sorted((of_black - int((mask == black).sum()), of_white - int((mask == white).sum())))
    if of_black + of_white < DOMINANT * mask.size or noise[1] > unequal * noise[0] + STRAY * min(of_black, of_white):
        return None
    between = ~(near_black | near_white)
    stray = between & ~(_spread(near_black, edge) & _spread(near_white, edge))
    if not around:
        near = NEAR * (high - low) // 255
        stray |= between & ((mask <= black + near) | (mask >= white - near))
    grey = (mask != black) & (mask != white)
    if stray.sum() > STRAY * min(of_black, of_white) or _flat(mask, grey) > FLAT * mask.size:
        return None
    return black, white, (black + white + 1) // 2


def _thresholded(mask: np.ndarray, black: int, white: int, threshold: int) -> Reading:
    soft = float(((mask != black) & (mask != white)).mean())
    return Reading(mask >= threshold, f"binary {black}/{white}", white, soft, threshold)


def _spread(marks: np.ndarray, by: int) -> np.ndarray:
    """Marks and everything that is at most so many pixels away, along rows and columns."""
    for axis in (0, 1):
        wide = np.concatenate([np.zeros_like(marks.take(range(min(1, marks.shape[axis])), axis)), marks], axis)
        total = wide.cumsum(axis, dtype=np.int32)
        at = np.arange(marks.shape[axis])
        upper, lower = np.minimum(at + by + 1, marks.shape[axis]), np.maximum(at - by, 0)
        marks = total.take(upper, axis) > total.take(lower, axis)
    return marks


def _flat(mask: np.ndarray, some: np.ndarray) -> int:
    """How many of some pixels have eight neighbours of their own value, as inside an object of a class."""
    if min(mask.shape) < 3:
        return int(some.sum())
    inner, flat = mask[1:-1, 1:-1], some[1:-1, 1:-1].copy()
    for y in range(3):
        for x in range(3):
            flat &= mask[y : y + inner.shape[0], x : x + inner.shape[1]] == inner
    return int(flat.sum())


# ---- any way to give a mask


def value_map(label: Any, image: Any) -> np.ndarray:
    """`(H, W)` numbers of a mask that was opened: an array, or a PIL image.

    Args:
        label: channels may be last or first, and must be equal; transparency must be none.
        image: the opened file, for its palette.

    Raises:
        ValueError: for colours, transparency, fractions and negative numbers.
    """
    if isinstance(label, Tensor):
        label = (label.double() if label.is_floating_point() else label).detach().cpu()
    mask = np.asarray(label)
    if isinstance(image, Image.Image) and image.mode == "P":
        mask = _black_and_white(image, mask)
    if mask.ndim == 3:
        mask = _one_channel(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "buif":
        what = f"PIL mode {image.mode}" if isinstance(image, Image.Image) else f"{mask.dtype} {mask.shape}"
        raise ValueError(f"a mask is (H, W) with one class number a pixel; got {what}")
    if mask.dtype.kind == "f" and not ((mask == np.round(mask)) & (np.abs(mask) < LARGEST)).all():
        raise ValueError("a float mask must hold whole class numbers; threshold a soft mask first")
    if mask.size and mask.min() < 0:
        raise ValueError(f"a mask has no negative values; got {mask.min()} (void pixels are 255)")
    return mask.astype(np.int64) if mask.dtype.kind == "f" else mask


def _black_and_white(image: Image.Image, indices: np.ndarray) -> np.ndarray:
    """Of a palette that shows nothing but black and white what it shows, else its indices."""
    palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
    used = np.unique(indices)
    if used[-1] >= len(palette) or not {tuple(colour) for colour in palette[used]} <= {(0, 0, 0), (255, 255, 255)}:
        return indices
    return palette[:, 0].astype(np.uint8)[indices]


def _one_channel(mask: np.ndarray) -> np.ndarray:
    """Of equal channels, last or first, one; the array itself where they are not equal."""
    if mask.shape[2] not in (1, 2, 3, 4) and mask.shape[0] in (1, 3):
        mask = mask.transpose(1, 2, 0)
    if mask.shape[2] not in (1, 2, 3, 4):
        return mask
    if mask.shape[2] in (2, 4):
        if (mask[:, :, -1] != (255 if mask.dtype == np.uint8 else mask[:, :, -1].max())).any():
            raise ValueError("the mask is transparent in places: pass the one channel that is the mask")
        mask = mask[:, :, :-1]
    return mask[:, :, 0] if (mask == mask[:, :, :1]).all() else mask


def is_coco(label: Any, size: tuple[int, int]) -> bool:
    """Whether a mask is given as polygons `[[x, y, x, y, ...], ...]` or as runs `{"counts", "size"}`.

    Lists of the image's size `(H, W)` are its pixels, as a column of arrays gives them.
    """
    if isinstance(label, dict):
        return "counts" in label
    several = isinstance(label, list | tuple) and len(label) > 0
    if not several or not all(isinstance(part, list | tuple | np.ndarray) and _is_polygon(part) for part in label):
        return False
    return len(label) != size[0] or any(len(part) != size[1] for part in label)


def _is_polygon(points: Sequence[Any]) -> bool:
    whole = len(points) >= 6 and not len(points) % 2
    return whole and all(isinstance(value, Real) and not isinstance(value, bool) for value in points)


def coco_mask(label: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask of COCO as `(H, W)` bool.

    Args:
        label: polygons, of which a pixel is in one where its centre is; or runs, compressed or not, down the columns.
        size: `(H, W)` of the image.

    Raises:
        ValueError: for runs of another size, or that do not add up.

    Example:
        >>> coco_mask([[1, 0, 3, 0, 3, 2, 1, 2]], (2, 4)).astype(int).tolist()
        [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    if isinstance(label, dict):
        return _of_runs(label, size)
    mask = np.zeros(size, dtype=bool)
    for points in _points(label):
        mask |= _filled(points, size)
    return mask


def _points(label: Sequence[Sequence[Real]]) -> list[np.ndarray]:
    """Of every polygon its points `(n, 2)`."""
    try:
        parts = [np.asarray(points, dtype=np.float64).reshape(-1, 2) for points in label]
    except OverflowError:
        parts = [np.array([[np.inf, np.inf]])]
    values = np.concatenate(parts)
    if not (np.abs(values) < LARGEST).all():
        raise ValueError("a polygon of the mask holds NaN, infinite or huge values")
    if values.min() >= 0 and values.max() <= 1 and (len(parts) > 1 or (values % 1).any()):
        raise ValueError(
            "the polygons of the mask hold nothing above 1, and their coordinates are pixels: multiply shares by the "
            "image's width and height; a mask that is given as lists must be of its image's size (H, W)"
        )
    return parts


def _of_runs(label: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    shape, counts = label.get("size"), label["counts"]
    if np.shape(shape) != (2,) or list(shape) != list(size):
        raise ValueError(f"the runs are of a mask of size {shape} and its image is {list(size)} (height, width)")
    if isinstance(counts, str | bytes):
        counts = _unpacked(counts.encode() if isinstance(counts, str) else counts)
    counts = np.asarray(counts)
    total = size[0] * size[1]
    whole = counts.ndim == 1 and counts.dtype.kind in "iu"
    if not whole or (counts < 0).any() or (counts > total).any() or counts.sum() != total:
        raise ValueError(f"the runs of the mask do not add up to the {total:,} pixels of its image")
    marks = np.arange(len(counts)) % 2 == 1
    return np.repeat(marks, counts).reshape(size[::-1]).T


def _unpacked(text: bytes) -> list[int]:
    """Counts from COCO's text: six bits a letter, five of the number, lowest first, as differences from the last but
    one."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 50:
            raise ValueError("the runs of the mask are no compressed counts of COCO: pass the mask itself")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (bits & 16) << (shift - 4)  # of a negative number
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _filled(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centres are inside a polygon: crossed by its outline an odd number of times, to the left."""
    height, width = size
    toggles = np.zeros((height, width + 1), dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        top, bottom = sorted((y0, y1))
        rows = np.arange(max(0, int(np.ceil(top - 0.5))), max(0, min(height, int(np.ceil(bottom - 0.5)))))
        crossed = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.ceil(crossed - 0.5).clip(0, width).astype(int)
        toggles[rows, columns] ^= True
    return np.logical_xor.accumulate(toggles, axis=1)[:, :width]


# ---- of a whole pool


def tally(readings: Iterable[Reading]) -> dict[str, Any]:
    """What some masks were taken for, as plain values that can be added up (see `added`)."""
    total: dict[str, Any] = {
        "kinds": {},
        "values": {},
        "soft": 0.0,
        "thresholds": [],
        "masks": 0,
        "full": 0,
        "grey": 0,
    }
    for reading in readings:
        one = {
            "kinds": {reading.kind: 1},
            "values": {} if reading.value is None else {str(reading.value): 1},
            "soft": reading.soft,
            "thresholds": [] if reading.threshold is None else [reading.threshold],
            "masks": 1,
            "full": int(reading.white.all()),
            "grey": int(reading.grey),
        }
        total = added(total, one)
    return total


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two tallies as one."""
    return {
        **{name: one.get(name, 0) + other.get(name, 0) for name in ("soft", "masks", "full", "grey")},
        **{
            name: {key: one[name].get(key, 0) + other[name].get(key, 0) for key in {**one[name], **other[name]}}
            for name in ("kinds", "values")
        },
        "thresholds": sorted({*one["thresholds"], *other["thresholds"]}),
    }


def check_one_meaning(total: dict[str, Any]) -> None:
    """Refuse masks that each have one class, but not the same.

    Raises:
        ValueError: naming the values.
    """
    values = sorted(map(int, total["values"]))
    if len(values) > 1:
        shown = ", ".join(map(str, values[:SHOWN])) + (", ..." if len(values) > SHOWN else "")
        raise ValueError(
            f"some masks mark their object by other values than others ({shown}): are they classes? {NAME}"
        )


def told(total: dict[str, Any]) -> str:
    """A tally in words, such as "binary 0/255, 1.2 % soft edge pixels, threshold 128"."""
    kinds = sorted(total["kinds"].items(), key=lambda pair: -pair[1])
    marked = [(kind, count) for kind, count in kinds if kind != "nothing marked"]
    text = marked[0][0] if len(marked) == 1 else "; ".join(f"{kind} ({count:,})" for kind, count in marked[:SHOWN])
    text = text or "nothing marked"
    if total["thresholds"]:
        share, levels = total["soft"] / max(1, total["masks"]), " and ".join(map(str, total["thresholds"][:SHOWN]))
        text += f", {100 * share:.2g} % soft edge pixels, threshold {levels}"
    return text
