"""Selections as files and on a Hub over HTTP: pushed, described, loaded back and drawn again in fresh processes."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from hub import LoopbackHub

from hf_effdl import LinearProbes, Selection, UncertaintySelector, load_selection, make_plan
from hf_effdl.samples.selection.files import records
from hf_effdl.samples.selection.source import source_of


def rows(count: int, seed: int) -> dict[str, list]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(3, (count,), generator=generator)
    x = torch.eye(3)[label] + 0.5 * torch.randn(count, 3, generator=generator)
    label[::7] = (label[::7] + 1) % 3  # wrong ones, which are to be suspected
    return {
        "x": x.tolist(),
        "label": label.tolist(),
        "number": list(range(1000, 1000 + count)),
        "name": [f"row {i}" for i in range(count)],
    }


def dataset(count: int, seed: int) -> Dataset:
    return Dataset.from_dict(rows(count, seed)).cast_column("label", ClassLabel(names=["a|b", "c", "d"]))


@pytest.fixture(scope="module")
def pool():
    return dataset(120, 0)


@pytest.fixture(scope="module")
def probes():
    return LinearProbes.train(None, dataset(60, 1), input_column="x", steps=50)


@pytest.fixture
def selector(probes):
    return UncertaintySelector(probes, trial=False)


# ---- files


@pytest.mark.parametrize(
    "options", [{}, {"preset": "paper"}, {"mode": "active"}, {"id_column": "name"}, {"id_column": "number"}]
)
def test_a_saved_selection_gives_the_same_rows(pool, probes, tmp_path, options):
    selector = UncertaintySelector(probes, trial=False, **options)
    subset = selector.select(pool, 20)
    selector.selection.save(tmp_path)
    loaded = Selection.load(tmp_path)
    plan, saved = loaded.plan, selector.selection
    for name in ("positions", "weights", "probabilities"):
        assert getattr(plan, name).dtype == getattr(saved.plan, name).dtype
        assert torch.equal(getattr(plan, name).nan_to_num(-1), getattr(saved.plan, name).nan_to_num(-1))
    assert plan.probabilities.isnan().all() == (options == {"preset": "paper"})
    assert (plan.rows, plan.settings, loaded.info) == (saved.plan.rows, saved.plan.settings, saved.info)
    assert (loaded.names, loaded.row_ids) == (saved.names, saved.row_ids)
    assert loaded.table.keys() == saved.scores().keys() and "label" not in loaded.table
    for name, column in loaded.table.items():
        assert column.dtype == saved.table[name].dtype and column.equal(saved.table[name])
    source = pool.shuffle(seed=3) if "id_column" in options else pool
    found = load_selection(tmp_path, source)
    assert str(found.to_dict()) == str(subset.to_dict())


def test_what_is_stored_holds_nothing_of_the_source(selector, pool, tmp_path):
    selector.select(pool, 20)
    folder = selector.selection.save(tmp_path)
    scores = Dataset.from_parquet(str(tmp_path / "scores" / "scores.parquet"))
    chosen = Dataset.from_parquet(str(folder / "selection.parquet"))
    assert not {"x", "label", "number", "name"} & {*scores.column_names, *chosen.column_names}
    assert len(scores) == 120 and len(chosen) == 20 and set(chosen["row_id"][:]) <= set(scores["row_id"][:])
    assert "row_id" not in (folder / "selection.json").read_text()
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {
        "selection.json",
        "selection.parquet",
        "scores.parquet",
        "scores.sha256",
    }


def test_budgets_share_scores_and_other_scores_get_their_own_name(selector, probes, pool, tmp_path):
    scored = selector.score(pool)
    for rows_ in (20, 40):
        selector.plan(scored, rows_).save(tmp_path, f"r{rows_}")
    paper = UncertaintySelector(probes, preset="paper")
    paper.select(pool, 20)
    paper.selection.save(tmp_path, "paper")
    places = {name: record["scores"]["config"] for name, record in records(tmp_path).items()}
    assert places["r20"] == places["r40"] == "scores" and re.fullmatch("scores-[0-9a-f]{8}", places["paper"])
    for name, count in (("r20", 20), ("r40", 40), ("paper", 20)):
        loaded = Selection.load(tmp_path, name)
        assert len(loaded) == count
        assert loaded.table["u_x"].equal((paper if name == "paper" else selector).selection.table["u_x"])
    # the same name again: its scores must not take the place of those that r40 needs
    paper.selection.save(tmp_path, "r20")
    assert torch.equal(Selection.load(tmp_path, "r40").table["u_x"], selector.selection.table["u_x"])
    assert torch.equal(Selection.load(tmp_path, "r20").table["u_x"], paper.selection.table["u_x"])


def test_a_write_that_was_cut_off_is_noticed(selector, pool, tmp_path):
    selector.select(pool, 20)
    selector.selection.save(tmp_path)
    selector.select(pool, 30)
    target = tmp_path / "default" / "selection.parquet"
    selector.selection.to_dataset().to_parquet(target)
    with pytest.raises(ValueError, match="do not belong together"):
        Selection.load(tmp_path)
    target.unlink()
    with pytest.raises(FileNotFoundError, match="selection.parquet is missing"):
        Selection.load(tmp_path)


def test_a_selection_with_numbers_of_numpy_is_written_as_pythons_own(selector, pool, tmp_path):
    selector.select(pool, 20)
    selection = selector.selection
    selection.save(tmp_path / "python")
    settings = selection.plan.settings | {"seed": np.int64(selection.plan.settings["seed"])}
    numbers = replace(
        selection, plan=replace(selection.plan, settings=settings), info=selection.info | {"cut": np.float32(0.5)}
    )
    numbers.save(tmp_path / "numpy")
    read = Selection.load(tmp_path / "numpy")
    assert read.plan.settings == Selection.load(tmp_path / "python").plan.settings and read.info["cut"] == 0.5


def test_a_changed_number_or_name_in_the_record_is_damage(selector, pool, tmp_path):
    selector.select(pool, 20)
    record = selector.selection.save(tmp_path) / "selection.json"
    text = record.read_text()
    for old, new in (('"budget": 20', '"budget": 21'), ('"budget"', '"bucket"'), ('"sha256"', '"sha257"')):
        record.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match="selection.json is damaged"):
            Selection.load(tmp_path)


def test_wrong_folders_are_refused_by_name(selector, pool, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no selection"):
        Selection.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Selection.load(tmp_path / "absent")
    selector.select(pool, 20)
    folder = selector.selection.save(tmp_path, "r20")
    with pytest.raises(ValueError, match=r"no config_name='default'; it has \['r20'\]"):
        load_selection(tmp_path)
    for name in ("", "scores", "scores-1", "a/b", "..", ".hidden"):
        with pytest.raises(ValueError, match="config_name="):
            selector.selection.save(tmp_path, name)
    record = json.loads((folder / "selection.json").read_text())
    for change, text in (
        ({"format": 2}, "format 2 and this version of hf_effdl reads 1"),
        ({"scores": {"config": "../../elsewhere", "digest": ""}}, "no folder beside it"),
        ({"scores": None}, "no record of a selection"),
    ):
        (folder / "selection.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=text):
            Selection.load(tmp_path, "r20")


def test_another_source_is_refused(selector, pool, tmp_path):
    selector.select(pool, 20)
    selector.selection.save(tmp_path)
    with pytest.raises(ValueError, match="119 rows and the selection was made from 120"):
        load_selection(tmp_path, pool.select(range(119)))
    with pytest.raises(ValueError, match="rows have moved or changed"):
        load_selection(tmp_path, pool.shuffle(seed=0))
    selector.selection.pool = pool.shuffle(seed=0)
    with pytest.raises(ValueError, match="rows have moved or changed"):
        selector.selection.apply(selector.selection.pool)
    with pytest.raises(ValueError, match="not loaded from the Hub.*pass source="):
        load_selection(tmp_path)
    named = UncertaintySelector(selector.probes, trial=False, id_column="name")
    named.select(pool, 20)
    with pytest.raises(ValueError, match="names some rows alike"):
        named.selection.apply(pool.select([*range(120), 0]))


def test_a_plan_made_by_hand_is_kept_and_says_that_its_source_is_unknown(pool, tmp_path):
    table = {
        "u_x": torch.rand(120),
        "mine": torch.rand(120, dtype=torch.float64),
        "label": torch.tensor(pool["label"]),
    }
    selection = Selection(make_plan(table, 20, score="mine", weights="exact"), table)
    selection.save(tmp_path)
    with pytest.raises(ValueError, match="not recorded; pass source="):
        load_selection(tmp_path)
    assert load_selection(tmp_path, pool).to_dict() == selection.apply(pool).to_dict()
    selection.save(tmp_path, card=True)
    card = (tmp_path / "README.md").read_text()
    assert "not known: it is not recorded" in card and "](default/selection.png)" in card
    assert (tmp_path / "default" / "selection.png").is_file()


# ---- other budgets from the scores


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"mode": "active"}, {"id_column": "name"}])
def test_another_budget_is_drawn_as_it_would_have_been_from_the_probes(pool, probes, tmp_path, options):
    selector = UncertaintySelector(probes, trial=False, **options)
    scored = selector.score(pool)
    selector.plan(scored, 66).save(tmp_path)
    expected = selector.plan(scored, 72).apply(pool)
    source = pool.shuffle(seed=3) if "id_column" in options else pool
    again = Selection.load(tmp_path).redraw(72, source)
    assert str(again.apply(source).to_dict()) == str(expected.to_dict())
    assert again.plan.settings == again.info["settings"] == selector.selection.plan.settings
    assert len(again.redraw(80)) == 80  # it has the labels now
    capped = again.redraw(72, clip=0.3)
    assert capped.plan.settings["clip"] == 0.3 and capped.plan.settings["clip_quantile"] is None


def test_a_draw_that_cannot_be_repeated_is_refused(selector, pool, tmp_path):
    scored = selector.score(pool)
    selector.plan(scored, 30).save(tmp_path)
    with pytest.raises(ValueError, match="holds no labels; pass data="):
        Selection.load(tmp_path).redraw(40)
    with pytest.raises(ValueError, match="rows have moved"):
        Selection.load(tmp_path).redraw(40, pool.shuffle(seed=0))
    masked = selector.plan(scored, 30, keep=torch.arange(120) < 40)
    with pytest.raises(ValueError, match="keep= mask, which is not stored"):
        masked.redraw(40)


# ---- the Hub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as server:
        yield server


PUSH = """
    import json
    from pathlib import Path

    from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets, load_dataset
    from huggingface_hub import DatasetCard, HfApi
    from hf_effdl import LinearProbes, UncertaintySelector
    from hf_effdl.samples.selection import files as storage
    from hf_effdl.samples.selection.source import source_of

    api = HfApi()
    made = {
        name: Dataset.from_dict(rows).cast_column("label", ClassLabel(names=["a|b", "c", "d"]))
        for name, rows in json.loads(Path("rows.json").read_text()).items()
    }
    DatasetDict(made).push_to_hub("tester/MyPool", "main")
    made["train"].to_parquet("bare.parquet")
    api.create_repo("tester/bare_one", repo_type="dataset")  # a repository without a card
    api.upload_file(path_or_fileobj="bare.parquet", path_in_repo="data/train.parquet", repo_id="tester/bare_one",
                    repo_type="dataset")

    data = load_dataset("tester/MyPool", "main")
    pool = data["train"]
    probes = LinearProbes.train(None, data["small"], input_column="x", steps=50)
    out = {"rows": {}, "urls": {}, "errors": []}

    def push(repo, config, data, budget=20, private=None, **options):
        selector = UncertaintySelector(probes, trial=False, **options)
        out["rows"][f"{repo}/{config}"] = str(selector.select(data, budget).to_dict())
        url = selector.selection.push_to_hub(f"tester/{repo}", config_name=config, private=private)
        out["urls"][f"{repo}/{config}"] = url
        return selector.selection

    first = push("plan", "r20", pool)
    card = DatasetCard.load("tester/plan")
    card.data.license, card.data.language = "cc0-1.0", "en"
    card.data.configs.append({"config_name": "mine", "data_files": "mine.csv"})
    edited = {"path_or_fileobj": str(card).encode(), "path_in_repo": "README.md"}
    api.upload_file(**edited, repo_id="tester/plan", repo_type="dataset")
    push("plan", "r40", pool, 40)
    paper = push("plan", "paper", pool, preset="paper")
    push("plan", "active", pool, mode="active")
    push("plan", "half", load_dataset("tester/MyPool", "main", split="train[:50%]"))
    push("bare", "default", load_dataset("tester/bare_one", split="train"))
    push("ids", "int", pool.shuffle(seed=1), id_column="number")
    push("ids", "text", pool.filter(lambda row: row["number"] % 3), id_column="name")
    push("moved", "default", pool.shuffle(seed=1))
    push("secret", "default", pool, private=True)

    for repo, private in (("tester/plan", True), ("tester/MyPool", None)):
        try:
            first.push_to_hub(repo, private=private)
        except ValueError as error:
            out["errors"].append(str(error))

    for selection, name in ((first, "a"), (paper, "b"), (first, "b")):
        selection.push_to_hub("tester/again", config_name=name)
    head = api.dataset_info("tester/again").sha
    first.push_to_hub("tester/again", config_name="b")
    out["nothing new"] = api.dataset_info("tester/again").sha == head
    save = storage.save

    def interrupted(*args):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/again", repo_type="dataset")
        return save(*args)

    storage.save = interrupted
    try:
        first.push_to_hub("tester/again", config_name="c")
    except Exception as error:
        out["late"] = error.response.status_code

    full = load_dataset("tester/MyPool", "main", split="train")
    out["sources"] = {name: source_of(data) for name, data in {
        "loaded": full, "column added": full.add_column("w", [1.0] * 120), "column removed": full.remove_columns("x"),
        "format": full.with_format("torch"), "part": load_dataset("tester/MyPool", "main", split="train[10:40]"),
        "both": load_dataset("tester/MyPool", "main", split="train+small"),
        "shuffled": full.shuffle(seed=0), "shuffled, column": full.shuffle(seed=0).add_column("w", [1.0] * 120),
        "shuffled, mapped": full.shuffle(seed=0).map(lambda row: {"w": 1}), "sorted": full.sort("label"),
        "reversed": full.select(range(119, -1, -1)), "all kept": full.filter(lambda row: True),
        "slice": full.select(range(100)), "chosen": full.select([3, 1, 2]),
        "split": full.train_test_split(20, seed=0)["train"],
        "turned": concatenate_datasets([full.select(range(60, 120)), full.select(range(60))]),
        "files": load_dataset("tester/MyPool", data_files="main/train-*.parquet", split="train"),
        "in memory": load_dataset("tester/MyPool", "main", split="train", keep_in_memory=True),
    }.items()}
    # the source goes on, with its rows in another order
    out["commit"] = api.dataset_info("tester/MyPool").sha
    DatasetDict({name: data.select(range(len(data))[::-1]) for name, data in made.items()}).push_to_hub(
        "tester/MyPool", "main"
    )
    Path("out.json").write_text(json.dumps(out))
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("push")
    (home / "rows.json").write_text(json.dumps({"train": rows(120, 0), "small": rows(60, 1)}))
    hub.run(PUSH, home)
    return json.loads((home / "out.json").read_text())


