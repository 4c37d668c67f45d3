"""The CIFAR-10 benchmarks of tickets and of growth: nets, rows that are made once, and what their tables may claim."""

import importlib
import statistics
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from hf_effdl import find_groups
from hf_effdl.structure.groups.group import regroup
from hf_effdl.structure.growing.widen import widen_groups


MODULES = (
    "structure_mnist",
    "structure_cifar10",
    "trainer_rows",
    "ticket_arms",
    "growth_arms",
    "tickets_cifar10",
    "growth_cifar10",
)
NETS = ("resnet18", "vgg16")


@pytest.fixture(scope="module")
def scripts():
    folder, threads = str(ROOT / "examples" / "benchmarks"), torch.get_num_threads()
    cudnn = torch.backends.cudnn.benchmark
    sys.path.insert(0, folder)  # as for a script that runs from there
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(folder)
    for name in MODULES:
        sys.modules.pop(name)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn


@pytest.fixture
def tickets(scripts):
    return scripts["tickets_cifar10"]


@pytest.fixture
def growth(scripts):
    return scripts["growth_cifar10"]


@pytest.fixture
def run(scripts, tmp_path, monkeypatch, capsys):
    """A script's main on made-up images of four classes; gives the rows, the table and how many rows were made."""

    def made_up(split, folder):
        random, n = np.random.default_rng(split == "test"), 240 if split == "train" else 80
        labels = np.arange(n) % 4
        return (random.integers(0, 60, (n, 32, 32, 3)) + 60 * labels[:, None, None, None]).astype(np.uint8), labels

    monkeypatch.setattr(scripts["tickets_cifar10"], "cifar10", made_up)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "rows.jsonl"

    def run(name: str, *options: str) -> tuple[list[dict], str, int]:
        read_rows = sys.modules["rows"].read_rows
        before = len(read_rows(file))
        small = ("--net", "vgg16", "--width", "4", "--classes", "4", "--batch", "16", "--seeds", "1")
        scripts[name].main([*small, "--out", str(file), *options])
        rows = read_rows(file)
        printed = capsys.readouterr().out
        return rows, printed[printed.rindex("\nvgg16, width") :], len(rows) - before

    run.file = file
    return run


# ---- nets


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("net", NETS)
def test_dense_widths_give_the_net_of_the_structure_benchmark(scripts, growth, net):
    torch.manual_seed(3)
    theirs = scripts["structure_cifar10"].NETS[net](5, 7)
    torch.manual_seed(3)
    ours = growth.NETS[net](growth.dense_widths(net, 5), 7)
    images = torch.randn(4, 3, 32, 32)
    assert shapes(ours) == shapes(theirs) and torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("net", NETS)
def test_the_widths_of_a_grown_net_in_the_order_of_its_groups_build_a_net_of_its_shapes(scripts, growth, net):
    build, widths = growth.NETS[net], [2] * len(growth.FACTORS[net])
    seed = scripts["trainer_rows"].Classifier(build(widths, 3))
    groups = find_groups(seed, {"pixel_values": torch.randn(1, 3, 32, 32)})
    assert [group.units for group in groups] == widths
    # every group by another number, so that two that were swapped would show
    grown = widen_groups(seed, groups, {group.name: i + 1 for i, group in enumerate(groups)})
    units = [group.units for group in regroup(groups, grown)]
    assert len(set(units)) == len(widths)
    assert shapes(build(units, 3)) == shapes(grown.net)


# ---- tables of made-up rows

FULL = {
    "net": "resnet18",
    "width": 64,
    "classes": 10,
    "rows": 50_000,
    "epochs": 30,
    "batch": 128,
    "device": "a GPU",
    "precision": "bfloat16",
    "torch": "2",
}
CUTS = [{"classes": 9}, {"rows": 49_999}, {"epochs": 29}, {"width": 32}, {"seeds": 2}]


