import json
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from matplotlib.colors import to_hex
from PIL import Image as Pillow

from hf_effdl import Plan, Selection, active_plan, make_plan
from hf_effdl.pictures import CHOSEN, OTHER
from hf_effdl.samples.selection.findings import clip_value, kept_by_filter, suspect_positions
from hf_effdl.samples.selection.pictures import plot_classes, plot_examples, plot_overview, plot_scores, plot_selection
from hf_effdl.samples.selection.report import _percent


NAMES = ["ant", "bee", "cat"]


def by_hand(positions=(0, 1, 4, 5), weights=None, settings=None, names=NAMES, ids=None, pool=None, **columns):
    """Ten rows of three classes: 0..3 ant, 4..7 bee, 8 and 9 cat."""
    table = {
        "label": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        "predicted": torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 2, 0]),
        "u_x": torch.tensor([0.001, 0.002, 0.05, 0.2, 0.3, 0.4, 0.05, 0.06, 0.07, 0.8]),
        "p_label": torch.tensor([0.9, 0.9, 0.9, 0.2, 0.9, 0.9, 0.8, 0.01, 0.9, 0.1]),
        "p_clean": torch.tensor([0.9, 0.9, 0.9, 0.6, 0.9, 0.9, 0.9, 0.02, 0.9, 0.3]),
        "confidence": torch.tensor([0.9] * 10),
    } | columns
    table = {name: column for name, column in table.items() if column is not None}
    positions = torch.tensor(positions)
    weights = torch.ones(len(positions)) if weights is None else torch.tensor(weights)
    plan = Plan(positions, torch.full((len(positions),), 0.4), weights.double(), 10, settings or {})
    return Selection(plan, table, names, ids, {}, pool)


def many(selected, rows=None, quotas="none", **columns):
    """`rows[c]` rows of class c, of which the first `selected[c]` are chosen."""
    rows = rows or [100] * len(selected)
    label = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    starts = np.cumsum([0, *rows[:-1]])
    chosen = torch.cat([torch.arange(s, s + k) for s, k in zip(starts, selected, strict=True)])
    table = {
        "label": label,
        "predicted": label,
        "u_x": torch.rand(len(label)) + 0.1,
        "p_label": torch.ones(len(label)),
        "p_clean": torch.ones(len(label)),
        "confidence": torch.ones(len(label)),
    } | columns
    plan = Plan(chosen, torch.ones(len(chosen)), torch.ones(len(chosen)), len(label), {"quotas": quotas})
    return Selection(plan, table, [f"class {c}" for c in range(len(rows))])


def texts_in(figure):
    return [text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))]


# ---- numbers


def test_counts_shares_and_weights():
    report = by_hand(weights=[1.0, 1.0, 1.0, 5.0]).report()
    assert (report.rows, report.selected, report.share) == (10, 4, 0.4)
    assert report.classes == [
        {"class": "ant", "pool": 4, "kept": None, "selected": 2, "share": 0.5},
        {"class": "bee", "pool": 4, "kept": None, "selected": 2, "share": 0.5},
        {"class": "cat", "pool": 2, "kept": None, "selected": 0, "share": 0.0},
    ]
    assert report.counted_by == "label" and report.mode == "coreset"
    assert report.kish == pytest.approx(64 / 28) and report.kish_share == pytest.approx(16 / 28)
    assert report.max_to_median == 5
    assert report.agreement == pytest.approx(0.7)
    assert report.mean_confidence == pytest.approx(0.9)


def test_classes_without_names_rows_or_a_label():
    label = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, 3])
    report = by_hand(names=None, label=label).report()
    assert [row["class"] for row in report.classes] == ["0", "1", "2", "3"]
    assert [row["pool"] for row in report.classes] == [4, 4, 0, 1]
    assert report.classes[2]["share"] is None
    assert not any(" 2" in text for text in report.warnings if "no row is selected" in text)


