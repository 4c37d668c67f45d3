"""The evaluator on a made-up folder in the shape of VOC 2012: every benchmark, both conventions, cut and resumed."""

import json
import shutil
import sys
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image
from test_examples import ROOT


sys.path.insert(0, str(ROOT / "examples"))

import evaluate_vicl  # noqa: E402
import voc_folds  # noqa: E402


MODEL = str(ROOT / "model_cards" / "tiny-seggpt-digits")
NAMES = [f"2007_{number:06d}" for number in range(20)]
POOL, QUERIES = NAMES[:14], NAMES[14:]


def class_of(name):
    return 1 + int(name[-1]) % 2


def xml(size, boxes):
    parts = [f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"]
    for x0, y0, x1, y1 in boxes:
        sides = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), (x0, y0, x1, y1)))
        parts.append(f"<object><name>{escape('cat')}</name><bndbox>{sides}</bndbox></object>")
    return f"<annotation>{''.join(parts)}</annotation>"


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """20 photos with a rectangle of one class, 255 around it, in a palette; another class in a corner of some."""
    folder, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    for name in (
        "JPEGImages",
        "SegmentationClass",
        "Annotations",
        "ImageSets/Main",
        "trn",
        "val",
        "fss/cat",
        "fss/dog",
    ):
        (folder / name).mkdir(parents=True)
    for number, name in enumerate(NAMES):
        width, height = 60 + number, 70 - number
        x, y, w, h = (int(value) for value in rng.integers((5, 5, 12, 10), (15, 15, 24, 20)))
        photo = rng.integers(0, 90, (height, width, 3))
        photo[y : y + h, x : x + w] += 40 * np.array([1, 2, 3])[:: (1, -1)[class_of(name) - 1]]
        mask = np.zeros((height, width), np.uint8)
        mask[y - 2 : y + h + 2, x - 2 : x + w + 2] = 255
        mask[y : y + h, x : x + w] = class_of(name)
        if number % 3 == 0:
            mask[-6:, -6:] = 3 - class_of(name)
        picture, drawn = Image.fromarray(photo.astype(np.uint8)), Image.fromarray(mask, mode="P")
        drawn.putpalette([value % 256 for value in range(768)])
        picture.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
        drawn.save(folder / "SegmentationClass" / f"{name}.png")
        boxes = [(x + 1, y + 1, x + w, y + h)] * (2 if number % 7 == 6 else 1)
        boxes = [(1, 1, width, height)] if number == 19 else boxes  # more than a fifth
        (folder / "Annotations" / f"{name}.xml").write_text(xml((width, height), boxes))
        if number < 8:
            kind = folder / "fss" / ("cat", "dog")[number % 2]
            picture.save(kind / f"{number}.jpg")
            Image.fromarray(np.uint8(mask == class_of(name)) * 255).convert("RGB").save(kind / f"{number}.png")
    for part, main, names in (("trn", "train", POOL), ("val", "val", QUERIES)):
        lines = [f"{name}__{class_of(name):02d}" for name in names]
        for fold in range(4):
            (folder / part / f"fold{fold}.txt").write_text("\n".join(lines[fold:]) + "\n")
        (folder / "ImageSets" / "Main" / f"{main}.txt").write_text("\n".join(names))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Photos in the shape of COCO: one or two classes of each fold, polygons, runs, a crowd, another class beside."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    kinds = [1, 2, 3, 4, 7, 10, 11, 90]  # of folds 0, 1, 2, 3, 0, 1, 2, 3
    (folder / "annotations").mkdir()
    for part in ("train", "val"):
        (folder / f"{part}2014").mkdir()
        images, annotations = [], []
        for number in range(8):
            height, width, name = 40 + number, 50 - number, f"COCO_{part}2014_{number:012d}.jpg"
            Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{part}2014" / name)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            runs = {"size": [height, width], "counts": [3 * height, 2 * height, (width - 5) * height]}  # two columns
            annotations += [
                {"image_id": number, "category_id": kinds[number % 2], "iscrowd": 0, "segmentation": SQUARE},
                {"image_id": number, "category_id": kinds[4 + number % 2], "iscrowd": 1, "segmentation": runs},
                {"image_id": number, "category_id": kinds[number % 2], "iscrowd": 1, "segmentation": runs},
                {"image_id": number, "category_id": kinds[2 + number % 2], "iscrowd": 0, "segmentation": SQUARE},
            ]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": k, "name": f"k{k}"} for k in kinds],
        }
        (folder / "annotations" / f"instances_{part}2014.json").write_text(json.dumps(content))
    return folder


