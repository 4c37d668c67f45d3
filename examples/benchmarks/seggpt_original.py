# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""SegGPT in transformers, and `SegGptInContext`, beside the authors' code: the same random weights, the same inputs.

    git clone https://github.com/baaivision/Painter
    python examples/benchmarks/seggpt_original.py --original Painter/SegGPT/SegGPT_inference

The authors' `models_seggpt.py` (MIT) is imported from that folder; packages it imports and this check does not need
(fvcore, detectron2, fairscale, timm) are replaced by stand-ins. Differences are largest absolute ones over `--seeds`
seeds, in pixels of [0, 1] unless it says otherwise. Seconds on a laptop.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import SegGptConfig, SegGptForImageSegmentation

from hf_effdl import SegGptInContext
from hf_effdl.hub.cards import markdown_table
from hf_effdl.vicl.remote_code.frozen_seggpt import MEAN, STD


SIDE, PATCH, WIDTH, BLOCKS, QUERIES, EXAMPLES = 32, 8, 32, 24, 3, 4
# block tensors of the authors' code and of transformers
NAMES = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.lin1",
    "mlp.fc2": "mlp.lin2",
}
TOKENS = {
    "mask_token": "mask_token",
    "segment_token_x": "segment_token_input",
    "pos_embed": "position_embeddings",
    "segment_token_y": "segment_token_prompt",
    "type_token_cls": "type_token_semantic",
    "type_token_ins": "type_token_instance",
}


class Mlp(nn.Module):
    """timm's, with its names."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(in_features, hidden_features),
            act_layer(),
            nn.Linear(hidden_features, in_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def load_original(folder: Path) -> type[nn.Module]:
    """The authors' `SegGPT` class."""
    if not (folder / "models_seggpt.py").is_file():
        raise FileNotFoundError(f"{folder} holds no models_seggpt.py: pass --original <clone>/SegGPT/SegGPT_inference")
    needed = {
        "fvcore.nn.weight_init": {},
        "fairscale.nn.checkpoint": {"checkpoint_wrapper": None},
        "detectron2.layers": {"CNNBlockBase": nn.Module, "Conv2d": nn.Conv2d, "get_norm": None},
        "timm.models.layers": {"DropPath": lambda rate: nn.Identity(), "trunc_normal_": nn.init.trunc_normal_},
        "timm.models.vision_transformer": {"Mlp": Mlp},
    }
    for name, values in needed.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        vars(sys.modules[name]).update(values)
    sys.path.insert(0, str(folder))
    from models_seggpt import SegGPT

    return SegGPT