def test_uncertainties_are_counted_at_the_released_thresholds():
    spread = by_hand().report().uncertainty
    assert spread["column"] == "u_x"
    assert spread["below_0.005"] == pytest.approx(0.2) and spread["above_0.1"] == pytest.approx(0.4)
    assert spread["quantiles"]["0"] == pytest.approx(0.001) and spread["quantiles"]["1"] == pytest.approx(0.8)
    assert spread["quantiles"]["0.5"] == pytest.approx(0.065)
    u_y = torch.full((10,), 0.01)
    assert by_hand(u_y=u_y, settings={"score": "u_y"}).report().uncertainty["column"] == "u_y"
    assert by_hand(u_y=u_y, settings={"score": "uniform"}).report().uncertainty["column"] == "u_x"


def test_the_clip_is_what_the_plan_drew_with():
    u = torch.rand(101, generator=torch.Generator().manual_seed(0)) + 0.01
    table = {"u_x": u, "label": torch.arange(101) % 2}
    for options, clip in (({"clip": 0.5}, 0.5), ({"clip_quantile": 0.25}, u.sort().values[25].item())):
        selection = Selection(make_plan(table, 20, weights="none", quotas="none", **options), table)
        assert clip_value(selection) == pytest.approx(clip)
        assert selection.report().capped == pytest.approx((u >= clip).double().mean().item())
    free = Selection(make_plan(table, 20, weights="none", quotas="none"), table)
    assert clip_value(free) is None and free.report().capped is None
    uniform = Selection(make_plan(table, 20, score="uniform", weights="none", clip=0.5), table)
    assert clip_value(uniform) is None


def test_suspects_are_sorted_and_named():
    ids = [f"row-{i}" for i in range(10)]
    report = by_hand(positions=(0, 9), ids=ids).report()
    found = [tuple(suspect.values()) for suspect in report.suspects]
    near = pytest.approx
    assert found == [
        ("row-7", "bee", "ant", near(0.01), near(0.02), False),
        ("row-9", "cat", "ant", near(0.1), near(0.3), True),
    ]
    assert list(report.suspects[0]) == ["row_id", "label", "vote", "p_label", "p_clean", "selected"]
    assert report.suspect_count == 2 and [suspect["row_id"] for suspect in by_hand().report().suspects] == [7, 9]
    p = torch.linspace(0.4, 0.1, 30)
    report = many([5, 5, 5], [10] * 3, p_label=p, p_clean=p).report()
    assert report.suspect_count == 30 and len(report.suspects) == 20
    everything = report.all_suspects()
    assert [suspect["row_id"] for suspect in everything] == list(range(29, -1, -1))
    assert everything[:20] == report.suspects


@pytest.mark.parametrize(
    ("regime", "kept", "refilled"),
    [("agreement", [3, 3, 1], 2), ("clipped", [4, 3, 1], 1), ("unclipped", [4, 3, 1], 1)],
)
def test_refilled_rows_are_those_outside_the_filter(regime, kept, refilled):
    settings = {"preset": "default", "regime": regime, "noise_rate": 0.0}
    selection = by_hand(positions=(0, 3, 7), settings=settings)
    report = selection.report()
    assert report.refilled == refilled and [row["kept"] for row in report.classes] == kept
    assert "did not pass the filter" in str(report) and "kept by the filter" in str(report)
    assert kept_by_filter(by_hand()) is None and by_hand().report().refilled is None


def test_noise_is_read_off_the_table_where_the_plan_has_none():
    assert by_hand(settings={"noise_rate": 0.2}).report().noise_rate == 0.2
    assert by_hand().report().noise_rate == pytest.approx(0.3)  # 3 of the 10 surest rows have another label
    assert by_hand(p_clean=None).report().noise_rate is None


def test_a_table_without_labels_is_counted_by_votes():
    report = by_hand(label=None, p_label=None, p_clean=None).report()
    assert report.mode == "active" and report.counted_by == "predicted"
    assert [row["pool"] for row in report.classes] == [5, 4, 1]
    assert report.suspect_count is None and report.suspects == [] and report.agreement is None
    assert "the class the probes vote for" in str(report)
    # scored with labels, planned without: its labels are not to be judged
    assert suspect_positions(by_hand(label=None)) is None
    # one that was loaded has no labels
    selection = by_hand(label=None, settings={"preset": "default", "regime": "agreement", "noise_rate": 0.1})
    selection.info = {"mode": "coreset"}
    report = selection.report()
    assert report.mode == "coreset" and report.suspects[0]["label"] is None and report.refilled is None and str(report)


