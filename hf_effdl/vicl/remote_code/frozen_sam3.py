"""SAM 3 as a frozen in-context model: examples and query share a canvas, and a box says what the object is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

from .backbones import config_of, load_backbone
from .frozen_model import FrozenModel, check_prompts
from .visual_tasks import PICTURES, largest_boxes
from .writing import check_folder


# height of the canvas that one example takes, and thickness of the L that several take
ONE, SEVERAL = 0.6, 0.3
PAINTS = ("union", "best", "box")
TEXT, LENGTH = "visual", 32  # what the model was trained to read where only boxes say what is meant, and how long
PADDED = -10  # the label of a box that does not count
CANVASES = 4  # in one call of the model
Rectangle = tuple[int, int, int, int]  # y0, x0, y1, x1


@dataclass(frozen=True)
class Found:
    """What the model found on one canvas.

    Args:
        scores: `(n,)` of all its object queries.
        boxes: `(n, 4)` corners `[x0, y0, x1, y1]` in shares of the canvas.
        masks: `(n, h, w)` chances, of the whole canvas.
    """

    scores: Tensor
    boxes: Tensor
    masks: Tensor

    def best(self, threshold: float) -> "Found":
        """Those above a threshold, best first."""
        order = self.scores.argsort(descending=True, stable=True)
        order = order[self.scores[order] > threshold]
        return Found(self.scores[order], self.boxes[order], self.masks[order])


class Sam3InContext(FrozenModel):
    """A SAM 3 that is shown what to look for in other images: every object of the kind is found, with a score.

    SAM 3 takes boxes in the image that it searches. So examples and query are put on one square canvas, where the box
    of the example's object is a positive prompt, and of what is found the query's part is cut out:

        one example     the upper 60 % of the height; the query below, or above it in arrangement 1
        several         an L of 30 % thickness: the larger half of them above, the others at the left

    The box bounds the largest white component of an example's label. Examples without any give no box; a query whose
    examples all have none gets an empty answer.

    Args:
        model: a `Sam3Model`, or a `Sam3LiteTextModel`. It is frozen in place: evaluation mode, no gradients.
        tokenizer: of its text; default: the one in the repository that the model was loaded from.
        text: the name of the class, where there is one; default: the word that SAM 3 reads where there is none.
        tokens: of the text, padded to 32, instead of a tokenizer: `{"input_ids": [...], "attention_mask": [...]}`.
        threshold: score above which an object counts, in (0, 1).
        paint: what `predict` paints: "union" of the masks of all objects that count (default), the mask of the
            "best", or its "box", filled, which is the choice for detection.

    Raises:
        TypeError: where the model is another one.
        ValueError: for an unknown name, a threshold out of range, a canvas that is not square, or without a tokenizer.

    Example:
        ```python
        frozen = Sam3InContext.from_pretrained("facebook/sam3", token=True)    # asks for Meta's licence first
        pool = ExamplePool.from_dataset(dataset, label_column="mask", encoder="facebook/dinov2-small")
        pipe = VisualInContextPipeline(model=frozen, pool=pool)
        pipe("photo.jpg", instances=True)["instances"]    # [{"score": 0.93, "box": [...], "mask": array}, ...]
        ```

    Source: the canvas, its shares and the box of the example follow FSS-SAM3, arXiv 2604.05433 (where the component
    is drawn at random); the model, "SAM 3: Segment Anything with Concepts", arXiv 2511.16719.
    """

    kind = "sam3"
    model_types = ("sam3", "sam3_lite_text", "sam3_video")
    backbone_class = PreTrainedModel  # one of two, see `load`
    kept = ("text", "tokens", "threshold", "paint")
    arrangements = 2

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Callable[..., Any] | None = None,
        *,
        text: str = TEXT,
        tokens: dict[str, list[int]] | None = None,
        threshold: float = 0.5,
        paint: str = "union",
    ) -> None:
        super().__init__()
        self.side = _side_of(model)
        if paint not in PAINTS:
            raise ValueError(f"paint={paint!r}: choose one of {PAINTS}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold}: it is a score, between 0 and 1")
        self.model = model.eval().requires_grad_(False)
        self.text, self.threshold, self.paint = text, threshold, paint
        self.tokens = tokens or _tokens_of(text, tokenizer, self.id)

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels `(h, w)` of a cell: that of one example on the canvas."""
        return int(ONE * self.side), self.side

    # ---- the contract of a frozen model

    @property
    def backbone(self) -> PreTrainedModel:
        """The SAM 3."""
        return self.model

    @property
    def id(self) -> str | None:
        """Repository or folder that the model was loaded from."""
        return self.model.config.name_or_path or None

    def check_task(self, task: str) -> None:
        """It finds objects."""
        if task in PICTURES:
            raise ValueError(f"task={task!r}: a SAM 3 finds objects and paints no colours")

    @classmethod
    def load(cls, source: dict[str, Any], token: str | bool | None = None, trust: bool = False) -> PreTrainedModel:
        """The backbone at a source, of the class that its config names."""
        model = load_backbone(source, _class_of(config_of(source, token).model_type), token, trust)
        # a checkpoint for videos has its images' config inside, without a name
        model.config.name_or_path = source.get("id") or ""
        return model

    @classmethod
    def from_pretrained(
        cls,
        id: str,
        *,
        task: str = "segmentation",
        revision: str | None = None,
        token: str | bool | None = None,
        **settings: Any,
    ) -> "Sam3InContext":
        """Made from the SAM 3 in a repository or folder; boxes are painted for detection by default."""
        if task in PICTURES:
            raise ValueError(f"{id}: a SAM 3 finds objects and paints no colours; pass task='segmentation'")
        check_folder(id, revision)
        tokenizer = AutoTokenizer.from_pretrained(id, revision=revision, token=token)
        if task == "detection":
            settings.setdefault("paint", "box")
        return super().from_pretrained(id, task=task, revision=revision, token=token, tokenizer=tokenizer, **settings)

    # ---- finding

    @torch.no_grad()
    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The labels of the queries.

        Args:
            queries: `(B, 3, h, w)` in [0, 1], of `image_size`.
            images: `(B, m, 3, h, w)` in [0, 1], the m >= 1 examples of each query.
            labels: `(B, m, 3, h, w)` in [0, 1], their labels as images.
            arrangement: 0, examples above; 1, upside down.

        Returns:
            `(B, 3, h, w)` in [0, 1], how sure the masks are, and 0 where nothing was found; in the queries' dtype and
            on their device, computed in the model's.

        Raises:
            TypeError: for tensors that are not floating.
            ValueError: for other sizes, no example, values outside [0, 1] or NaN, or an unknown arrangement.
        """
        # one after the other: masks of all objects of many queries would fill the memory
        pictures = [self._picture(**vars(found)) for found in self._search(queries, images, labels, arrangement)]
        return torch.stack(pictures).to(queries)[:, None].expand(-1, 3, -1, -1)

    @torch.no_grad()
    def instances(
        self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0
    ) -> list[dict[str, Tensor]]:
        """All objects of the examples' kind in each query, best first.

        Args:
            queries, images, labels, arrangement: as for `predict`.

        Returns:
            for each query `{"scores": (n,), "boxes": (n, 4), "masks": (n, h, w)}`: scores above the threshold, boxes
            `[x0, y0, x1, y1]` in shares of the query's sides, and masks in [0, 1] of the cell's size.
        """
        return [vars(found) for found in self._search(queries, images, labels, arrangement)]

    def painted(self, instances: list[dict[str, Tensor]]) -> Tensor:
        """What was found as pictures `(B, 3, h, w)`."""
        return torch.stack([self._picture(**found) for found in instances])[:, None].expand(-1, 3, -1, -1)

    def _picture(self, scores: Tensor, boxes: Tensor, masks: Tensor) -> Tensor:
        picture = masks.new_zeros(self.image_size)
        if not len(scores):
            return picture
        if self.paint != "box":
            return masks.amax(0) if self.paint == "union" else masks[0]
        height, width = self.image_size
        x0, y0, x1, y1 = (boxes[0].cpu() * torch.tensor([width, height] * 2)).round().long().tolist()
        picture[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 1
        return picture

    def _search(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int) -> Iterator[Found]:
        """Of each query what counts in its part of the canvas, best first, in shares and pixels of a cell."""
        check_prompts(queries, images, labels, self.image_size)
        if arrangement not in range(self.arrangements):
            raise ValueError(f"arrangement={arrangement!r}: there are {list(range(self.arrangements))}")
        *shown, asked = places = layout(self.side, images.shape[1], upside_down=arrangement == 1)
        boxes, marked = self._boxes(labels, shown)
        for part in torch.arange(len(queries)).split(CANVASES):
            canvas = self._canvas(queries[part], images[part], places)
            for found, any_box in zip(self._call(canvas, boxes[part], marked[part]), marked[part].any(1).tolist()):
                yield self._cut(found.best(self.threshold if any_box else 1.0), asked)

    def _canvas(self, queries: Tensor, images: Tensor, places: list[Rectangle]) -> Tensor:
        """`(B, 3, s, s)`, in the model's units."""
        canvas = queries.new_zeros(len(queries), 3, self.side, self.side)
        for cells, (y0, x0, y1, x1) in zip([*images.unbind(1), queries], places, strict=True):
            canvas[..., y0:y1, x0:x1] = _resized(cells, (y1 - y0, x1 - x0))
        return ((canvas - 0.5) / 0.5).to(self.model.device, self.model.dtype)

    def _boxes(self, labels: Tensor, places: list[Rectangle]) -> tuple[Tensor, Tensor]:
        """Of each example the object's centre and size in shares of the canvas `(B, m, 4)`, and if there is one."""
        white = labels.float().mean(2) >= 0.5
        corners, marked = largest_boxes(white.flatten(0, 1))
        height, width = self.image_size
        corners = corners.unflatten(0, white.shape[:2]).float() / corners.new_tensor([width, height] * 2)
        y0, x0, y1, x1 = corners.new_tensor(places).T / self.side
        low = corners[..., :2] * torch.stack([x1 - x0, y1 - y0], 1) + torch.stack([x0, y0], 1)
        high = corners[..., 2:] * torch.stack([x1 - x0, y1 - y0], 1) + torch.stack([x0, y0], 1)
        return torch.cat([(low + high) / 2, high - low], 2), marked.unflatten(0, white.shape[:2])

    def _call(self, canvas: Tensor, boxes: Tensor, marked: Tensor) -> Iterator[Found]:
        output = self.model(
            pixel_values=canvas,
            **{name: torch.tensor([values], device=canvas.device) for name, values in self.tokens.items()},
            input_boxes=boxes.to(canvas),
            input_boxes_labels=torch.where(marked, 1, PADDED).to(canvas.device),
        )
        scores = output.pred_logits.float().sigmoid() * output.presence_logits.float().sigmoid()
        for parts in zip(scores, output.pred_boxes.float(), output.pred_masks.float().sigmoid(), strict=True):
            yield Found(*parts)

    def _cut(self, found: Found, place: Rectangle) -> Found:
        """The query's part, without objects of which nothing is there."""
        y0, x0, y1, x1 = place
        low = found.boxes.new_tensor([x0, y0, x0, y0]) / self.side
        size = found.boxes.new_tensor([x1 - x0, y1 - y0] * 2) / self.side
        boxes = ((found.boxes - low) / size).clamp(0, 1)
        here = (boxes[:, 2:] > boxes[:, :2]).all(1)
        masks = [
            _resized(_resized(mask[None, None], (self.side, self.side))[..., y0:y1, x0:x1], self.image_size)[0, 0]
            for mask in found.masks[here]
        ]
        empty = found.masks.new_zeros(0, *self.image_size)
        return Found(found.scores[here], boxes[here], torch.stack(masks) if masks else empty)


