"""The tasks of visual in-context learning: how labels become images, and how painted images are read and scored.

A frozen model sees and paints RGB images only, so a task says how a label is drawn (`label`, `labels`), how a painted
answer is read (`decode`) and how good it is (`score`). Pixels are float `(N, 3, h, w)` in [0, 1]; images are squashed
to the model's cell `(h, w)` (aspect ratio not kept), bicubic, masks nearest.

Every image is turned as its EXIF orientation says, and **a mask or box belongs to the turned image**, the one a viewer
shows. Boxes are half open: `[0, 0, W, H]` is the whole image.

Sources: Bar et al., "Visual Prompting via Image Inpainting", arXiv 2209.00647 (tasks and metrics); Xu et al.,
"Towards Global Optimal Visual In-Context Learning Prompt Selection" (Partial2Global), arXiv 2405.15279.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .images import BICUBIC, NEAREST, Size, opened, pixels, to_rgb
from .masks import ANY, LOSSY, Reading, coco_mask, is_coco, read_mask, value_map


BOXES = ("xyxy", "xywh")
# share of an image that is void where there is no object of the class, beyond which it is one that was drawn white
VOID_AT_MOST = 0.02
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's; the mean cancels in a difference


def largest_boxes(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Bounding box of each mask's largest 8-connected component, for a whole batch at once.

    Each pixel points to the first pixel, in reading order, that it is known to be connected to. A round takes the
    first of the neighbours' by a 3x3 max-pool, tells the pixel it pointed to before, and follows the pointers, until
    nothing changes: some log(h w) rounds also for mazes.

    Args:
        masks: `(N, h, w)` bool.

    Returns:
        `boxes (N, 4)` int64 `[x0, y0, x1, y1]`, half open, zeros where nothing is set, and `found (N,)` bool. Of
        components of one size the first in reading order counts.

    Example:
        >>> mask = torch.tensor([[[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]).bool()
        >>> largest_boxes(mask)
        (tensor([[2, 1, 4, 3]]), tensor([True]))
    """
    n, h, w = masks.shape
    total = h * w
    found = masks.flatten(1).any(1)
    # a pixel's rank falls in reading order, 0 is background; float32 counts to 2^24
    ranks = torch.arange(total, 0, -1, device=masks.device, dtype=torch.float32 if total < 2**24 else torch.float64)
    ranks = ranks * masks.flatten(1)
    pointers = torch.arange(total, device=masks.device).expand(n, total)
    while n:
        grown = F.max_pool2d(ranks.view(n, 1, h, w), 3, stride=1, padding=1).view(n, total) * masks.flatten(1)
        grown = grown.scatter_reduce(1, pointers, grown, "amax")
        for _ in range(2):
            pointers = (total - grown).long().clamp(max=total - 1)
            grown = torch.maximum(grown, grown.gather(1, pointers) * masks.flatten(1))
        if torch.equal(grown, ranks):
            break
        ranks, pointers = grown, (total - grown).long().clamp(max=total - 1)
    counts = torch.zeros(n, total, dtype=torch.long, device=masks.device)
    counts.scatter_add_(1, pointers, masks.flatten(1).long())
    largest = masks & (pointers == counts.argmax(1, keepdim=True)).view_as(masks)
    columns, rows = largest.any(1).byte(), largest.any(2).byte()
    boxes = [columns.argmax(1), rows.argmax(1), w - columns.flip(1).argmax(1), h - rows.flip(1).argmax(1)]
    return torch.stack(boxes, 1) * found[:, None], found


def _white(soft: Tensor) -> Tensor:
    """`(..., h, w)` bool: pixels at least as near to white as to black."""
    return _painted(soft).mean(-3) >= 0.5


def _painted(soft: Tensor) -> Tensor:
    if soft.ndim < 3 or soft.shape[-3] != 3:
        raise ValueError(f"label images are (..., 3, h, w); got {tuple(soft.shape)}")
    if not torch.isfinite(soft.sum(dtype=torch.float32)):  # NaN and infinity stay in a sum; ten times as fast
        raise ValueError("a painted image holds NaN or infinite values; run the model in float32 or bfloat16")
    return soft.float()


def _rescaled(box: Sequence[float], old: Size, new: Size) -> list[int]:
    """A box of an image of size `old = (h, w)` in pixels of one of size `new`, at least one pixel wide and high."""
    before, after = np.array(old[::-1]), np.array(new[::-1])
    low = np.floor(np.array(box[:2]) * after / before + 0.5).clip(0, after - 1)
    high = np.floor(np.array(box[2:]) * after / before + 0.5).clip(low + 1, after)
    return [int(value) for value in (*low, *high)]


