"""SAM 2 as a frozen in-context model: examples are the remembered frames of a video, and the query is its next one."""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2VideoInferenceSession, Sam2VideoModel

from .encoder_seggpt import MEAN, STD, channels
from .frozen_model import FrozenModel
from .images import check_pixels
from .visual_tasks import PICTURES


IMAGES = 4  # encoded in one call of the model
OBJECT = 1  # the one that is followed


class Sam2InContext(FrozenModel):
    """A SAM 2 that follows the object of the examples into the query.

    Each example is a frame whose mask is given, as a user would draw it, and goes into the model's memory; the query
    is the next frame, of which the mask is read out of that memory. The first example, which a strategy thinks best,
    is the frame next to it. The model was trained to follow one object, not to find another one of its kind.

    What the model sees in an image is the same in every video, so `encode` gives it once and the pool's is kept:
    asked with ten examples, one image is encoded and not eleven, in a third of the time.

    Args:
        model: a `Sam2VideoModel`. It is frozen in place: evaluation mode, no gradients.

    Raises:
        TypeError: where the model is another one.
        ValueError: where its images are no squares.

    Example:
        ```python
        frozen = Sam2InContext.from_pretrained("facebook/sam2.1-hiera-large")
        pool = ExamplePool.from_dataset(dataset, label_column="mask", encoder="facebook/dinov2-small")
        pipe = VisualInContextPipeline(model=frozen, pool=pool)
        pipe("photo.jpg", num_examples=5, fusion="model")["prediction"]
        ```

    Source: Ravi et al., "SAM 2: Segment Anything in Images and Videos", arXiv 2408.00714.
    """

    kind = "sam2"
    model_types = ("sam2_video",)
    backbone_class = Sam2VideoModel
    resample = Image.Resampling.BILINEAR  # as its processor

    def __init__(self, model: Sam2VideoModel) -> None:
        super().__init__()
        if not isinstance(model, Sam2VideoModel):
            raise TypeError(f"model is a {type(model).__name__}: pass a Sam2VideoModel, which has a memory")
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"image_size={height, width} of the model's config: SAM 2 takes squares")
        self.side, self.model = height, model.eval().requires_grad_(False)
        self.places: Tensor | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels `(h, w)` of an image."""
        return self.side, self.side

    # ---- the contract of a frozen model

    @property
    def backbone(self) -> Sam2VideoModel:
        """The SAM 2."""
        return self.model

    @property
    def id(self) -> str | None:
        """Repository or folder that the model was loaded from."""
        return self.model.config.name_or_path or None

    def check_task(self, task: str) -> None:
        """It finds an object."""
        if task in PICTURES:
            raise ValueError(f"task={task!r}: a SAM 2 finds an object and paints no colours")

    # ---- seeing and remembering

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """What the model sees in images: `(..., 3, h, w)` in [0, 1], of `image_size`, to `(..., d)` in its precision.

        d is some four million numbers at full size: maps of three resolutions, one after the other.
        """
        check_pixels("images", images, (*["B", "m"][: images.dim() - 3], 3, *self.image_size))
        flat = images.flatten(0, -4)
        seen = [torch.cat([part.flatten(1) for part in self._maps(some)], 1) for some in flat.split(IMAGES)]
        return torch.cat(seen).unflatten(0, images.shape[:-3])

    @torch.no_grad()
    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The labels of the queries.

        Args:
            queries: `(B, d)`, see `encode`.
            images: `(B, m, d)`, the m >= 1 examples of each query, the best one first.
            labels: `(B, m, 3, h, w)` in [0, 1], their labels as images; white is the object.
            arrangement: 0, there is no canvas.

        Returns:
            `(B, 3, h, w)` in [0, 1], how sure the mask is, and 0 where the object was not found; in the labels' dtype
            and on their device, computed in the model's.

        Raises:
            TypeError: for labels that are not floating.
            ValueError: for other sizes, no example, values outside [0, 1] or NaN, or another arrangement.
        """
        if arrangement:
            raise ValueError(f"arrangement={arrangement!r}: SAM 2 has no canvas to arrange, only 0")
        if queries.dim() != 2 or images.dim() != 3 or images.shape[::2] != queries.shape:
            raise ValueError(
                f"queries {tuple(queries.shape)} and images {tuple(images.shape)}: pass (B, d) and (B, m, d) of encode"
            )
        check_pixels("labels", labels, (len(queries), images.shape[1], 3, *self.image_size))
        masks = labels.float().mean(2, keepdim=True) >= 0.5
        found = torch.cat([self._follow(*one) for one in zip(queries, images, masks, strict=True)])
        chances = F.interpolate(found.float(), self.image_size, mode="bilinear", align_corners=False).sigmoid()
        return chances.to(labels).expand(-1, 3, -1, -1)

    def _follow(self, query: Tensor, images: Tensor, masks: Tensor) -> Tensor:
        """Log-odds of the mask of one query, `(1, 1, h, w)` at the model's resolution."""
        device, m = self.model.device, len(images)
        session = Sam2VideoInferenceSession(
            video_height=self.side,
            video_width=self.side,
            inference_device=device,
            inference_state_device=device,
            video_storage_device=device,
            dtype=self.model.dtype,
            max_vision_features_cache_size=m + 1,
        )
        for frame, seen in enumerate([*images.flip(0), query]):
            session.add_new_frame(torch.empty(0), frame)  # its pixels are not looked at: they were encoded
            session.cache.cache_vision_features(frame, self._seen(seen.to(device, self.model.dtype)))
        number = session.obj_id_to_idx(OBJECT)
        for frame, mask in enumerate(masks.flip(0)):
            session.add_mask_inputs(number, frame, mask[None].float())
            session.obj_with_new_inputs = [OBJECT]
            self.model(session, frame_idx=frame)
        return self.model(session, frame_idx=m, run_mem_encoder=False).pred_masks

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Maps of images, the finest first, `(N, pixels, channels)` each; it keeps where the last one's pixels are."""
        pixels = (images - channels(MEAN, images)) / channels(STD, images)
        seen = self.model.get_image_features(pixels.to(self.model.device, self.model.dtype), return_dict=True)
        self.places = seen.fpn_position_encoding[-1][:, :1]  # the same for all
        return [part.transpose(0, 1) for part in seen.fpn_hidden_states]

    def _seen(self, encoded: Tensor) -> dict[str, list[Tensor]]:
        """Of one image, as the model has it."""
        sizes = [height * width for height, width in self.model.backbone_feature_sizes]
        wide = self.model.config.vision_config.fpn_hidden_size
        shapes = list(zip(sizes, (wide // 8, wide // 4, wide), strict=True))
        parts = encoded.split([size * width for size, width in shapes])
        if self.places is None:  # encoded by another copy
            self._maps(encoded.new_zeros(1, 3, *self.image_size))
        return {
            "vision_feats": [part.view(size, 1, width) for part, (size, width) in zip(parts, shapes, strict=True)],
            "vision_pos_embeds": [self.places.to(encoded)],
        }
