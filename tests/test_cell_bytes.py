"""Cosines of whole numbers against those of floats: how near they are, and that the same examples are chosen."""

import datasets
import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_examples import ROOT
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from hf_effdl import (
    CascadeSelector,
    ExamplePool,
    FeatureMatching,
    VisionEncoder,
    VisualInContextModel,
    VisualInContextPipeline,
    measure_examples,
)
from hf_effdl.vicl.remote_code import examples as examples_module
from hf_effdl.vicl.remote_code.cascade_features import MATCHES, byte_matches, dense_matches
from hf_effdl.vicl.remote_code.cell_bytes import CellBytes


def unit(*size: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def spiky(*size: int, seed: int = 0) -> torch.Tensor:
    """One entry of every vector is large."""
    cells = unit(*size, seed=seed)
    cells[..., 0] = 0.6
    return F.normalize(cells, dim=-1)


@pytest.mark.parametrize("make", [unit, spiky])
@pytest.mark.parametrize("width", [16, 256, 768])
def test_cosines_are_as_near_as_is_said(make, width):
    one, other = make(40, width), make(30, width, seed=1)
    a, b = CellBytes.of(one), CellBytes.of(other)
    expected = one.double() @ other.double().T
    errors = a.cosines(b) - expected
    said = a.unit * b.unit * width**0.5 / 12 + (a.unit**2 + b.unit**2) ** 0.5 / 880
    assert a.cosines(b).dtype == torch.float32 and 0.3 * said < errors.square().mean().sqrt() < said
    assert errors.abs().max() < 6 * said
    rough = (a.large.float() @ b.large.float().T * a.unit * b.unit - expected).square().mean().sqrt()
    assert rough > 10 * errors.square().mean().sqrt()  # what the small parts are for
    if make is unit and width == 768:
        assert said < 1e-5


def test_all_of_it_goes_into_one_tensor_and_out_again():
    cells = CellBytes.of(unit(7, 12))
    packed = cells.packed
    again = CellBytes.unpacked(packed.clone())
    assert packed.dtype == torch.int8 and packed.shape == (15, 12)
    assert torch.equal(again.large, cells.large) and torch.equal(again.small, cells.small)
    assert again.unit == pytest.approx(cells.unit, rel=1e-7)
    assert CellBytes.of(torch.zeros(3, 8)).cosines(cells.of(unit(2, 8))).abs().max() == 0
    assert CellBytes.of(torch.full((3, 8), torch.nan)).cosines(cells.of(unit(2, 8))).isnan().all()


@pytest.mark.parametrize("count", [1, 9])
def test_matches_are_those_of_floats(count):
    asked, grids = unit(64, 96), unit(count, 49, 96, seed=1)
    shares = torch.rand(count, 49, generator=torch.Generator().manual_seed(2))
    shares[0] = 0.0
    expected = dense_matches(asked[None], grids[None], shares[None])[0]
    found = byte_matches(CellBytes.of(asked), [CellBytes.of(cells) for cells in grids], shares)
    assert found.shape == (count, len(MATCHES))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def both_ways(pipe: VisualInContextPipeline, images: list, monkeypatch) -> list[list[dict]]:
    """Outputs with whole numbers, and with floats."""
    found = []
    for quick in (True, False):
        pipe.model.config.quick_cosines = quick
        taken = []
        monkeypatch.setattr(examples_module, "byte_matches", lambda *given: taken.append(1) or byte_matches(*given))
        found.append(pipe(images))
        assert bool(taken) == quick
    return found


def check_same(found: list[list[dict]]) -> None:
    for quickly, exactly in zip(*found, strict=True):
        assert quickly["example_ids"] == exactly["example_ids"]
        assert (quickly["prediction"] != exactly["prediction"]).mean() <= 1e-3


def test_a_cascade_of_before_chooses_the_same_for_scenes_of_digits(monkeypatch):
    from digit_scenes import make_scenes

    pipe = VisualInContextPipeline(model=str(ROOT / "model_cards" / "tiny-cascade-digits"))
    assert pipe.model.config.quick_cosines is False  # which its file does not say
    check_same(both_ways(pipe, [scene["image"] for scene in make_scenes(24, "test", "segmentation", 5)], monkeypatch))


@pytest.mark.filterwarnings("ignore:on the pool")
def test_a_cascade_chooses_the_same_for_photos_of_pets(data_folder, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    backbone = ViTModel(
        ViTConfig(**sizes, image_size=64, patch_size=8, initializer_range=0.1), add_pooling_layer=False
    )
    encoder = VisionEncoder(backbone)
    files = sorted((data_folder / "pets" / "images").iterdir())[::9][:52]
    rows = {"image": [str(file) for file in files[:28]]}
    rows["mask"] = [str(data_folder / "pets" / "trimaps" / f"{file.stem}.png") for file in files[:28]]
    data = Dataset.from_dict(rows)
    for name in rows:
        data = data.cast_column(name, datasets.Image())
    pool = ExamplePool.from_dataset(
        data, "image", "mask", encoder=encoder, foreground=1, keep_grids=True, cache_dir=tmp_path, progress=False
    )
    model = VisualInContextModel.from_parts(FeatureMatching(encoder), candidates=12)
    measure_examples(model, pool, progress=False)
    model.set_selector(CascadeSelector(model, passes=4).fit(pool, progress=False))
    pipe = VisualInContextPipeline(model, pool=pool)
    check_same(both_ways(pipe, [Image.open(file).convert("RGB") for file in files[28:]], monkeypatch))