def _four_numbers(box: Sequence[float]) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in box) if np.shape(box) == (4,) else ()
    except (TypeError, ValueError, OverflowError):
        values = ()
    if not values:
        raise ValueError(f"a box is four numbers [x0, y0, x1, y1], or None; got {box!r}")
    if max(values) <= 1 and any(value % 1 for value in values):
        raise ValueError(
            f"the box {box!r} holds nothing above 1, and boxes are in pixels: multiply shares by the image's width "
            "and height"
        )
    return values


def _is_drawn(mask: np.ndarray) -> bool:
    """Whether a mask looks black and white: of nothing but 0 and 255, as much of it as an object has."""
    return bool(((mask == 0) | (mask == 255)).all() and (mask == 255).mean() > VOID_AT_MOST)


def _check_sizes(what: str, size: Size, image: Size) -> None:
    if tuple(size) != tuple(image):
        raise ValueError(
            f"the {what} is {size[0]} x {size[1]} pixels and its image {image[0]} x {image[1]} (width x "
            "height, after EXIF rotation); they must agree"
        )


class _Task:
    name: str
    metric: str
    greater_is_better = True
    _resample = NEAREST

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in vars(self).items())})"

    def query(self, image: Any) -> Image.Image:
        """What the frozen model sees of an image, PIL RGB."""
        return to_rgb(image)

    def labels(self, labels: Sequence, images: Sequence, size: Size) -> Tensor:
        """`label()` of each, in cells of `size = (h, w)`: `(N, 3, h, w)`."""
        return pixels([self.label(*pair) for pair in zip(labels, images, strict=True)], size, self._resample)

    def decode(self, soft: Tensor, size: Size | Sequence[Size]) -> Any:
        """The prediction in a painted `(3, h, w)` at the query's size `(H, W)`.

        Of `(N, 3, h, w)` it is a list of N; `size` is then one `(H, W)` for all or one for each.
        """
        soft = _painted(soft.detach()).cpu()
        if soft.ndim == 3:
            return self._decode(soft[None], size)
        sizes = [size] * len(soft) if np.ndim(size) == 1 else size
        return [self._decode(one[None], each) for one, each in zip(soft, sizes, strict=True)]


class Segmentation(_Task):
    """Foreground segmentation: masks are drawn white on black; score: IoU of white, 1 if both are empty.

    What the values of a mask mean is decided from all of its pixels, see `read_mask`: black and white in any two
    values, with soft edges or without, and one class beside `void` need no more; several classes must be named.

    Args:
        foreground: the mask value or values that are the object, every other value is background; or "any": every
            value but 0 and `void`. None: see above.
        void: the value of pixels that belong to nothing, drawn as background; None for no such value.

    Example:
        >>> task, photo = Segmentation(), Image.new("RGB", (3, 1))
        >>> soft = task.labels([np.array([[0, 7, 255]])], [photo], (1, 3))
        >>> task.decode(soft, (1, 3))
        [array([[0, 1, 0]], dtype=uint8)]
    """

    name, metric = "segmentation", "foreground_iou"

    def __init__(self, foreground: int | Iterable[int] | str | None = None, void: int | None = 255) -> None:
        if isinstance(foreground, str):
            if foreground != ANY:
                raise ValueError(f"foreground={foreground!r}: pass mask values, or {ANY!r} for all but 0 and void")
        elif foreground is not None:
            foreground = (int(foreground),) if np.isscalar(foreground) else tuple(int(value) for value in foreground)
        self.foreground, self.void = foreground, void
        if foreground == ():
            raise ValueError("foreground= names no value; pass the mask values of the object, or None for every class")

    def label(self, label: Any, image: Any) -> Image.Image:
        """The mask as a white-on-black PIL RGB image of `image`'s size; all black where the mask has no foreground.

        Args:
            label: `(H, W)` numbers, an array or PIL image (mode P: the palette's indices, but black and white as
                they are shown; several channels: equal ones), or a file as in `to_rgb`; floats must be whole numbers.
                Or as in COCO: polygons `[[x, y, x, y, ...], ...]`, or runs `{"size": [H, W], "counts"}`.
            image: the image it belongs to, after EXIF rotation.

        Raises:
            ValueError: for a mask of another size, with colours, fractions, negative values, or several classes of
                which none is named.
        """
        return self.read(label, image).picture().convert("RGB")

    def read(self, label: Any, image: Any) -> Reading:
        """The mask, and what its values were taken for; arguments and errors are those of `label`."""
        size = to_rgb(image).size
        if is_coco(label, size[::-1]):
            return Reading(coco_mask(label, size[::-1]), "outlines or runs of COCO")
        file = opened(label)
        mask = value_map(file, file)
        _check_sizes("mask", mask.shape[::-1], size)
        if mask.dtype == bool or getattr(label, "white_on_black", False):  # no class numbers, whatever was named
            return read_mask(mask)
        if isinstance(self.foreground, tuple) and 255 not in self.foreground and _is_drawn(mask):
            warnings.warn(
                f"a mask holds nothing but 0 and 255, and foreground={self.foreground} names neither: it is read as "
                "one without the object; of a black-and-white mask pass mask > 0",
                stacklevel=2,
            )
        return read_mask(mask, self.foreground, self.void, getattr(file, "source_format", None) in LOSSY)

    def _decode(self, soft: Tensor, size: Size) -> np.ndarray:
        soft = F.interpolate(soft, tuple(size), mode="bilinear", align_corners=False)
        return _white(soft)[0].numpy().astype(np.uint8)

    def score(self, predicted: Tensor, target: Tensor) -> Tensor:
        """IoU of the pixels nearer to white than to black, `(..., 3, h, w)` twice to `(...,)`."""
        predicted, target = _white(predicted), _white(target)
        both = (predicted & target).sum((-2, -1)).float()
        either = (predicted | target).sum((-2, -1))
        return torch.where(either > 0, both / either.clamp(min=1), 1.0)


