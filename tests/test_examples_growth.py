"""The growth example as a user would run it: with a push to a Hub, under accelerate launch, and on two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from test_examples import ROOT, TWO, run
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextImageProcessor, ResNetConfig

from hf_effdl import SparsePath


SCRIPT = ROOT / "examples" / "grow_image_classifier.py"
SEED, DENSE = [4, 4, 8], [16, 16, 32]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A folder of images, the config and the processor of the dense net, and a YAML file that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for i in range(40):
        name, side = ("left", "right")[i % 2], slice(18 * (i % 2), 18 * (i % 2) + 18)
        pixels = rng.integers(0, 120, (40, 36, 3), dtype=np.uint8)
        pixels[:, side] += 120
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        Picture.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    dense = ResNetConfig(embedding_size=DENSE[0], hidden_sizes=DENSE[1:], depths=[1, 1], layer_type="basic")
    dense.save_pretrained(folder / "dense")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder / "dense")
    file = folder / "run.yaml"
    file.write_text(
        f"model_name_or_path: {folder / 'dense'}\ndataset_name: {folder / 'images'}\nuse_cpu: true\nmax_steps: 16\n"
        "per_device_train_batch_size: 4\nlearning_rate: 0.1\ngrowth_rounds: 2\ngrowth_until: 0.75\n"
        f"disable_tqdm: true\neval_strategy: epoch\nreport_to: none\nseed_widths: {SEED}\nmax_macs_share: 0.5\n"
    )
    return file


def check(out: str, folder: Path) -> None:
    """One report; a grown stock model within the budget, its path, picture and card."""
    assert out.count("| round | step |") == 1 and out.count("grown model in out") == 1
    seed, grown = (float(out.partition(f" {name} ")[2].split(",")[0].split()[0]) for name in ("seed", "grown"))
    assert seed < grown <= 0.5
    model = AutoModelForImageClassification.from_pretrained(folder)
    widths = [model.config.embedding_size, *model.config.hidden_sizes]
    assert all(old < new <= dense for old, new, dense in zip(SEED, widths, DENSE, strict=True)), widths
    assert model.config.id2label == {0: "left", 1: "right"} and not hasattr(model.config, "quantization_config")
    assert SparsePath.load(folder).units["resnet.embedder.embedder.convolution"]["entered"].shape == (widths[0],)
    assert (folder / "growth.png").stat().st_size > 1000
    card = (folder / "README.md").read_text()
    for text in ("## Growth", "(growth.png)", "| grown | "):
        assert text in card, text


def test_the_example_grows_a_classifier_of_a_folder_of_images(config, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import grow_image_classifier

    monkeypatch.chdir(tmp_path)
    grow_image_classifier.main(["--config", str(config), "--output_dir", "out"])
    check(capsys.readouterr().out, tmp_path / "out")


@pytest.mark.slow
def test_the_example_runs_on_two_processes_and_reports_once(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    given = f"--config {config} --output_dir out --seed-depths 1 2 --max-macs-share 0.49"
    check(run(*TWO, str(SCRIPT), *given.split(), cwd=tmp_path), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["depths"] == [1, 2]


def test_bad_sizes_and_other_architectures_are_refused(config, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from grow_image_classifier import parse

    from hf_effdl.cli.work.structure import seed_config

    dense = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2])
    seed = seed_config(dense, None, None)
    assert (seed.embedding_size, seed.hidden_sizes, seed.depths) == (4, [4, 8], [1, 2])
    with pytest.raises(ValueError, match="--seed_widths takes 3 numbers.*2.*4, 8"):
        seed_config(dense, [4, 8], None)
    with pytest.raises(ValueError, match="'convnext'.*grows a 'resnet'"):
        seed_config(ConvNextConfig(), None, None)
    with pytest.raises(ValueError, match="--max_macs_share 1.5.*in"):
        parse(["--config", str(config), "--max_macs_share", "1.5"])
