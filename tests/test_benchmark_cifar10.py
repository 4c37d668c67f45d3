"""The CIFAR-10 benchmark: reader, augmentation, nets, rows that go on after a kill, and what its table may claim."""

import gzip
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from benchmarks import FOLDER, FULL, importable
from PIL import Image

from hf_effdl import find_groups


LINES = {f"data_batch_{i + 1}": lines for i, lines in enumerate((2, 1, 3, 4, 5))} | {"test_batch": 4}
COLUMNS = 5
ARMS = ("path, early", "global L2, early")


@pytest.fixture(scope="module")
def benchmark():
    with importable("structure_cifar10") as scripts:
        yield scripts["structure_cifar10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in the format of the data set, three classes of different brightness, and what was written there."""
    folder, random = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    written, names = {}, []
    for part, lines in LINES.items():
        labels = np.arange(lines * COLUMNS) % 3
        images = (random.integers(0, 60, (len(labels), 32, 32, 3)) + 90 * labels[:, None, None, None]).astype(np.uint8)
        mosaic = Image.new("RGB", (32 * COLUMNS, 32 * lines))
        for i, image in enumerate(images):
            mosaic.paste(Image.fromarray(image), (32 * (i % COLUMNS), 32 * (i // COLUMNS)))
        mosaic.save(folder / f"{part}.webp", lossless=True)
        names += [f"{label}\tname_{i}.png" for i, label in enumerate(labels)]
        written[part] = images, labels
    with gzip.open(folder / "labels_filenames.tsv.gz", "wt") as file:
        file.write("\n".join(names))
    return folder, written


@pytest.fixture
def run(benchmark, data, tmp_path, capsys, monkeypatch):
    """The script's main; gives the rows, what it printed and what it trained (one line of stderr each)."""

    shared = sys.modules["structure_mnist"]
    monkeypatch.setattr(shared, "measure_latency", partial(shared.measure_latency, seconds=0))  # one pass a round

    def run(*options: str) -> tuple[list[dict], str, list[str]]:
        common = ("--data", str(data[0]), "--out", str(tmp_path / "rows.jsonl"), "--width", "8", "--classes", "2")
        short = ("--tune", "1", "--seeds", "1", "--set", "batch=16", "--arms", *ARMS)
        benchmark.main([*common, *short, *options])
        printed = capsys.readouterr()
        trained = [line for line in printed.err.splitlines() if "per epoch" in line]
        return benchmark.read_rows(tmp_path / "rows.jsonl"), printed.out, trained

    return run


# ---- data


def test_the_reader_gives_the_pixels_and_labels_that_were_written(benchmark, data):
    folder, written = data
    for split, parts in (("train", list(LINES)[:5]), ("test", ["test_batch"])):
        images, labels = benchmark.cifar10(split, folder)
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert np.array_equal(images, np.concatenate([written[part][0] for part in parts]))
        assert np.array_equal(labels, np.concatenate([written[part][1] for part in parts]))


def test_a_folder_with_files_missing_or_of_two_copies_is_refused(benchmark, data, tmp_path):
    for file in data[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with gzip.open(tmp_path / "labels_filenames.tsv.gz", "at") as file:
        file.write("\n1\tone_more.png")
    with pytest.raises(SystemExit, match="95 images and 96 labels"):
        benchmark.cifar10("train", tmp_path)
    (tmp_path / "data_batch_4.webp").unlink()
    with pytest.raises(SystemExit, match="data_batch_4.webp missing; pass --data"):
        benchmark.cifar10("test", tmp_path)


def test_a_row_is_augmented_as_by_a_loop_over_crops_and_flips(benchmark):
    pad, size, rows = benchmark.PADDING, (6, 5), 2000
    image = torch.arange(1.0, 2 * 6 * 5 + 1).reshape(2, *size)  # every pixel another value, none that of the padding
    batch = benchmark.augment(image.expand(rows, -1, -1, -1), torch.Generator().manual_seed(3))
    padded = np.pad(image.numpy(), ((0, 0), (pad, pad), (pad, pad)))
    possible = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + size[0], left : left + size[1]]
            possible[crop.tobytes()] = top, left, False
            possible[crop[:, :, ::-1].tobytes()] = top, left, True
    found = [possible[np.ascontiguousarray(row).tobytes()] for row in batch.numpy()]
    assert {(top, left) for top, left, _ in found} == {(t, c) for t in range(2 * pad + 1) for c in range(2 * pad + 1)}
    assert 0.45 < np.mean([mirrored for *_, mirrored in found]) < 0.55
    for corner in (0, 1):  # uniform in both directions: a standard error is 0.06
        assert abs(np.mean([place[corner] for place in found]) - pad) < 0.25


# ---- nets


SIZES = [("resnet18", 11_173_962, 555_422_720, 12), ("vgg16", 14_724_042, 313_201_664, 13)]


@pytest.mark.slow
@pytest.mark.parametrize("net, params, macs, count", SIZES)
def test_the_nets_are_those_of_the_papers_for_32_pixels(benchmark, net, params, macs, count):
    groups = find_groups(benchmark.NETS[net](64, 10), torch.randn(1, 3, 32, 32))
    assert groups[0].network.count() == {"params": params, "macs": macs}
    # the channels of every convolution are in a group; those that add to one residual stream share it
    assert len(groups) == count and all(group.lifted for group in groups)


def test_the_magnitude_of_a_residual_channel_is_summed_over_the_layers_that_write_it(benchmark):
    net = benchmark.resnet18(4, 10)
    trained = {"model": net, "groups": find_groups(net, torch.randn(1, 3, 32, 32)), "optimizer": None}
    path, _ = sys.modules["structure_mnist"].path_of("l2", trained, 0)
    writers = (net[0], net[3].branch[3], net[4].branch[3])
    expected = sum(layer.weight.detach().flatten(1).norm(dim=1) for layer in writers)
    assert torch.allclose(path.units["0"]["dual"], expected)
    assert torch.allclose(path.units["3.branch.0"]["dual"], net[3].branch[0].weight.detach().flatten(1).norm(dim=1))


# ---- rows


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(run, tmp_path):
    rows, printed, trained = run("--epochs", "2")
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, 1) for arm in ARMS]
    # 3 steps an epoch: 60 % of 2 epochs for the net that selects, what is left and 1 more for each of three small ones
    assert [int(line.split()[0]) for line in trained] == [3, 6, 6, 6] * 2
    for row in rows:
        said = {"net": "resnet18", "width": 8, "classes": 2, "rows": 52, "epochs": 2, "tune": 1, "device": "cpu"}
        assert row | said | {"torch": torch.__version__, "settings": "batch=16", "held_out": 0} == row
        for budget, found in row["budgets"].items():
            assert 0.8 * float(budget) < found["macs"] <= float(budget) and 0 <= found["after"] <= 100
    assert "2 classes, 52 rows, 2 epochs, 1 seeds, supports no claim" in printed and "Goal" not in printed
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text()[:-100])  # killed while it wrote the last row
    again, _, trained = run("--epochs", "2")
    assert len(trained) == 3 and again[0] == rows[0]  # the whole net was kept
    after = [[cell["after"] for cell in row["budgets"].values()] for row in (again[1], rows[1])]
    assert after[0] == after[1]


# ---- what the table may claim

WHOLE = {"tune": 10, "settings": "", "held_out": 0, "dense": 90.0}


def made_up(after: dict[str, list[float]], **changed) -> list[dict]:
    def cell(value: float) -> dict:
        return {"before": 50.0, "after": value, "macs": 0.1, "params": 0.1, "latency": 0.5}

    return [
        FULL
        | WHOLE
        | {"arm": arm, "seed": seed, "budgets": {b: cell(value) for b in ("0.5", "0.25", "0.1")}}
        | changed
        for arm, values in after.items()
        for seed, value in enumerate(values)
    ]


AFTER = {
    "path, early": [92.0, 93.0, 94.5],
    "global L2, early": [91.0, 91.0, 91.0],
    "random": [92.0, 93.0, 94.0],
    "scratch, widths of path": [99.0, 99.0, 99.0],
    "BN weight": [99.0, 99.0],
}


def test_a_full_comparison_names_the_best_other_arm_that_selects_from_one_run(benchmark):
    lines = benchmark.verdict(made_up(AFTER))
    assert len(lines) == 4 and "met in 3 of 3 cells, 3 seeds" in lines[-1]
    # differences 0, 0 and 0.5: mean 1/6, standard error 1/6; scratch is no selection, two seeds are too few
    assert all("+0.17 (SE 0.17) beside the best other, random" in line for line in lines[:3])
    assert "not among the arms: group lasso, same unit, early, global L2, BN weight" in lines[-1]
    lines = benchmark.verdict(made_up(AFTER | {"random": [93.0, 94.0, 95.0]}))
    assert "met in 0 of 3" in lines[-1] and all("-0.83 (SE 0.17)" in line for line in lines[:3])


@pytest.mark.parametrize(
    "changed", [{"classes": 9}, {"rows": 49_999}, {"epochs": 29}, {"width": 32}, {"held_out": 5000}, {"seeds": 2}]
)
def test_anything_less_supports_no_claim(benchmark, changed):
    seeds = changed.pop("seeds", 3)
    lines = benchmark.verdict(made_up({arm: after[:seeds] for arm, after in AFTER.items()}, **changed))
    assert len(lines) == 1 and "supports no claim" in lines[0]


def test_the_committed_rows_are_whole(benchmark):
    lines = (FOLDER / "results" / "structure_cifar10.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({(*(row[key] for key in benchmark.KEYS), row["arm"], row["seed"]) for row in rows}) == len(rows) > 0
    for row in rows:
        assert row["arm"] in benchmark.ARMS and row["torch"] and row["budgets"].keys() == {"0.5", "0.25", "0.1"}
        assert all(found["macs"] <= float(budget) for budget, found in row["budgets"].items())


def test_neighbours_of_what_is_chosen_come_later():
    with importable("selection_cifar10") as scripts:
        spread_out = scripts["selection_cifar10"].spread_out
    points = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2], [9.0], [9.1], [9.2]])
    scores = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8])
    assert spread_out(scores, points, 3, neighbours=2).tolist() == [1, 4, 7]  # the middle of each heap
    assert sorted(spread_out(scores, points, 9, neighbours=2).tolist()) == list(range(9))


@pytest.mark.slow
def test_rows_of_cifar10_are_chosen_by_every_arm_and_not_again(data, tmp_path, monkeypatch):
    with importable("selection_cifar10") as scripts:
        script = scripts["selection_cifar10"]
        monkeypatch.setitem(script.CHECK, "pool", 30)
        monkeypatch.setitem(script.CHECK, "budgets", (20,))
        options = ["--check", "--data", str(data[0]), "--work", str(tmp_path), "--out", str(tmp_path / "rows.jsonl")]
        script.main([*options, "--device", "cpu"])
        lines = (tmp_path / "rows.jsonl").read_text().splitlines()
        assert [json.loads(line)["arm"] for line in lines] == list(script.ARMS)
        monkeypatch.setattr(script, "Task", None)  # nothing is missing
        script.main([*options, "--device", "cpu"])