def test_a_bare_table_reports_and_shows_what_it_can():
    table = {"bald": torch.rand(20)}
    selection = Selection(make_plan(table, 5, score="bald", quotas="none", weights="none"), table)
    report = selection.report()
    assert report.classes == [] and report.uncertainty is None and report.mean_confidence is None
    assert "5 of 20 rows" in str(report)
    [axes] = plot_overview(selection).axes
    assert axes.get_title("left") == "Score bald: the draw's score"
    with pytest.raises(ValueError, match="neither labels nor the probes' votes"):
        plot_classes(selection)


# ---- words


BY_CLASS = {"preset": "default", "quotas": "label", "score": "uniform", "weights": "p_label"}
CAPPED = BY_CLASS | {"score": "u_x", "clip_quantile": 0.5, "regime": "clipped"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BY_CLASS | {"regime": "agreement", "noise_rate": 0.2}, ["20 % of the labels look wrong", "uniformly"]),
        (BY_CLASS | {"regime": "agreement", "noise_rate": 0.0, "trial_accuracy": 0.7}, ["0.700", "below 0.86"]),
        (BY_CLASS | {"regime": "agreement", "noise_rate": 0.0, "trial_accuracy": None}, ["not known"]),
        (
            BY_CLASS | {"regime": "agreement", "noise_rate": 0.0, "trial_accuracy": 0.95, "budget": 75, "classes": 10},
            ["0.950", "7.5 rows a class are too few"],
        ),
        (
            CAPPED | {"trial_accuracy": 0.95, "budget": 60, "classes": 5},
            ["0.950", "hardest rows pay only from 20 rows"],
        ),
        (CAPPED | {"noise_rate": 0.0, "trial_accuracy": 0.9}, ["u_x up to its median", "0.900", "equal shares of"]),
        (
            {"preset": "default", "quotas": "none", "regime": "unclipped", "trial_accuracy": 0.96},
            ["from 0.945", "whatever class"],
        ),
        (
            {"quotas": "none", "score": "bald", "clip": 0.2, "weights": "none"},
            ["of equal weight", "to bald up to 0.2"],
        ),
        (
            {"preset": "paper", "score": "u_y", "clip": 0.005, "weights": "damped", "beta": 0.1},
            ["released code", "damped at 0.1"],
        ),
    ],
)
def test_the_sentence_follows_the_settings_and_their_reason(settings, words):
    recipe = by_hand(settings={"noise_rate": 0.0} | settings).report().recipe
    assert all(word in recipe for word in words) and ("median" in recipe) == ("clip_quantile" in settings)


def test_the_sentence_of_what_to_label():
    table = by_hand().table
    active = Selection(active_plan(table, 4, accuracy=0.5), table, info={"mode": "active"}).report()
    assert active.recipe.startswith("Rows in equal shares of the classes voted for, drawn uniformly")
    assert "rows they have not seen has an accuracy of 0.500" in active.recipe
    assert "on rows they were not trained on: 0.500" in str(active)


@pytest.mark.parametrize(
    "share,text",
    [(0, "0 %"), (1e-7, "under 0.1 %"), (0.004, "0.4 %"), (0.05, "5 %"), (0.1, "10 %"), (0.734, "73 %")]
    + [(0.996, "99.6 %"), (0.99996, "over 99.9 %"), (1, "100 %")],
)
def test_only_none_reads_as_none_and_only_all_as_all(share, text):
    assert _percent(share) == text


