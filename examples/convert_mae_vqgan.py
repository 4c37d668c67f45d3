# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Convert the published checkpoints of MAE-VQGAN, for `MaeVqganForImageInpainting.from_pretrained`.

    python examples/convert_mae_vqgan.py --mae checkpoint-1000.pth --vqgan last.ckpt --out mae-vqgan

The masked autoencoder is linked from the README of github.com/amirbar/visual_prompting, the VQGAN
(`vqgan_imagenet_f16_1024`) from that of github.com/CompVis/taming-transformers; read their licences first. Sizes are
taken from the tensors; numbers of attention heads, which no tensor tells, are those of the published ViT-L. Nothing is
unpickled but tensors and plain values. What the VQGAN has beside its decoder (encoder, losses) is left out.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_effdl import MaeVqganConfig, MaeVqganForImageInpainting
from hf_effdl.cli.arguments import refuse_several_processes


HEADS, DECODER_HEADS = 16, 16
# of a VQGAN, what paints nothing; and the sums of its training
LEFT_OUT = ("vae.encoder.", "vae.quant_conv.", "vae.loss.", "vae.colorize", "vae.quantize.used")
SHOWN = 3


def read(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by name.

    Args:
        file: of `torch.save`.
        key: under which they lie.

    Raises:
        ValueError: for a file that holds other things than tensors and plain values, or nothing under the key.
    """
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # the arguments of the run, which are not looked at
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is in it
        raise ValueError(
            f"{file} cannot be read as tensors and plain values ({str(error).splitlines()[0][:200]}): where you trust "
            f"it, save its tensors alone, torch.save({{{key!r}: torch.load(file, weights_only=False)[{key!r}]}}, file)"
        ) from error
    tensors = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file} holds no tensors under {key!r}: is it the checkpoint of another model?")
    return dict(tensors)


def sizes_of(tensors: Mapping[str, Tensor], heads: int, decoder_heads: int) -> dict[str, Any]:
    """The arguments of a `MaeVqganConfig` for tensors of the model's names."""
    patches = tensors["pos_embed"].shape[1] - 1
    patch = tensors["patch_embed.proj.weight"].shape[2]
    width, narrow = tensors["norm.weight"].shape[0], tensors["decoder_norm.weight"].shape[0]
    levels = _count(tensors, r"vae\.decoder\.up\.(\d+)\.")
    blocks = _count(tensors, r"vae\.decoder\.up\.0\.block\.(\d+)\.")
    last = [tensors[f"vae.decoder.up.{level}.block.{blocks - 1}.conv2.weight"] for level in range(levels)]
    return {
        "image_size": round(patches**0.5) * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": _count(tensors, r"blocks\.(\d+)\."),
        "num_attention_heads": heads,
        "decoder_hidden_size": narrow,
        "decoder_num_hidden_layers": _count(tensors, r"decoder_blocks\.(\d+)\."),
        "decoder_num_attention_heads": decoder_heads,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "codebook_size": tensors["decoder_pred.weight"].shape[0],
        "code_size": tensors["vae.quantize.embedding.weight"].shape[1],
        "latent_channels": tensors["vae.post_quant_conv.weight"].shape[0],
        "level_channels": [weight.shape[0] for weight in last],
        "blocks": blocks,
        "attention_levels": [i for i in range(levels) if f"vae.decoder.up.{i}.attn.0.norm.weight" in tensors],
    }


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def convert(
    mae: Mapping[str, Tensor],
    vqgan: Mapping[str, Tensor] | None = None,
    heads: int = HEADS,
    decoder_heads: int = DECODER_HEADS,
) -> MaeVqganForImageInpainting:
    """The model of two checkpoints' tensors.

    Args:
        mae: of the masked autoencoder; it may hold a VQGAN under `vae.`.
        vqgan: of the VQGAN; default: that in `mae`.
        heads, decoder_heads: of attention.

    Raises:
        ValueError: for parts that are missing, tensors that the model has no place for, or of other shapes.
    """
    tensors = {name: value for name, value in mae.items() if vqgan is None or not name.startswith("vae.")}
    tensors |= {f"vae.{name}": value for name, value in (vqgan or {}).items()}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(LEFT_OUT)}
    try:
        model = MaeVqganForImageInpainting(MaeVqganConfig(**sizes_of(tensors, heads, decoder_heads)))
    except KeyError as error:
        part = "VQGAN: pass --vqgan" if str(error.args[0]).startswith("vae.") else "masked autoencoder: pass --mae"
        raise ValueError(f"there is no tensor {error.args[0]!r}, of the {part}") from None
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{len(missing)} tensors are missing, such as {', '.join(missing[:SHOWN])}")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{len(unknown)} tensors have no place in the model, such as {', '.join(unknown[:SHOWN])}")
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensors[name].shape)} and should be {tuple(value.shape)}: another model?"
            )
    model.load_state_dict(tensors)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mae", type=Path, required=True)
    parser.add_argument("--vqgan", type=Path, help="default: the VQGAN in --mae")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--decoder_heads", type=int, default=DECODER_HEADS)
    options = parser.parse_args(arguments)
    refuse_several_processes("converting files")
    vqgan = None if options.vqgan is None else read(options.vqgan, "state_dict")
    model = convert(read(options.mae, "model"), vqgan, options.heads, options.decoder_heads)
    model.save_pretrained(options.out)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights in {options.out}")


if __name__ == "__main__":
    main()
