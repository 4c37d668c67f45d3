# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Convert the published checkpoint of Painter, for `PainterInContext.from_pretrained`.

    python examples/convert_painter.py --painter painter_vit_large.pth --out painter

The checkpoint is linked from the README of github.com/baaivision/Painter (MIT). What comes out is a model of
transformers, `SegGptForImageSegmentation`, and needs nothing of ours: Painter is SegGPT without type tokens, so these
are zeros. Sizes are taken from the tensors; what no tensor tells (the block after which images and labels become one,
the blocks that the decoder reads) is that of the authors' code. Nothing is unpickled but tensors and plain values.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from convert_mae_vqgan import read
from torch import Tensor
from transformers import SegGptConfig, SegGptForImageSegmentation

from hf_effdl.cli.arguments import refuse_several_processes


# the block after which images and labels become one, and how many blocks, evenly spaced, the decoder reads
MERGE, READ = 2, 4
# the authors' names, and those of transformers
NAMES = {
    r"mask_token": "model.embeddings.mask_token",
    r"segment_token_x": "model.embeddings.segment_token_input",
    r"segment_token_y": "model.embeddings.segment_token_prompt",
    r"pos_embed": "model.embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"model.embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(\w+)": r"model.encoder.layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"model.encoder.layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.mlp\.fc([12])\.(\w+)": r"model.encoder.layers.\1.mlp.lin\2.\3",
    r"blocks\.(\d+)\.attn\.(qkv\.\w+|proj\.\w+|rel_pos_[hw])": r"model.encoder.layers.\1.attention.\2",
    r"norm\.(\w+)": r"model.encoder.layernorm.\1",
    r"decoder_embed\.(\w+)": r"decoder.decoder_embed.\1",
    r"decoder_pred\.0\.(\w+)": r"decoder.decoder_pred.conv.\1",
    r"decoder_pred\.1\.(\w+)": r"decoder.decoder_pred.layernorm.\1",
    r"decoder_pred\.3\.(\w+)": r"decoder.decoder_pred.head.\1",
}
TYPES = ("model.embeddings.type_token_semantic", "model.embeddings.type_token_instance")
SHOWN = 3


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of transformers.

    Raises:
        ValueError: for tensors that no Painter has; those of a SegGPT among them.
    """
    found, unknown = {}, []
    for name, value in tensors.items():
        match = next(((match, new) for old, new in NAMES.items() if (match := re.fullmatch(old, name))), None)
        if match is None:
            unknown.append(name)
        else:
            found[match[0].expand(match[1])] = value
    if unknown:
        kind = "; this is a SegGPT, which transformers has" if any("type_token" in name for name in unknown) else ""
        raise ValueError(
            f"{len(unknown)} tensors have no place in a Painter, such as {', '.join(sorted(unknown)[:SHOWN])}{kind}"
        )
    return found


def config_of(tensors: Mapping[str, Tensor]) -> SegGptConfig:
    """The config for tensors of transformers' names.

    Raises:
        KeyError: for a tensor that is missing.
        ValueError: for a canvas that is not twice as high as it is wide, as where attention is in windows.
    """
    embeddings, layers = "model.embeddings.", "model.encoder.layers."
    width, _, patch, _ = tensors[f"{embeddings}patch_embeddings.projection.weight"].shape
    depth = len({name.removeprefix(layers).split(".")[0] for name in tensors if name.startswith(layers)})
    positions = [tensors[f"{layers}0.attention.rel_pos_{axis}"] for axis in "hw"]
    rows, columns = ((len(one) + 1) // 2 for one in positions)
    if rows != 2 * columns:
        raise ValueError(
            f"positions of {rows} x {columns} patches: a canvas is two squares, one above the other, and every block "
            "attends over all of it, as in the authors' code (where a comma too many turns windows off)"
        )
    if depth % READ or depth // READ <= MERGE:
        raise ValueError(
            f"there are {depth} blocks: they are a multiple of {READ}, of which the decoder reads every "
            f"{READ}th part, and the first part ends after block {MERGE}, where images and labels become one"
        )
    return SegGptConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // positions[0].shape[1],
        image_size=(rows * patch, columns * patch),
        patch_size=patch,
        pretrain_image_size=round((tensors[f"{embeddings}position_embeddings"].shape[1] - 1) ** 0.5) * patch,
        mlp_dim=tensors[f"{layers}0.mlp.lin1.weight"].shape[0],
        decoder_hidden_size=tensors["decoder.decoder_pred.conv.weight"].shape[0],
        merge_index=MERGE,
        intermediate_hidden_state_indices=[(i + 1) * depth // READ - 1 for i in range(READ)],
        in_context_model="painter",  # PainterInContext knows its own by this
    )


def convert(tensors: Mapping[str, Tensor]) -> SegGptForImageSegmentation:
    """The model of a checkpoint's tensors.

    Args:
        tensors: by the authors' names.

    Raises:
        ValueError: for parts that are missing, tensors that the model has no place for, or of other shapes.
    """
    found = renamed(tensors)
    try:
        model = SegGptForImageSegmentation(config_of(found))
    except KeyError as error:
        raise ValueError(f"there is no tensor for {error.args[0]!r}: is it the checkpoint of another model?") from None
    wanted: dict[str, Any] = model.state_dict()
    found |= {name: torch.zeros_like(wanted[name]) for name in TYPES}
    for names, what in ((set(wanted) - set(found), "are missing"), (set(found) - set(wanted), "have no place")):
        if names:
            raise ValueError(f"{len(names)} tensors {what}, such as {', '.join(sorted(names)[:SHOWN])}")
    for name, value in wanted.items():
        if value.shape != found[name].shape:
            raise ValueError(
                f"{name} is {tuple(found[name].shape)} and should be {tuple(value.shape)}: another model?"
            )
    model.load_state_dict(found)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--painter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    refuse_several_processes("converting files")
    model = convert(read(options.painter, "model"))
    model.save_pretrained(options.out)
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights in {options.out}")


if __name__ == "__main__":
    main()
