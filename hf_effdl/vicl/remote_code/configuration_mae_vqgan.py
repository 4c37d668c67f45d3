"""Sizes of a MAE-VQGAN."""

from typing import Any

from transformers import PreTrainedConfig


# a config may be anybody's
LARGEST = dict.fromkeys(("num_hidden_layers", "decoder_num_hidden_layers", "blocks"), 1000)
LARGEST |= dict.fromkeys(("image_size", "patch_size", "hidden_size", "decoder_hidden_size", "codebook_size"), 2**16)


class MaeVqganConfig(PreTrainedConfig):
    """Configuration of a `MaeVqganForImageInpainting`; the defaults are those of the published ViT-L.

    Args:
        image_size, patch_size: pixels of a side.
        hidden_size, num_hidden_layers, num_attention_heads: of the encoder, which sees the visible patches.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads: of the decoder, which says codes.
        mlp_ratio: width of the hidden layers, in both.
        codebook_size, code_size: how many codes there are, and numbers in each.
        latent_channels: of the painter's first layer.
        level_channels: of the painter's levels, the finest first; each but the first doubles the sides.
        blocks: in each level.
        attention_levels: those that attend over places.
    """

    model_type = "effdl-mae-vqgan"

    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    codebook_size: int = 1024
    code_size: int = 256
    latent_channels: int = 256
    level_channels: list[int] | tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 3
    attention_levels: list[int] | tuple[int, ...] = (4,)
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        self.level_channels, self.attention_levels = list(self.level_channels), list(self.attention_levels)
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name}={value!r}: it is a whole number from 1 to {most}")
        if wrong := [name for name in ("hidden_size", "decoder_hidden_size") if getattr(self, name) % 4]:
            raise ValueError(f"{wrong[0]}={getattr(self, wrong[0])} is no multiple of 4, as sines of two axes want it")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is not made of whole patches of {self.patch_size} pixels")
        if 2 ** (len(self.level_channels) - 1) != self.patch_size:
            raise ValueError(
                f"level_channels={self.level_channels}: {len(self.level_channels)} levels paint "
                f"{2 ** (len(self.level_channels) - 1)} pixels of a code's side, and patch_size={self.patch_size}"
            )
        if wrong := [channels for channels in (*self.level_channels,) if channels % 32]:
            raise ValueError(f"level_channels holds {wrong[0]}: norms are of 32 groups")
        super().__post_init__(**kwargs)


MaeVqganConfig.register_for_auto_class()