def test_it_is_known_where_a_pool_came_from_and_whether_its_rows_have_moved(hub, pushed):
    commit = pushed["commit"]
    unmoved = {"loaded", "column added", "column removed", "format", "part", "both"}
    for name, source in pushed["sources"].items():
        assert source["exact"] == (name in unmoved), name
        assert (source["why"] is None) == source["exact"], name
        if name != "in memory":
            assert (source["id"], source["revision"], source["config"]) == ("tester/MyPool", commit, "main"), name
    assert pushed["sources"]["in memory"]["id"] is None
    assert pushed["sources"]["part"]["split"] == "train[10:40]"


def test_every_selection_loads_in_another_process_as_it_was_selected(hub, pushed, tmp_path):
    code = """
    import json
    import sys
    from datasets import load_dataset

    sizes = {name: len(load_dataset("tester/plan", name, split="train")) for name in ("r20", "r40", "scores")}
    assert sizes == {"r20": 20, "r40": 40, "scores": 120}, sizes
    assert len(load_dataset("tester/plan", split="train")) == 20
    assert "hf_effdl" not in sys.modules

    from hf_effdl import Selection, load_selection

    names, first, commit = json.load(open("asked.json"))
    pool = load_dataset("tester/MyPool", "main", split="train", revision=commit)
    found = {}
    for name in names:
        repo, config = name.split("/")
        source = None
        if repo == "moved":
            try:
                load_selection("tester/moved")
            except ValueError as error:
                found["error"] = str(error)
            source = pool.shuffle(seed=1)
        found[name] = str(load_selection(f"tester/{repo}", source, config_name=config).to_dict())
    for where, config, revision in (
        ("tester/plan", "r30", None), ("tester/plan", "r40", first), ("tester/MyPool", "default", None)
    ):
        try:
            load_selection(where, config_name=config, revision=revision)
        except (ValueError, FileNotFoundError) as error:
            found[f"{where} {config}"] = str(error)
    found["redrawn"] = str(Selection.load("tester/plan", "r20").redraw(40, pool).apply(pool).to_dict())
    print(json.dumps(found))
    """
    first = pushed["urls"]["plan/r20"].rpartition("/")[2]
    (tmp_path / "asked.json").write_text(json.dumps([list(pushed["rows"]), first, pushed["commit"]]))
    found = json.loads(hub.run(code, tmp_path).splitlines()[-1])
    assert {name: found[name] for name in pushed["rows"]} == pushed["rows"]
    assert "nan" in found["plan/paper"]
    assert "shuffled after loading, so the places there may be others; pass source=" in found["error"]
    assert "no config_name='r30'; it has ['active', 'half', 'paper', 'r20', 'r40']" in found["tester/plan r30"]
    assert "it has ['r20']" in found["tester/plan r40"]
    assert "holds no selection" in found["tester/MyPool default"]
    assert found["redrawn"] == pushed["rows"]["plan/r40"]