def test_the_text_is_markdown_and_safe_against_names():
    selection = by_hand(names=["a|b\nc", "bee", "cat"], ids=[f"x|{i}" for i in range(10)])
    report = selection.report()
    text = str(report)
    assert "| a\\|b c | 4 | 2 | 50 % |" in text
    assert "| x\\|7 | bee | a\\|b c | 0.01 | no |" in text
    assert "| 1000007 | bee" in str(by_hand(ids=[1_000_000 + i for i in range(10)]).report())
    assert report._repr_markdown_() == text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {5, 6}
    assert repr(report) == f"SelectionReport(4 of 10 rows, {len(report.warnings)} warnings)"
    report = by_hand(settings={"preset": "default", "regime": "clipped", "noise_rate": 0.1}).report()
    assert "preset='default', regime='clipped'" in repr(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert "selection" not in report.to_dict() and report.to_dict()["classes"] == report.classes


def test_of_many_classes_the_text_shows_the_most_changed():
    selected = [10] * 39 + [60]
    report = many(selected).report()
    assert len(report.classes) == 40
    text = str(report)
    assert "30 of 40 classes" in text and "| class 39 | 100 | 60 | 60 % |" in text
    assert sum(line.startswith("| class ") for line in text.splitlines()) == 31  # with the heading


# ---- warnings


def warned(selection, words):
    return [text for text in selection.report().warnings if words in text]


FEW = "less than half the rows"
EMPTY = "no row is selected"


@pytest.mark.parametrize(
    ("selected", "options", "words", "said"),
    [
        ([10, 0, 10], {}, EMPTY, "of 1 of 3 classes: class 1"),
        ([10, 1, 10], {}, EMPTY, None),
        ([10, 0, 10], {"rows": [100, 0, 100]}, EMPTY, None),  # there are none to select
        ([35, 4, 36], {}, FEW, "class 1 (4, not 25)"),
        ([35, 1, 36], {}, FEW, "class 1 (1, not"),
        ([35, 15, 36], {}, FEW, None),
        ([5, 1, 5], {}, FEW, None),  # chance
        # equal shares: a large class gives a small part of its rows by design
        ([20, 20], {"rows": [1000, 30], "quotas": "label"}, FEW, None),
        ([5, 35], {"rows": [1000, 100], "quotas": "label"}, "of equal shares", "class 0"),
        ([10, 11, 9], {}, "", None),  # nothing at all
    ],
)
def test_warns_of_classes_that_get_too_few_rows_or_none(selected, options, words, said):
    found = warned(many(selected, **options), words)
    assert said in found[0] if said else not found


def test_warns_of_classes_that_the_filter_removes():
    vote = torch.tensor([0, 1, 2]).repeat_interleave(100)
    vote[120:200] = 0  # 20 of 100 of class 1 pass, 73 % in all
    selection = many([10, 10, 10], quotas="label", predicted=vote)
    selection.plan.settings.update(preset="default", regime="agreement", noise_rate=0.0)
    [text] = warned(selection, "the filter keeps")
    assert "73 %" in text and "class 1 (20 %)" in text and "class 0" not in text
    vote[:] = torch.tensor([0, 1, 2]).repeat_interleave(100)
    vote[150:200] = 0  # 50 of 100: more than half the average share
    assert not warned(selection, "the filter keeps")


def test_warns_of_noise_weak_probes_wild_weights_and_clips_that_cap_everything():
    def flipped(wrong):
        vote = torch.tensor([0, 1, 2]).repeat_interleave(100)
        vote[:wrong] = (vote[:wrong] + 1) % 3
        return many([10, 10, 10], predicted=vote)

    clip = {"score": "u_x", "quotas": "none"}
    cases = {
        "labels look wrong": [by_hand(settings={"noise_rate": rate}) for rate in (0.06, 0.05)],
        # three classes: weak below a third of the way from 1/3 to 1
        "the probes are weak": [many([10] * 3, confidence=torch.full((300,), c)) for c in (0.55, 0.56)],
        "they are weak, or most labels": [flipped(151), flipped(149)],
        "Kish": [by_hand(weights=[1.0, 1.0, 1.0, largest]) for largest in (10.0, 3.0)],
        "uniform_share": [by_hand(weights=[1.0] * 3 + [w], settings={"weights": "exact"}) for w in (101.0, 99.0)],
        "100 %": [by_hand(settings=clip | {"clip": value}) for value in (0.001, 0.05)],
    }
    for words, (one, other) in cases.items():
        assert len(warned(one, words)) == 1 and not warned(other, words), words


# ---- files


def test_save_writes_text_numbers_and_pictures(tmp_path):
    pool = Dataset.from_dict({"text": [f"text {i}" for i in range(10)]})
    report = by_hand(pool=pool, ids=[f"ünïcode-{i}" for i in range(10)]).report()
    written = report.save(tmp_path / "new" / "folder")
    assert {file.name for file in written} == {"report.md", "report.json", "selection.png", "examples.png"}
    assert sorted((tmp_path / "new" / "folder").iterdir()) == sorted(written)
    text = (tmp_path / "new/folder/report.md").read_text(encoding="utf-8")
    assert text.startswith(str(report)) and "(selection.png)" in text and "(examples.png)" in text
    assert json.loads((tmp_path / "new/folder/report.json").read_text(encoding="utf-8")) == report.to_dict()
    assert Pillow.open(tmp_path / "new/folder/selection.png").size[0] > 1000
    fewer = {file.name for file in report.save(tmp_path / "b", examples=False)}
    assert fewer == {"report.md", "report.json", "selection.png"}
    before = {file: file.read_bytes() for file in written}
    other = by_hand(pool=pool).report()
    other.to_dict = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        other.save(tmp_path / "new" / "folder")
    assert {file: file.read_bytes() for file in (tmp_path / "new" / "folder").iterdir()} == before  # all or none


def test_without_matplotlib_pictures_fail_clearly_and_the_rest_is_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match='pip install "matplotlib>=3.9"'):
        by_hand().plot()
    with pytest.warns(UserWarning, match="without pictures.*matplotlib>=3.9"):
        written = by_hand().report().save(tmp_path)
    assert {file.name for file in written} == {"report.md", "report.json"}
    assert "selection.png" not in (tmp_path / "report.md").read_text()


