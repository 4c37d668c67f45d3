"""The list-wise ranker: a small transformer that sees a query and k candidate examples at once and scores them."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .backbones import check_whole, plain_errors
from .borrowing import borrow
from .configuration_listwise_ranker import ListwiseRankerConfig
from .ranker_losses import neural_ndcg_loss, pairwise_margin_loss, ranks
from .vision_encoder import VisionEncoder
from .writing import check_folder, save_whole


QUERY, CANDIDATE = 0, 1
# tokens of all lists of one pass in `score_lists`: enough to keep a processor busy, little enough for its memory
TOKENS = 2**14


@dataclass
class RankerOutput(ModelOutput):
    """What a `ListwiseRanker` gives.

    Args:
        loss: a number, where `metric` was passed.
        scores: `(B, k)`, higher is better, -inf at padding.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None


def label_tokens(labels: Tensor) -> Tensor:
    """Label images as five small vectors each: the mean over the image, then over its quarters in reading order.

    Args:
        labels: `(..., c, h, w)` in [0, 1], as a task draws them.

    Returns:
        `(..., 5, c)`, in the places of a `VisionEncoder`'s five tokens.

    Example:
        >>> mask = torch.zeros(1, 4, 4)
        >>> mask[:, :2, 2:] = 1
        >>> label_tokens(mask)[:, 0].tolist()
        [0.25, 0.0, 1.0, 0.0, 0.0]
    """
    flat = labels.flatten(0, -4) if labels.dim() > 3 else labels[None]
    quarters = F.adaptive_avg_pool2d(flat, 2).flatten(2).transpose(1, 2)
    found = torch.cat([flat.mean((2, 3))[:, None], quarters], 1)
    return found.view(*labels.shape[:-3], 5, labels.shape[-3])