def ahead(ours: list[float], other: list[float]) -> str:
    """Mean difference and its standard error, seed by seed."""
    d = np.subtract(ours, other)
    return f"{d.mean():+.2f} (SE {np.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1) / len(d)):.2f}"


TICKETS = {
    "dense": [93.0, 93.5, 93.1],
    "path ticket, init": [90.0, 91.2, 90.4],
    "path ticket, late": [91.0, 92.0, 92.2],
    "random ticket, init": [89.8, 90.5, 90.4],
    "random ticket, late": [90.0, 91.1, 91.5],
    "one-shot magnitude, init": [90.0, 90.0, 90.0],
}


def ticket_rows(seeds: int = 3, found: float = 0.12, **changed) -> list[dict]:
    costs = {"path": found + 0.1, "one-shot": 1.1, "dense": 1.0}
    return [
        FULL
        | {
            "arm": arm,
            "seed": seed,
            "budget": 1.0 if arm == "dense" else budget,
            "accuracy": values[seed - 1],
            "macs": budget,
            "cost": costs.get(arm.split()[0], 0.1),
            "found": found,
            "settled": True,
        }
        | changed
        for arm, values in TICKETS.items()
        for seed in range(1, seeds + 1)
        for budget in ((1.0,) if arm == "dense" else (0.25, 0.1))
    ]


def test_what_the_ticket_goals_come_to_is_recomputed_by_hand(tickets):
    lines = tickets.verdict(ticket_rows())
    assert "at most 12.0% of the dense epochs; goal, 20 %: met" in lines[0]
    # ahead by 1.4 standard errors from the initial weights, by 5 from the late ones
    for line, start, met in ((lines[1], "init", "not met"), (lines[2], "late", "met")):
        ours, other = TICKETS[f"path ticket, {start}"], TICKETS[f"random ticket, {start}"]
        assert f"10% MACs: path ticket, {start} {ahead(ours, other)}, 3 seeds) beside random ticket, {start}" in line
        assert line.endswith(f"standard errors: {met}")
    costs = [line for line in lines if "training MACs" in line]
    assert len(costs) == 2 and all(
        "0.22 of the dense net's, one-shot magnitude's 1.10; goal, not more: met" in line for line in costs
    )
    beside = [line for line in lines if line.endswith("beside dense")]
    assert len(beside) == 2 and all(ahead(TICKETS["path ticket, late"], TICKETS["dense"]) in line for line in beside)
    late = tickets.verdict(ticket_rows(found=1.3))
    assert late[0].endswith("20 %: not met") and sum("not more: not met" in line for line in late) == 2


GROWTH = {"dense": [93.0, 93.4, 93.3], "grown": [92.9, 93.2, 93.1], "final from scratch": [92.0, 93.5, 93.6]}


def growth_rows(accuracy=GROWTH, seeds: int = 3, cost: float = 0.4, **changed) -> list[dict]:
    history = [{"step": step, "from": 16 * i, "to": 32 * i} for i, step in ((1, 5), (2, 9))]
    return [
        FULL
        | {
            "seed_width": 16,
            "share": 0.5,
            "settings": "",
            "arm": arm,
            "seed": seed,
            "accuracy": values[seed - 1],
            "macs": 100 if arm == "dense" else 50,
            "training_macs": 1000 if arm == "dense" else 1000 * cost,
            "params": 10,
            "seconds": 1.0,
            "history": history,
        }
        | changed
        for arm, values in accuracy.items()
        for seed in range(1, seeds + 1)
    ]