# ---- pictures


def test_the_bars_of_the_scores_are_counts():
    selection = many([20, 20, 20])
    figure = plot_scores(selection)
    [axes] = figure.axes
    bars = [patch for patch in axes.patches if to_hex(patch.get_facecolor()) == OTHER]
    u = selection.table["u_x"].numpy()
    edges = [bar.get_x() for bar in bars] + [bars[-1].get_x() + bars[-1].get_width()]
    counts, _ = np.histogram(u.clip(edges[0], edges[-1]), edges)
    assert [bar.get_height() * len(u) / 100 for bar in bars] == pytest.approx(counts.tolist(), abs=1.01)
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    [line] = [patch for patch in axes.patches if to_hex(patch.get_edgecolor()) == CHOSEN]
    heights = line.get_xy()[:, 1]
    inside, _ = np.histogram(u[selection.plan.positions.numpy()].clip(edges[0], edges[-1]), edges)
    assert heights.max() * len(selection) / 100 == pytest.approx(inside.max(), abs=1.01)
    assert axes.get_xscale() == "linear" and not axes.lines


def test_the_clip_is_marked_and_wide_scores_are_logarithmic():
    u = torch.logspace(-5, 0, 300)
    selection = many([20, 20, 20], u_x=u)
    selection.plan.settings.update(score="u_x", clip=0.01)
    [axes] = plot_scores(selection).axes
    assert axes.get_xscale() == "log" and "the draw's score" in axes.get_title("left")
    assert list(axes.lines[0].get_xdata()) == [0.01, 0.01]
    assert "40% of the pool" in axes.lines[0].get_label()
    selection.plan.settings.update(score="uniform")
    [axes] = plot_scores(selection).axes
    assert not axes.lines and "drawn uniformly" in axes.get_title("left")
    u = torch.rand(300) + 0.5
    u[0] = 700  # must not squeeze the others
    [axes] = plot_scores(many([20, 20, 20], u_x=u)).axes
    assert axes.get_xlim()[1] < 3 and "last bar: above" in axes.get_xlabel()
    assert sum(bar.get_height() for bar in axes.patches if to_hex(bar.get_facecolor()) == OTHER) == pytest.approx(100)