class RankerBlock(nn.Module):
    """A pre-LN transformer block: x + attention(LN x), then + MLP(LN .)."""

    def __init__(self, config: ListwiseRankerConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=config.layer_norm_eps) for _ in range(2))
        self.query, self.key_value, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, config.intermediate_size), nn.Linear(config.intermediate_size, d)

    def forward(self, states: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        """`(B, n, d)` to `(B, n, d)`, or of the first `keep` tokens alone; `mask (B, 1, 1, n)`: what may be seen."""
        normed = self.norm1(states)
        query = self._split(self.query(normed[:, :keep]))
        key, value = (self._split(part) for part in self.key_value(normed).chunk(2, dim=2))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states[:, :keep] + self.out(seen.transpose(1, 2).flatten(2))
        return states + self.down(F.gelu(self.up(self.norm2(states))))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ListwiseRanker(PreTrainedModel):
    """Scores k candidate examples for a query, all of them in view of each other.

    An image comes as T tokens, of a `VisionEncoder` five: one of the whole and one for each quarter. The first tokens
    of the query and of the candidates stand in front, then the other tokens; blocks of attention without positions run
    over all T (k + 1) of them, and a small net makes a score of each candidate's first token. So the order of the
    candidates does not matter, lists may have any length, and T = 1 takes plain feature vectors.

    Trained with `metric`, the measured performance of the candidates on the query:

        loss = sort_weight NeuralNDCG(scores, ranks(metric)) + pairwise margin(scores, metric)
               + mse_weight mean((scores - metric)^2)

    The released network (`legacy=True`) passes the first tokens through the same blocks a second time, and nothing
    tells it which image is the query, nor which token belongs to which image. By default a learned vector marks query
    and candidates (`role`), an image's first token is mapped onto its others (`bind`), the candidates' labels may be
    seen (`label_channels`), and there is no second pass.

    The encoder is not part of the weights: pass cached tokens, or `attach` it and pass pixels.

    Example:
        >>> ranker = ListwiseRanker(ListwiseRankerConfig(hidden_size=16, num_attention_heads=2)).eval()
        >>> output = ranker(torch.rand(2, 5, 16), torch.rand(2, 7, 5, 16), metric=torch.rand(2, 7))
        >>> output.scores.shape, output.loss.shape
        (torch.Size([2, 7]), torch.Size([]))

    Source: Xu et al., arXiv 2405.15279, section 3.2.
    """

    config: ListwiseRankerConfig
    base_model_prefix = "ranker"
    main_input_name = "query_tokens"

    def __init__(self, config: ListwiseRankerConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.project = None if config.input_size == d else nn.Linear(config.input_size, d)
        self.label = None if config.label_channels is None else nn.Linear(config.label_channels, d)
        self.bind = nn.Linear(d, d) if config.bind else None
        self.role = nn.Parameter(torch.empty(2, d)) if config.role else None
        self.trunk = nn.ModuleList(RankerBlock(config) for _ in range(config.num_hidden_layers))
        own = config.head_layers if config.head == "own" else 0
        self.head = nn.ModuleList(RankerBlock(config) for _ in range(own))
        self.predictor = nn.Sequential(
            nn.Linear(d, config.predictor_size), nn.ReLU(), nn.Linear(config.predictor_size, 1)
        )
        borrow(self, "attached", None)
        self.post_init()

    # ---- the encoder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "ListwiseRanker":
        """Load a saved ranker.

        Raises:
            ValueError: where the file lacks weights, which would be drawn at random.
        """
        with_info = kwargs.pop("output_loading_info", False)
        check_folder(pretrained_model_name_or_path, kwargs.get("revision"))
        where = pretrained_model_name_or_path
        with plain_errors(where):
            model, info = super().from_pretrained(where, *args, **kwargs, output_loading_info=True)
        check_whole(info["missing_keys"], pretrained_model_name_or_path, info["unexpected_keys"])
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save config and weights."""
        save_whole(super().save_pretrained, save_directory, *args, **kwargs)

    def attach(self, encoder: VisionEncoder) -> "ListwiseRanker":
        """Let pixels go through this encoder, frozen; its name and fingerprint are kept in the config.

        Raises:
            ValueError: for another encoder than the one the ranker was trained with.
        """
        self.check_tokens(encoder.dim, encoder.fingerprint)
        self.config.encoder, self.config.encoder_fingerprint = encoder.describe(), encoder.fingerprint
        borrow(self, "attached", encoder.eval().requires_grad_(False))
        return self

    @property
    def encoder(self) -> VisionEncoder:
        """The encoder that was attached; else the one that the config names, loaded at first use.

        Raises:
            ValueError: where none was attached and the config names none, or another is found under its name.
        """
        if self.attached is None:
            made = self.config.encoder
            if made is None or made["id"] is None:
                raise ValueError(
                    "the ranker has no encoder to send pixels through: attach the encoder with "
                    "ranker.attach(encoder), or pass tokens"
                )
            self.attach(
                VisionEncoder.from_pretrained(
                    made["id"], made["revision"], image_size=tuple(made["image_size"]), layer=made["layer"]
                )
            )
        return self.attached

    def check_tokens(self, width: int, fingerprint: str | None = None) -> None:
        """Raise where tokens of this width, or from the encoder of this fingerprint, are not those of its training.

        Raises:
            ValueError: naming both.
        """
        config = self.config
        trained_on = config.encoder_fingerprint
        made = "" if trained_on is None else f" of the encoder {(config.encoder or {}).get('id') or trained_on}"
        if width != config.input_size:
            raise ValueError(
                f"tokens of width {width}, but this ranker takes width {config.input_size}{made}: pass "
                "that encoder's tokens, or make a ranker with input_size of these"
            )
        if trained_on is not None and fingerprint is not None and fingerprint != trained_on:
            raise ValueError(
                f"tokens of the encoder {fingerprint}, but this ranker was trained on those{made}, "
                f"fingerprint {trained_on}: build the pool with that encoder, or train a ranker for this "
                "one"
            )

    # ---- scores

    def forward(
        self,
        query_tokens: Tensor | None = None,
        candidate_tokens: Tensor | None = None,
        candidate_labels: Tensor | None = None,
        mask: Tensor | None = None,
        metric: Tensor | None = None,
        query_pixels: Tensor | None = None,
        candidate_pixels: Tensor | None = None,
    ) -> RankerOutput:
        """Scores of the candidates, and the loss where `metric` is given.

        Args:
            query_tokens: `(B, T, input_size)`.
            candidate_tokens: `(B, k, T, input_size)`.
            candidate_labels: `(B, k, T, label_channels)` in [0, 1], see `label_tokens`; default: labels not known.
            mask: `(B, k)` bool, False for padding, which is neither seen nor scored; default: none.
            metric: `(B, k)` measured performance, larger is better.
            query_pixels: `(B, 3, h, w)` in [0, 1], instead of the query's tokens.
            candidate_pixels: `(B, k, 3, h, w)`, instead of the candidates' tokens.

        Raises:
            ValueError: for tokens of another width, shapes that do not fit, or labels that the ranker does not take.
        """
        query = self._given("query", query_tokens, query_pixels, 3)
        candidates = self._given("candidate", candidate_tokens, candidate_pixels, 4)
        b, k, count = candidates.shape[:3]
        if query.shape[:2] != (b, count) or not k:
            raise ValueError(
                f"query tokens {tuple(query.shape)} and candidate tokens {tuple(candidates.shape)}: pass "
                "(B, T, d) and (B, k, T, d)"
            )
        for name, given in (("mask", mask), ("metric", metric)):
            if given is not None and given.shape != (b, k):
                raise ValueError(f"{name} of shape {tuple(given.shape)} for {b} lists of {k}: pass ({b}, {k})")
        if mask is not None:
            candidates = candidates.masked_fill(~mask[:, :, None, None], 0.0)  # even NaN is no harm there
            if candidate_labels is not None:
                candidate_labels = candidate_labels.masked_fill(~mask[:, :, None, None], 0.0)
        scores = self._score(
            self._embed(query, None, QUERY), self._embed(candidates, candidate_labels, CANDIDATE), mask
        )
        return RankerOutput(None if metric is None else self._loss(scores, metric, mask), scores)

    def score_lists(
        self, query_tokens: Tensor, candidate_tokens: Tensor, lists: Tensor, candidate_labels: Tensor | None = None
    ) -> Tensor:
        """Scores of many short lists over the same candidates, in few passes of bounded memory.

        Equal to `forward` list by list; every image is prepared once, however many lists it is in.

        Args:
            query_tokens: `(B, T, input_size)`.
            candidate_tokens: `(B, K, T, input_size)`.
            lists: `(B, L, k)` positions among the K candidates, -1 for padding at a list's end; a list may be empty.
            candidate_labels: `(B, K, T, label_channels)`.

        Returns:
            `(B, L, k)`, -inf at padding, on the lists' device.
        """
        query = self._embed(self._given("query", query_tokens, None, 3), None, QUERY)
        candidates = self._given("candidate", candidate_tokens, None, 4)
        candidates = self._embed(candidates, candidate_labels, CANDIDATE)
        total, count = candidates.shape[1:3]
        places = lists.flatten(0, 1).cpu()
        scores = torch.full(places.shape, -torch.inf)
        owners = torch.arange(len(lists)).repeat_interleave(lists.shape[1])
        todo = (places >= 0).any(1).nonzero()[:, 0]
        images = candidates.flatten(0, 1)
        for part in todo.split(max(1, TOKENS // (count * (places.shape[1] + 1)))) if len(todo) else ():
            query_rows, members = owners[part], places[part]
            mask = None if bool((members >= 0).all()) else (members >= 0).to(self.device)
            states = images[(query_rows[:, None] * total + members.clamp(min=0)).to(self.device)]
            scores[part] = self._score(query[query_rows.to(self.device)], states, mask).float().cpu()
        return scores.view(lists.shape).to(lists.device)

    def _given(self, name: str, tokens: Tensor | None, pixels: Tensor | None, axes: int) -> Tensor:
        if (tokens is None) == (pixels is None):
            raise ValueError(f"pass either {name}_tokens or {name}_pixels")
        if tokens is None:
            if pixels.dim() != axes + 1:
                raise ValueError(
                    f"{name}_pixels of shape {tuple(pixels.shape)}: pass (B, {'k, ' * (axes - 3)}3, h, w)"
                )
            encoded = self.encoder.to(self.device)(pixels.flatten(0, -4))["tokens"]
            tokens = encoded.unflatten(0, pixels.shape[:-3])
        if tokens.dim() != axes:
            raise ValueError(f"{name}_tokens of shape {tuple(tokens.shape)}: pass (B, {'k, ' * (axes - 3)}T, d)")
        self.check_tokens(tokens.shape[-1])
        return tokens.to(self.device, self.dtype)

    def _embed(self, tokens: Tensor, labels: Tensor | None, role: int) -> Tensor:
        """Tokens of each image with what is known of it: `(..., T, input_size)` to `(..., T, d)`."""
        states = tokens if self.project is None else self.project(tokens)
        if labels is not None:
            wanted = (*tokens.shape[:-1], self.config.label_channels)
            if self.label is None:
                raise ValueError(
                    "candidate_labels were passed, but config.label_channels=None: this ranker does not "
                    "look at labels; leave them out, as with RankingLists(labels=False)"
                )
            if labels.shape != wanted:
                raise ValueError(f"candidate_labels of shape {tuple(labels.shape)}: pass {wanted}")
            states = states + self.label(labels.to(states))
        if self.bind is not None:
            first, others = states[..., :1, :], states[..., 1:, :]
            states = torch.cat([first, others + self.bind(first)], -2)
        return states if self.role is None else states + self.role[role]

    def _score(self, query: Tensor, candidates: Tensor, mask: Tensor | None) -> Tensor:
        k, count = candidates.shape[1:3]
        states = torch.cat([query[:, :1], candidates[:, :, 0], query[:, 1:], candidates[:, :, 1:].flatten(1, 2)], 1)
        seen = of_first = None
        if mask is not None:
            always = mask.new_ones(len(mask), 1)
            seen = [always, mask, always.expand(-1, count - 1), mask.repeat_interleave(count - 1, 1)]
            seen = torch.cat(seen, 1)[:, None, None]
            of_first = seen[..., : k + 1]
        for block in self.trunk[:-1]:
            states = block(states, seen)
        # what becomes of the other tokens after this is not looked at
        states = self.trunk[-1](states, seen, keep=k + 1)
        for block in self.trunk if self.config.head == "tied" else self.head:
            states = block(states, of_first)
        scores = self.predictor(states[:, 1:])[:, :, 0]
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)

    def _loss(self, scores: Tensor, metric: Tensor, mask: Tensor | None) -> Tensor:
        config, metric = self.config, metric.to(self.device).float()
        loss = pairwise_margin_loss(scores, metric, config.margin, mask=mask)
        if config.sort_weight:
            places = ranks(metric, mask=mask)
            loss = loss + config.sort_weight * neural_ndcg_loss(scores, places, config.sort_temperature, mask=mask)
        if config.mse_weight:
            counted = slice(None) if mask is None else mask
            loss = loss + config.mse_weight * F.mse_loss(scores[counted].float(), metric[counted])
        return loss

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ListwiseRanker) and module.role is not None:
            init.normal_(module.role, std=0.02)


ListwiseRanker.register_for_auto_class("AutoModel")
