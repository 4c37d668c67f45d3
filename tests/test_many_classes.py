"""One pool of several classes: what is measured and shown, maps of them all, and when one of them is absent."""

import numpy as np
import pytest
import torch
from answers import photos
from scenes import make_model, make_pool, scene, tiny_encoder

from hf_effdl import CascadeSelector, ExamplePool, VisualInContextPipeline, measure_examples
from hf_effdl.vicl.remote_code import cascade_stages
from hf_effdl.vicl.remote_code import pipeline_visual_in_context as pipeline_module
from hf_effdl.vicl.remote_code.absence import FEATURES, fit_presence
from hf_effdl.vicl.remote_code.label_maps import joined


KINDS = ["cat", "dog", "emu"]
CLASSES = [KINDS[i % 3] if i < 30 else None for i in range(32)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("pool"), count=32, classes=CLASSES, encoder=tiny_encoder())


@pytest.fixture
def pipe(pool):
    return VisualInContextPipeline(make_model(encoder=pool.encoder_module), pool=pool)


# ---- what is measured


@pytest.mark.parametrize("groups", [None, [str(i // 4) for i in range(32)]])
def test_examples_are_measured_within_their_class(pool, groups):
    model = make_model(encoder=pool.encoder_module)
    rows, performance = measure_examples(model, pool, candidates=12, groups=groups, progress=False)
    for own, shown in enumerate(rows.tolist()):
        there = [row for row in shown if row >= 0]
        if CLASSES[own] is not None:  # one of no class is like everything
            others = [row for row in range(32) if CLASSES[row] == CLASSES[own] and row != own]
            others = [row for row in others if groups is None or groups[row] != groups[own]]
            assert set(there) == set(others)
        else:
            assert len(there) == 12
    across, _ = measure_examples(model, pool, candidates=12, classes=[None] * 32, progress=False)
    assert len({CLASSES[row] for row in across[0].tolist()}) > 1
    with pytest.raises(ValueError, match="3 classes for a pool of 32"):
        measure_examples(model, pool, classes=KINDS)


def test_an_image_that_is_alone_in_its_class_is_named(pool):
    classes = ["one", *["other"] * 31]
    with pytest.raises(ValueError, match="'scene 0' has no example of its class"):
        measure_examples(make_model(encoder=pool.encoder_module), pool, classes=classes, progress=False)


@pytest.mark.filterwarnings("ignore:on the pool")
def test_one_cascade_serves_all_classes_also_one_of_few_rows(tmp_path):
    classes = ["rare"] * 4 + [KINDS[i % 2] for i in range(28)]
    pool = make_pool(tmp_path, count=32, classes=classes, encoder=tiny_encoder())
    model = make_model(encoder=pool.encoder_module)
    measure_examples(model, pool, candidates=10, progress=False)
    cascade = CascadeSelector(model, passes=3).fit(pool, progress=False)
    pipe = VisualInContextPipeline(model.set_selector(cascade), pool=pool)
    for name in ("rare", "dog"):
        for answer in pipe(photos(), classes=[name] * len(photos()), num_examples=2):
            assert {classes[pool.position(id)] for id in answer["example_ids"]} == {name}
            assert np.isfinite(answer["scores"]).all()


@pytest.mark.filterwarnings("ignore:on the pool")
@pytest.mark.parametrize("passes", [1, 3])
def test_a_cascade_with_weights_by_class_survives_saving(tmp_path, monkeypatch, passes):
    monkeypatch.setattr(cascade_stages, "OWN", (300.0, 3000.0))
    monkeypatch.setattr(cascade_stages, "PENALTY", 1e6)  # so that what is shared predicts next to nothing
    classes = ["rare"] * 5 + [KINDS[i % 2] for i in range(26)] + [None]
    pool = make_pool(tmp_path, count=32, classes=classes, encoder=tiny_encoder())
    model = make_model(encoder=pool.encoder_module)
    measure_examples(model, pool, candidates=10, progress=False)
    of = {
        by_class: CascadeSelector(model, passes=passes, by_class=by_class).fit(pool, progress=False)
        for by_class in (False, True)
    }
    assert of[True].classes == ["cat", "dog", "rare"] and of[True].first_apart.abs().amax(1).min() > 0
    assert not [name for name in of[False].state_dict() if "apart" in name]
    pipe = VisualInContextPipeline(model.set_selector(of[True]), pool=pool)
    asked = dict(classes=["dog", "rare", "cat"], num_examples=2)
    found = pipe(photos()[:3], **asked)
    pipe.save_pretrained(tmp_path / "saved")
    again = VisualInContextPipeline(str(tmp_path / "saved"))
    assert again.model.selector.by_class and again.model.selector.classes == of[True].classes
    for one, other in zip(found, again(photos()[:3], **asked), strict=True):
        assert one["example_ids"] == other["example_ids"] and one["scores"] == pytest.approx(other["scores"])
    with torch.no_grad():
        of[True].first_apart.neg_()
    assert [one["scores"] for one in pipe(photos()[:3], **asked)] != [one["scores"] for one in found]


def test_weights_by_class_need_classes_and_ridges(tmp_path):
    pool = make_pool(tmp_path, count=12, encoder=tiny_encoder())
    model = make_model(encoder=pool.encoder_module)
    measure_examples(model, pool, candidates=5, progress=False)
    with pytest.raises(ValueError, match="by_class=True, but this pool keeps no class.*class_column="):
        CascadeSelector(model, passes=2, by_class=True).fit(pool)
    with pytest.raises(ValueError, match="by_class=True with head='listwise': only head='ridge'"):
        CascadeSelector(model, head="listwise", by_class=True)


# ---- maps


def test_a_label_map_has_the_surest_class_of_every_pixel(pipe):
    image = photos()[0]
    found = pipe.label_map(image)
    assert found["classes"] == KINDS and found["label_map"].shape == image.size[::-1]
    each = [pipe(image, classes=name, soft_map=True) for name in KINDS]
    sure = [np.where(one["soft_map"] >= 0.5, one["soft_map"] * one["confidence"], 0) for one in each]
    expected = np.where(np.max(sure, 0) > 0, np.argmax(sure, 0) + 1, 0)
    np.testing.assert_array_equal(found["label_map"], expected)
    assert found["example_ids"] == {name: one["example_ids"] for name, one in zip(KINDS, each)}
    assert len(np.unique(expected)) > 2 and "present" not in found


def test_a_label_map_follows_the_classes_asked_for(pipe):
    images = photos()
    forward, backward = pipe.label_map(images, KINDS[:2]), pipe.label_map(images, KINDS[1::-1], batch_size=2)
    for image, one, other in zip(images, forward, backward):
        np.testing.assert_array_equal(one["label_map"], np.array([0, 2, 1])[other["label_map"]])
        alone = pipe.label_map(image, ["emu"])["label_map"]
        np.testing.assert_array_equal(alone, pipe(image, classes="emu")["prediction"])


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["cow"], "'cow', of which the pool has no example"),
        (np.int64(7), "7, of which the pool has no example"),
        ([], "one class or more"),
        (["cat", "cat"], "each once"),
    ],
)
def test_a_class_that_cannot_be_is_refused(pipe, classes, text):
    with pytest.raises(ValueError, match=text):
        pipe.label_map(photos()[0], classes)


def test_maps_keep_to_what_each_image_may_be_shown(pipe, pool):
    images = photos()
    plain = pipe.label_map(images, KINDS[:2])
    exclude = [[*one["example_ids"]["cat"], *one["example_ids"]["dog"]] for one in plain]
    found = pipe.label_map(images, KINDS[:2], exclude=exclude, batch_size=2)
    for image, ids, one in zip(images, exclude, found):
        assert not set(ids) & {id for shown in one["example_ids"].values() for id in shown}
        alone = pipe.label_map(image, KINDS[:2], exclude=ids)
        assert alone["example_ids"] == one["example_ids"]
    for options in ({"batch_size": 0}, {"soft_map": True}, {"presence": True}, {"exclude": exclude[:2]}):
        with pytest.raises((ValueError, TypeError), match="batch_size=0|label_map sets|2 exclude for 5"):
            pipe.label_map(images, **options)


@pytest.mark.parametrize("sign", [1, -1])
def test_maps_also_go_by_expected_performance_below_zero(sign):
    answers = {
        name: {"soft_map": np.array([[white, 0.1]]), "confidence": sign * sure, "example_ids": [name]}
        for name, white, sure in (("a", 0.8, 0.3), ("b", 0.9, 0.6))
    }
    assert joined(answers)["label_map"].tolist() == [[2 if sign > 0 else 1, 0]]


@pytest.mark.parametrize(
    "where",
    ["cat", [("class", "cat")], {"kind": "cat"}, {"class": None}, {"class": np.str_("cow")}, {"class": ["dog", "a"]}],
)
def test_candidates_that_there_are_not_are_refused(pipe, where):
    with pytest.raises(ValueError, match="candidates_where"):
        pipe(photos(), candidates_where=where)
    one = pipe(photos()[0], candidates_where={"class": np.str_("cat")}, exclude=np.str_("scene 0"))
    assert CLASSES[pipe.pool.position(one["example_ids"][0])] == "cat" and one["example_ids"] != ["scene 0"]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Three groups of four rows, which have numbers for names."""
    numbers = [i // 4 for i in range(12)]
    return make_pool(tmp_path_factory.mktemp("groups"), groups=numbers, classes=numbers, encoder=tiny_encoder())


@pytest.mark.parametrize("kind", [int, str, np.int64, np.str_, torch.tensor])
def test_a_group_is_the_same_in_every_type(numbered, kind):
    pipe = VisualInContextPipeline(make_model(encoder=numbered.encoder_module), "nearest", numbered)
    photo, one = scene(5)[0], kind("1") if kind in (str, np.str_) else kind(1)

    def shown(**given):
        return {numbered.groups[numbered.position(id)] for id in pipe(photo, num_examples=8, **given)["example_ids"]}

    assert "1" in shown()
    assert shown(groups=one) == {"0", "2"}
    assert shown(classes=one) == {"1"}
    with pytest.warns(UserWarning, match="none of groups= is a group of the pool, which has 0, 1, 2: "):
        assert "1" in shown(groups="video")


@pytest.mark.parametrize("name", [1.0, np.float32(1), b"1", [1], torch.tensor([1])])
def test_what_would_be_another_group_than_it_says_is_refused(numbered, name):
    model = make_model(encoder=numbered.encoder_module)
    pipe = VisualInContextPipeline(model, "nearest", numbered)
    for argument in ("groups", "classes"):
        with pytest.raises(TypeError, match=f"{argument} holds .*pass texts, whole numbers or None"):
            pipe([scene(5)[0]], **{argument: [name]})
    with pytest.raises(TypeError, match="'group'. holds .*pass texts, whole numbers or None"):
        pipe(scene(5)[0], candidates_where={"group": [name]})
    with pytest.raises(TypeError, match="groups holds .*pass texts, whole numbers or None"):
        measure_examples(model, numbered, groups=[name] * 12)
    with pytest.raises(TypeError, match="groups='twelve chars': pass one for each row"):
        measure_examples(model, numbered, groups="twelve chars")


def test_rows_without_a_group_in_a_table_are_of_none(numbered):
    model = make_model(encoder=numbered.encoder_module)
    expected = measure_examples(model, numbered, candidates=4, groups=["a", None] * 6, progress=False)
    got = measure_examples(model, numbered, candidates=4, groups=["a", float("nan")] * 6, progress=False)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("wrong", [0.0, b"", [], [[1]]])
def test_a_column_of_groups_that_are_no_names_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match="column 'group' holds .*pass texts, whole numbers or None"):
        make_pool(tmp_path, groups=[wrong] * 12)


def test_panels_beside_keep_to_what_may_be_shown(pipe, monkeypatch):
    shown = []
    monkeypatch.setattr(
        pipeline_module, "rows_shown", lambda pipe, images, answers, labels: shown.extend(answers) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        pipe.plot(scene(3)[0], exclude="scene 3", classes="dog", strategy="dense", beside=("nearest", "random"))
    ids = [answer[0]["example_ids"][0] for _, answer in shown]
    assert len(ids) == 3 and "scene 3" not in ids and {CLASSES[pipe.pool.position(id)] for id in ids} == {"dog"}


def test_maps_are_of_masks_and_of_pools_that_keep_classes(tmp_path):
    boxes = make_pool(tmp_path, "detection", classes=KINDS * 4)
    with pytest.raises(ValueError, match="this pipeline is for detection"):
        VisualInContextPipeline(make_model("detection"), pool=boxes).label_map(photos()[0])
    with pytest.raises(ValueError, match="keeps no class"):
        VisualInContextPipeline(make_model(), pool=make_pool(tmp_path)).label_map(photos()[0])


# ---- absence


def features_of(shift, count=400, groups=1, seed=0):
    """Two kinds of rows, `shift` apart in one of three features; `groups` rows each are the same."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(count // groups, generator=generator) < 0.3
    rows = torch.randn(count // groups, 3, generator=generator)
    rows[:, 1] += shift * present
    return rows.repeat(groups, 1), present.repeat(groups), torch.arange(count // groups).repeat(groups)


@pytest.mark.parametrize("asked", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_false_alarms_are_as_many_as_were_asked_for(shift, asked):
    found = fit_presence(*features_of(shift), asked, "pool")
    fresh, present, _ = features_of(shift, count=4000, seed=1)
    above = torch.tensor([found.of(row)["present"] for row in fresh.tolist()])
    rate, error = float(above[~present].float().mean()), 3 * (asked * (1 - asked) / 280) ** 0.5
    assert abs(rate - asked) < error and abs(found.false_alarm_rate - asked) < error
    # what is said of objects that are there is true of new images, whether they can be told or not
    assert abs(float(above[present].float().mean()) - found.found_rate) < 0.12
    assert (found.found_rate > 2 * asked) == (shift > 0)


def test_rows_of_one_group_say_nothing_of_each_other():
    rows, present, groups = features_of(0.0, count=84, groups=4)
    wide = torch.cat([rows, torch.randn(21, 30, generator=torch.Generator().manual_seed(2)).repeat(4, 1)], 1)
    leaky = fit_presence(wide, present, torch.arange(84), 0.2, "pool")
    honest = fit_presence(wide, present, groups, 0.2, "pool")
    assert leaky.found_rate > 0.7 > 0.5 > honest.found_rate


def test_a_pipeline_says_whether_the_object_is_there(pipe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run pipe.calibrate_absence"):
        pipe(photos(), presence=True)
    found = pipe.calibrate_absence(20, 0.2, progress=False)
    assert found["images"] >= 36 and 0 <= found["false_alarm_rate"] <= 1 and 0 <= found["found_rate"] <= 1
    found |= {"mine": 1}  # the model has its own
    answers = pipe(photos(), presence=True, classes=["cat"] * 5)
    for answer, plainly in zip(answers, pipe(photos(), classes=["cat"] * 5)):
        assert 0 < answer["presence"] < 1 and answer["example_ids"] == plainly["example_ids"]
        score = torch.tensor(answer["presence"], dtype=torch.float64).logit()
        assert answer["present"] == (float(score) > found["threshold"])
    mapped = pipe.label_map(photos()[0])
    absent = [i + 1 for i, name in enumerate(KINDS) if not mapped["present"][name]]
    assert not set(absent) & set(np.unique(mapped["label_map"]).tolist())
    pipe.save_pretrained(tmp_path)
    again = VisualInContextPipeline(tmp_path)(photos(), presence=True, classes=["cat"] * 5)
    assert [one["presence"] for one in again] == pytest.approx([one["presence"] for one in answers], abs=1e-5)
    for name, value in (
        ("weights", [1.0]),
        ("centre", None),
        ("threshold", "0"),
        ("more", 1),
        ("spread", [0.0] * len(FEATURES)),
        *((name, [float("nan")] * len(FEATURES)) for name in ("centre", "spread")),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="not what calibrate_absence writes"):
            patch.setitem(pipe.model.config.absence, name, value)
            pipe(photos(), presence=True)
    monkeypatch.setitem(pipe.model.config.absence, "pool_fingerprint", "another")
    with pytest.raises(ValueError, match="calibrated on the pool another"):
        pipe(photos(), presence=True)


@pytest.mark.parametrize(
    ("classes", "groups", "images"),
    [
        (["rare", *[KINDS[i % 3] for i in range(31)]], None, 2 * 31),  # one that is alone is not asked about
        ([KINDS[i % 3] for i in range(32)], ["video" if i % 3 == 0 else str(i) for i in range(32)], 2 * 21),
        ([KINDS[i % 2] for i in range(32)], ["video" if i % 2 == 0 else str(i) for i in range(32)], 2 * 16),
        ([KINDS[i % 2] for i in range(32)], ["video"] * 32, None),
    ],
)
def test_only_what_has_an_example_is_asked_about(classes, groups, images, tmp_path):
    pool = make_pool(tmp_path, count=32, classes=classes, groups=groups)
    pipe = VisualInContextPipeline(make_model(), pool=pool)
    if images is not None:
        assert pipe.calibrate_absence(32, progress=False)["images"] == images
        return
    with pytest.raises(ValueError, match="alone in its class, or of the only group"):
        pipe.calibrate_absence(32, progress=False)


def test_absence_is_learnt_with_the_options_of_the_pipeline(pipe, pool):
    options = {"strategy": "dense", "num_examples": 3}
    given = pipe.calibrate_absence(12, 0.2, progress=False, **options)
    own = VisualInContextPipeline(pipe.model, pool=pool, **options)
    assert own.calibrate_absence(12, 0.2, progress=False) == given
    assert pipe.calibrate_absence(12, 0.2, progress=False)["weights"] != given["weights"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        *[({"queries": value}, "queries=.*: pass a number") for value in (-5, 0, 2.5, "many", True)],
        *[({"false_alarms": value}, "false_alarms=") for value in ("few", None, float("nan"))],
        ({"absent": photos()[0]}, "and 1 without"),
        ({"kind": "cat"}, "unknown options"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(pipe, settings, text):
    with pytest.raises((ValueError, TypeError), match=text):
        pipe.calibrate_absence(**{"progress": False} | settings)
    assert pipe.model.config.absence is None


def test_a_pipeline_made_to_say_so_also_looks_at_the_pool_anew(tmp_path):
    pool = make_pool(tmp_path, count=24, classes=KINDS * 8)
    pipe = VisualInContextPipeline(make_model(), pool=pool, presence=True)
    with pytest.raises(ValueError, match="run pipe.calibrate_absence"):
        pipe(photos()[0])
    pipe.calibrate_absence(progress=False)
    assert "present" in pipe(photos()[0])
    pipe.model.config.absence["threshold"] = 1e9
    with pytest.warns(UserWarning, match="in 1 of 1 images no class is taken to be present"):
        assert not pipe.label_map(photos()[0])["label_map"].any()
    pool.remove(["scene 0"])
    with pytest.raises(ValueError, match="or it was changed since"):
        pipe(photos()[0])


def test_a_pool_of_one_class_is_told_what_is_absent(tmp_path):
    pool = make_pool(tmp_path, count=14)
    pipe = VisualInContextPipeline(make_model(), pool=pool)
    with pytest.raises(ValueError, match="keeps no class"):
        pipe.calibrate_absence(progress=False)
    empty = [scene(number)[0].crop((0, 0, 9, 9)) for number in range(200, 212)]
    found = pipe.calibrate_absence(absent=empty, progress=False)
    assert found["images"] == 26 and pipe(empty[0], presence=True)["present"] in (True, False)
    for options, text in (
        ({"absent": empty[:3]}, "at least 10 of each"),
        ({"absent": empty, "queries": 4}, "4 images with their object and 12 without"),
        ({"absent": empty, "false_alarms": 0}, "false_alarms=0"),
    ):
        with pytest.raises(ValueError, match=text):
            pipe.calibrate_absence(**{"progress": False} | options)
    only = ExamplePool.from_pretrained(make_pool(tmp_path, count=12, classes=["cat"] * 12).folder)
    with pytest.raises(ValueError, match="the pool is of one class"):
        VisualInContextPipeline(make_model(), pool=only).calibrate_absence(progress=False)
