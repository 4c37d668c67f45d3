"""Every kind of vision backbone as an encoder: three views of an image, saved and loaded."""

import json

import numpy as np
import pytest
import torch
import transformers as t
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from hf_effdl import ExamplePool, FeatureMatching, SegGptInContext, VisionEncoder, VisualInContextModel


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SIZES | {"intermediate_size": 16}
SMALL = {"image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BOTH = {"vision_config": WIDE | SMALL, "text_config": WIDE | TEXT}
SEGGPT = SIZES | {"image_size": (64, 32), "patch_size": 8, "decoder_hidden_size": 4, "pretrain_image_size": 32}
SEGGPT |= {"merge_index": 0, "intermediate_hidden_state_indices": [0, 1]}
DEEP = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
SHORT = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DINO2 = SIZES | {"image_size": 28, "patch_size": 14}
FLEX = WIDE | {"num_patches": 16, "patch_size": 8}
BOTH_FLEX = {"vision_config": FLEX, "text_config": WIDE | TEXT}
BACKBONES = {  # model, config and its values, image_size, layer -> grid, width
    "vit": (ViTModel, ViTConfig, WIDE | SMALL, None, None, (4, 4), 16),
    "vit stretched": (ViTModel, ViTConfig, WIDE | SMALL, (48, 64), None, (6, 8), 16),
    "dinov2": (t.Dinov2Model, t.Dinov2Config, DINO2, 56, None, (4, 4), 16),
    "dinov2 registers": (t.Dinov2WithRegistersModel, t.Dinov2WithRegistersConfig, DINO2, 56, None, (4, 4), 16),
    "dinov3": (t.DINOv3ViTModel, t.DINOv3ViTConfig, WIDE | {"num_register_tokens": 4}, 64, None, (4, 4), 16),
    "dinov3 wide": (
        t.DINOv3ViTModel,
        t.DINOv3ViTConfig,
        WIDE | {"num_register_tokens": 4},
        (64, 96),
        None,
        (4, 6),
        16,
    ),
    "siglip2": (t.Siglip2Model, t.Siglip2Config, BOTH_FLEX, None, None, (4, 4), 16),
    "siglip2 wide": (t.Siglip2Model, t.Siglip2Config, BOTH_FLEX, (32, 64), None, (4, 8), 16),
    "siglip2 tower": (t.Siglip2VisionModel, t.Siglip2VisionConfig, FLEX, (48, 32), 1, (6, 4), 16),
    "clip": (t.CLIPModel, t.CLIPConfig, BOTH, None, None, (4, 4), 16),
    "siglip": (t.SiglipModel, t.SiglipConfig, BOTH, None, None, (4, 4), 16),
    "siglip tower": (t.SiglipVisionModel, t.SiglipVisionConfig, WIDE | SMALL, None, None, (4, 4), 16),
    "mobilenet": (t.MobileNetV2Model, t.MobileNetV2Config, {"depth_multiplier": 0.35}, 96, None, (3, 3), 1280),
    "mobilenet layer": (t.MobileNetV2Model, t.MobileNetV2Config, {"depth_multiplier": 0.35}, 96, 10, (6, 6), 32),
    "resnet": (t.ResNetModel, t.ResNetConfig, SHORT, 64, None, (8, 8), 16),
    "convnext": (t.ConvNextModel, t.ConvNextConfig, DEEP, 64, None, (2, 2), 16),
    "seggpt": (t.SegGptForImageSegmentation, t.SegGptConfig, SEGGPT, None, None, (4, 4), 16),
}


def encoder_of(name: str) -> VisionEncoder:
    torch.manual_seed(0)
    kind, config, values, size, layer, _, _ = BACKBONES[name]
    backbone = kind(config(**values))
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):  # fresh ones are so small that deep features vanish
            torch.nn.init.kaiming_normal_(module.weight)
    return VisionEncoder(backbone, image_size=size, layer=layer)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_kind_of_backbone_gives_the_same_three_views(name):
    encoder = encoder_of(name)
    grid, width = BACKBONES[name][5:]
    images = torch.rand(3, 3, *encoder.image_size)
    views = encoder(images)
    assert views["grid"].shape == (3, *grid, width) and views["tokens"].shape == (3, 5, encoder.dim)
    assert views["vector"].shape == (3, encoder.dim)
    torch.testing.assert_close(views["vector"].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.nn.functional.normalize(views["tokens"][:, 0], dim=1), views["vector"])
    if grid[0] % 2 == 0 and encoder.layer is None:  # the other four are the quarters of the grid in reading order
        gh, gw = grid[0] // 2, grid[1] // 2
        corners = [views["grid"][:, y : y + gh, x : x + gw].mean((1, 2)) for y in (0, gh) for x in (0, gw)]
        torch.testing.assert_close(views["tokens"][:, 1:], torch.stack(corners, 1))
    one = encoder(images[1:2])
    for view in views:  # the rest of a batch does not matter
        torch.testing.assert_close(one[view][0], views[view][1], rtol=1e-4, atol=1e-5)
    assert not encoder.train().training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_a_saved_model_has_the_same_encoder(name, tmp_path):
    encoder = encoder_of(name)
    frozen = SegGptInContext(encoder.backbone) if name == "seggpt" else FeatureMatching(encoder)
    model = VisualInContextModel.from_parts(frozen)
    model.save_pretrained(tmp_path)
    again = VisualInContextModel.from_pretrained(tmp_path)
    images = torch.rand(2, 3, *encoder.image_size)
    for view, value in encoder(images).items():
        torch.testing.assert_close(again.encoder(images)[view], value)
    assert again.encoder.fingerprint == model.encoder.fingerprint
    shown = images, images[:, None], images[:, None]
    torch.testing.assert_close(again(*shown), model(*shown))