def build(original: type[nn.Module], std: float, seed: int) -> tuple[SegGptForImageSegmentation, nn.Module]:
    """One set of random weights in both implementations."""
    torch.manual_seed(seed)
    model = SegGptForImageSegmentation(
        SegGptConfig(
            hidden_size=WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            decoder_hidden_size=8,
            patch_size=PATCH,
            image_size=(2 * SIDE, SIDE),
            pretrain_image_size=SIDE,
            initializer_range=std,
        )
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():  # those start at zero or one, which would hide a swap
            if "layernorm" in name:
                value += 0.1 * torch.randn_like(value)
            elif "bias" in name:
                value.copy_(0.1 * torch.randn_like(value))
    theirs = original(
        img_size=(2 * SIDE, SIDE),
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        use_rel_pos=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        pretrain_img_size=SIDE,
        decoder_embed_dim=8,
    ).eval()
    own, state = model.state_dict(), {}
    for there, here in TOKENS.items():
        state[there] = own[f"model.embeddings.{here}"]
    pairs = {
        "patch_embed.proj": "model.embeddings.patch_embeddings.projection",
        "norm": "model.encoder.layernorm",
        "decoder_embed": "decoder.decoder_embed",
        "decoder_pred.0": "decoder.decoder_pred.conv",
        "decoder_pred.1": "decoder.decoder_pred.layernorm",
        "decoder_pred.3": "decoder.decoder_pred.head",
    }
    for i in range(BLOCKS):
        there, here = f"blocks.{i}.", f"model.encoder.layers.{i}."
        pairs |= {there + a: here + b for a, b in NAMES.items()}
        for axis in ("rel_pos_h", "rel_pos_w"):
            state[f"{there}attn.{axis}"] = own[f"{here}attention.{axis}"]
    for there, here in pairs.items():
        state |= {f"{there}.{kind}": own[f"{here}.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(state)
    return model, theirs


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def ask_original(theirs: nn.Module, query: Tensor, images: Tensor, labels: Tensor, ensemble: bool) -> Tensor:
    """All m painted answers to one query, as the authors' inference script makes them; (m, 3, h, w)."""
    pairs = normalised(torch.cat([images, query.expand_as(images)], 2))
    painted = normalised(torch.cat([labels, labels], 2))
    hidden = (torch.arange(theirs.patch_embed.num_patches) >= theirs.patch_embed.num_patches // 2)[None]
    kind = torch.ones(len(images), 1)  # instance
    _, patches, _ = theirs(pairs, painted, hidden, torch.ones_like(painted), kind, 0 if ensemble else -1)
    answer = theirs.unpatchify(patches)[:, :, SIDE:]
    return (answer * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)


def compare(model: SegGptForImageSegmentation, theirs: nn.Module, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.rand(QUERIES, 3, SIDE, SIDE, generator=generator)
    images, labels = torch.rand(2, QUERIES, EXAMPLES, 3, SIDE, SIDE, generator=generator)
    ours, upstream = SegGptInContext(model), SegGptInContext(model, ensemble="upstream")
    one = torch.cat([ask_original(theirs, queries[b], images[b, :1], labels[b, :1], False) for b in range(QUERIES)])
    several = torch.stack([ask_original(theirs, queries[b], images[b], labels[b], True) for b in range(QUERIES)])
    mine = ours(queries, images, labels)
    with torch.no_grad():
        alone = torch.cat(
            [
                model(
                    pixel_values=normalised(queries[:1]),
                    prompt_pixel_values=normalised(images[:1, 0]),
                    prompt_masks=normalised(labels[:1, 0]),
                    feature_ensemble=flag,
                    embedding_type="instance",
                ).pred_masks[:, :, SIDE:]
                for flag in (False, True)
            ]
        )
    spread = several - several.mean(1, keepdim=True)
    return {
        "ours against the original, one example": (ours(queries, images[:, :1], labels[:, :1]) - one).abs().max(),
        "ours against the mean of the original's m answers": (mine - several.mean(1)).abs().max(),
        "the m answers of the original among themselves, first row of pixels": spread[..., 0, :].abs().max(),
        "the same, all other rows": spread[..., 1:, :].abs().max(),
        "feature_ensemble of transformers against the original": (upstream(queries, images, labels) - several.mean(1))
        .abs()
        .max(),
        "transformers, one example: feature_ensemble on against off (normalised units)": (alone[0] - alone[1])
        .abs()
        .max(),
    }


def casts_labels(model: SegGptForImageSegmentation) -> str:
    """What transformers does with single precision labels in a model of half precision."""
    pixels = torch.rand(1, 3, SIDE, SIDE)
    try:
        model.half()(pixel_values=pixels, prompt_pixel_values=pixels, prompt_masks=pixels)
    except RuntimeError as error:
        return f"refused: {error}"
    return "cast"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="the authors' folder SegGPT/SegGPT_inference")
    parser.add_argument("--std", type=float, nargs="+", default=[0.02, 0.15], help="of the random weights")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    original, rows = load_original(options.original), {}
    for std in options.std:
        for seed in range(options.seeds):
            model, theirs = build(original, std, seed)
            for name, value in compare(model, theirs, seed).items():
                row = rows.setdefault(name, {"difference": name})
                row[str(std)] = max(row.get(str(std), 0.0), float(value))
    for row in rows.values():
        row |= {str(std): f"{row[str(std)]:.1e}" for std in options.std}
    columns = {"difference": "largest difference"} | {str(std): f"weights of {std}" for std in options.std}
    print(markdown_table(rows.values(), columns))
    print(f"\nlabels in single precision, model in half, transformers: {casts_labels(model)}")


if __name__ == "__main__":
    main()