def layout(side: int, examples: int, upside_down: bool = False) -> list[Rectangle]:
    """Where examples stand on a canvas, and last the query: `(y0, x0, y1, x1)`, which cover it without overlap.

    Example:
        >>> layout(10, 1), layout(9, 3)
        ([(0, 0, 6, 10), (6, 0, 10, 10)], [(0, 0, 3, 4), (0, 4, 3, 9), (3, 0, 9, 3), (3, 3, 9, 9)])
    """
    left = examples // 2
    thick = int(ONE * side) if examples == 1 else round(SEVERAL * side)
    indent = thick if left else 0
    columns = _cut_points(0, side, examples - left)
    rows = _cut_points(thick, side, left) if left else []
    places = [(0, x0, thick, x1) for x0, x1 in zip(columns, columns[1:])]
    places += [(y0, 0, y1, thick) for y0, y1 in zip(rows, rows[1:])]
    places.append((thick, indent, side, side))
    return [(side - y1, x0, side - y0, x1) for y0, x0, y1, x1 in places] if upside_down else places


def _cut_points(start: int, stop: int, parts: int) -> list[int]:
    return [start + (stop - start) * part // parts for part in range(parts + 1)]


def _resized(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """`(N, C, h, w)`; a size that it has already leaves it as it is."""
    if tuple(cells.shape[-2:]) == tuple(size):
        return cells
    return F.interpolate(cells, size, mode="bilinear", align_corners=False, antialias=True)


def _side_of(model: Any) -> int:
    """Pixels of a side of the canvas."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in Sam3InContext.model_types or not hasattr(model, "get_text_features"):
        raise TypeError(f"model is a {type(model).__name__}: pass a Sam3Model or a Sam3LiteTextModel")
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"image_size={height, width} of the model's config: the canvas of SAM 3 is a square")
    return height


def _tokens_of(text: str, tokenizer: Callable[..., Any] | None, id: str | None) -> dict[str, list[int]]:
    if tokenizer is None:
        if id is None:
            raise ValueError(
                "a SAM 3 reads a word beside its boxes, and this model does not say where its tokenizer is: pass "
                "tokenizer=AutoTokenizer.from_pretrained('facebook/sam3')"
            )
        tokenizer = AutoTokenizer.from_pretrained(id)
    # as its processor does
    tokens = tokenizer(text, padding="max_length", max_length=LENGTH, truncation=True)
    return {name: [int(value) for value in tokens[name]] for name in ("input_ids", "attention_mask")}


def _class_of(model_type: str) -> Any:
    # imported where they are needed: they want torchvision, which says so itself
    if model_type == "sam3_lite_text":
        from transformers import Sam3LiteTextModel

        return Sam3LiteTextModel
    from transformers import Sam3Model

    return Sam3Model
