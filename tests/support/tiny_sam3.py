"""Tiny SAM 3 models of random weights, also where torchvision is not installed."""

import importlib
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import transformers
from pytest import MonkeyPatch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available


SIDE = 32
WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "visual": 3, "cat": 4}
NAMES = {"sam3": ("Sam3Model", "Sam3VisionModel", "Sam3ViTModel"), "sam3_lite_text": ("Sam3LiteTextModel",)}


def roi_align(features, boxes, size):
    """A box's features at the centres of `size` x `size` bins."""
    at = (torch.arange(size, device=features.device, dtype=features.dtype) + 0.5) / size
    parts = []
    for one, corners in zip(features, boxes):
        sides = one.new_tensor(one.shape[-2:]).flip(0)
        low, high = corners[:, None, :2], corners[:, None, 2:]
        spots = (low + at[None, :, None] * (high - low)) / sides * 2 - 1
        x, y = spots.unbind(2)
        grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
        parts.append(F.grid_sample(one.expand(len(corners), -1, -1, -1), grid, align_corners=False))
    return torch.cat(parts)


@contextmanager
def torchvision_or_its_place():
    """transformers' SAM 3 wants one function of torchvision; where that is missing, it gets one of ours."""
    with MonkeyPatch.context() as patch:
        if not is_torchvision_available():
            for package, names in NAMES.items():
                home = importlib.import_module(f"transformers.models.{package}")
                code = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
                vision = SimpleNamespace(ops=SimpleNamespace(roi_align=roi_align))
                patch.setattr(code, "torchvision", vision, raising=False)
                for name in names:
                    patch.setattr(home, name, getattr(code, name), raising=False)
                    patch.setattr(transformers, name, getattr(code, name), raising=False)
        yield


def tiny_sam3(kind: str = "sam3", seed: int = 0):
    """A model of two layers that looks at 32 x 32 pixels and knows six object queries."""
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    part = {**width, "num_layers": 1, "initializer_range": 0.3}
    backbone = {
        **width,
        "model_type": "sam3_vit_model",
        "num_hidden_layers": 2,
        "image_size": SIDE,
        "patch_size": 4,
        "pretrain_image_size": 16,
        "window_size": 4,
        "global_attn_indexes": [1],
        "initializer_range": 0.3,
    }
    text = {**width, "num_hidden_layers": 1, "vocab_size": 8, "projection_dim": 16, "max_position_embeddings": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    text |= {"use_repmixer_blocks": False} if kind == "sam3_lite_text" else {"model_type": "clip_text_model"}
    config = transformers.AutoConfig.for_model(
        kind,
        vision_config={"model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": 16},
        text_config=text,
        geometry_encoder_config={**part, "roi_size": 2},
        detr_encoder_config=part,
        detr_decoder_config={**part, "num_queries": 6},
        mask_decoder_config={"hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.3},
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return getattr(transformers, NAMES[kind][0])(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