def test_a_shallower_layer_changes_the_grid_and_nothing_else():
    deep, shallow = encoder_of("mobilenet"), encoder_of("mobilenet layer")
    images = torch.rand(2, 3, 96, 96)
    one, other = deep(images), shallow(images)
    torch.testing.assert_close(one["vector"], other["vector"])
    torch.testing.assert_close(one["tokens"], other["tokens"])
    states = deep.backbone((images - 0.5) / 0.5, output_hidden_states=True).hidden_states[10]
    torch.testing.assert_close(other["grid"], states.permute(0, 2, 3, 1))
    shallow.layer = 99
    with pytest.raises(ValueError, match="layer=99: MobileNetV2Model has"):
        shallow(images)


def test_the_class_token_stands_in_front_of_registers_and_patches():
    encoder = encoder_of("dinov2 registers")
    images = torch.rand(1, 3, 56, 56)
    states = encoder.backbone((images - 0.5) / 0.5).last_hidden_state
    views = encoder(images)
    torch.testing.assert_close(views["tokens"][:, 0], states[:, 0])
    torch.testing.assert_close(views["grid"].flatten(1, 2), states[:, 5:])  # four registers are left out


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (112, 48)])
def test_features_of_a_dinov3_are_those_of_its_patches_taken_by_hand(size):
    torch.manual_seed(0)
    backbone = t.DINOv3ViTModel(t.DINOv3ViTConfig(**WIDE, num_register_tokens=4, image_size=64)).eval()
    images, (gh, gw) = torch.rand(2, 3, *size), (size[0] // 16, size[1] // 16)
    with torch.no_grad():
        output = backbone((images - 0.5) / 0.5, output_hidden_states=True)
    model = FeatureMatching(VisionEncoder(backbone, image_size=size), layers=[1, None])
    by_hand = [states[:, 5:].unflatten(1, (gh, gw)) for states in (output.hidden_states[1], output.last_hidden_state)]
    for found, expected in zip(model.maps(images), by_hand, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.encoder(images)["tokens"][:, 0], output.last_hidden_state[:, 0])
    cells = [torch.nn.functional.normalize(one, dim=3).flatten(1, 2) for one in by_hand]
    cosines = sum(one[0] @ one[1].T for one in cells) / 2
    label = (torch.rand(gh, gw) > 0.5).float()  # of a cell each, enlarged without a change in their midst
    labels = label.repeat_interleave(16, 0).repeat_interleave(16, 1).expand(1, 1, 3, *size)
    found = model(images[:1], images[None, 1:], labels)
    expected = ((cosines / 0.05).softmax(1) @ label.flatten()).view(1, 1, gh, gw)
    expected = torch.nn.functional.interpolate(expected, size, mode="bilinear")
    torch.testing.assert_close(found, expected.expand(-1, 3, -1, -1).clamp(0, 1))


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (56, 16)])
@pytest.mark.parametrize("whole", [True, False])
def test_features_of_a_siglip2_are_those_of_its_own_processor(size, whole):
    torch.manual_seed(0)
    model = (
        t.Siglip2Model(t.Siglip2Config(**BOTH_FLEX)) if whole else t.Siglip2VisionModel(t.Siglip2VisionConfig(**FLEX))
    )
    tower = model.vision_model if whole else model
    encoder = VisionEncoder(model, image_size=size)
    drawn = [Image.fromarray(torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()) for _ in range(2)]
    patches = size[0] * size[1] // 64
    processor = t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=patches)  # which then leaves the size
    given = processor(drawn, return_tensors="pt")
    assert given["spatial_shapes"].tolist() == [[size[0] // 8, size[1] // 8]] * 2
    with torch.no_grad():
        output = tower(**given)
    cells = torch.stack([torch.from_numpy(np.array(one)) for one in drawn]).permute(0, 3, 1, 2) / 255
    views = encoder(cells)
    torch.testing.assert_close(views["grid"].flatten(1, 2), output.last_hidden_state, atol=1e-5, rtol=1e-5)
    pooled = output.pooler_output if whole else output.last_hidden_state.mean(1)
    expected = torch.nn.functional.normalize(pooled, dim=1)
    torch.testing.assert_close(views["vector"], expected, atol=1e-5, rtol=1e-5)
    matching = FeatureMatching(encoder)
    unit = torch.nn.functional.normalize(output.last_hidden_state, dim=2)
    torch.testing.assert_close(matching.encode(cells).unflatten(1, (patches, 16)), unit, atol=1e-5, rtol=1e-5)


def test_a_siglip2_without_a_size_takes_as_many_patches_as_it_has_positions(tmp_path):
    t.Siglip2VisionModel(t.Siglip2VisionConfig(**FLEX)).save_pretrained(tmp_path)
    t.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16).save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(str(tmp_path))
    assert encoder.image_size == (32, 32) and encoder.grid_size == (4, 4) and encoder.mean == (0.5, 0.5, 0.5)
    with pytest.warns(UserWarning, match=r"patches of \(8, 8\) pixels do not divide"):
        cut = VisionEncoder(encoder.backbone, image_size=(36, 44))
    assert cut(torch.rand(1, 3, 36, 44))["grid"].shape == (1, 4, 5, 16)


def test_a_contrastive_tower_is_asked_for_its_pooled_output():
    encoder = encoder_of("siglip")
    images = torch.rand(1, 3, 32, 32)
    pooled = encoder.backbone((images - 0.5) / 0.5).pooler_output
    torch.testing.assert_close(encoder(images)["vector"], torch.nn.functional.normalize(pooled, dim=1))


def test_loading_takes_the_normalisation_and_crop_size_of_the_processor(tmp_path):
    ViTModel(ViTConfig(**WIDE, **SMALL)).save_pretrained(tmp_path)
    bare = VisionEncoder.from_pretrained(str(tmp_path))
    assert bare.image_size == (32, 32) and bare.mean == (0.5, 0.5, 0.5)  # weights alone
    ViTImageProcessorPil(
        size={"height": 48, "width": 40}, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3]
    ).save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(str(tmp_path))
    assert encoder.image_size == (48, 40) and encoder.mean == (0.1, 0.2, 0.3) and encoder.std == (1, 2, 3)
    assert encoder.resample == 2 and bare.resample == 3  # bilinear, as a ViT's processor has it; bicubic
    assert VisionEncoder.from_pretrained(str(tmp_path), image_size=64).image_size == (64, 64)
    # loaded twice it is the same, also where a pooler was drawn anew
    assert VisionEncoder.from_pretrained(str(tmp_path)).fingerprint == encoder.fingerprint


