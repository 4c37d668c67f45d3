"""MAE-VQGAN: a masked autoencoder that fills hidden patches with codes, and the half of a VQGAN that paints them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_mae_vqgan import MaeVqganConfig


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


@dataclass
class MaeVqganOutput(ModelOutput):
    """Of a `MaeVqganForImageInpainting`.

    Args:
        logits: `(N, patches, codes)`, of every patch, also of those that were seen.
    """

    logits: Tensor | None = None


class MaeVqganForImageInpainting(PreTrainedModel):
    """Fills the hidden patches of pictures: "visual prompting via image inpainting".

    The encoder, a ViT, sees the visible patches; the decoder, a smaller one, sees what it made of them, with a learnt
    token in place of each hidden patch, and says for every patch which of the codes of a VQGAN it is. `paint` takes
    the likeliest and has the VQGAN paint them. Tensors are named as in the authors' checkpoints, which
    `examples/convert_mae_vqgan.py` converts.

    Example:
        >>> config = MaeVqganConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, decoder_hidden_size=16,
        ...     decoder_num_hidden_layers=1, decoder_num_attention_heads=2, codebook_size=8, code_size=4,
        ...     latent_channels=8, level_channels=(32, 32, 32), blocks=1, attention_levels=(2,), image_size=16,
        ...     patch_size=4)
        >>> model, hidden = MaeVqganForImageInpainting(config).eval(), torch.arange(16)[None] > 11
        >>> model(torch.randn(1, 3, 16, 16), hidden).logits.shape, model.paint(torch.rand(1, 3, 16, 16), hidden).shape
        (torch.Size([1, 16, 8]), torch.Size([1, 3, 16, 16]))

    Source: Bar et al., "Visual Prompting via Image Inpainting", arXiv 2209.00647; its parts, He et al., arXiv
    2111.06377, and Esser et al., arXiv 2012.09841.
    """

    config: MaeVqganConfig
    base_model_prefix = "mae_vqgan"
    main_input_name = "pixel_values"

    def __init__(self, config: MaeVqganConfig) -> None:
        super().__init__(config)
        side = config.image_size // config.patch_size
        wide, narrow = config.hidden_size, config.decoder_hidden_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, wide, config.patch_size, stride=config.patch_size)})
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, size)) for size in (wide, narrow))
        self.pos_embed, self.decoder_pos_embed = (
            nn.Parameter(positions(size, side), requires_grad=False) for size in (wide, narrow)
        )
        self.blocks = nn.ModuleList(
            Block(wide, config.num_attention_heads, config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(wide, config.layer_norm_eps)
        self.decoder_embed = nn.Linear(wide, narrow)
        self.decoder_blocks = nn.ModuleList(
            Block(narrow, config.decoder_num_attention_heads, config) for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(narrow, config.layer_norm_eps)
        self.decoder_pred = nn.Linear(narrow, config.codebook_size)
        self.vae = CodePainter(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor, return_dict: bool = True
    ) -> MaeVqganOutput | tuple:
        """Logits of the codes.

        Args:
            pixel_values: `(N, 3, image_size, image_size)`, normalised by ImageNet's mean and deviation.
            bool_masked_pos: `(N, patches)` bool, True at hidden patches, as many in each picture.

        Raises:
            ValueError: for other shapes, and for pictures of which different numbers are hidden.
        """
        size, patches = self.config.image_size, self.pos_embed.shape[1] - 1
        if tuple(pixel_values.shape[1:]) != (3, size, size) or bool_masked_pos.shape != (len(pixel_values), patches):
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} and bool_masked_pos {tuple(bool_masked_pos.shape)}: they "
                f"must be (N, 3, {size}, {size}) and (N, {patches})"
            )
        hidden = bool_masked_pos.sum(1)
        if (hidden != hidden[0]).any():
            raise ValueError(f"bool_masked_pos hides {hidden.tolist()} patches: it must be as many in each picture")
        states = self.patch_embed["proj"](pixel_values).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        states = states[~bool_masked_pos].unflatten(0, (len(pixel_values), -1))
        states = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(states), -1, -1), states], 1)
        for block in self.blocks:
            states = block(states)
        states = self.decoder_embed(self.norm(states))
        filled = self.mask_token.expand(len(states), patches, -1).clone()
        filled[~bool_masked_pos] = states[:, 1:].flatten(0, 1)
        states = torch.cat([states[:, :1], filled], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            states = block(states)
        logits = self.decoder_pred(self.decoder_norm(states))[:, 1:]
        return MaeVqganOutput(logits=logits) if return_dict else (logits,)

    @torch.no_grad()
    def paint(self, pixels: Tensor, bool_masked_pos: Tensor) -> Tensor:
        """Pictures `(N, 3, h, w)` in [0, 1] as the likeliest codes paint them, all of them; in the model's precision.

        Args:
            pixels: `(N, 3, h, w)` in [0, 1].
            bool_masked_pos: as for `forward`.
        """
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        seen = ((pixels - mean) / std).to(self.device, self.dtype)
        codes = self(seen, bool_masked_pos.to(self.device)).logits.argmax(2)
        side = self.config.image_size // self.config.patch_size
        return self.vae(codes.unflatten(1, (side, side)))


class Block(nn.Module):
    """A block of a ViT, whose norms come first."""

    def __init__(self, size: int, heads: int, config: MaeVqganConfig) -> None:
        super().__init__()
        if size % heads:
            raise ValueError(f"{heads} attention heads do not divide {size} numbers")
        self.heads, hidden = heads, int(size * config.mlp_ratio)
        self.norm1, self.norm2 = (nn.LayerNorm(size, config.layer_norm_eps) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(size, 3 * size), "proj": nn.Linear(size, size)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, hidden), "fc2": nn.Linear(hidden, size)})

    def forward(self, states: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(states)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        states = states + self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return states + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(states))))


# ---- the VQGAN's half


class CodePainter(nn.Module):
    """Codes to pictures: the codebook and the decoder of a VQGAN."""

    def __init__(self, config: MaeVqganConfig) -> None:
        super().__init__()
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.code_size)})
        self.post_quant_conv = nn.Conv2d(config.code_size, config.latent_channels, 1)
        self.decoder = PictureDecoder(config)

    def forward(self, codes: Tensor) -> Tensor:
        """`(N, gh, gw)` to `(N, 3, h, w)` in [0, 1]."""
        latents = self.post_quant_conv(self.quantize["embedding"](codes).permute(0, 3, 1, 2))
        return (self.decoder(latents).clamp(-1, 1) + 1) / 2


class PictureDecoder(nn.Module):
    """Convolutions, coarse to fine."""

    def __init__(self, config: MaeVqganConfig) -> None:
        super().__init__()
        channels = config.level_channels
        last = channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, last, 3, padding=1)
        self.mid = nn.ModuleDict(
            {"block_1": Residual(last, last), "attn_1": SpatialAttention(last), "block_2": Residual(last, last)}
        )
        levels = []
        for level in reversed(range(len(channels))):
            parts = {"block": nn.ModuleList(), "attn": nn.ModuleList()}
            for _ in range(config.blocks):
                parts["block"].append(Residual(last, channels[level]))
                last = channels[level]
                if level in config.attention_levels:
                    parts["attn"].append(SpatialAttention(last))
            if level:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(last, last, 3, padding=1)})
            levels.insert(0, nn.ModuleDict(parts))
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = group_norm(last), nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        states = self.conv_in(latents)
        for part in self.mid.values():
            states = part(states)
        for level in reversed(self.up):
            for number, block in enumerate(level["block"]):
                states = block(states)
                if len(level["attn"]):
                    states = level["attn"][number](states)
            if "upsample" in level:
                states = level["upsample"]["conv"](F.interpolate(states, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(states)))


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside a projection where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = group_norm(after), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = None if before == after else nn.Conv2d(before, after, 1)

    def forward(self, states: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(states)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (states if self.nin_shortcut is None else self.nin_shortcut(states))


class SpatialAttention(nn.Module):
    """Every place attends to every other, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        normal = self.norm(states)
        q, k, v = (part(normal).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return states + self.proj_out(attended.reshape(states.shape))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def positions(size: int, side: int) -> Tensor:
    """Fixed sine and cosine positions `(1, 1 + side side, size)`: columns in the first half, rows in the second.

    The first token, of the class, has zeros.
    """
    rates = 10000.0 ** -(torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = one[None].expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    grid = torch.cat([columns, rows], 2).flatten(0, 1)
    return torch.cat([torch.zeros(1, size, dtype=torch.float64), grid]).float()[None]


MaeVqganForImageInpainting.register_for_auto_class("AutoModel")
