"""What scripts make of pretrained models: a smaller checkpoint of any of them, and the benchmarks' arithmetic."""

from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from benchmarks import FOLDER, importable
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast, BitImageProcessor, Dinov2Config, Dinov2Model

from hf_effdl import find_groups


WORDS = [f"w{i}" for i in range(40)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def small_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=45, intermediate_size=32, **SIZES)).eval()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text encoder, an image encoder, a file of texts and a folder of images."""
    folder = tmp_path_factory.mktemp("pretrained")
    small_bert().save_pretrained(folder / "bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder / "bert")
    Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **SIZES)).save_pretrained(folder / "dinov2")
    size = {"height": 28, "width": 28}
    BitImageProcessor(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder / "dinov2")
    rng = torch.Generator().manual_seed(0)
    draws = torch.randint(40, (60, 6), generator=rng).tolist()
    (folder / "texts.txt").write_text("\n".join(" ".join(WORDS[i] for i in row) for row in draws) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER.parent))
        import slim_pretrained

        yield slim_pretrained


def arguments(inputs, *more: str) -> list[str]:
    named = {"--model_name_or_path": inputs / "bert", "--dataset_name": inputs / "texts.txt", "--max_length": 8}
    return [*(str(part) for pair in named.items() for part in pair), "--output_dir", str(inputs / "out"), *more]


@pytest.mark.slow
def test_a_smaller_checkpoint_is_stock_and_nearer_to_the_model_than_without_refits(script, inputs, capsys):
    script.main(arguments(inputs))
    assert "needs nothing but transformers" in capsys.readouterr().out
    small = BertModel.from_pretrained(inputs / "out")
    assert small.config.intermediate_size == 16 and small.config.num_attention_heads == 2
    told = small.config.effdl_report
    assert told["calibration"]["rows"] + told["calibration"]["held_out"] == 60
    assert told["calibration"]["error"] < told["calibration"]["error_without"] and told["macs"]["ratio"] < 1


@pytest.mark.slow
def test_free_widths_save_as_much_as_equal_ones_and_go_by_rows(script, inputs, capsys, tmp_path):
    copytree(inputs / "bert", tmp_path / "bert")
    model = small_bert()
    model.encoder.layer[0].output.dense.weight.data *= 0.1
    model.save_pretrained(tmp_path / "bert")
    more = ["--model_name_or_path", str(tmp_path / "bert"), "--widths", "free", "--output_dir", str(tmp_path / "free")]
    script.main(arguments(inputs, "--keep", "0.75", *more))
    assert "loading it needs `import hf_effdl`" in capsys.readouterr().out
    small = BertModel.from_pretrained(tmp_path / "free")
    first, second = (layer.intermediate.dense.out_features for layer in small.encoder.layer)
    assert first + second == 2 * 24 and first < second
    with pytest.raises(ValueError, match="set --calibration"):
        script.main(more)


def test_a_checkpoint_is_saved_whole_or_the_earlier_one_stays(script, inputs, tmp_path, monkeypatch):
    out = [*arguments(inputs), "--rows", "8", "--output_dir", str(tmp_path / "out")]
    script.main([*out, "--keep", "0.5"])
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def cut(model, folder, **more):
        (Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(BertModel, "save_pretrained", cut)
    with pytest.raises(KeyboardInterrupt):
        script.main([*out, "--keep", "0.75"])
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--column", "question"], "not 'question'; set --column"),
        (["--model_class", "NoSuchModel"], "set --model_class"),
        (["--keep", "0"], "keep"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_with_what_to_change(script, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        script.main(arguments(inputs, *change))


# ---- benchmarks


@pytest.fixture
def benchmarks():
    names = ("arms", "minilm", "dinov2", "resnet20", "training")
    with importable(*(f"pretrained_{name}" for name in names)) as found:
        yield found


def test_both_kinds_of_an_arm_lack_the_same_units_and_chance_is_the_seeds(benchmarks):
    arms, model = benchmarks["pretrained_arms"], small_bert()
    batches = [{"input_ids": torch.randint(45, (10, 6), generator=torch.Generator().manual_seed(1))}]
    groups = arms.sized(find_groups(model, {"input_ids": batches[0]["input_ids"][:1]}), 32)
    rows = {
        seed: [arm.model.encoder.layer[1].intermediate.dense.weight for arm in found]
        for seed in (0, 1)
        for found in [list(arms.smaller(model, groups, 0.5, "random", batches, seed))]
    }
    assert len(groups) == 2 and rows[0][0].shape == (16, 16)
    assert torch.equal(*rows[0]) and torch.equal(*rows[1]) and not torch.equal(rows[0][0], rows[1][0])


def test_a_class_score_is_that_of_the_mean_over_the_tokens_that_are_there(benchmarks):
    model = benchmarks["pretrained_minilm"].Classifier(small_bert(), 3)
    ids, mask = torch.randint(5, 45, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    there = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, there).logits, model(ids, mask).logits, atol=1e-5, rtol=1e-5)
        said = model(ids, mask, labels=torch.tensor([0, 2]))
    assert said.loss == nn.functional.cross_entropy(said.logits, torch.tensor([0, 2]))


class Rows:
    """Texts whose class is their first word."""

    def batch(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = torch.stack(
            [torch.randint(5, 45, (6,), generator=torch.Generator().manual_seed(int(i))) for i in places]
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}


@pytest.fixture
def classifier(benchmarks):
    torch.manual_seed(0)
    model = benchmarks["pretrained_minilm"].Classifier(small_bert(), 3).eval()
    batch = Rows().batch(torch.arange(32))
    return (
        model,
        benchmarks["pretrained_arms"].sized(find_groups(model, {k: v[:1] for k, v in batch.items()}), 32),
        batch,
    )


def unit_norms(model: nn.Module, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    block = model.encoder.encoder.layer[layer]
    return block.intermediate.dense.weight.detach().norm(dim=1), block.output.dense.weight.detach().norm(dim=0)


def test_a_lasso_takes_its_strength_off_every_unit_over_a_run_and_no_more_than_there_is(benchmarks, classifier):
    (model, groups, _), script = classifier, benchmarks["pretrained_training"]
    with torch.no_grad():
        model.encoder.encoder.layer[0].intermediate.dense.weight[3] *= 0.1
        model.encoder.encoder.layer[0].output.dense.weight[:, 3] *= 0.1
    (rows, columns), way = unit_norms(model, 0), script.Lasso(groups)
    before = torch.stack([rows / rows.mean(), columns / columns.mean()]).norm(dim=0)
    way.start(model, (1e-3, 1e-3), [0.5, 1.0, 0.25])
    for step in range(3):
        way.after_step(step)
    left = (before - script.STRENGTH).clamp_min(0) / before
    for now, then in zip(unit_norms(model, 0), (rows, columns), strict=True):
        torch.testing.assert_close(now, then * left)
    assert left[3] == 0 and left.count_nonzero() == 31


@pytest.mark.slow
def test_along_a_path_cheap_units_are_pressed_hardest_and_the_layers_behind_those_that_left_read_nothing_of_them(
    benchmarks, classifier
):
    (model, groups, batch), script = classifier, benchmarks["pretrained_training"]
    worth = script.unit_scores(model, groups, [batch], "obs")
    way = script.Path(groups, [batch], score="obs", refits=True)
    script.train(model, Rows(), torch.arange(256), 2, (3e-3, 3e-3), seed=0, way=way)
    lifted = {group["name"]: group for group in way.optimizer.param_groups if group["penalty"]}
    path = script.SparsePath.from_optimizer(way.optimizer, groups)
    for layer, group in enumerate(groups):
        factors = torch.tensor(lifted[group.name]["penalty_factor"])
        assert factors.argmax() == worth[group.name].argmin() and factors.argmin() == worth[group.name].argmax()
        assert factors.max() / factors.min() == pytest.approx(script.SPREAD**2)
        inside, (_, columns) = path.support[group.name], unit_norms(model, layer)
        assert 0 < inside.sum() < 32 and torch.equal(columns > 0, inside)
        assert way.scores()[group.name][inside].min() >= 1 > way.scores()[group.name][~inside].max()


def test_features_that_did_not_move_are_at_no_distance_and_the_nearest_is_another_photo(benchmarks):
    measures, whole = benchmarks["pretrained_dinov2"].measures, torch.zeros(4, 2, 3)
    whole[:, :, 0], whole[1, 0, 1], whole[2:, 0, 0], whole[2:, 0, 2] = 1, 0.1, -1, 2
    found = measures(whole, whole, torch.tensor([0, 0, 1, 2]))
    assert found == {"cosine CLS": pytest.approx(1), "cosine patch": pytest.approx(1), "error": 0, "breed": 50}
    moved = measures(-whole, whole, torch.tensor([0, 0, 1, 1]))
    assert moved == {"cosine CLS": pytest.approx(-1), "cosine patch": pytest.approx(-1), "error": 2, "breed": 100}


def test_masks_come_from_the_nearest_other_photo_or_the_best_of_some(benchmarks):
    script = benchmarks["pretrained_dinov2"]
    model = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **SIZES)).eval()
    found, kind, cells = torch.zeros(12, 5, 16), torch.arange(12) % 2, torch.arange(4)
    found[:, 1 + cells, 2 + cells] = 1  # a cell is like the same cell of other photos
    found[torch.arange(12), 1:, kind] = 1  # and a photo like those of its kind
    masks = torch.zeros(12, 3, 56, 56)
    masks[kind == 0, :, :28], masks[kind == 1, :, 28:] = 1, 1
    assert script.by_example(model, found, masks, 28) == {"IoU nearest": 1, "IoU best": 1}
    said = script.by_example(model, found, masks[torch.randperm(12, generator=torch.Generator().manual_seed(0))], 28)
    assert said["IoU nearest"] < said["IoU best"]


def test_every_block_of_the_resnet_keeps_the_largest_share_that_holds_the_budget(benchmarks):
    script, x = benchmarks["pretrained_resnet20"], torch.randn(2, 3, 32, 32)
    model = script.ResNet20(width=4).eval()
    groups = find_groups(model, {"pixel_values": x})
    assert len(groups) == 9 and {group.name for group in groups} == {
        f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)
    }
    share, macs = script.share_for(groups, 0.5)
    sizes = [max(1, round((share + step) * group.units)) for step in (0, 1 / 4) for group in groups]
    network, names = groups[0].network, [group.name for group in groups]
    held, over = (network.count(groups, dict(zip(names, part, strict=True))) for part in (sizes[:9], sizes[9:]))
    whole = network.count()["macs"]
    assert macs == held["macs"] / whole <= 0.5 < over["macs"] / whole
    batch = {"pixel_values": x, "labels": torch.tensor([1, 2])}
    small = list(benchmarks["pretrained_arms"].smaller(model, groups, share, "fisher", [batch]))
    assert all(found.model(x)["logits"].shape == (2, 10) for found in small)


@pytest.mark.slow
def test_the_resnet_is_cut_after_some_epochs_and_trains_on(benchmarks, tmp_path, monkeypatch):
    script, drawn = benchmarks["pretrained_resnet20"], torch.Generator().manual_seed(0)
    images = torch.randint(256, (96, 32, 32, 3), dtype=torch.uint8, generator=drawn).numpy()

    def net(file):
        torch.manual_seed(0)
        return script.ResNet20(width=4)

    monkeypatch.setattr(script, "cifar10", lambda *given: (images, np.arange(96) % 3))
    monkeypatch.setattr(script, "trained", net)
    options = [
        "--epochs",
        "0",
        "1",
        "--before",
        "1",
        "--seeds",
        "0",
        "--budgets",
        "0.5",
        "--rows",
        "32",
        "--test",
        "96",
    ]
    files = ["--work", str(tmp_path / "nets"), "--out", str(tmp_path / "rows.jsonl")]
    script.main([*options, *files, "--arms", "magnitude", "path"])
    rows = script.RowFile(tmp_path / "rows.jsonl", script.KEYS).rows
    assert [(row["arm"], row["epochs"]) for row in rows] == [(a, e) for a in ("magnitude", "path") for e in (0, 1)]
    nets = [torch.load(tmp_path / "nets" / f"{name}-1-0.pt") for name in ("plain", "path")]
    assert any(not torch.equal(a, b) for a, b in zip(*(found["state"].values() for found in nets), strict=True))
    monkeypatch.setattr(script.Run, "fit", None)  # the nets are there, and so are the rows
    script.main([*options, *files, "--arms", "magnitude", "path"])
    script.main([*options, *files, "--arms", "obs", "--epochs", "0"])
    assert len(script.RowFile(tmp_path / "rows.jsonl", script.KEYS).rows) == 5
