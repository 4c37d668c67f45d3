"""Rows of results: the file they stand in, the tables of those that are committed, and that none is made twice."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import FOLDER, importable


# script -> start of the SHA-256 of the table that it prints of its committed rows, and a line of it
TABLES = {
    "active_rounds": ("f847ec91f5ad3adc", "| diverse | 0.8846 |"),
    "growth_mnist": ("d5e089b73e11b019", "MNIST, 60,000 rows, 6 epochs"),
    "lora_ranks_banking77": ("a8bb76a7ac2424f3", "| 0.0625 | path, columns | "),
    "lora_ranks_smollm2": ("54f12abe9021c7d2", "| 0.0625 | path | 304,800 |"),
    "pool_scale": ("4553905212a8ac3d", "| rows | noise | probes |"),
    "pretrained_minilm": ("8f826cb0e364feca", "| 25% | obs | "),
    "pretrained_dinov2": ("ab7ac8771074ff19", "| 50% | 64 | activation | yes | "),
    "pretrained_smollm2": ("32e15e38fd236f85", "| ffn:0.75 | obs | wikitext, 128 tokens |"),
    "pretrained_resnet20": ("823acc1f815f0c75", "| 48.5% | activation | yes | "),
    "recipe_cifar10": ("2e4df3faedd59f9a", "| path, even order | "),
    "recipe_mnist": ("c1453b9703ee2d65", "| scratch, uniform widths, equal MACs |"),
    "sampling_scale": ("97a6552bd4990ef7", "| plan_shards | "),
    "scaling": ("00cafb2d0c50efe1", "| scoring | 1,024 | 2 | "),
    "selection_banking77": ("c04c1bfe9c22f9e3", "| P default + probe set, p_label |"),
    "selection_cifar10n": ("8f7c7686dea0e784", "| worse | 4062 | cleanlab, as many | "),
    "scoring_overhead": ("474fa450df782b8c", "| ProbeScorer, score_shards | 8,000 | "),
    "selection_digits": ("7d7049977f899d91", "| AUM, CCS (pool) |"),
    "selection_sft": ("eb8097aedacf45a0", "| clean (3 seeds) | "),
    "selection_speed": ("7294282fa1fe70a0", "| hodge | "),
    "slim_latency": ("c058d19617ff1d8e", "resnet18: medians over seeds"),
    "structure_cifar10": ("85f3bec7b5358de2", "supports no claim"),
    "structure_mnist": ("f4ce9637a47a6b60", "| path, early | "),
    "tickets_settling": ("f47919cce32baea1", "| all | 1/50 | forecast | 52 of 80 | 5 |"),
    "tickets_mnist": ("ba4ef91e0d5c1d1e", "| path ticket, late (5 seeds) |"),
    "vicl_digits": ("e128df34e7f403f0", "segmentation, oracle less nearest: "),
    "vicl_classes": ("9f57bcbca1939255", "cascade of all classes, ahead of one for each class: +0.0"),
    "vicl_cutouts": ("cf2f963103d900fe", "| auto | 10 | 0.8964 | 77.0 ± 5.4 |"),
    "vicl_matching": ("aca2439b359ef955", "| pets | DINOv2-small | soft, several layers | "),
    "vicl_throughput": ("7a13457369217782", "SAM 2, Hiera-tiny, 10 examples: 3.52 times as fast"),
    "whole": ("7e568acf614610de", "| chosen, 90 | 4 ± 1 | smaller | "),
    "vicl_pets": ("fb8683ba0231a518", "| cascade 10, weighted | 10 |"),
}


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    with importable():
        yield


# ---- the file


def test_rows_come_back_and_a_cut_line_is_none(tmp_path, capsys):
    from rows import append_rows, read_rows

    file = tmp_path / "new" / "rows.jsonl"
    assert read_rows(file) == []
    rows = [{"arm": "ä", "seed": 1, "curve": [0.1, None]}, {"arm": "b", "seed": 2}]
    append_rows(file, rows)
    assert read_rows(file) == rows and file.read_bytes().endswith(b"}\n")
    text = file.read_bytes()
    file.write_bytes(text[:-5])  # killed while it wrote
    assert read_rows(file) == rows[:1] and "left out: a cut line" in capsys.readouterr().err
    append_rows(file, [{"arm": "c"}])
    assert read_rows(file) == [rows[0], {"arm": "c"}] and file.read_bytes().startswith(text[:-5] + b"\n")


def test_a_row_is_found_by_its_key_among_those_of_its_settings(tmp_path, capsys):
    from rows import RowFile

    file = tmp_path / "rows.jsonl"
    RowFile(file, ("arm",)).add({"arm": "a", "epochs": 3}, {"arm": "b", "epochs": 6})
    rows = RowFile(file, ("arm", "seed"), {"epochs": 3})
    assert ("a", None) in rows and ("b", None) not in rows and len(rows.rows) == 2
    assert not capsys.readouterr().err
    rows.add({"arm": "b", "seed": 1, "epochs": 3, "curve": [1]}, hide=("curve",))
    assert ("b", 1) in rows and json.loads(capsys.readouterr().err) == {"arm": "b", "seed": 1, "epochs": 3}
    assert RowFile(file, ("arm", "seed")).rows == rows.rows


def test_a_mean_has_an_error_from_two_values_on():
    from rows import mean_and_error

    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))
    assert (
        mean_and_error([4.0])[0] == 4.0 and np.isnan(mean_and_error([4.0])[1]) and np.isnan(mean_and_error([])).all()
    )


# ---- committed rows


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_rows_print_this_table(name, capsys):
    importlib.import_module(name).main(["--table", "--out", str(FOLDER / "results" / f"{name}.jsonl")])
    printed = capsys.readouterr().out
    digest, line = TABLES[name]
    assert line in printed
    assert hashlib.sha256(printed.encode()).hexdigest()[:16] == digest, f"another table than before:\n{printed}"


def test_every_file_of_rows_with_a_table_is_among_them():
    without = {"optimizer_step", "train_overhead"}  # print what they measured, and nothing of earlier rows
    assert {file.stem for file in (FOLDER / "results").glob("*.jsonl")} == set(TABLES) | without


# ---- rows that are there are not made again


BUDGETS = ("0.5", "0.25", "0.1")
Maker = Callable[[Any, pytest.MonkeyPatch, list], list[str]]


def images_of(*sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*sizes), torch.arange(sizes[0]) % 10


def structure_row(*given: Any) -> dict:
    cell = {"before": 50.0, "after": 90.0, "macs": 0.1, "params": 0.1, "latency": 0.5}
    row = {"net": given[0], "arm": given[1], "seed": given[2], "dense": 99.0, "seconds": 1.0}
    return row | {"budgets": {budget: cell for budget in BUDGETS}}


def structure_mnist(script, patch, made) -> list[str]:
    patch.setattr(script, "mnist", lambda split, net="": images_of(40, 1, 2, 2))
    patch.setattr(script, "one_row", lambda *given: made.append(given[1:3]) or structure_row(*given))
    return ["--arms", "path, early", "global L2", "--seeds", "2"]


def recipe_row(run, arm, seed, budget, searched) -> dict:
    row = {"net": run.net, "budget": budget, "arm": arm, "seed": seed, "before": 50.0, "after": 90.0 + seed}
    return row | {"macs": budget, "cost": 0.3, "found": 0.2, "settled": False}


def recipe_mnist(script, patch, made) -> list[str]:
    patch.setattr(script, "mnist", lambda split, net="": images_of(40, 1, 2, 2))
    patch.setattr(script, "one_row", lambda *given: made.append(given[1:4]) or recipe_row(*given))
    return ["--arms", "path", "random", "scratch, uniform widths", "--seeds", "6", "7"]


def growth_row(setting, arm, seed, grown) -> dict:
    row = {"accuracy": 90.0, "params": 10, "seconds": 1.0, "macs": 5, "training_macs": 100.0}
    return row | ({"history": [{"step": 3, "from": 2, "to": 4}], "curve": []} if arm == "grown" else {})


def growth_mnist(script, patch, made) -> list[str]:
    patch.setattr(script, "mnist", lambda split, net="": images_of(40, 1, 2, 2))
    arms = sys.modules["growth_arms"]
    patch.setattr(arms, "one_row", lambda *given: made.append(given[1:3]) or growth_row(*given))
    return ["--arms", "dense", "grown", "final from scratch", "--seeds", "1", "2", "--rows", "40"]


def ticket_rows(setting, seed, done, cache, made) -> Iterator[dict]:
    for arm, budget in (("dense", 1.0), ("path ticket, late", 0.25), ("random ticket, late", 0.25)):
        if (arm, seed, budget) not in done:
            made.append((arm, seed))
            row = {"arm": arm, "seed": seed, "budget": budget, "macs": budget, "cost": 1.0, "accuracy": 90.0}
            yield setting.config | row | {"net": setting.net, "found": 0.1, "settled": True}


def moved_row(setting, seed, made) -> dict:
    made.append(("transfer", seed))
    row = {"arm": "path ticket, late", "seed": seed, "budget": 0.25, "transfer": True, "accuracy": 80.0}
    return setting.config | row | {"net": setting.net}


def tickets_mnist(script, patch, made) -> list[str]:
    patch.setattr(script, "mnist", lambda split, net="": images_of(40, 1, 2, 2))
    patch.setattr(script, "rows_of_seed", lambda *given: ticket_rows(*given, made))
    patch.setattr(script, "transfer_rows", lambda setting, seed, *given, **named: [moved_row(setting, seed, made)])
    return ["--seeds", "1", "2"]


def tickets_settling(script, patch, made) -> list[str]:
    def looks_of(task, seed) -> list[dict]:
        made.append(seed)
        one = dict.fromkeys(script.BUDGETS, "8:c0")
        return [{"step": k, "path": k / 40, "selections": one} for k in range(1, 41)]

    patch.setattr(script, "looks_of", looks_of)
    return ["--seeds", "1", "2"]


def selected(arm: str, **key: Any) -> dict:
    facts = {"regime": "agreement", "trial": None, "conf10": 0.2, "mix": 0.2} if arm == "default" else {}
    return key | {"arm": arm, "accuracy": 0.9 - 0.1 * (arm != "default")} | facts


def selection_digits(script, patch, made) -> list[str]:
    def run(pair, cell, arms):
        made.extend((str(cell), arm, pair) for arm in arms)
        return [selected(arm, cell=str(cell), pair=pair) for arm in arms]

    patch.setattr(script, "Pair", lambda cell, number: number)
    patch.setattr(script, "run", run)
    return ["--arms", "default", "A uniform by class", "--pairs", "2"]


def selection_banking77(script, patch, made) -> list[str]:
    patch.setattr(script, "read", lambda: SimpleNamespace(names=["a", "b"]))
    patch.setattr(script, "features", lambda *given: None)
    patch.setattr(script, "Pair", lambda texts, x, flips, number, *others: number)
    patch.setattr(script, "run", lambda pair, r, arm: made.append((pair, r, arm)) or selected(arm))
    return ["--arms", "default", "A uniform by class", "whole pool", "--pairs", "2", "--flips", "0.2"]


def selection_cifar10n(script, patch, made) -> list[str]:
    def suspects(pair) -> dict:
        made.append((pair, "suspects"))
        return {"wrong": 4} | {
            f"{name}{what}": 0.5 for name in script.PARTS for what in ("", ", precision", ", recall")
        }

    patch.setattr(script, "features", lambda *given: None)
    patch.setattr(script, "people", lambda *given: {})
    patch.setattr(script, "cifar10", lambda *given: (None, np.zeros(3, np.int64)))
    patch.setattr(script, "PeoplePair", lambda x, labels, test, noise, number: number)
    patch.setattr(script, "suspects", suspects)
    patch.setattr(script, "run", lambda pair, r, arm: made.append((pair, r, arm)) or selected(arm))
    arms = ["default", "A uniform by class", script.SUSPECTS]
    return ["--arms", *arms, "--pairs", "2", "--noise", "worse", "clean"]


def scoring_overhead(script, patch, made) -> list[str]:
    def overhead(arm, rows, options) -> dict:
        made.append((arm, rows))
        return {"passes": 8, "ratio": 1.01, "rows a second": 5.0, "once, s": [0.1]}

    patch.setattr(script, "overhead", overhead)
    return ["--rows", "9"]


def vicl_digits(script, patch, made) -> list[str]:
    scores = {"random": 0.2, "nearest": 0.4, "cascade": 0.6, "oracle of the 50": 0.8}
    patch.setattr(script, "SegGptForImageSegmentation", SimpleNamespace(from_pretrained=lambda folder: None))
    patch.setattr(script, "SegGptInContext", lambda model: None)
    patch.setattr(script, "VisualInContextModel", SimpleNamespace(from_parts=lambda frozen, task: task))
    scores = {arm: [score] for arm, score in scores.items()}
    patch.setattr(script, "run", lambda task, *given: made.append((task, *given[:3])) or scores)
    return ["--tasks", "segmentation", "--seeds", "2", "--queries", "3", "--pool", "5"]


def vicl_pets(script, patch, made) -> list[str]:
    task = SimpleNamespace(name="segmentation", metric="IoU")
    photos = SimpleNamespace(task=task, pool=range(12), names=[])
    scores = {"random": 0.2, "nearest": 0.4, "cascade": 0.6, "oracle of the 50": 0.8}
    patch.setattr(script, "VisionEncoder", SimpleNamespace(from_pretrained=lambda *given, **named: None))
    patch.setattr(script, "read_photos", lambda *given: None)
    patch.setattr(script, "prepare", lambda *given: photos)
    patch.setattr(script, "without_copies", lambda photos, queries, members, *given: members)
    patch.setattr(script, "run_fold", lambda *given, **named: made.append(given[3].name) or scores)
    return ["--tasks", "segmentation", "--frozen", "soft", "--seeds", "2", "--photos", "12"]


def selection_speed(script, patch, made) -> list[str]:
    def measure(options, wanted):
        case = {"part": "aggregation", "method": "hodge", "candidates": 5, "queries": 3, "lists": 4}
        for way in ("batched", "one by one"):
            if wanted(case | {"way": way}):
                made.append(way)
                yield case | {"way": way, "timed": 3, "seconds": 1.5}

    patch.setattr(script, "MEASURE", {"aggregation": measure})
    return ["--parts", "aggregation"]


def slim_latency(script, patch, made) -> list[str]:
    def one_row(net, arm, seed, device):
        made.append((net, arm, seed))
        times = {f"{kind} {batch}": 0.6 for kind in ("latency", "beside stock") for batch in script.BATCHES}
        return {"net": net, "arm": arm, "seed": seed, "macs": 0.5, "units": {}, **times}

    patch.setattr(script, "one_row", one_row)
    return ["--seeds", "2", "--nets", "resnet18"]


def arms_made(script, patch, made) -> list[str]:
    """Both scripts on pretrained models, with arms that nothing is computed for."""

    def smaller(model, groups, share, score, batches, seed, *_, **__) -> list:
        made.append((share, score, seed))
        return [SimpleNamespace(model=None, refit=refit, facts={"held-out error": 0.1}) for refit in (False, True)]

    patch.setattr(script, "smaller", smaller)
    return ["--arms", "random", "obs", "--seeds", "0", "1", "--kept", "0.5"]


def pretrained_minilm(script, patch, made) -> list[str]:
    def run(texts, seed, *given) -> SimpleNamespace:
        speed = {"macs": 0.5, "latency 1": 0.5, "latency 32": 0.5}
        told = {"after": lambda model, epochs, *_: 90.0 - epochs, "speed": lambda *_: speed}
        told |= {"groups": [], "members": {None: []}, "calibration": [], "calibrated_on": None}
        return SimpleNamespace(seed=seed, model=None, **told)

    patch.setattr(script, "read", lambda: None)
    patch.setattr(script, "Run", run)
    return arms_made(script, patch, made)


def pretrained_dinov2(script, patch, made) -> list[str]:
    model = SimpleNamespace(eval=lambda: SimpleNamespace(config=SimpleNamespace(hidden_size=4, mlp_ratio=4)))
    patch.setattr(script, "AutoModel", SimpleNamespace(from_pretrained=lambda name: model))
    patch.setattr(script, "read", lambda *given: script.Photos([], [images_of(2, 1)[0]], images_of(4)[1], None))
    patch.setattr(script, "by_example", lambda *given: {"IoU nearest": 0.5, "IoU best": 0.6})
    patch.setattr(script, "find_groups", lambda *given: [])
    patch.setattr(script, "sized", lambda *given: [])
    patch.setattr(script, "features", lambda *given: torch.ones(4, 3, 2))
    return arms_made(script, patch, made)


def whole(script, patch, made) -> list[str]:
    def one_row(options, photos, kind, model, rate, seed) -> dict:
        made.append((kind, model, seed))
        return dict.fromkeys(script.MEASURES, 0.5) | {"rows used": 9, "wrong": 0.2}

    patch.setattr(script, "read", lambda seed: "photos")
    patch.setattr(script, "one_row", one_row)
    return ["--seeds", "0", "1"]


def pretrained_resnet20(script, patch, made) -> list[str]:
    patch.setattr(script, "trained", lambda file: None)
    patch.setattr(script, "read", lambda *given: script.Images([], [{"pixel_values": torch.zeros(1, 3, 2, 2)}]))
    patch.setattr(script, "find_groups", lambda *given: [])
    patch.setattr(script, "share_for", lambda groups, budget: (budget, budget))
    patch.setattr(script, "accuracy", lambda *given: 90.0)
    patch.setattr(script, "recalibrate_batch_norm", lambda *given: None)
    return [*arms_made(script, patch, made)[:-2], "--budgets", "0.5"]


MAKERS: tuple[Maker, ...] = (growth_mnist, selection_banking77, selection_digits, selection_speed, slim_latency)
MAKERS += (pretrained_dinov2, pretrained_minilm, pretrained_resnet20, recipe_mnist)
MAKERS += (scoring_overhead, selection_cifar10n, structure_mnist, tickets_mnist, tickets_settling)
MAKERS += (vicl_digits, vicl_pets, whole)
MADE_UP = {maker.__name__: maker for maker in MAKERS}


@pytest.mark.parametrize("name", MADE_UP)
def test_rows_that_are_there_are_not_made_again(name, tmp_path: Path, capsys, monkeypatch):
    made: list = []
    script = importlib.import_module(name)
    file = tmp_path / "rows.jsonl"
    arguments = [*MADE_UP[name](script, monkeypatch, made), "--out", str(file)]
    if name in ("vicl_pets", "selection_speed", "selection_banking77"):
        option = "--work" if name == "selection_banking77" else "--cache"
        arguments += [option, str(tmp_path / "cache")]
    script.main(arguments)
    first, table, text = list(made), capsys.readouterr().out, file.read_text()
    assert len(first) > 1 and table.count("|") > 10
    script.main(arguments)
    again = capsys.readouterr().out
    assert made == first and file.read_text() == text and table.endswith(again)
    script.main([*arguments, "--table"])
    assert capsys.readouterr().out == again
    # a run killed in its last row makes that row alone again; all arms of a seed are one row here
    lines = text.splitlines(keepends=True)
    lost = 4 if name.startswith("vicl") else 1
    file.write_text("".join(lines[:-lost]) + lines[-lost][:-20])
    script.main(arguments)
    more = made[len(first) :]
    assert len(first) > len(more) > 0 and more == first[-len(more) :]
    assert len(file.read_text().splitlines()) == len(lines) + 1 and capsys.readouterr().out.endswith(again)
