"""Rounds of labelling: which rows are asked about, who answers, and how a run goes on."""

import csv
import json

import active_run
import pytest
import torch
from active_run import CLASSES, cloud, features, learner, train
from datasets import Dataset
from forked import Script

from hf_effdl import ActiveLearner, ColumnAnswers, CsvAnswers
from hf_effdl.samples.rounds.strategies import STRATEGIES, diverse, gradients_apart, next_rows, typical


def files(folder) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("round-*.json"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three rounds of every strategy."""
    found = {}
    for strategy in STRATEGIES:
        folder = tmp_path_factory.mktemp(strategy)
        made = learner(folder, strategy)
        assert made.run(3)
        found[strategy] = made, files(folder)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rounds_ask_about_new_rows_and_learn(whole, strategy):
    made, _ = whole[strategy]
    assert len(made.places) == len(set(made.places)) == 36 == len(made.labelled)
    pool = cloud()
    assert made.labelled["label"][:] == [pool["label"][i] for i in made.places]
    assert made.labelled["name"][:] == [f"row {i}" for i in made.places]
    assert [size for size, _ in made.curve] == [12, 24, 36] and made.curve[-1][1] > 0.8


def test_a_run_goes_on_after_every_file_as_if_it_had_not_stopped(whole, tmp_path):
    for strategy in ("default", "badge"):
        expected = whole[strategy][1]
        for rounds in (1, 2):
            folder = tmp_path / f"{strategy}-{rounds}"
            learner(folder, strategy).run(rounds)
            last = folder / f"round-{rounds - 1:04d}.json"
            step = json.loads(last.read_text())
            for kept in ({"asked"}, {"asked", "labels"}, {"asked", "labels", "score"}):
                gone = {"asked", "labels", "score"} - kept
                last.write_text(json.dumps({name: value for name, value in step.items() if name not in gone}))
                learner(folder, strategy).run(3)
                assert files(folder) == expected
                for later in sorted(folder.glob("round-*"))[rounds:]:
                    later.unlink()


def test_two_processes_ask_about_what_one_asks_about(whole, tmp_path):
    Script("active_run.py", tmp_path, "default", processes=2, env={"ACCELERATE_USE_CPU": "true"}).finish()
    assert files(tmp_path) == whole["default"][1]


# ---- a person


def fill(file, labels: dict[int, str], backwards: bool = False) -> None:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    for row in rows:
        row["label"] = labels.get(int(row["row"]), "")
    with open(file, "w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows[::-1] if backwards else rows)


def test_a_spreadsheet_is_written_filled_in_and_read_back(whole, tmp_path, capsys):
    pool = cloud().remove_columns("label")
    labels = {i: str(label) for i, label in enumerate(cloud()["label"])}

    def made() -> ActiveLearner:
        options = {"batch": 12, "embed": features, "evaluate": active_run.accuracy}
        return ActiveLearner(pool, train, CsvAnswers(tmp_path / "csv"), tmp_path / "rounds", **options)

    for number in range(3):
        assert not made().run(3)
        file = tmp_path / "csv" / f"asked-{number:04d}.csv"
        assert file.read_text(encoding="utf-8-sig").splitlines()[0] == "row,name,label"
        assert "12 of 12 labels are missing" in capsys.readouterr().out
        fill(file, dict(list(labels.items())[:60]))
        assert not made().run(3) or all(int(i) < 60 for i in made().history[number]["asked"])
        fill(file, labels, backwards=True)
    assert made().run(3)
    assert made().places == whole["default"][0].places
    assert [str(label) for label in whole["default"][0].labelled["label"]] == made().labelled["label"][:]


@pytest.mark.parametrize(
    "change, message",
    [(lambda rows: rows[:-1], "does not have the 12 rows"), (lambda rows: rows + rows[:1], "each once")],
)
def test_a_spreadsheet_with_other_rows_is_refused(change, message, tmp_path):
    answers = CsvAnswers(tmp_path / "csv")
    learner(tmp_path / "rounds", answers=answers).run(1)
    file = tmp_path / "csv" / "asked-0000.csv"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *change(rows)]))
    with pytest.raises(ValueError, match=message):
        learner(tmp_path / "rounds", answers=answers).run(1)
    file.write_text(f"{head}\n" + "x" * 140_000)
    with pytest.raises(ValueError, match="is no table .*field larger than field limit"):
        learner(tmp_path / "rounds", answers=answers).run(1)
    file.write_text("place,class\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns 'row' and 'label'"):
        learner(tmp_path / "rounds", answers=answers).run(1)


# ---- strategies


def test_badge_draws_apart_in_the_space_of_gradients():
    p = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    x[10:] = x[9]  # twenty rows with one gradient
    p[10:] = p[9]
    for seed in range(5):
        chosen = gradients_apart(p, x, 10, seed)
        assert (chosen >= 9).sum() <= 1 and len(chosen.unique()) == 10
    error = p - torch.nn.functional.one_hot(p.argmax(1), 4)
    longest = (error[:, :, None] * x[:, None]).flatten(1).norm(dim=1).argmax()
    assert gradients_apart(p, x, 1, 0).tolist() == [int(longest)]


def test_typical_rows_come_from_clusters_without_labels():
    centre = 5 * torch.eye(8)[torch.arange(80) % 4]
    x = centre + torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    x[0] = 5 * torch.eye(8)[0] + 20 * torch.eye(8)[6]  # far out
    labelled = torch.arange(80) == 1
    chosen = (~labelled).nonzero().flatten()[typical(x, labelled, 3, 0)]
    assert sorted((chosen % 4).tolist()) == [0, 2, 3] and 0 not in chosen


def test_rows_with_small_margins_are_spread_over_the_features():
    x = torch.eye(6).repeat_interleave(10, 0) + 0.01 * torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    margins = torch.rand(60, generator=torch.Generator().manual_seed(1)) / 2 + 0.5
    margins[::10] = 0.1  # one in each place, of which the first has many more
    margins[1:4] = 0.0
    assert sorted(diverse(margins, x, 6, 0).tolist())[3:] == [30, 40, 50]
    assert len(set(diverse(margins, torch.ones(60, 2), 6, 0).tolist())) == 6
    assert diverse(margins, x, 60, 0).unique().numel() == 60


def test_the_largest_scores_are_taken_and_the_regime_follows_the_accuracy():
    table = {"entropy": torch.arange(10.0), "margin": torch.arange(10.0), "u_x": torch.rand(10)}
    labelled = torch.arange(10) >= 8
    assert next_rows("entropy", 3, labelled, table=table).tolist() == [5, 6, 7]
    assert next_rows("margin", 3, labelled, table=table).tolist() == [0, 1, 2]
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    for accuracy, strategy in ((0.5, "typical"), (0.95, "diverse"), (None, "typical")):
        found = next_rows("default", 4, labelled, x, table, accuracy=accuracy)
        assert found.equal(next_rows(strategy, 4, labelled, x, table))


# ---- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, "batch=0"),
        ({"strategy": "best"}, "strategy='best'"),
        ({"pool": Dataset.from_dict({"features": []})}, "with rows"),
        ({"answers": lambda rows, places, number: [1]}, "1 labels for 12 rows"),
        ({"train": lambda rows, seed: 3}, "train returned a int"),
        ({"embed": None, "strategy": "badge", "train": "whole"}, "needs features"),
        ({"answers": "label"}, "answers is a str: pass a function"),
        ({"train": None}, "train is a NoneType"),
        ({"answers": lambda *given: "a" * 12}, "answers gave a str; give a list"),
        ({"answers": lambda rows, *given: dict.fromkeys(range(12), 0)}, "answers gave a dict"),
        ({"answers": lambda *given: [0.5] * 12}, "answers gave 0.5 among the labels"),
        ({"answers": lambda *given: [[float("inf")]] * 12}, r"answers gave \[inf\] among the labels"),
        ({"answers": lambda *given: [object()] * 12}, "answers gave <object object"),
        ({"answers": lambda *given: ["a"] + [0] * 11}, "answers gave 'a' among the labels; .* all texts"),
        ({"answers": ColumnAnswers("class")}, "the pool has no column 'class'"),
        ({"embed": lambda rows: torch.ones(3, 2)}, r"shape \(3, 2\).*vector for each of the 120 rows"),
        ({"embed": lambda rows: torch.full((120, 2), torch.nan)}, "NaN"),
        ({"evaluate": lambda probes: "good"}, "evaluate='good': it must be a number"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, message, tmp_path):
    from hf_effdl import Probes

    options = {
        "pool": cloud(),
        "train": train,
        "answers": ColumnAnswers(),
        "output_dir": tmp_path,
        "batch": 12,
    } | changes
    if options["train"] == "whole":
        heads = [torch.nn.Linear(5, CLASSES) for _ in range(2)]
        options["train"] = lambda rows, seed: Probes(heads, None, "features")
    with pytest.raises((ValueError, TypeError), match=message):
        ActiveLearner(**options).run(2)


def test_rounds_of_another_run_are_not_gone_on_with(tmp_path):
    learner(tmp_path).run(1)
    with pytest.raises(ValueError, match="another strategy"):
        learner(tmp_path, "random")
    with pytest.raises(ValueError, match="another pool"):
        ActiveLearner(cloud(seed=5), train, ColumnAnswers(), tmp_path, batch=12)
    (tmp_path / "round-0000.json").write_text("{")
    with pytest.raises(ValueError, match="round-0000.json is damaged"):
        learner(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"asked": [1.5] * 12},
        {"asked": [10**6, *range(11)]},
        {"asked": [0] * 12},
        {"labels": [0]},
        {"number": 7},
        {"asked": "again"},
    ],
)
def test_rounds_that_are_none_are_refused(change, tmp_path):
    learner(tmp_path, "random").run(2)
    file = tmp_path / "round-0001.json"
    first, step = (json.loads(one.read_text()) for one in (tmp_path / "round-0000.json", file))
    change = {"asked": first["asked"]} if change == {"asked": "again"} else change
    file.write_text(json.dumps(step | change))
    with pytest.raises(ValueError, match="round-0001.json is damaged"):
        learner(tmp_path, "random")
    file.write_text("[1]")
    with pytest.raises(ValueError, match="it holds no round"):
        learner(tmp_path, "random")


def test_two_runs_do_not_write_over_each_other(tmp_path):
    mine, other = learner(tmp_path, "random"), learner(tmp_path, "margin")  # before there is a round
    mine.run(2)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="another strategy"):
        other.run(1)
    assert files(tmp_path) == before and learner(tmp_path, "random").run(3)


def test_a_run_that_began_beside_another_takes_nothing_back(tmp_path):
    late = learner(tmp_path, "random", answers=lambda rows, *given: [2] * len(rows))  # before there is a round
    learner(tmp_path, "random").run(2)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="round-0000.json has another labels and score by now: two runs"):
        late.run(1)
    assert files(tmp_path) == before
    asked = {name: value for name, value in before["round-0000.json"].items() if name not in ("labels", "score")}
    (tmp_path / "round-0000.json").write_text(json.dumps(asked))
    with pytest.raises(ValueError, match="round-0001.json is damaged .it is no round after those before it"):
        learner(tmp_path, "random")


@pytest.mark.parametrize("mark", [True, False])
def test_answers_about_rows_of_another_pool_are_not_taken(mark, tmp_path):
    """Two pools of one length are asked about the same places."""
    answers, pools = CsvAnswers(tmp_path), [Dataset.from_dict({"name": list(names)}) for names in ("abc", "abd")]
    assert answers(pools[0], [4, 5, 6], 0) is None
    file = tmp_path / "asked-0000.csv"
    file.write_text("row,label\n6,x\n5,y\n4,z\n")
    assert answers(pools[0], [4, 5, 6], 0) == ["z", "y", "x"]
    if not mark:  # of an earlier version
        (tmp_path / ".asked-0000.csv.sha256").unlink()
        assert answers(pools[1], [4, 5, 6], 0) == ["z", "y", "x"]
        return
    with pytest.raises(ValueError, match="asked-0000.csv asks about rows of another pool"):
        answers(pools[1], [4, 5, 6], 0)
    file.unlink()
    assert answers(pools[1], [4, 5, 6], 0) is None and "d" in file.read_text()


def test_a_wrong_answer_is_not_kept(tmp_path):
    made = learner(tmp_path, "random", answers=lambda rows, *given: [object()] * len(rows))
    with pytest.raises(TypeError, match="among the labels"):
        made.run(1)
    assert made.labelled.column_names == ["features", "name"] and len(made.labelled) == 0
    made.answers = ColumnAnswers()
    assert made.run(2) and learner(tmp_path, "random").history == made.history


@pytest.mark.parametrize(
    "changes, message",
    [({"columns": "name"}, "columns"), ({"columns": [1]}, "columns"), ({"columns": 0}, "columns")]
    + [({"label_column": []}, "label_column"), ({"columns": ["nmae"]}, "the pool has no column 'nmae'")],
)
def test_columns_to_show_are_names_that_the_pool_has(changes, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        learner(tmp_path, answers=CsvAnswers(tmp_path / "csv", **changes)).run(1)
    with pytest.raises(TypeError, match="column"):
        ColumnAnswers(3)
    learner(tmp_path, answers=CsvAnswers(tmp_path / "none", columns=[])).run(1)
    assert (tmp_path / "none" / "asked-0000.csv").read_text(encoding="utf-8-sig").startswith("row,label\n")


@pytest.mark.parametrize("comma, encoding", [(";", "utf-8"), ("\t", "utf-8-sig"), (",", "utf-16"), (";", "cp1252")])
def test_spreadsheets_of_other_countries_are_read(comma, encoding, tmp_path):
    answers = CsvAnswers(tmp_path / "csv", columns=["name"])
    learner(tmp_path / "rounds", answers=answers).run(1)
    file = tmp_path / "csv" / "asked-0000.csv"
    rows = [line.split(",") for line in file.read_text(encoding="utf-8-sig").splitlines()]
    rows[1:] = [[place, "Zürich", "1"] for place, *_ in rows[1:]]
    file.write_bytes("\r\n".join(comma.join(row) for row in rows).encode(encoding))
    if encoding == "cp1252":
        with pytest.raises(ValueError, match="is no text in UTF-8 .*save it as 'CSV UTF-8'"):
            learner(tmp_path / "rounds", answers=answers).run(1)
        return
    places = learner(tmp_path / "rounds", answers=answers).history[0]["asked"]
    assert answers(cloud().select(places), places, 0) == ["1"] * 12


def test_a_pool_that_is_used_up_ends_the_run(tmp_path):
    made = learner(tmp_path, "random", batch=50)
    assert made.run(9) and len(made.places) == 120 and len(made.history) == 3


def test_an_answer_that_training_refuses_can_be_mended(tmp_path):
    def strict(rows, seed):
        if not all(label.isdigit() for label in rows["label"][:] if rows.num_rows):
            raise ValueError("no number")
        return train(rows, seed)

    def made() -> ActiveLearner:
        pool, answers = cloud().remove_columns("label"), CsvAnswers(tmp_path / "csv")
        return ActiveLearner(pool, strict, answers, tmp_path / "rounds", batch=12, embed=features)

    labels, file = {i: str(label) for i, label in enumerate(cloud()["label"])}, tmp_path / "csv" / "asked-0000.csv"
    assert not made().run(1)
    fill(file, dict.fromkeys(labels, "seven"))
    for _ in range(2):
        with pytest.raises(ValueError, match="no number") as caught:
            made().run(1)
    (last,) = (tmp_path / "rounds").glob("round-*")
    assert f"labels in {last}" in caught.value.__notes__[0]
    fill(file, labels)
    last.unlink()
    assert made().run(1)