def test_what_the_growth_goals_come_to_is_recomputed_by_hand(growth):
    first, second = growth.verdict(growth_rows())
    assert f"{ahead(GROWTH['grown'], GROWTH['dense'])}, 3 seeds) beside dense at 40% of its training MACs" in first
    assert first.endswith("50 %: met")
    assert f"{ahead(GROWTH['grown'], GROWTH['final from scratch'])}, 3 seeds) beside its final widths" in second
    assert second.endswith("standard errors: met")  # 0.03 below, of a standard error of 0.47
    assert growth.verdict(growth_rows(cost=0.51))[0].endswith("50 %: not met")
    worse = GROWTH | {"grown": [92.6, 93.0, 92.9], "final from scratch": [92.9, 93.4, 93.3]}
    assert [line[-7:] for line in growth.verdict(growth_rows(worse))] == ["not met", "not met"]


@pytest.mark.parametrize("changed", CUTS)
def test_anything_less_supports_no_claim(tickets, growth, changed, capsys):
    for script, rows in ((tickets, ticket_rows(**changed)), (growth, growth_rows(**changed))):
        [line] = script.verdict(rows)
        assert "supports no claim" in line
        assert f"{rows[0]['classes']} classes, {rows[0]['rows']:,} rows, {rows[0]['epochs']} epochs" in line
        script.table(rows)
        printed = capsys.readouterr().out
        assert line in printed and "goal" not in printed
    [line] = growth.verdict(growth_rows(seed_width=8))
    assert "supports no claim" in line


def test_arms_that_a_goal_compares_count_only_where_a_seed_has_them_all(tickets, growth):
    rows = [row for row in ticket_rows() if (row["arm"], row["seed"]) != ("random ticket, late", 2)]
    assert "2 seeds, supports no claim" in tickets.verdict(rows)[0]
    rows = [row for row in growth_rows() if (row["arm"], row["seed"]) != ("final from scratch", 2)]
    assert "2 seeds, supports no claim" in growth.verdict(rows)[0]


def test_rows_of_different_settings_never_meet_in_a_table(tickets, growth, capsys):
    for script, rows in ((tickets, ticket_rows()), (growth, growth_rows())):
        others = {"net": "vgg16", "classes": 2, "rows": 9, "device": "cpu", "batch": 8, "width": 8}
        apart = [row | {key: value} for key, value in others.items() for row in rows]
        script.table(rows + apart)
        printed = capsys.readouterr().out
        assert printed.count("\n| dense ") == len(others) + 1
        assert printed.count("| 3 |" if script is growth else "dense (3 seeds)") >= len(others) + 1
    growth.table([row for row in growth_rows() if row["arm"] != "dense"])
    assert "6 rows, none of dense" in capsys.readouterr().out


# ---- small runs


@pytest.mark.slow
def test_growth_from_end_to_end_and_rows_that_are_there_are_not_made_again(run, growth):
    arms = ("dense", "grown", "final from scratch", "uniform from scratch")
    options = (
        "growth_cifar10",
        "--seed-width",
        "2",
        "--rows",
        "96",
        "--epochs",
        "2",
        "--set",
        "growth_rounds=1",
        "growth_until=0.5",
        "growth_threshold=0.01",
        "--share",
        "0.4",
        "--arms",
        *arms,
    )
    rows, printed, made = run(*options)
    assert made == 4 and [row["arm"] for row in rows] == list(arms)
    dense, grown, final, uniform = rows
    steps = 2 * 96 // 16
    assert dense["training_macs"] == 3 * dense["macs"] * 16 * steps and len(dense["curve"]) == 2
    assert final["widths"] == list(grown["units"].values()) and max(final["widths"]) > 2
    assert final["params"] == grown["params"] and final["macs"] == grown["macs"] <= 0.4 * dense["macs"]
    assert uniform["macs"] <= grown["macs"] and len(uniform["widths"]) == 13
    for row in (final, uniform):  # as many training MACs as growth took, but for less than a step
        assert 0 <= grown["training_macs"] - row["training_macs"] < 3 * row["macs"] * 16
    assert all(f"| {arm} | 1 |" in printed for arm in arms)
    assert "4 classes, 96 rows, 2 epochs, 1 seeds, supports no claim" in printed

    text = run.file.read_text()
    assert run(*options)[1:] == (printed, 0) and run.file.read_text() == text
    run.file.write_text(text[:-100])  # killed while it wrote the last row
    again, _, _ = run(*options)
    assert len(again) == 4 and again[:3] == rows[:3] and again[3]["widths"] == uniform["widths"]
    assert run(*options, "--table")[1:] == (run(*options)[1], 0)