SQUARE = [[10, 10, 20, 10, 20, 30, 10, 30], [0, 35, 5, 35, 5, 38, 0, 38]]  # of 200 and of 15 pixels


def run_coco(coco, out, *arguments):
    given = ["--benchmark", "coco20i", "--folder", str(coco), "--model", MODEL, "--candidates", "3", *arguments]
    evaluate_vicl.main([*given, "--output_dir", str(out)])
    return evaluate_vicl.Rows(out, 0).read() if out.exists() else []


def test_folds_of_coco_are_every_fourth_class_and_masks_are_the_union_of_what_is_marked(coco, capsys):
    found = [voc_folds.read("coco20i", coco, None, fold) for fold in range(4)]
    assert [sorted({item.kind for item in pool}) for pool, _ in found] == [["k1", "k7"], ["k10", "k2"], ["k3"], ["k4"]]
    for pool, queries in found:
        assert {item.image.parent.name for item in pool} == {"train2014"} and len(pool) == len(queries)
        assert {item.image.parent.name for item in queries} == {"val2014"} and len(set(map(str, queries))) == len(
            queries
        )
        for item in queries:
            mask, (height, width) = item.classes(), item.size
            by_hand = np.zeros((height, width), np.uint8)
            if item.kind in ("k1", "k2", "k7", "k10"):
                by_hand[:, 3:5] = 1
            if item.kind not in ("k7", "k10"):
                by_hand[10:30, 10:20] = by_hand[35:38, :5] = 1
            assert np.array_equal(mask, by_hand) and Image.open(item.image).size == (width, height)
    voc_folds.main(["coco20i", "--folder", str(coco)])
    assert capsys.readouterr().out.splitlines()[0] == "fold 0: 8 examples, 8 queries, classes k1, k7"


@pytest.mark.parametrize(
    ("options", "queries"),
    [
        (("--convention", "fss", "--folds", "0", "1", "--strategies", "random", "nearest"), 32),
        (("--folds", "3", "--strategies", "oracle"), 4),
        (("--dry_run",), 0),
    ],
)
def test_coco_runs_in_both_conventions(coco, tmp_path, capsys, options, queries):
    rows = run_coco(coco, tmp_path / "out", *options)
    printed = capsys.readouterr().out
    assert len(rows) == queries and ("FSS-SAM3" in printed) == ("fss" in options)
    for row in rows:
        if "fss" in options:  # of the query's class, which another class beside does not count for
            assert {id.split("__")[1] for id in row["example_ids"]} == {row["query"].split("__")[1]}
            assert 0 <= row["intersection"] <= row["union"]
        else:
            assert 0 <= row["score"] <= 1
    if not queries:
        assert "fold 0: 8 examples" in printed and "fold 3: 4 examples" in printed


def test_without_training_annotations_examples_are_of_the_queries_images(coco, tmp_path):
    for name in ("annotations", "val2014"):
        shutil.copytree(coco / name, tmp_path / "coco" / name)
    (tmp_path / "coco" / "annotations" / "instances_train2014.json").unlink()
    pool, queries = voc_folds.read("coco20i", tmp_path / "coco", None, 0)
    assert pool == queries
    rows = run_coco(tmp_path / "coco", tmp_path / "out", "--convention", "fss", "--folds", "2", "--num_examples", "2")
    assert rows and all(row["query"] not in row["example_ids"] and len(row["example_ids"]) == 2 for row in rows)


