"""The CIFAR-10 benchmarks of tickets and of growth: nets, rows that are made once, and what their tables may claim."""

import sys

import numpy as np
import pytest
import torch
from benchmarks import FULL, importable

from hf_effdl import find_groups
from hf_effdl.structure.groups.group import regroup
from hf_effdl.structure.growing.widen import widen_groups


NETS = ("resnet18", "vgg16")


@pytest.fixture(scope="module")
def scripts():
    with importable("structure_cifar10", "trainer_rows", "tickets_cifar10", "growth_cifar10") as found:
        yield found


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

TICKETS = {
    "dense": [93.0, 93.5, 93.1],
    "path ticket, init": [90.0, 91.2, 90.4],
    "path ticket, late": [91.0, 92.0, 92.2],
    "random ticket, init": [89.8, 90.5, 90.4],
    "random ticket, late": [90.0, 91.1, 91.5],
    "one-shot magnitude, init": [90.0, 90.0, 90.0],
}
GROWTH = {"dense": [93.0, 93.4, 93.3], "grown": [92.9, 93.2, 93.1], "final from scratch": [92.0, 93.5, 93.6]}


def of_seeds(accuracy: dict, seeds: int) -> list[dict]:
    return [
        FULL | {"arm": arm, "seed": seed, "accuracy": values[seed - 1]}
        for arm, values in accuracy.items()
        for seed in range(1, seeds + 1)
    ]


def ticket_rows(seeds: int = 3, found: float = 0.12, **changed) -> list[dict]:
    costs = {"path": found + 0.1, "one-shot": 1.1, "dense": 1.0}
    search = {"found": found, "settled": True}
    return [
        row | search | {"budget": budget, "macs": budget, "cost": costs.get(row["arm"].split()[0], 0.1)} | changed
        for row in of_seeds(TICKETS, seeds)
        for budget in ((1.0,) if row["arm"] == "dense" else (0.25, 0.1))
    ]


def growth_rows(accuracy=GROWTH, seeds: int = 3, cost: float = 0.4, **changed) -> list[dict]:
    history = [{"step": step, "from": 16 * i, "to": 32 * i} for i, step in ((1, 5), (2, 9))]
    shared = {"seed_width": 16, "share": 0.5, "settings": "", "params": 10, "seconds": 1.0, "history": history}
    sizes = {"dense": {"macs": 100, "training_macs": 1000}}
    small = {"macs": 50, "training_macs": 1000 * cost}
    return [row | shared | sizes.get(row["arm"], small) | changed for row in of_seeds(accuracy, seeds)]


CUTS = [{"classes": 9}, {"rows": 49_999}, {"epochs": 29}, {"width": 32}, {"seeds": 2}]


def ahead(ours: list[float], other: list[float]) -> str:
    """Mean difference and its standard error, seed by seed."""
    d = np.subtract(ours, other)
    return f"{d.mean():+.2f} (SE {np.sqrt(((d - d.mean()) ** 2).sum() / (len(d) - 1) / len(d)):.2f}"


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


def test_goals_need_every_arm_of_a_seed_and_the_narrowest_seed(tickets, growth):
    rows = [row for row in ticket_rows() if (row["arm"], row["seed"]) != ("random ticket, late", 2)]
    assert "2 seeds, supports no claim" in tickets.verdict(rows)[0]
    rows = [row for row in growth_rows() if (row["arm"], row["seed"]) != ("final from scratch", 2)]
    assert "2 seeds, supports no claim" in growth.verdict(rows)[0]
    assert "supports no claim" in growth.verdict(growth_rows(seed_width=8))[0]


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

SMALL = {
    "growth_cifar10": "--rows 96 --share .4 --seed-width 2 --set growth_rounds=1 growth_until=.5 growth_threshold=.01",
    "tickets_cifar10": "--rows 160 --budgets 0.25 --transfer-epochs 1",
}
ARMS = {
    "growth_cifar10": ("dense", "grown", "final from scratch", "uniform from scratch"),
    "tickets_cifar10": ("dense", "path ticket, late", "random ticket, late", "one-shot magnitude, init"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_from_end_to_end_and_rows_that_are_there_are_not_made_again(run, name):
    options = (name, *SMALL[name].split(), "--epochs", "2", "--arms", *ARMS[name])
    rows, printed, made = run(*options)
    main = [row for row in rows if "transfer" not in row]
    assert made == len(rows) and tuple(row["arm"] for row in main) == ARMS[name]
    assert "4 classes, " in printed and "2 epochs, " in printed and "supports no claim" in printed
    if name == "growth_cifar10":
        dense, grown, final, uniform = rows
        assert dense["training_macs"] == 3 * dense["macs"] * 16 * 12 and len(dense["curve"]) == 2
        assert final["widths"] == list(grown["units"].values()) and max(final["widths"]) > 2
        assert final["params"] == grown["params"] and final["macs"] == grown["macs"] <= 0.4 * dense["macs"]
        for row in (final, uniform):  # as many training MACs as growth took, but for less than a step
            assert 0 <= grown["training_macs"] - row["training_macs"] < 3 * row["macs"] * 16
    else:
        assert all(row["macs"] <= 0.25 and 0 < row["found"] <= 0.2 for row in main[1:3])
        assert [row["cost"] for row in main[1:]] == pytest.approx(
            [r["macs"] + r["found"] for r in main[1:3]] + [1 + main[3]["macs"]]
        )
        # its own search has half of the rows; two looks are too few to settle
        assert all(row["found"] == 0.2 for row in rows if "path" in row["arm"] and "transfer" in row)
    assert run(*options)[1:] == (printed, 0)


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
