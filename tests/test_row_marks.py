"""Rows known by their content: the marks, and what selections, score columns and caches make of them."""

import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as Picture
from torch import nn

from hf_effdl import LinearProbes, UncertaintySelector, load_selection
from hf_effdl.samples.probes import scoring
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.row_marks import content_ids, row_marks
from hf_effdl.samples.selection.selection import Selection


def rows(count: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 5)).astype("float32")
    x[np.arange(count), label] += 2
    table = {"x": x, "other": x[:, ::-1].copy(), "text": [f"row {i}" for i in range(count)], "label": label}
    return Dataset.from_dict(table)


@pytest.fixture(scope="module")
def probes():
    return LinearProbes.train(None, rows(90, 1), input_column="x", steps=20)


# ---- marks


def test_marks_follow_the_content_wherever_a_row_stands():
    data = rows(3000)
    marks, order = row_marks(data, data.column_names), torch.randperm(3000)
    assert len(marks.unique()) == 3000
    assert row_marks(data.select(order.tolist()), data.column_names).equal(marks[order])
    for view in (data.with_format("torch"), data.cast_column("x", List(Value("float64")))):
        assert row_marks(view, data.column_names).equal(marks)
    assert (
        row_marks(data.rename_columns({"x": "other", "other": "x"}), ["x", "other"])
        .ne(row_marks(data, ["x", "other"]))
        .all()
    )


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, -1, 2**62, None],
        [0.5, 0.25, float("nan"), float("inf"), 1e-300, None],
        ["", "a", "b", "ab", "\u00e9\U0001f600", None],
        [b"", b"\x00", b"\x00\x00", b"a", None],
        [[], [0], [0, 0], [1, 0], [0, 1], None],
        [[[0], [1]], [[0, 1]], [[], [0, 1]], [[1], [0]], None],
        [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}, {"a": 1, "b": "y"}, {"a": None, "b": "x"}],
        [True, False, None],
    ],
)
def test_values_that_differ_have_marks_that_differ(values):
    data = Dataset.from_dict({"value": [*values, *values]})
    marks = row_marks(data, ["value"])
    assert len(marks.unique()) == len(values) and marks[: len(values)].equal(marks[len(values) :])


def test_small_numbers_and_grids_do_not_collide():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, size=(20_000, 24)).astype("float32") / 16
    assert len(row_marks(Dataset.from_dict({"x": x}), ["x"]).unique()) == len(np.unique(x, axis=0))
    grid = Dataset.from_dict({"x": x[:50].reshape(50, 4, 6)}, features=Features({"x": Array2D((4, 6), "float32")}))
    assert len(row_marks(grid, ["x"]).unique()) == len(np.unique(x[:50], axis=0))


def test_ids_by_content_are_the_marks_but_of_rows_that_repeat():
    data = concatenate_datasets([rows(50), rows(50).select(range(10)), rows(50).select(range(5))])
    ids, marks = content_ids(data, ["x"]), row_marks(data, ["x"])
    assert len(ids.unique()) == 65 and ids[:50].equal(marks[:50])


def files(*paths) -> Dataset:
    return Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", Image())