def test_one_commit_holds_a_selection_and_the_earlier_ones_stay(hub, pushed):
    repo = hub.repos["dataset", "tester/plan"]
    commits = [commit for commit in repo.commits.values() if commit.title.startswith("Selection")]
    assert [commit.title.split(":")[0] for commit in commits] == [
        f"Selection {name}" for name in ("r20", "r40", "paper", "active", "half")
    ]
    assert {
        "README.md",
        "r20/selection.json",
        "r20/selection.parquet",
        "r20/selection.png",
        "scores/scores.parquet",
    } <= commits[0].tree.keys()
    for before, after in zip(commits, commits[1:], strict=False):
        kept = {path: content for path, content in before.tree.items() if path != "README.md"}
        assert kept.items() <= after.tree.items()
    assert not repo.private and hub.repos["dataset", "tester/secret"].private
    assert "exists and is public" in pushed["errors"][0] and "holds other data" in pushed["errors"][1]


def test_the_card_says_what_is_needed_to_redo_it(hub, pushed):
    tree = hub.repos["dataset", "tester/plan"].head.tree
    card = tree["README.md"].decode()
    commit = pushed["commit"]
    for text in (
        "license: cc0-1.0",
        "path: r20/selection.parquet",
        "path: scores/scores.parquet",
        "config_name: mine",
        "source_datasets:\n- tester/MyPool\n",
        "| `r20` | 20 | 120 | default |",
        "| `paper` | 20 | 120 | paper |",
        "| source | tester/MyPool |",
        f"| revision | {commit} |",
        "| split | train[:50%] |",
        "| rows of the pool | 120 |",
        "8 x linear heads",
        "| rows the probes were trained on | 60, each on a bootstrap sample |",
        "| gauge of the uncertainty | drop-first |",
        "| regime | agreement |",
        "| sampler | sequential |",
        "| budget | 40 |",
        "| a\\|b |",
        'load_selection("tester/plan", config_name="r20")',
        "![Scores and classes, before and after](r20/selection.png)",
    ):
        assert text in card, text
    assert card.count("default: true") == 1 and card.index("## r20") < card.index("## active")
    assert tree["r20/selection.png"].startswith(b"\x89PNG")
    assert json.loads(tree["r20/selection.json"])["summary"]["suspect_count"] > 0
    for name in ("plan", "ids"):  # neither rows' names nor, by way of suspects, their labels
        for path, content in hub.repos["dataset", f"tester/{name}"].head.tree.items():
            assert not path.endswith(".json") or not re.search(rb'row_id|"row \d|"p_label": \d', content), path
    moved = hub.repos["dataset", "tester/moved"].head.tree["README.md"].decode()
    assert 'load_selection("tester/moved", source)' in moved and "needs `source=`" in moved
    ids = hub.repos["dataset", "tester/ids"].head.tree["README.md"].decode()
    assert "column `name`" in ids and 'load_selection("tester/ids", config_name="int")' in ids
    assert "needs `source=`" not in ids


