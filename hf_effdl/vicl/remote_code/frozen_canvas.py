"""In-painting models as frozen in-context models: a 2x2 canvas per example, eight arrangements of it, and a vote."""

from abc import abstractmethod

import torch
from torch import Tensor

from .frozen_model import FrozenModel, check_prompts
from .images import check_pixels


# What stands top left, top right, bottom left and bottom right: the example S, its label SM, the query Q and the
# answer QM, which is hidden. These are all the layouts with S diagonal to QM, in prompt-SelF's order A1 to A8.
ARRANGEMENTS = (
    ("S", "SM", "Q", "QM"),
    ("SM", "S", "QM", "Q"),
    ("QM", "Q", "SM", "S"),
    ("Q", "QM", "S", "SM"),
    ("SM", "QM", "S", "Q"),
    ("QM", "SM", "Q", "S"),
    ("Q", "S", "QM", "SM"),
    ("S", "Q", "SM", "QM"),
)
# two cells and the gutter between them
CELL, GUTTER = 111, 2
SIDE = 2 * CELL + GUTTER
PATCHES = 14  # of 16 pixels, along a side


class CanvasModel(FrozenModel):
    """A frozen in-context model that fills the hidden quarter of a canvas; a subclass says how, in `paint`.

    Several examples of a query make one canvas each, and the painted answers are averaged. `paint` is all that an
    in-painting model such as MAE-VQGAN has to implement, with its own normalisation. Which arrangements are run, and
    that they `vote`, is the caller's choice.

    Example:
        >>> class Grey(CanvasModel):
        ...     def paint(self, canvas, mask):
        ...         return torch.full_like(canvas, 0.5)
        >>> model, queries, images = Grey(), torch.rand(2, 3, 111, 111), torch.rand(2, 4, 3, 111, 111)
        >>> answers = [model(queries, images, images, arrangement) for arrangement in range(model.arrangements)]
        >>> vote(torch.stack(answers)).shape
        torch.Size([2, 3, 111, 111])

    Source: Bar et al., "Visual Prompting via Image Inpainting", arXiv 2209.00647; Sun et al., "Exploring Effective
    Factors for Improving Visual In-Context Learning" (prompt-SelF), arXiv 2304.04748.
    """

    image_size = (CELL, CELL)
    arrangements = len(ARRANGEMENTS)

    @abstractmethod
    def paint(self, canvas: Tensor, mask: Tensor) -> Tensor:
        """Fills the hidden patches.

        Args:
            canvas: `(N, 3, 224, 224)` in [0, 1]; the hidden cell is white.
            mask: `(N, 14, 14)` bool, True at the 49 hidden patches of 16 pixels.

        Returns:
            `(N, 3, 224, 224)` in [0, 1]. Only the hidden cell is read.
        """

    @torch.no_grad()
    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The labels of the queries.

        Args:
            queries: `(B, 3, 111, 111)` in [0, 1].
            images: `(B, m, 3, 111, 111)` in [0, 1], the m >= 1 examples of each query.
            labels: `(B, m, 3, 111, 111)` in [0, 1], their labels as images.
            arrangement: index into `ARRANGEMENTS`.

        Returns:
            `(B, 3, 111, 111)` in [0, 1], the mean over the examples, in the queries' dtype and on their device.

        Raises:
            TypeError: for tensors that are not floating.
            ValueError: for other sizes, no example, values outside [0, 1] or NaN, an unknown arrangement, or a `paint`
                that returns another size.
        """
        check_prompts(queries, images, labels, self.image_size)
        repeated = queries[:, None].expand_as(images)
        canvas, mask = arrange(images.flatten(0, 1), labels.flatten(0, 1), repeated.flatten(0, 1), arrangement)
        painted = unarrange(self.paint(canvas, mask), arrangement)
        return painted.to(queries).unflatten(0, images.shape[:2]).mean(1).clamp(0, 1)


def arrange(examples: Tensor, labels: Tensor, queries: Tensor, arrangement: int = 0) -> tuple[Tensor, Tensor]:
    """Canvases of 224x224: rows and columns 0 to 110 and 113 to 223 are cells, the gutter and the hidden cell white.

    Args:
        examples, labels, queries: `(N, 3, 111, 111)`.
        arrangement: index into `ARRANGEMENTS`.

    Returns:
        The canvases `(N, 3, 224, 224)` and what is hidden of them, `(N, 14, 14)` bool: the 7x7 patches that hold the
        answer's cell and nothing else but gutter.
    """
    shape = (len(examples), 3, CELL, CELL)
    for name, cells in (("examples", examples), ("labels", labels), ("queries", queries)):
        if cells.shape != shape:
            raise ValueError(f"{name} is {tuple(cells.shape)}: it must be {shape}, of one size with the examples")
    canvas = queries.new_ones(len(queries), 3, SIDE, SIDE)
    for name, cells in (("S", examples), ("SM", labels), ("Q", queries)):
        rows, columns = _cell(arrangement, name)
        canvas[..., rows, columns] = cells
    top, left = (7 * i for i in divmod(ARRANGEMENTS[arrangement].index("QM"), 2))
    mask = torch.zeros(len(queries), PATCHES, PATCHES, dtype=torch.bool, device=queries.device)
    mask[:, top : top + 7, left : left + 7] = True
    return canvas, mask


def unarrange(canvas: Tensor, arrangement: int = 0) -> Tensor:
    """The answer's cell `(N, 3, 111, 111)` of canvases `(N, 3, 224, 224)`."""
    if canvas.ndim != 4 or canvas.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"canvas is {tuple(canvas.shape)}: it must be (N, 3, {SIDE}, {SIDE})")
    rows, columns = _cell(arrangement, "QM")
    return canvas[..., rows, columns]


def vote(predictions: Tensor, threshold: bool = True) -> Tensor:
    """One answer from those of several arrangements: prompt-SelF's fusion.

        white where  1/V sum_v floor(255 p_v) > 127  in all three channels, else black

    Args:
        predictions: `(V, B, 3, h, w)` in [0, 1], V >= 1.
        threshold: False returns the plain mean `1/V sum_v p_v`, which is for colours.

    Returns:
        `(B, 3, h, w)`.

    Example:
        >>> vote(torch.tensor([0.9, 0.4, 0.3]).reshape(3, 1, 1, 1, 1).expand(-1, -1, 3, -1, -1)).flatten()
        tensor([1., 1., 1.])

    Source: Sun et al., arXiv 2304.04748; the threshold and the whole levels are those of the released code.
    """
    check_pixels("predictions", predictions, ("V", "B", 3, "h", "w"))
    if not threshold:
        return predictions.mean(0)
    # times 255 in the own dtype, where k / 255 becomes k again
    white = (predictions * 255).floor().float().mean(0) > 127
    return white.all(1, keepdim=True).expand_as(white).to(predictions.dtype)


def _cell(arrangement: int, name: str) -> tuple[slice, slice]:
    if arrangement not in range(len(ARRANGEMENTS)):
        raise ValueError(f"arrangement={arrangement!r}: it must be from 0 to {len(ARRANGEMENTS) - 1}")
    row, column = divmod(ARRANGEMENTS[arrangement].index(name), 2)
    top, left = row * (CELL + GUTTER), column * (CELL + GUTTER)
    return slice(top, top + CELL), slice(left, left + CELL)