@pytest.mark.parametrize("strategy", ["nearest", "random", "oracle"])
def test_a_photo_is_no_example_for_itself_under_another_class_either(coco, tmp_path, strategy):
    for name in ("annotations", "val2014"):
        shutil.copytree(coco / name, tmp_path / "coco" / name)
    (tmp_path / "coco" / "annotations" / "instances_train2014.json").unlink()
    rows = run_coco(tmp_path / "coco", tmp_path / "out", "--folds", "0", "--strategies", strategy)
    photos = [row["query"].split("__")[0] for row in rows]
    assert len(rows) == 8 and len(set(photos)) == 4  # each is asked for two classes
    assert all(photo != id.split("__")[0] for photo, row in zip(photos, rows) for id in row["example_ids"])


def test_all_that_is_asked_of_a_photo_is_one_group_of_the_pool(coco):
    pool = voc_folds.read("coco20i", coco, None, 0)[0]
    photos = voc_folds.as_dataset(pool, "segmentation")["photo"]
    assert len(set(photos)) == 4 and all(photos.count(photo) == 2 for photo in photos)
    assert len({item.photo for item in pool + voc_folds.read("coco20i", coco, None, 0)[1]}) == 8


def change_first(folder, **values):
    """Change the first annotation of the validation part."""
    file = folder / "annotations" / "instances_val2014.json"
    content = json.loads(file.read_text())
    content["annotations"][0] |= values
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda folder: change_first(folder, segmentation=[[1, 2, 3]]),
            r"000.jpg, k1: \[\[1, 2, 3\]\] is neither poly",
        ),
        (lambda folder: change_first(folder, segmentation={"size": [9, 9], "counts": [81]}), "nor runs of 40 x 50"),
        (lambda folder: change_first(folder, segmentation=None), "None is neither polygons"),
        (lambda folder: change_first(folder, category_id=99), "KeyError: 99"),
        (lambda folder: change_first(folder, image_id=99), "KeyError: 99"),
        (lambda folder: (folder / "val2014" / "COCO_val2014_000000000003.jpg").unlink(), "1 of .* files are missing"),
        (
            lambda folder: (folder / "annotations" / "instances_val2014.json").unlink(),
            r"holds no instances_val\*.json",
        ),
        (lambda folder: (folder / "annotations" / "instances_val2014.json").write_text("{"), "cannot be read as inst"),
        (lambda folder: (folder / "annotations" / "instances_val2014.json").write_text("{}"), "KeyError: 'images'"),
        (
            lambda folder: (folder / "annotations" / "instances_val2014.json").write_text("[]"),
            "cannot be read as inst",
        ),
    ],
)
def test_a_coco_folder_that_is_not_whole_is_refused_before_a_run(coco, tmp_path, change, text):
    shutil.copytree(coco, tmp_path / "coco")
    change(tmp_path / "coco")
    with pytest.raises(ValueError, match=text):
        run_coco(tmp_path / "coco", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_nothing_of_a_class_is_marked_nothing_is_asked(coco, tmp_path):
    shutil.copytree(coco, tmp_path / "coco")
    change_first(tmp_path / "coco", segmentation=[], image_id=1)  # which has no other of the class
    found = [voc_folds.read("coco20i", folder, None, 0)[1] for folder in (coco, tmp_path / "coco")]
    assert {item.id for item in found[1]} <= {item.id for item in found[0]}
    assert all(item.classes().any() for item in found[1])


def run(voc, out, *arguments, benchmark="pascal5i"):
    lists = {"fss1000": ["--lists", str(voc / "classes.txt")], "detection": []}.get(benchmark, ["--lists", str(voc)])
    folder = voc / "fss" if benchmark == "fss1000" else voc
    given = ["--benchmark", benchmark, "--folder", str(folder), *lists, "--model", MODEL, "--candidates", "6"]
    evaluate_vicl.main([*given, "--output_dir", str(out), *arguments])
    return evaluate_vicl.Rows(out, 0).read() if out.exists() else []


def test_every_query_is_scored_at_111_pixels_and_a_cut_run_goes_on(voc, tmp_path, capsys, monkeypatch):
    arguments = ("--folds", "1", "--strategies", "nearest", "oracle", "random")
    rows = run(voc, tmp_path, *arguments)
    printed = capsys.readouterr().out
    by = {
        name: {row["query"]: row for row in rows if row["strategy"] == name}
        for name in ("nearest", "oracle", "random")
    }
    assert [len(of) for of in by.values()] == [5, 5, 5] and [row["place"] for row in by["nearest"].values()] == [
        *range(5)
    ]
    assert all(by["oracle"][query]["score"] >= by["nearest"][query]["score"] - 1e-6 for query in by["nearest"])
    mean = 100 * np.mean([row["score"] for row in by["oracle"].values()])
    assert f"| oracle | 5 | {mean:.2f} | {mean:.2f} |" in printed and "Partial2Global, MAE-VQGAN" in printed
    file = tmp_path / "answers-0.jsonl"
    whole = file.read_text()
    file.write_text("\n".join(whole.splitlines()[:7]) + "\n" + whole.splitlines()[7][:20])
    asked = []
    answer = evaluate_vicl.answers
    monkeypatch.setattr(evaluate_vicl, "answers", lambda *given: (asked.extend(given[3]), answer(*given))[1])
    again = run(voc, tmp_path, *arguments)
    assert len(asked) == 8 and capsys.readouterr().out == printed
    assert sorted(map(str, again)) == sorted(map(str, rows))


def test_the_means_are_those_of_the_conventions(voc):
    rows = [{"place": place, "score": score} for place, score in ((2, 0.2), (0, 0.9), (1, 0.4))]
    args = evaluate_vicl.Arguments(folder="x")
    round_list = [0.9, 0.4, 0.2] * 334
    assert evaluate_vicl.summary(args, rows) == pytest.approx((50.0, 100 * np.mean(round_list[:1000])))
    args = evaluate_vicl.Arguments(folder="x", convention="fss")
    rows = [
        {"class": kind, "intersection": i, "union": u, "ground intersection": g, "ground union": v}
        for kind, i, u, g, v in (("a", 1, 4, 6, 8), ("a", 3, 4, 8, 8), ("b", 1, 1, 2, 4))
    ]
    assert evaluate_vicl.summary(args, rows) == pytest.approx((100 * (4 / 8 + 1) / 2, 50 * (5 / 9 + 16 / 20)))


def test_void_pixels_do_not_count_and_boxes_are_of_the_objects(voc):
    item = voc_folds.read("pascal5i", voc, voc, 0)[0][3]
    args = evaluate_vicl.Arguments(folder="x", convention="fss")
    mask = np.asarray(Image.open(item.mask))
    spilled = np.uint8((mask == 255) | (mask == item.value))
    counts = evaluate_vicl.counted(args, item, Image.open(item.image), {"prediction": spilled})
    assert counts["intersection"] == counts["union"] == (mask == item.value).sum()
    assert counts["ground intersection"] == counts["ground union"] == ((mask != 255) & (mask != item.value)).sum()
    for single in sum(voc_folds.read("detection", voc, None, 0), []):
        x0, y0, x1, y1 = single.box
        mask = np.asarray(Image.open(voc / "SegmentationClass" / f"{single.id}.png"))
        mine = mask == class_of(single.id)
        assert mine[y0:y1, x0:x1].all() and mine[:-6, :-6].sum() <= (y1 - y0) * (x1 - x0)


@pytest.mark.parametrize(
    ("benchmark", "options", "queries"),
    [
        ("pascal5i", ("--convention", "fss", "--episodes", "3", "--folds", "0", "--strategies", "random", "dense"), 6),
        ("fss1000", ("--convention", "fss", "--num_examples", "2"), 8),
        ("detection", (), 5),
        ("colourisation", ("--folds", "3"), 3),
    ],
)
def test_every_benchmark_runs(voc, tmp_path, capsys, benchmark, options, queries):
    rows = run(voc, tmp_path, *options, benchmark=benchmark)
    printed = capsys.readouterr().out
    assert len(rows) == queries and ("published" in printed) == (benchmark != "fss1000")
    for row in rows:
        assert row["query"] not in row["example_ids"]
        if row["convention"] == "fss":
            assert 0 <= row["intersection"] <= row["union"]
            kinds = {id.split("__")[1] if "__" in id else id.split("/")[0] for id in row["example_ids"]}
            assert kinds == {row["class"]}
        else:
            assert np.isfinite(row["score"])


def test_answers_under_other_settings_are_neither_taken_nor_counted(voc, tmp_path, capsys):
    for options, rows in ((("--candidates", "3"), 3), (("--candidates", "4"), 6), (("--seed", "1"), 9)):
        assert len(run(voc, tmp_path, "--folds", "3", *options, benchmark="colourisation")) == rows
        assert "| nearest | 3 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:on the pool")
