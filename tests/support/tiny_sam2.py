"""Tiny SAM 2 models for videos, of random weights."""

import torch
from transformers import Sam2VideoConfig, Sam2VideoModel


SIDE, WIDTH = 64, 128  # memory has 64 channels in the code, and objects are told by a multiple of that


def tiny_sam2(seed: int = 0) -> Sam2VideoModel:
    """A model of 64 x 64 pixels: a Hiera of five blocks, one block of memory attention."""
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
        "initializer_range": 0.3,
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": WIDTH,
        "initializer_range": 0.3,
    }
    memory = {
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 16,
        "memory_attention_rope_feat_sizes": [4, 4],
        "memory_encoder_hidden_size": WIDTH,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 16,
        "memory_fuser_num_layers": 1,
    }
    prompt = {"hidden_size": WIDTH, "image_size": SIDE, "mask_input_channels": 4}
    decoder = {"hidden_size": WIDTH, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    torch.manual_seed(seed)
    config = Sam2VideoConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder, image_size=SIDE, **memory
    )
    model = Sam2VideoModel(config).eval()
    # as it starts, memory hardly counts: embeddings and layer scales are zeros; and there is always an object
    stronger = {"memory_attention": 8, "mask_downsampl": 20, "mask_decoder": 4, "object_pointer_proj": 4}
    for name, weight in model.named_parameters():
        if weight.dim() in (2, 4) and "embedding" not in name and "token" not in name:
            weight.data *= next((factor for part, factor in stronger.items() if part in name), 1)
        if weight.dim() < 2 or "embedding" in name or "pointer" in name or "encoding" in name or "scale" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    model.mask_decoder.pred_obj_score_head.proj_out.bias.data += 30
    return model