def test_images_are_known_by_their_bytes_in_the_data_set_and_beside_it(tmp_path):
    pictures = [Picture.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)) for value in (1, 2)]
    paths = [tmp_path / folder / "one.bmp" for folder in ("a", "b", "c")]
    for path, picture in zip(paths, [*pictures, pictures[0]], strict=True):
        path.parent.mkdir()
        picture.save(path)
    assert len({path.stat().st_size for path in paths}) == 1
    marks = row_marks(files(*paths), ["image"])
    assert marks[0] != marks[1] and marks[0] == marks[2]  # another machine, another folder
    inside = Dataset.from_dict({"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]})
    assert row_marks(inside.cast_column("image", Image()), ["image"]).equal(marks)
    os.utime(paths[0], ns=(1, 1))
    assert row_marks(files(*paths), ["image"]).equal(marks)


def test_files_in_archives_and_elsewhere_are_known_by_their_whole_paths():
    paths = ["zip://3.png::/d/x.zip", "zip://4.png::/d/x.zip", "zip://a/3.png::/d/x.zip", "https://there/3.png"]
    assert len(row_marks(files(*paths), ["image"]).unique()) == 4


@pytest.mark.parametrize("content", ["a" * 200_000, b"a" * 200_000])
def test_all_of_a_long_value_counts(content):
    place = 30_000  # neither an end nor the middle
    other = content[:place] + ("b" if isinstance(content, str) else b"b") + content[place + 1 :]
    assert len(row_marks(Dataset.from_dict({"value": [content, other]}), ["value"]).unique()) == 2


# ---- selections


VIEWS = {
    "as it was": (lambda pool: pool, None),
    "in another format": (lambda pool: pool.with_format("torch"), None),
    "a column more": (lambda pool: pool.map(lambda row: {"length": len(row["text"])}), None),
    "another type of numbers": (lambda pool: pool.cast_column("x", List(Value("float64"))), None),
    "labels under another name": (lambda pool: pool.rename_column("label", "y"), None),
    "shuffled": (lambda pool: pool.shuffle(seed=1), "have moved or changed"),
    "moved within classes, labels under another name": (
        lambda pool: pool.rename_column("label", "y").shuffle(seed=2).sort("y"),
        "have moved or changed",
    ),
    "mapped": (lambda pool: pool.map(lambda row: {"text": row["text"].upper()}), "have moved or changed"),
    "filtered": (lambda pool: pool.filter(lambda row: row["label"] < 2), "rows and the selection was made from 200"),
    "relabelled": (
        lambda pool: pool.map(lambda row: {"label": (row["label"] + 1) % 3}),
        "column 'label' differs from the one",
    ),
    "twice": (lambda pool: concatenate_datasets([pool, pool]), "400 rows and the selection was made from 200"),
    "a column less": (lambda pool: pool.remove_columns("text"), r"lacks the columns \['text'\].*id_column="),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_pool_give_the_selected_rows_or_are_refused(view, probes, tmp_path):
    change, refusal = VIEWS[view]
    pool = rows(200)
    selector = UncertaintySelector(probes, trial=False)
    right = selector.select(pool, 30)["text"]
    selector.selection.save(tmp_path)
    if refusal is None:
        assert load_selection(tmp_path, change(pool))["text"] == right
        assert selector.selection.apply(change(pool))["text"] == right
    else:
        for apply in (lambda data: load_selection(tmp_path, data), selector.selection.apply):
            with pytest.raises(ValueError, match=refusal):
                apply(change(pool))


def test_classes_of_the_same_names_in_another_order_are_other_classes():
    def named(names, seed, count=200):
        return rows(count, seed).cast_column("label", ClassLabel(names=names))

    pool = named(["x", "y", "z"], 0)
    selector = UncertaintySelector(LinearProbes.train(None, named(["x", "y", "z"], 1), input_column="x"), trial=False)
    right = selector.select(pool, 30)["text"]
    assert selector.selection.apply(named(["one", "two", "three"], 0))["text"] == right  # says it in other words
    with pytest.raises(ValueError, match="classes of column 'label' are in another order.*align_labels_with_mapping"):
        selector.selection.apply(named(["z", "y", "x"], 0))


def test_rows_that_moved_are_refused_where_no_labels_are_looked_at(probes):
    pool = rows(200)
    selector = UncertaintySelector(probes, mode="active")
    right = selector.select(pool, 30)["text"]
    assert selector.selection.apply(pool.remove_columns("label"))["text"] == right
    with pytest.raises(ValueError, match="rows have other content in .*, so rows have moved or changed"):
        selector.selection.apply(pool.shuffle(seed=1))


def halves_turned(pool):
    return concatenate_datasets([pool.select(range(180, 360)), pool.select(range(180))])


ORDERS = {
    **{f"shuffled {seed}": lambda pool, seed=seed: pool.shuffle(seed=seed) for seed in range(4)},
    "sorted": lambda pool: pool.sort("text"),
    "reversed": lambda pool: pool.select(range(359, -1, -1)),
    "halves turned": halves_turned,
    "copied": lambda pool: pool.shuffle(seed=4).flatten_indices(),
    "a column more": lambda pool: halves_turned(pool).add_column("more", np.zeros(360)),
    "in another format": lambda pool: pool.shuffle(seed=5).with_format("torch"),
}


@pytest.mark.parametrize("options", [{}, {"mode": "active"}, {"preset": "paper"}, {"id_column": "id"}])
def test_no_order_of_rows_changes_which_are_drawn(options, probes):
    # every row three times, told apart by another column, a third of them by none
    pool = concatenate_datasets([rows(120).add_column("copy", np.arange(120) % 3 * k) for k in range(3)])
    if "id_column" in options:
        pool = pool.add_column("id", [f"n{i}" for i in range(360)])

    def drawn(data):
        subset = UncertaintySelector(probes, **options).select(data, 150).with_format(None)
        return sorted(zip(*(subset[name][:] for name in ("text", "label", "copy", "weight")), strict=True))

    right = drawn(pool)
    for order, change in ORDERS.items():
        # another column may number those anew that the probes see alike
        same = 2 if order == "a column more" else 3
        for row, expected in zip(drawn(change(pool)), right, strict=True):
            assert row[:same] == expected[:same] and row[3] == pytest.approx(expected[3], rel=1e-4), order


def test_a_selection_without_ids_is_drawn_by_content_and_one_of_an_earlier_version_by_places(probes, tmp_path):
    pool = rows(200)
    selector = UncertaintySelector(probes, trial=False)
    scored = selector.score(pool)
    selector.plan(scored, 30).save(tmp_path)
    loaded, more = Selection.load(tmp_path), selector.plan(scored, 50).plan
    assert loaded.drawn_by.equal(row_marks(pool, ["x"])) and loaded.info["drawn_by"] == "content"
    assert loaded.redraw(50, pool).plan.positions.equal(more.positions)
    plan = selector.plan(scored, 30, row_ids=None).plan
    earlier = replace(loaded, plan=plan, drawn_by=None, info={k: v for k, v in loaded.info.items() if k != "drawn_by"})
    assert earlier.redraw(50, pool).plan.positions.equal(selector.plan(scored, 50, row_ids=None).plan.positions)


def test_a_selection_of_an_earlier_version_is_taken_with_a_warning(probes, tmp_path):
    pool = rows(200)
    selector = UncertaintySelector(probes, trial=False)
    right = selector.select(pool, 30)["text"]
    selector.selection.save(tmp_path)
    earlier = Selection.load(tmp_path)
    earlier.marks = None
    with pytest.warns(UserWarning, match="no marks of its rows' content"):
        assert earlier.apply(pool)["text"] == right


# ---- score columns


def test_scores_of_other_probes_settings_or_rows_are_refused(probes):
    pool = rows(200)
    scored = UncertaintySelector(probes, trial=False).score(pool)
    other = LinearProbes.train(None, rows(60, 2), input_column="x", steps=20)
    with pytest.raises(ValueError, match="made by other probes, or with other settings"):
        UncertaintySelector(other, trial=False).select(scored, 30)
    with pytest.raises(ValueError, match="made by other probes, or with other settings"):
        UncertaintySelector(probes, preset="paper").plan(scored, 30)
    changed = scored.map(lambda row: {"label": (row["label"] + 1) % 3 if row["text"] == "row 7" else row["label"]})
    with pytest.raises(ValueError, match="1 of 200 rows are not what they were when they were scored"):
        UncertaintySelector(probes, trial=False).select(changed, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in (scored, scored.shuffle(seed=0), scored.select(range(100)), scored.add_column("more", [0] * 200)):
            assert len(UncertaintySelector(probes, trial=False).select(view, 30)) == 30
        assert len(UncertaintySelector(probes, mode="active").select(scored, 30)) == 30
    with pytest.warns(UserWarning, match="do not say which probes made them"):
        UncertaintySelector(probes, trial=False).select(scored.remove_columns("score_key"), 30)


# ---- the cache


class Net(nn.Linear):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(5, 3)
        generator = torch.Generator().manual_seed(seed)
        self.weight.data, self.bias.data = torch.randn(3, 5, generator=generator), torch.zeros(3)


class Bent(Net):
    def forward(self, x):
        return super().forward(x).sinh()


def collate(rows):
    return torch.tensor([row["x"] for row in rows])


def doubled(rows):
    return torch.tensor([row["x"] for row in rows]) * 2


def models(kind=Net, first: int = 0, count: int = 4) -> list[nn.Module]:
    return [kind(seed) for seed in range(first, first + count)]


EDITS = {
    "weights": {"probes": lambda: Probes(models(first=9), input_column="x")},
    "what is done with the weights": {"probes": lambda: Probes(models(Bent), input_column="x")},
    "number of probes": {"probes": lambda: Probes(models(count=3), input_column="x")},
    "column": {"probes": lambda: Probes(models(), input_column="other")},
    "collator": {"probes": lambda: Probes(models(), data_collator=collate)},
    "another collator": {"probes": lambda: Probes(models(), data_collator=doubled)},
    "rows": {"data": lambda: rows(50, 3)},
    "one value": {"data": lambda: rows(50).map(lambda row: {"x": [9.0] * 5 if row["text"] == "row 3" else row["x"]})},
    "order of rows": {"data": lambda: rows(50).shuffle(seed=0)},
    "transform": {"data": lambda: rows(50).with_transform(lambda batch: {"x": [row[::-1] for row in batch["x"]]})},
    "labels": {"labels": lambda: (torch.tensor(rows(50)["label"][:]) + 1) % 3},
    "no labels": {"labels": lambda: None},
    "gauge": {"gauge": lambda: "drop-first"},
    "batch_size": {"batch_size": lambda: 7},
}
KEPT = {"progress": {"progress": lambda: False}, "another format": {"data": lambda: rows(50).with_format("torch")}}


def keys(folder, edit) -> set[str]:
    given = {
        "probes": lambda: Probes(models(), input_column="x"),
        "data": lambda: rows(50),
        "labels": lambda: torch.tensor(rows(50)["label"][:]),
    }
    arguments = {name: make() for name, make in (given | edit).items()}
    scoring.score_rows(**({"progress": False} | arguments), cache_dir=folder)
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("edit", [*EDITS, *KEPT])
def test_whatever_decides_the_scores_is_in_the_key_of_their_cache(edit, tmp_path):
    first = keys(tmp_path, {})
    both = keys(tmp_path, (EDITS | KEPT)[edit])
    assert len(first) == 1 and len(both) == (2 if edit in EDITS else 1)


def test_standardisation_and_heads_name_linear_probes(probes):
    names = {probes.fingerprint}
    for name in ("heads", "mean", "scale"):
        kept = getattr(probes, name)
        setattr(probes, name, kept * 2)
        names.add(probes.fingerprint)
        setattr(probes, name, kept)
    assert len(names) == 4 and probes.fingerprint in names


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temp, self.act, self.sizes = 1.0, torch.relu, (1, 2)
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.act(x / self.temp + self.shift)


class Rescaled(Scaled):
    def forward(self, x):
        return self.act(x * self.temp + self.shift)

    def _get_name(self) -> str:
        return "Scaled"


CHANGES = {
    "a weight in place": lambda model: model[0].weight.data.mul_(2),
    "a number": lambda model: setattr(model[1], "temp", 2.0),
    "a function": lambda model: setattr(model[1], "act", torch.tanh),
    "a tuple": lambda model: setattr(model[1], "sizes", (1, 3)),
    "a tensor": lambda model: setattr(model[1], "more", np.ones(2)),
    "a buffer that is not saved": lambda model: model[1].shift.add_(1),
    "the code of a part": lambda model: setattr(model[1], "__class__", Rescaled),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_answers_changes_the_name_of_the_probes(change):
    probes = Probes([nn.Sequential(Net(seed), Scaled()) for seed in range(2)], input_column="x")
    before = probes.fingerprint
    assert probes.fingerprint == before == Probes(probes.models, input_column="x").fingerprint
    CHANGES[change](probes.models[1])
    assert probes.fingerprint != before


def test_how_images_are_decoded_and_formatted_is_in_the_score_key(tmp_path):
    path = tmp_path / "one.png"
    Picture.fromarray(np.full((4, 4, 3), 7, dtype=np.uint8)).save(path)
    probes = Probes(models(), input_column="image")
    views = [files(path), files(path).cast_column("image", Image(mode="L")), files(path).with_format("torch")]
    views.append(files(path).with_format("torch", dtype=torch.float64))
    first, grey, tensors, wide = (int(scoring.score_keys(probes, view, "invariant", None)[0]) for view in views)
    assert first == tensors and len({first, grey, wide}) == 3


def test_class_labels_read_as_their_numbers():
    data = rows(50)
    named = data.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    assert row_marks(data, ["label"]).equal(row_marks(named, ["label"]))