@pytest.mark.slow
def test_tickets_from_end_to_end_and_rows_that_are_there_are_not_made_again(run, tickets):
    options = (
        "tickets_cifar10",
        "--rows",
        "160",
        "--epochs",
        "2",
        "--budgets",
        "0.25",
        "--transfer-epochs",
        "1",
        "--arms",
        "dense",
        "path ticket, late",
        "random ticket, late",
    )
    rows, printed, made = run(*options)
    main, moved = [row for row in rows if "transfer" not in row], [row for row in rows if "transfer" in row]
    assert made == 9 and [row["arm"] for row in main] == ["dense", "path ticket, late", "random ticket, late"]
    steps = 2 * 160 // 16
    for row in main[1:]:
        assert row["macs"] <= 0.25 and row["cost"] == pytest.approx(row["macs"] + row["found"])
        assert row["found"] * steps == round(row["found"] * steps) <= 0.2 * steps
    assert len({row["arm"] for row in moved}) == 6
    # its own search has half of the rows; two looks are too few to settle
    assert all(row["found"] == 0.2 and 0 <= row["accuracy"] <= 100 for row in moved)
    assert "4 classes, 160 rows, 2 epochs, 0 seeds, supports no claim" in printed
    assert "| transferred |" in printed

    text = run.file.read_text()
    assert run(*options)[1:] == (printed, 0) and run.file.read_text() == text
    magnitude = ["one-shot magnitude, init", "iterative magnitude, late"]
    more, _, made = run(*options, *magnitude)  # two more arms, of the dense net that was kept
    assert made == 2 and [row["arm"] for row in more[-2:]] == magnitude
    assert more[-2]["cost"] == 1 + more[-2]["macs"] and all(row["macs"] <= 0.25 for row in more[-2:])
    assert statistics.mean(row["seconds"] for row in main) > 0


def test_a_ticket_moves_from_the_first_half_of_the_classes_to_a_thousand_rows_of_the_second(tickets, monkeypatch):
    labels, tested = torch.arange(2500) % 5, torch.arange(50) % 5
    images = [part.float()[:, None, None, None].expand(-1, 3, 32, 32) for part in (labels, tested)]
    setting = tickets.Setting("vgg16", None, (images[0], labels), (images[1], tested), 1, 0.1, 0.0)
    monkeypatch.setattr(tickets, "transfer_rows", lambda *found: [found])
    options = tickets.parser_of(None, "").parse_args(["--net", "vgg16", "--width", "2", "--classes", "5"])
    options.transfer_epochs = 3
    [(searched, seed, source, model, target, target_test, other, budget, steps)] = tickets.transferred(
        setting, options, 7
    )
    assert searched.data is source and seed == 7 and budget == 0.25 and steps == 3 * (1000 // 128)
    assert [len(part[1]) for part in (source, target, target_test)] == [1000, 1000, 30]
    for (inputs, classes), first in ((source, 0), (target, 2), (target_test, 2)):
        assert torch.equal(inputs[:, 0, 0, 0].long(), classes + first)
    assert set(source[1].tolist()) == {0, 1} and set(target[1].tolist()) == {0, 1, 2}
    assert model.net[-1].out_features == 2 and other().net[-1].out_features == 3


def test_bad_options_are_refused_before_anything_is_trained(run):
    for name in ("tickets_cifar10", "growth_cifar10"):
        for options in (("--rows", "241"), ("--rows", "15"), ("--arms", "path"), ("--device", "cuda")):
            with pytest.raises(SystemExit):
                run(name, *options)
    assert not run.file.exists()