def test_scores_that_no_selection_needs_any_more_are_deleted_and_a_late_push_is_refused(hub, pushed):
    repo = hub.repos["dataset", "tester/again"]
    before, after = (commit for commit in repo.commits.values() if commit.title.startswith("Selection b"))
    assert sum(path.endswith("/scores.parquet") for path in before.tree) == 2
    assert [path for path in after.tree if path.endswith("/scores.parquet")] == ["scores/scores.parquet"]
    assert after.tree["README.md"].count(b"scores.parquet") == 1
    assert pushed["nothing new"] and pushed["late"] == 412 and "c/selection.json" not in repo.head.tree


def test_a_source_without_a_revision_warns(monkeypatch, pool, probes, tmp_path):
    selector = UncertaintySelector(probes, trial=False, id_column="name", source="me/pool")
    selector.select(pool, 20)
    source = {"split": "train", "config": "main"}
    selection = replace(
        selector.selection, info=selector.selection.info | {"source": selector.selection.info["source"] | source}
    )
    selection.save(tmp_path)
    asked = []
    monkeypatch.setattr(
        "hf_effdl.samples.selection.source.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or pool
    )
    with pytest.warns(UserWarning, match="revision of me/pool.*not known"):
        assert len(load_selection(tmp_path, token="t")) == 20
    assert asked == [(("me/pool", "main"), {"split": "train", "revision": None, "token": "t"})]
    monkeypatch.setattr("hf_effdl.samples.selection.source.load_dataset", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught, warnings.catch_warnings(action="ignore"):
        load_selection(tmp_path)
    assert "pass source=" in caught.value.__notes__[0]
    assert source_of(pool)["id"] is None
