"""Feature matching, an in-context model without training: like places of the example say what a place shows."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .frozen_model import FrozenModel
from .vision_encoder import VisionEncoder
from .visual_tasks import PICTURES


MATCHINGS = ("soft", "nearest", "prototype", "mutual")
GREY = (0.299, 0.587, 0.114)
PROBES = 16  # images of each kind that show nothing


class FeatureMatching(FrozenModel):
    """A frozen in-context model on any vision encoder: the example's label is carried over by matching features.

    With unit features `q` of a query cell and `e_j` of the cells of the examples, whose labels `y_j` are averaged to
    the grid, the label of the query cell is

        soft        sum_j softmax_j(<q, e_j> / temperature) y_j
        nearest     y_j of the largest <q, e_j>
        prototype   sigmoid((<q, p> - <q, b>) / temperature): p and b are the unit means of the e_j weighted by y_j
                    and 1 - y_j
        mutual      sum_j w_ij y_j of the query's cell i, w_ij in proportion to softmax_j(s_ij) softmax_i(s_ij) with
                    s_ij = <q_i, e_j> / temperature: a match counts as far as it is one both ways, for object and
                    background alike

    and the grid is upsampled to the label's size by bilinear interpolation. Several examples are matched together, as
    if they were one large one. After the training-free matching of frozen features in few-shot segmentation (e.g.
    PANet, arXiv 1908.06391; both ways, LoFTR, arXiv 2104.00680); the forms differ in how they fail (noise or bias),
    which makes them useful as test beds.

    Features may say where a cell is, beside what is there. `positions=r` takes out the r directions along which
    features of images that show nothing differ most from place to place: with m_p the mean over such images at place
    p, and V the first r right singular vectors of the m_p less their mean, f <- f - V V^T f, before f is normalised
    (after INSID3, arXiv 2603.28480).

    Args:
        encoder: gives the grid of features.
        matching: "soft", "nearest", "prototype" (black and white labels only) or "mutual".
        temperature: of the softmax.
        carry: "label", or "difference": the label minus the grey example is carried over and added to the grey query
            at full resolution. The choice for colourisation, where the query already has the brightness.
        layers: indices into the encoder's `hidden_states`, None for the last map: a cosine is then the mean of the
            layers' cosines. Default: the encoder's own `layer` alone.
        positions: directions of position that are taken out of every layer; default 0.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = FeatureMatching(VisionEncoder(ViTModel(config), image_size=64))
        >>> queries, images = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 3, 64, 64)
        >>> labels = torch.ones_like(images)
        >>> model(queries, images, labels).mean().item()
        1.0
    """

    kind = "feature-matching"
    encoder_options = ("image_size", "layer")

    def __init__(
        self,
        encoder: VisionEncoder,
        matching: str = "soft",
        temperature: float = 0.05,
        carry: str = "label",
        layers: Sequence[int | None] | None = None,
        positions: int = 0,
    ) -> None:
        super().__init__()
        if matching not in MATCHINGS:
            raise ValueError(f"matching={matching!r}: choose one of {MATCHINGS}")
        if isinstance(temperature, str) or temperature is None or not 0 < temperature < float("inf"):
            raise ValueError(f"temperature={temperature!r}: must be a positive number")
        if carry not in ("label", "difference"):
            raise ValueError(f"carry={carry!r}: choose 'label' or 'difference'")
        if carry == "difference" and matching == "prototype":
            raise ValueError(
                "carry='difference' with matching='prototype': a prototype is of black and white labels; "
                "use matching='soft'"
            )
        layers = _layers_of(layers)
        if isinstance(positions, bool) or not isinstance(positions, Integral) or positions < 0:
            raise ValueError(
                f"positions={positions!r}: pass a number of directions, or 0 to leave features as they are"
            )
        self.encoder, self.matching, self.temperature, self.carry = encoder, matching, float(temperature), carry
        self.layers, self.positions = layers, int(positions)
        self._grid: tuple[int, int, int] | None = None
        self._directions: list[Tensor] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """Pixels `(h, w)` of a cell, the encoder's."""
        return self.encoder.image_size

    @property
    def resample(self) -> int:
        """How images are resized to a cell, the encoder's."""
        return self.encoder.resample

    # ---- the contract of a frozen model

    @property
    def backbone(self) -> PreTrainedModel:
        """The encoder's."""
        return self.encoder.backbone

    @property
    def id(self) -> str | None:
        """Repository or folder that the encoder was loaded from."""
        return self.encoder.id

    @property
    def revision(self) -> str | None:
        """Commit that the encoder was loaded from."""
        return self.encoder.revision

    def settings(self) -> dict[str, Any]:
        """The arguments, the encoder's among them, as plain values."""
        options = {"matching": self.matching, "temperature": self.temperature, "carry": self.carry}
        if self.layers is not None:
            options["layers"] = list(self.layers)
        if self.positions:
            options["positions"] = self.positions
        return self.encoder.settings() | options

    @classmethod
    def from_settings(
        cls, settings: dict[str, Any], token: str | bool | None = None, trust: bool = False
    ) -> "FeatureMatching":
        """Made from `settings` and the source of its backbone."""
        options = {name: settings[name] for name in ("matching", "temperature", "carry")}
        options |= {name: settings[name] for name in ("layers", "positions") if name in settings}
        return cls(VisionEncoder.from_settings(settings, token, trust), **options)

    @classmethod
    def from_pretrained(
        cls,
        id: str,
        *,
        task: str = "segmentation",
        revision: str | None = None,
        token: str | bool | None = None,
        **settings: Any,
    ) -> "FeatureMatching":
        """Made from the encoder in a repository or folder; colours are carried as differences by default."""
        shape = {name: settings.pop(name) for name in cls.encoder_options if name in settings}
        if task == "colourisation":
            settings.setdefault("carry", "difference")
        return cls(VisionEncoder.from_pretrained(id, revision, token=token, **shape), **settings)

    def own_encoder(self) -> VisionEncoder:
        """The encoder that it matches features of."""
        return self.encoder

    def check_task(self, task: str) -> None:
        """Colours have no prototypes."""
        if self.matching == "prototype" and task in PICTURES:
            raise ValueError(
                f"matching='prototype' for task={task!r}: a prototype is of black and white labels; use "
                "matching='soft'"
            )

    # ---- matching

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Unit features of every cell, flat, and the grey image behind them where differences are carried.

        Args:
            images: `(N, 3, h, w)` in [0, 1].

        Returns:
            `(N, gh gw d)` or `(N, gh gw d + h w)`, so that one row is all that has to be kept of an image.
        """
        encoded = self.features(self.maps(images))
        if self.carry == "difference":
            weights = torch.tensor(GREY, device=images.device).view(1, 3, 1, 1)
            encoded = torch.cat([encoded, (images * weights).sum(1).flatten(1).to(encoded)], 1)
        return encoded

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the encoder says of images, `(N, gh, gw, d)` for each layer."""
        return [self.encoder(images)["grid"]] if self.layers is None else self.encoder.maps(images, self.layers)

    @torch.no_grad()
    def features(self, maps: list[Tensor]) -> Tensor:
        """Unit features of every cell, flat `(N, gh gw d)`, from maps; smaller maps are enlarged to the largest."""
        if self.positions and self._directions is None:
            self._directions = self._of_position()
        side = max(tuple(one.shape[1:3]) for one in maps)
        parts = []
        for number, one in enumerate(maps):
            if self.positions:
                directions = self._directions[number].to(one)
                one = one - (one @ directions) @ directions.T
            if tuple(one.shape[1:3]) != side:
                one = F.interpolate(one.permute(0, 3, 1, 2), side, mode="bilinear").permute(0, 2, 3, 1)
            parts.append(F.normalize(one, dim=3) / len(maps) ** 0.5)
        grid = torch.cat(parts, 3)
        self._grid = tuple(grid.shape[1:])
        return grid.flatten(1)

    def _of_position(self) -> list[Tensor]:
        """Of each layer the directions `(d, r)` that say where a cell is."""
        generator, (h, w) = torch.Generator().manual_seed(0), self.image_size
        kinds = [torch.rand(PROBES, 3, *size, generator=generator) for size in ((1, 1), (16, 16), (h, w))]
        device = next(self.encoder.parameters()).device
        shown = [F.interpolate(kind, (h, w)).to(device) for kind in kinds]  # blank, coarse and fine noise
        each = zip(*(self.maps(part) for kind in shown for part in kind.split(8)), strict=True)
        return [position_directions(torch.cat(parts), self.positions) for parts in each]

    @torch.no_grad()
    def predict(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """Label images of a batch of queries.

        Args:
            queries: `(B, ...)` from `encode`.
            images: `(B, m, ...)` from `encode`: m examples for each query.
            labels: `(B, m, 3, h, w)` in [0, 1]; of any size, which is the answer's too, except with
                carry="difference", where it is that of the images.

        Returns:
            `(B, 3, h, w)` in [0, 1].

        Raises:
            ValueError: for other shapes, no example, or an arrangement other than 0.
        """
        self._check(queries, images, labels, arrangement)
        gh, gw, d = self._shape(queries.device)
        (batch, m), size, cells = labels.shape[:2], labels.shape[3:], gh * gw * d
        carried = labels.flatten(0, 1).float()
        if self.carry == "difference":
            carried = carried - images[..., cells:].reshape(batch * m, 1, *size)
        carried = F.adaptive_avg_pool2d(carried, (gh, gw)).unflatten(0, (batch, m))
        values = carried.permute(0, 1, 3, 4, 2).reshape(batch, m * gh * gw, 3)
        example_cells = images[..., :cells].reshape(batch, m * gh * gw, d)
        query_cells = queries[..., :cells].reshape(batch, gh * gw, d)
        matched = self._match(query_cells, example_cells, values).transpose(1, 2).unflatten(2, (gh, gw))
        painted = F.interpolate(matched, size=size, mode="bilinear", align_corners=False)
        if self.carry == "difference":
            painted = painted + queries[:, cells:].reshape(batch, 1, *size)
        return painted.clamp(0, 1)

    def forward(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int = 0) -> Tensor:
        """The same from pixels: `(B, 3, h, w)`, `(B, m, 3, h, w)` and `(B, m, 3, h, w)` to `(B, 3, h, w)`."""
        encoded = self.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return self.predict(self.encode(queries), encoded, labels, arrangement)

    def _check(self, queries: Tensor, images: Tensor, labels: Tensor, arrangement: int) -> None:
        fits = labels.dim() == 5 and labels.shape[:2] == images.shape[:2] and len(queries) == len(images)
        if not fits or not images.shape[1]:
            raise ValueError(
                f"queries {tuple(queries.shape)}, images {tuple(images.shape)} and labels "
                f"{tuple(labels.shape)}: pass (B, ...), (B, m, ...) and (B, m, 3, h, w) with the same B "
                "and m >= 1"
            )
        if arrangement:
            raise ValueError(f"arrangement={arrangement}: feature matching has no canvas to arrange, only 0")
        if self.carry == "difference" and labels.shape[3:] != self.image_size:
            raise ValueError(
                f"labels of {tuple(labels.shape[3:])} pixels: a difference is between a label and an "
                f"image of one size, {self.image_size}"
            )

    def _match(self, query_cells: Tensor, example_cells: Tensor, values: Tensor) -> Tensor:
        """(B, Q, d), (B, E, d), (B, E, 3) to (B, Q, 3)."""
        if self.matching == "prototype":
            weight = values[..., :1]
            sides = [F.normalize((example_cells * share).sum(1), dim=1) for share in (weight, 1 - weight)]
            white, black = (torch.einsum("bqd,bd->bq", query_cells, side) for side in sides)
            return ((white - black) / self.temperature).sigmoid()[..., None].expand(-1, -1, 3)
        similarity = query_cells @ example_cells.transpose(1, 2)
        if self.matching == "nearest":
            best = similarity.argmax(2)
            return values.gather(1, best[..., None].expand(-1, -1, 3))
        logits = similarity / self.temperature
        if self.matching == "mutual":
            logits = 2 * logits - logits.logsumexp(1, keepdim=True)
        return logits.softmax(2) @ values

    def _shape(self, device: torch.device) -> tuple[int, int, int]:
        if self._grid is None:  # features that were kept from before
            self.encode(torch.zeros(1, 3, *self.image_size, device=device))
        return self._grid


def _layers_of(layers: Any) -> tuple[int | None, ...] | None:
    if layers is None:
        return None
    several = [] if isinstance(layers, str) or not hasattr(layers, "__len__") else list(layers)
    if not several or not all(
        one is None or (isinstance(one, Integral) and not isinstance(one, bool)) for one in several
    ):
        raise ValueError(f"layers={layers!r}: pass a list of one layer's number or more, None for the encoder's own")
    return tuple(None if one is None else int(one) for one in several)


def position_directions(maps: Tensor, count: int) -> Tensor:
    """Directions `(d, count)` along which features of images that show nothing differ from place to place.

    Args:
        maps: `(N, gh, gw, d)` features of such images.
        count: of directions, fewer than d and than there are places.

    Raises:
        ValueError: for more.
    """
    mean = maps.float().mean(0).flatten(0, 1)
    if count >= min(mean.shape):
        raise ValueError(f"positions={count}: {mean.shape[1]} numbers at {mean.shape[0]} places have fewer directions")
    return torch.linalg.svd(mean - mean.mean(0), full_matrices=False)[2][:count].T.contiguous()