class Detection(_Task):
    """Single-object detection: a box is drawn as a filled rectangle; score: IoU, 1 if both are empty.

    The predicted rectangle bounds the largest 8-connected white component.

    Args:
        boxes: how boxes are given: "xyxy", corners `[x0, y0, x1, y1]`; or "xywh", corner and size as in COCO. What
            is predicted, and kept in a pool, is always corners.

    Example:
        >>> task, photo = Detection(), Image.new("RGB", (8, 6))
        >>> task.decode(task.labels([[1, 2, 5, 6], None], [photo, photo], (6, 8)), (6, 8))
        [[1, 2, 5, 6], None]
    """

    name, metric = "detection", "box_iou"

    def __init__(self, boxes: str = "xyxy") -> None:
        if boxes not in BOXES:
            raise ValueError(f"boxes={boxes!r}: choose one of {BOXES}")
        self.boxes = boxes

    def corners(self, box: Sequence[float] | None) -> Sequence[float] | None:
        """A box, as it was given, as `[x0, y0, x1, y1]`."""
        if self.boxes == "xyxy" or box is None or np.shape(box) != (4,):
            return box
        x, y, width, height = np.asarray(box).tolist()  # Python's numbers: sums of bytes would start again at 256
        return [x, y, x + width, y + height]

    def label(self, label: Sequence[float] | None, image: Any) -> Image.Image:
        """The box in pixels of `image`, filled white on black, as PIL RGB of its size; None: black.

        Raises:
            ValueError: for a box that is empty, unordered or reaches more than half a pixel out of the image.
        """
        size = to_rgb(image).size[::-1]
        return Image.fromarray(self._drawn(self.corners(label), size, size)).convert("RGB")

    @staticmethod
    def _drawn(box: Sequence[float] | None, old: Size, new: Size) -> np.ndarray:
        canvas = np.zeros(new, dtype=np.uint8)
        if box is None:
            return canvas
        x0, y0, x1, y1 = _four_numbers(box)
        if not (-0.5 <= x0 < x1 <= old[1] + 0.5 and -0.5 <= y0 < y1 <= old[0] + 0.5):
            raise ValueError(
                f"box [{x0:g}, {y0:g}, {x1:g}, {y1:g}] is not 0 <= x0 < x1 <= {old[1]} and "
                f"0 <= y0 < y1 <= {old[0]}, the image's width and height"
            )
        x0, y0, x1, y1 = _rescaled((x0, y0, x1, y1), old, new)
        canvas[y0:y1, x0:x1] = 255
        return canvas

    def labels(self, labels: Sequence, images: Sequence, size: Size) -> Tensor:
        """The boxes drawn at cell size with rounded corners, one pixel at least: `(N, 3, h, w)`."""
        pairs = zip(labels, images, strict=True)
        return pixels(
            [self._drawn(self.corners(box), to_rgb(image).size[::-1], size) for box, image in pairs], size, NEAREST
        )

    def _decode(self, soft: Tensor, size: Size) -> list[int] | None:
        boxes, found = largest_boxes(_white(soft))
        return _rescaled(boxes[0].tolist(), tuple(soft.shape[-2:]), size) if found[0] else None

    def score(self, predicted: Tensor, target: Tensor) -> Tensor:
        """IoU of the bounding rectangles of the largest white components, `(..., 3, h, w)` twice to `(...,)`."""
        masks = torch.broadcast_tensors(_white(predicted), _white(target))
        (a, any_a), (b, any_b) = (largest_boxes(mask.reshape(-1, *mask.shape[-2:])) for mask in masks)
        overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
        union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - overlap
        iou = torch.where(any_a | any_b, overlap.float() / union.clamp(min=1), 1.0)
        return iou.view(masks[0].shape[:-2])


