"""Any vision model of transformers as an encoder: a retrieval vector, five tokens and a grid of features per image."""

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from .backbones import check_whole, commit_of, config_of, load_backbone
from .encoder_seggpt import SegGptFeatures
from .images import BICUBIC
from .writing import check_folder


HALF = (0.5, 0.5, 0.5)
# values taken from every tensor for the fingerprint: enough to tell two sets of weights apart, and quick for a large
# model
SAMPLED = 4096
# how backbones that are no plain encoders say what they know of an image, by the model type of transformers
READERS = {"seggpt": SegGptFeatures}


def in_eval_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method during which all parts are in eval mode: the backbone may be part of a model that is being trained."""

    @wraps(method)
    def asked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return asked


class VisionEncoder(nn.Module):
    """What retrieval, dense matching and the ranker know of an image.

    One pass of the backbone gives three views:

    - `vector` `(N, d)`: unit norm, for nearest neighbours. The last layer's class token where the backbone has one,
      the pooled output of a contrastive model's vision tower (CLIP, SigLIP 1 and 2), else the mean of the last feature
      map.
    - `tokens` `(N, 5, d)`: the vector before it is normalised, then the last feature map averaged over a 2x2 grid in
      reading order: the input of the list-wise ranker (Partial2Global, arXiv 2405.15279).
    - `grid` `(N, gh, gw, d')`: the feature map of `layer`, for dense similarity and feature matching.

    Register tokens are dropped. Images are squashed to `image_size`, and nothing is cropped where patches divide it
    (else a warning says so): a grid cell and the same cell of a mask show the same place.

    Args:
        backbone: a transformers vision model with a class token (ViT, DINOv2, DINOv3), without (SigLIP, SigLIP 2, also
            "NaFlex") or convolutional (MobileNetV2, ResNet, ConvNeXt); a two-tower model, whose vision tower is taken;
            or a `SegGptForImageSegmentation`, whose own features are used. It is frozen in place.
        image_size: pixels `(h, w)` or one side that images are resized to; default: the config's `image_size`, else
            224.
        layer: index into `hidden_states` for `grid`; None is the last one. A shallower layer of a convolutional
            backbone has a finer grid: of a MobileNetV2, 11 has 96 channels at stride 16.
        mean, std: normalisation per channel; default 0.5.
        resample: how images are resized, as PIL numbers it: 2 bilinear, 3 bicubic.
        id, revision: where the weights are from, for the records.

    Raises:
        ValueError: where the output of the backbone cannot be read as a grid.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> views = VisionEncoder(ViTModel(config), image_size=64)(torch.rand(2, 3, 64, 64))
        >>> {name: tuple(view.shape) for name, view in views.items()}
        {'vector': (2, 16), 'tokens': (2, 5, 16), 'grid': (2, 4, 4, 16)}
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        image_size: int | tuple[int, int] | None = None,
        layer: int | None = None,
        mean: tuple[float, ...] = HALF,
        std: tuple[float, ...] = HALF,
        resample: int = BICUBIC,
        id: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module) or not hasattr(backbone, "config"):
            raise TypeError(f"backbone is a {type(backbone).__name__}: pass a vision model of transformers")
        self.contrastive = hasattr(backbone, "vision_model") and hasattr(backbone, "text_model")
        self.backbone = backbone.vision_model if self.contrastive else backbone
        self.backbone.eval().requires_grad_(False)
        if not self.contrastive:
            _drop_unused_pooler(self.backbone)
        reader = READERS.get(getattr(backbone.config, "model_type", None))
        self._reader = None if reader is None else reader(backbone)  # no module: the weights are registered once
        if self._reader is not None:
            image_size = self._reader.image_size
        parameters = signature(self.backbone.forward).parameters
        self.patched, self.stretches = "spatial_shapes" in parameters, "interpolate_pos_encoding" in parameters
        if image_size is None:
            image_size = getattr(self.backbone.config, "image_size", None) or 224
            if self.patched:  # of as many patches as it has positions
                image_size = int(self.backbone.config.num_patches**0.5) * self.backbone.config.patch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self._tell_what_is_cut()
        self.layer, self.mean, self.std, self.resample = layer, tuple(mean), tuple(std), int(resample)
        self.id, self.revision = id, revision
        self._fingerprint: str | None = None
        self._weights: tuple[set[torch.dtype], str] | None = None  # as they were when the fingerprint was taken

    def _tell_what_is_cut(self) -> None:
        """Say where patches do not divide an image, whose last rows and columns the backbone does not look at."""
        patch = getattr(self.backbone.config, "patch_size", None)
        if self._reader is not None or patch is None:
            return
        sides = (patch, patch) if isinstance(patch, int) else tuple(patch)
        whole = tuple(side // size * size for side, size in zip(self.image_size, sides, strict=True))
        if 0 in whole:
            raise ValueError(f"image_size={self.image_size} is smaller than a patch of {sides} pixels: pass more")
        if whole != self.image_size:
            warnings.warn(
                f"patches of {sides} pixels do not divide image_size={self.image_size}: the backbone does not see the "
                f"last rows and columns, and grids are shifted against labels; pass image_size={whole}",
                stacklevel=3,
            )

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str,
        revision: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        layer: int | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> "VisionEncoder":
        """The encoder in a repository or folder, with its image processor's normalisation and resampling.

        Args:
            id_or_folder: e.g. `facebook/dinov2-base`.
            revision: commit, branch or tag.
            image_size, layer: see the class; the default size is that of the processor's crop, else of its size.
            options: for the backbone's `from_pretrained`, e.g. `dtype`; with `trust_remote_code=True` code of the
                repository is run, which is refused otherwise.

        Raises:
            ValueError: where the file lacks weights of the backbone, or the repository asks to run its code.
        """
        check_folder(id_or_folder, revision)
        trust = bool(options.pop("trust_remote_code", False))
        config = AutoConfig.from_pretrained(id_or_folder, revision=revision, token=token, trust_remote_code=trust)
        backbone, info = _backbone_class(config.model_type).from_pretrained(
            id_or_folder,
            revision=revision,
            token=token,
            output_loading_info=True,
            **{"dtype": torch.float32, "trust_remote_code": trust} | options,
        )
        processor = _processor(id_or_folder, revision, token, trust)
        if image_size is None:
            image_size = _size_in(processor)
        revision = commit_of(id_or_folder, revision, token) or revision
        resample = processor.get("resample")
        encoder = cls(
            backbone,
            image_size=image_size,
            layer=layer,
            mean=processor.get("image_mean") or HALF,
            std=processor.get("image_std") or HALF,
            resample=BICUBIC if resample is None else resample,
            id=str(id_or_folder),
            revision=revision,
        )
        used = encoder.backbone.state_dict().keys()
        check_whole(
            {name for name in info["missing_keys"] if name.removeprefix("vision_model.") in used}, id_or_folder
        )
        return encoder

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], token: str | bool | None = None, trust: bool = False
    ) -> "VisionEncoder":
        """Made from `settings()` and `settings["backbone"]`, the source of its backbone (see `load_backbone`)."""
        source = settings["backbone"]
        encoder = cls(
            load_backbone(source, _backbone_class(config_of(source, token, trust).model_type), token, trust),
            image_size=tuple(settings["image_size"]),
            layer=settings["layer"],
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            resample=settings["resample"],
            id=source.get("id"),
            revision=source.get("revision"),
        )
        encoder.contrastive = settings["contrastive"]  # an embedded tower comes without its other half
        return encoder

    @property
    def dim(self) -> int:
        """Width d of the features."""
        return self._shapes["vector"][1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Cells `(gh, gw)` of the grid."""
        return tuple(self._shapes["grid"][1:3])

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        with torch.no_grad():
            blank = torch.zeros(1, 3, *self.image_size, device=next(self.backbone.parameters()).device)
            return {name: view.shape for name, view in self(blank).items()}

    @property
    def fingerprint(self) -> str:
        """A hash of what decides the features: model type, a sample of every weight, layer, size, normalisation."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.settings() | {"model": self.backbone.config.model_type}).encode())
            digest_weights(digest, self.backbone)
            self._fingerprint, self._weights = digest.hexdigest()[:16], self._weights_now()
        return self._fingerprint

    def _weights_now(self) -> tuple[set[torch.dtype], str]:
        digest = hashlib.sha256()
        digest_weights(digest, self.backbone)
        return {value.dtype for value in self.backbone.state_dict().values()}, digest.hexdigest()

    def settings(self) -> dict[str, Any]:
        """The arguments beside the backbone, as plain values."""
        return {
            "layer": self.layer,
            "image_size": list(self.image_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "resample": self.resample,
            "contrastive": self.contrastive,
        }

    def describe(self) -> dict[str, Any]:
        """What a pool records of its encoder: plain values, among them the fingerprint.

        Of weights that were trained on since, the fingerprint is another one; rounded ones are the same encoder.
        """
        now = self._weights_now()
        if self._weights is not None and now[0] == self._weights[0] and now != self._weights:
            self._fingerprint = None
        self._weights = now
        return {
            "id": self.id,
            "revision": self.revision,
            "layer": self.layer,
            "image_size": list(self.image_size),
            "fingerprint": self.fingerprint,
        }

    def train(self, mode: bool = True) -> "VisionEncoder":
        """The encoder is frozen and stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    @in_eval_mode
    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Views of a batch.

        Args:
            pixels: `(N, 3, h, w)` in [0, 1], of `image_size`.

        Returns:
            `{"vector": (N, d), "tokens": (N, 5, d), "grid": (N, gh, gw, d')}`, float32.
        """
        self._check_size(pixels)
        if self._reader is not None:
            last = grid = self._reader(pixels).float()
            pooled = None
        else:
            last, grid, pooled = self._features(pixels)
        pooled = last.mean((1, 2)) if pooled is None else pooled
        quarters = nn.functional.adaptive_avg_pool2d(last.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
        return {
            "vector": nn.functional.normalize(pooled, dim=1),
            "tokens": torch.cat([pooled[:, None], quarters], 1),
            "grid": grid,
        }

    @torch.no_grad()
    @in_eval_mode
    def maps(self, pixels: Tensor, layers: Sequence[int | None]) -> list[Tensor]:
        """Feature maps of several layers from one pass.

        Args:
            pixels: as for `forward`.
            layers: indices into `hidden_states`; None is the last map.

        Returns:
            `(N, gh, gw, d)` for each layer, float32; sizes may differ in a convolutional backbone.
        """
        self._check_size(pixels)
        if self._reader is not None:
            if set(layers) != {None}:
                raise ValueError(f"layers={layers}: {type(self.backbone).__name__} has one map of features, the last")
            return [self._reader(pixels).float()] * len(layers)
        output = self._output(pixels, hidden=set(layers) != {None})
        return [self._layer(output, layer) for layer in layers]

    def _check_size(self, pixels: Tensor) -> None:
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)}, but the encoder takes (N, 3, {self.image_size[0]}, "
                f"{self.image_size[1]}): resize with images.pixels(images, encoder.image_size, encoder.resample)"
            )

    def _output(self, pixels: Tensor, hidden: bool) -> Any:
        weight = next(self.backbone.parameters())
        mean, std = (torch.tensor(v, device=weight.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        normalised = ((pixels.to(weight.device) - mean) / std).to(weight.dtype)
        if self.patched:
            return self.backbone(
                **patches_of(normalised, self.backbone.config.patch_size), output_hidden_states=hidden
            )
        # positions are made for one size; one that can stretch them says so in its signature
        stretch = {"interpolate_pos_encoding": True} if self.stretches else {}
        return self.backbone(normalised, output_hidden_states=hidden, **stretch)

    def _layer(self, output: Any, layer: int | None) -> Tensor:
        if layer is None:
            return self._map(output.last_hidden_state)[0]
        if not -len(output.hidden_states) <= layer < len(output.hidden_states):
            raise ValueError(f"layer={layer}: {type(self.backbone).__name__} has {len(output.hidden_states)}")
        return self._map(output.hidden_states[layer])[0]

    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        output = self._output(pixels, hidden=self.layer is not None)
        last, token = self._map(output.last_hidden_state)
        grid = last if self.layer is None else self._layer(output, self.layer)
        return last, grid, output.pooler_output.float() if self.contrastive else token

    def _map(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, gh, gw, d) and the class token, from what a layer gives."""
        states = states.float()
        if states.dim() == 4:  # a convolutional map
            return states.permute(0, 2, 3, 1), None
        name, patch = type(self.backbone).__name__, getattr(self.backbone.config, "patch_size", None)
        if states.dim() == 3 and patch is None and (sides := _sides_of(states.shape[1], self.image_size)):
            extra = states.shape[1] - sides[0] * sides[1]
            return states[:, extra:].unflatten(1, sides), states[:, 0] if extra else None
        if states.dim() != 3 or patch is None:
            raise ValueError(
                f"{name} gives features of shape {tuple(states.shape)} and its config has patch_size={patch}; a grid "
                "is needed, as of a ViT or a convolutional net"
            )
        sides = (patch, patch) if isinstance(patch, int) else patch
        gh, gw = (side // size for side, size in zip(self.image_size, sides, strict=True))
        extra = states.shape[1] - gh * gw  # the class token and registers stand in front
        if extra < 0:
            raise ValueError(
                f"{name} gives {states.shape[1]} tokens, fewer than the {gh}x{gw} patches of image_size="
                f"{self.image_size}: it merges patches, or was made for another size"
            )
        return states[:, extra:].unflatten(1, (gh, gw)), states[:, 0] if extra else None


def patches_of(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """What SigLIP 2 in its native aspect ratio ("NaFlex") takes of images of one size: patches of whole images.

    `(N, 3, h, w)` to patches `(N, gh gw, patch^2 3)`, row by row and with the channels of a pixel beside each other, a
    mask of ones, and the sides of the grids `(N, 2)`.
    """
    count, gh, gw = len(pixels), pixels.shape[2] // patch, pixels.shape[3] // patch
    cut = pixels[..., : gh * patch, : gw * patch].unflatten(3, (gw, patch)).unflatten(2, (gh, patch))
    return {
        "pixel_values": cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(count, gh * gw, dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.tensor([[gh, gw]], device=pixels.device).expand(count, -1),
    }


def digest_weights(digest: Any, module: nn.Module) -> None:
    """Feed a `hashlib` digest with names, shapes and a sample of the values of all tensors of a module."""
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        # rounded to half, so that a copy saved in half precision is the same
        sample = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].half().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())


def _sides_of(tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Of a convolutional map that comes as a list, with a pooled token in front or none: its sides, by its stride."""
    for stride in (4, 8, 16, 32, 64):
        height, width = (-(-side // stride) for side in image_size)
        if tokens - height * width in (0, 1):
            return height, width
    return None


def _backbone_class(model_type: str) -> Any:
    return READERS[model_type].backbone_class if model_type in READERS else AutoModel


def _drop_unused_pooler(backbone: PreTrainedModel) -> None:
    # drawn at random where a checkpoint has none, as for many a ViT: two loads would differ
    pooler = getattr(backbone, "pooler", None)
    if isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        backbone.pooler = None


def _processor(id: str, revision: str | None, token: str | bool | None, trust: bool) -> dict[str, Any]:
    """Settings of the image processor; none for weights without a preprocessor_config.json."""
    try:
        processor = AutoImageProcessor.from_pretrained(
            id, revision=revision, token=token, backend="pil", trust_remote_code=trust
        )
        return processor.to_dict()
    except OSError:
        return {}


def _size_in(processor: dict[str, Any]) -> int | tuple[int, int] | None:
    size = processor.get("crop_size") if processor.get("do_center_crop") else processor.get("size")
    if not size:
        return None
    return (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