@pytest.mark.parametrize("values", [torch.full((300,), 0.3), torch.zeros(300), torch.linspace(-1, 1, 300)])
def test_constant_and_negative_scores_have_a_picture(values):
    [axes] = plot_scores(many([20, 20, 20], u_x=values)).axes
    assert sum(bar.get_height() for bar in axes.patches if to_hex(bar.get_facecolor()) == OTHER) == pytest.approx(100)


def test_the_bars_of_the_classes_are_shares():
    [axes] = plot_classes(by_hand()).axes
    pool, selected = axes.containers
    assert [bar.get_width() for bar in pool] == [40, 40, 20]
    assert [bar.get_width() for bar in selected] == [50, 50, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert all(bar.get_y() < other.get_y() for bar, other in zip(pool, selected, strict=True))  # pool above
    assert axes.yaxis_inverted()
    [votes] = plot_classes(by_hand(label=None, p_clean=None)).axes
    assert "vote" in votes.get_title("left")


def test_of_many_classes_thirty_are_drawn():
    [axes] = plot_classes(many([10] * 39 + [60])).axes
    assert len(axes.containers[0]) == 30 and "30 of 40" in axes.get_title("left")
    assert axes.get_yticklabels()[0].get_text() == "class 39"
    assert axes.containers[1][0].get_width() == pytest.approx(100 * 60 / 450)


def images_pool(with_none=False):
    pixels = [Pillow.fromarray(np.full((12, 20), 10 * i, dtype=np.uint8)) for i in range(10)]
    if with_none:
        pixels[9] = None
    features = Features({"picture": Image(), "label": ClassLabel(names=NAMES), "u_x": Value("float32")})
    return Dataset.from_dict({"picture": pixels, "label": [0] * 10, "u_x": [0.0] * 10}, features=features)


def test_examples_are_the_rows_at_the_ends(tmp_path):
    figure = plot_examples(by_hand(positions=(0, 9), pool=images_pool()), count=2)
    shown = [axes for axes in figure.findobj(match=lambda a: hasattr(a, "images")) if axes.images]
    # least certain 9, 5; most certain 0, 1; suspects 7, 9
    assert [int(axes.images[0].get_array()[0, 0]) for axes in shown] == [90, 50, 0, 10, 70, 90]
    assert [axes.get_title() for axes in shown[:2]] == ["label cat\nvote ant", "label bee\nvote bee"]
    assert [axes.get_xlabel() for axes in shown[:3:2]] == ["row 9\nu 0.8", "row 0\nu 0.001"]
    assert shown[4].get_xlabel() == "row 7\np(label) 0.01"
    framed = [to_hex(axes.spines["top"].get_edgecolor()) == CHOSEN for axes in shown]
    assert framed == [True, False, True, False, False, True]
    figure.savefig(tmp_path / "picture.png")


def test_images_that_are_missing_encoded_or_of_many_kinds():
    kinds = [
        Pillow.fromarray(np.zeros((30, 900, 3), dtype=np.uint8)),
        Pillow.new("RGBA", (20, 20)),
        Pillow.fromarray(np.full((20, 20), 40_000, dtype=np.uint16)),
        None,
        Pillow.new("1", (9, 9)),
    ]
    pool = Dataset.from_dict({"image": kinds * 2}, features=Features({"image": Image()}))
    selection = by_hand(pool=pool)
    figure = plot_examples(selection, count=10)
    arrays = [
        image.get_array() for axes in figure.findobj(match=lambda a: hasattr(a, "images")) for image in axes.images
    ]
    assert max(max(array.shape) for array in arrays) == 256
    assert any(array.max() == 40_000 for array in arrays)
    assert "no image" in texts_in(figure)
    selection.pool = pool.cast_column("image", Image(decode=False))
    plot_examples(selection, count=2)


@pytest.mark.parametrize(
    "shape", [(3, 16, 16), (16, 16, 3), (1, 16, 12), (12, 16), (4, 4), (9, 90), (16,), (5, 16, 16)]
)
def test_arrays_that_are_images_are_shown_as_such_and_others_are_not(shape):
    pool = Dataset.from_dict({"pixel_values": np.random.default_rng(0).normal(size=(10, *shape)).tolist()})
    figure = plot_examples(by_hand(pool=pool), count=1)
    shown = [a.images[0].get_array() for a in figure.findobj(match=lambda a: hasattr(a, "images")) if a.images]
    if shape in [(4, 4), (9, 90), (16,), (5, 16, 16)]:
        assert not shown
    else:
        assert shown[0].shape[:2] == tuple(side for side in shape if side not in (1, 3))
        assert 0 <= shown[0].min() and shown[0].max() == 1


def test_texts_are_shown_without_being_read_as_formulas(tmp_path):
    words = [f"It costs $5 and\n$ {i} \\frac{{1}} " + "very long " * 40 for i in range(10)]
    words[0] = None
    pool = Dataset.from_dict({"file": ["short"] * 10, "words": words, "label": ["unseen label " * 30] * 10})
    selection = by_hand(pool=pool, names=["$x", "$\\frac$", "cat"], positions=(0, 5))
    selection.info = {"label_column": "label"}
    figure = plot_examples(selection, count=2)
    figure.savefig(tmp_path / "picture.png")
    found = texts_in(figure)
    assert any(text.startswith("It costs $5 and $ 9") for text in found) and "(empty)" in found
    assert "row 5, u 0.4" in found and "label and vote $\\frac$" in found and "vote $x" in found
    assert not any("short" in text or "unseen" in text for text in found)
    bars = [to_hex(line.get_color()) for line in figure.axes[0].lines]
    assert bars == [OTHER, CHOSEN]
    plot_classes(selection).savefig(tmp_path / "classes.png")
    assert "short" in texts_in(plot_examples(selection, 1, "file"))


def test_sound_is_left_undecoded_and_transforms_uncalled():
    class Sound(Value):
        def decode_example(self, *_):
            raise AssertionError("decoded")

    pool = Dataset.from_dict({"text": ["a"] * 10, "sound": ["b" * 30] * 10, "width": [float(i) for i in range(10)]})
    pool.info.features["sound"], seen = Sound("string"), []
    pool = pool.with_transform(lambda rows: seen.append(1))
    found = texts_in(plot_examples(by_hand(pool=pool), 1))
    assert "a" in found and not any("bbb" in text for text in found) and not seen
    assert "width 9" in texts_in(plot_examples(by_hand(pool=pool.select_columns("width")), 1))


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (None, {}, "selection.pool"),
        ({"text": ["a"] * 9}, {}, "has 9 rows and the selection was made from 10"),
        ({"text": ["a"] * 10}, {"column": "txt"}, "no column 'txt'.*near ones"),
        ({"text": ["a"] * 10}, {"count": 0}, "count=0"),
        ({"v": [[1.0, 2.0]] * 10}, {"column": "v"}, "column='v' holds .* neither images nor texts nor numbers"),
    ],
)
def test_examples_refuse_what_is_not_there(columns, options, message):
    with pytest.raises(ValueError, match=message):
        plot_examples(by_hand(pool=columns and Dataset.from_dict(columns)), **options)


def test_one_figure_holds_everything(tmp_path):
    pool = Dataset.from_dict({"text": ["a"] * 10})
    figure = by_hand(pool=pool).plot(count=1)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert [title.split()[0] for title in titles] == ["Uncertainty", "Classes", "Least", "Most", "Suspected"]
    figure = plot_selection(by_hand())
    assert len(figure.axes) == 2 and any("not at hand" in text for text in texts_in(figure))
    votes = by_hand(pool=pool, label=None, p_label=None, p_clean=None).report().plot(count=1)
    assert not any("Suspected" in text or text.startswith("label") for text in texts_in(votes))
    pictures = plot_selection(by_hand(pool=images_pool(with_none=True)), count=1)
    assert sum(text.endswith("(red frame: selected)") for text in texts_in(pictures)) == 3