def test_weights_that_were_trained_on_are_another_encoder_to_a_pool():
    encoder = encoder_of("vit")
    before = encoder.describe()["fingerprint"]
    encoder.to(torch.bfloat16).to(torch.float32)  # rounded, and no other encoder
    encoder.half()
    assert encoder.describe()["fingerprint"] == encoder.float().describe()["fingerprint"] == before
    with torch.no_grad():
        for p in encoder.parameters():
            p.add_(0.1)
    after = encoder.describe()["fingerprint"]
    assert after != before and encoder.fingerprint == after == encoder.describe()["fingerprint"]


def test_the_fingerprint_knows_weights_layer_and_size():
    seen = {encoder_of(name).fingerprint for name in ("vit", "vit stretched", "mobilenet", "mobilenet layer")}
    encoder = encoder_of("vit")
    assert encoder.fingerprint in seen and len(seen) == 4
    assert encoder_of("vit").fingerprint == encoder.fingerprint
    other = encoder_of("vit")
    with torch.no_grad():
        list(other.backbone.parameters())[-1][0] += 1e-3
    assert other.fingerprint not in seen
    encoder = encoder_of("vit")
    encoder.backbone.half()
    assert encoder.fingerprint in seen  # the same weights in half precision
    json.dumps(other.describe())


def test_a_pool_takes_a_model_of_transformers_as_encoder(tmp_path):
    image = Image.fromarray(torch.randint(256, (40, 30, 3), dtype=torch.uint8).numpy())
    data = Dataset.from_dict({"image": [image, image.rotate(90)]}, features=Features({"image": ImageFeature()}))
    backbone = encoder_of("vit").backbone
    pool = ExamplePool.from_dataset(data, encoder=backbone, task="colourisation", cache_dir=tmp_path, progress=False)
    assert pool.encoder["fingerprint"] == VisionEncoder(backbone).fingerprint
    with pytest.raises(TypeError, match="encoder=Linear: pass a VisionEncoder, a vision model of transformers"):
        ExamplePool.from_dataset(data, encoder=torch.nn.Linear(1, 1), task="colourisation", cache_dir=tmp_path)


def test_what_cannot_be_encoded_is_refused():
    encoder = encoder_of("vit")
    with pytest.raises(ValueError, match=r"takes \(N, 3, 32, 32\).*images.pixels"):
        encoder(torch.rand(1, 3, 40, 40))
    config = t.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    with pytest.raises(ValueError, match="64 tokens, fewer than the 16x16 patches"):
        VisionEncoder(t.SwinModel(config))(torch.rand(1, 3, 64, 64))