def test_learned_strategies_measure_the_pool_first(voc, tmp_path):
    arguments = ("--folds", "0", "--strategies", "transfer", "cascade", "--label_budget", "12", "--candidates", "12")
    rows = run(voc, tmp_path, *arguments)
    assert len(rows) == 12 and list((tmp_path / "performance").rglob("*.safetensors"))


def test_a_dry_run_says_what_it_costs_and_does_nothing(voc, tmp_path, capsys):
    arguments = ("--strategies", "nearest", "oracle", "cascade", "--label_budget", "5", "--dry_run")
    assert run(voc, tmp_path / "out", *arguments) == [] and not (tmp_path / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    assert "14 examples" in lines[0] and "6 queries: nearest 6, oracle 36, cascade 60, measuring 30" in lines[0]
    assert lines[-1].startswith(f"{4 * 30 + (6 + 5 + 4 + 3) * 17} runs of the frozen model, about ")


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        ("JPEGImages/2007_000015.jpg", (), "1 of 40 files are missing, such as .*2007_000015.jpg"),
        ("SegmentationClass", (), "neither SegmentationClassAug nor SegmentationClass"),
        ("val/fold2.txt", (), "there is no file .*fold2.txt"),
        (("val/fold1.txt", "2007_000015\n"), (), "line 1, is '2007_000015': it must be"),
        (("val/fold1.txt", "2007_000015__33\n"), (), "it must be an image and a class"),
        (("trn/fold1.txt", ""), (), "no image for the pool"),
        (("trn/fold1.txt", "2007_000001__01\n" * 2), (), "the same image and class twice"),
        ("Annotations/2007_000003.xml", ("--benchmark", "detection"), "there is no file .*2007_000003.xml"),
        (None, ("--benchmark", "detection", "--convention", "fss"), "detection has none"),
        (None, ("--benchmark", "fss1000"), "pass --convention fss"),
        (None, ("--folds", "4"), "folds holds 4: pascal5i has 4"),
    ],
)
def test_what_would_stop_a_run_is_said_before_it(voc, tmp_path, change, arguments, text):
    folder = tmp_path / "voc"
    folder.mkdir()
    for path in voc.rglob("*"):
        inside = path.relative_to(voc)
        if isinstance(change, str) and inside.as_posix().startswith(change):
            continue
        if path.is_dir():
            (folder / inside).mkdir(exist_ok=True)
        else:
            (folder / inside).write_bytes(path.read_bytes())
    if isinstance(change, tuple):
        (folder / change[0]).write_text(change[1])
    given = [
        "--benchmark",
        "pascal5i",
        "--folder",
        str(folder),
        "--lists",
        str(folder),
        "--model",
        "no/such",
        *arguments,
    ]
    with pytest.raises(ValueError, match=text):
        evaluate_vicl.main([*given, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="pass --lists"):
        voc_folds.read("fss1000", folder, None, 0)
    assert not (tmp_path / "out").exists()


def test_the_folds_are_told(voc, capsys):
    voc_folds.main(["pascal5i", "--folder", str(voc), "--lists", str(voc)])
    assert capsys.readouterr().out.splitlines()[3] == "fold 3: 11 examples, 3 queries, classes 01, 02"