class Colourisation(_Task):
    """Colouring a grey image; score: mean squared error of ImageNet-normalised values (lower is better).

    Example:
        >>> task, photo = Colourisation(), Image.new("RGB", (2, 2), "red")
        >>> task.query(photo).getpixel((0, 0)), task.label(None, photo).getpixel((0, 0))
        ((76, 76, 76), (255, 0, 0))
    """

    name, metric, greater_is_better = "colourisation", "colour_mse", False
    _resample = BICUBIC

    def query(self, image: Any) -> Image.Image:
        """The grey version of the image, in three channels."""
        return to_rgb(image).convert("L").convert("RGB")

    def label(self, label: Any, image: Any) -> Image.Image:
        """The colour image: `label`, of `image`'s size, or `image` itself where `label` is None."""
        image = to_rgb(image)
        label = image if label is None else to_rgb(label)
        _check_sizes("colour label", label.size, image.size)
        return label

    def _decode(self, soft: Tensor, size: Size) -> Image.Image:
        soft = F.interpolate(soft, tuple(size), mode="bicubic", align_corners=False).clamp(0, 1)
        return Image.fromarray((soft[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy())

    def score(self, predicted: Tensor, target: Tensor) -> Tensor:
        """`mean(((predicted - target) / std)^2)` over channels and pixels, `(..., 3, h, w)` twice to `(...,)`."""
        error = _painted(predicted) - _painted(target)
        return (error / error.new_tensor(_STD)[:, None, None]).square().mean((-3, -2, -1))


class ImageToImage(Colourisation):
    """Any picture of an image: the image cleaned, sharpened or lit, its depth in grey; score: that of colourisation.

    Depth is drawn as a share of the farthest that is to be told, `depth / far`, in grey, and the answer's `soft_map`
    times `far` is depth again.

    Example:
        >>> task, noisy, clean = ImageToImage(), Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
        >>> task.query(noisy).getpixel((0, 0)), task.label(clean, noisy).getpixel((0, 0))
        ((255, 0, 0), (0, 0, 255))
    """

    name = "image-to-image"

    def query(self, image: Any) -> Image.Image:
        """The image."""
        return to_rgb(image)

    def label(self, label: Any, image: Any) -> Image.Image:
        """The picture `label`, any that `to_rgb` takes, of `image`'s size."""
        if label is None:
            raise ValueError("it has no picture as its label; what an image is to become is a picture of its size")
        return super().label(label, image)


TASKS = {task.name: task for task in (Segmentation(), Detection(), Colourisation(), ImageToImage())}
# tasks whose labels are pictures, not white on black
PICTURES = tuple(name for name, task in TASKS.items() if isinstance(task, Colourisation))


def find_task(
    task: str | _Task, foreground: int | Iterable[int] | str | None = None, boxes: str | None = None
) -> _Task:
    """A task by name, with its defaults, or the given task itself.

    Args:
        task: "segmentation", "detection", "colourisation", "image-to-image", or an instance such as
            `Segmentation(foreground=[1])`.
        foreground: for "segmentation" by name: the mask values that are the object.
        boxes: for "detection" by name: how boxes are given.

    Example:
        >>> find_task("segmentation", foreground=[15])
        Segmentation(foreground=(15,), void=255)
    """
    if not isinstance(task, _Task) and task not in TASKS:
        raise ValueError(f"task={task!r}: it must be one of {list(TASKS)} or an instance of theirs")
    if boxes is not None:
        if task != "detection":
            raise ValueError(f"boxes= goes with task='detection'; got task={task!r} beside it")
        task = Detection(boxes)
    if foreground is None:
        return task if isinstance(task, _Task) else TASKS[task]
    if task != "segmentation":
        raise ValueError(f"foreground= goes with task='segmentation'; got task={task!r} beside it")
    return Segmentation(foreground)


def task_of(name: str, settings: dict[str, Any]) -> _Task:
    """The task that reads labels as those of a pool's data set were read, by the settings in its manifest."""
    if name == "segmentation":
        return Segmentation(settings.get("foreground"), settings.get("void", 255))
    return Detection(settings.get("boxes", "xyxy")) if name == "detection" else TASKS[name]
