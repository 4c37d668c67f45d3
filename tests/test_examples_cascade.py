"""The cascade's example as a user would run it: alone, on two processes, and its settings."""

import json
import sys

import numpy as np
import pytest
from test_examples import ROOT, TWO, run

from hf_effdl import CascadeSelector, ListwiseRanker, RankerSelector, VisualInContextPipeline


SCRIPT = ROOT / "examples" / "fit_cascade.py"
sys.path.insert(0, str(ROOT / "examples"))

import fit_cascade  # noqa: E402
import train_ranker  # noqa: E402
from digit_scenes import make_scenes  # noqa: E402

from hf_effdl.cli.work import fitting  # noqa: E402


SMALL = "--max_pool 18 --max_queries 4 --candidates 7 --label_budget 11 --passes 3 --fused 5".split()


def table(printed: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.filterwarnings("ignore:on the pool's own images")
def test_it_fits_a_cascade(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_cascade.main([*SMALL, "--output_dir", "one"])
    found = table(capsys.readouterr().out)
    assert list(found) == ["nearest", "dense", "transfer", "cascade", "cascade, 5 weighted", "oracle"]
    assert [row[0] for row in found.values()] == ["1", "1", "1", "3", "5", "7"]
    assert found["nearest"][2] == "0 ± 0" and found["oracle"][2] == "100 ± 0"
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["labelled"] == report["fit"]["images"] == 11
    for name, each in report["scores"].items():
        row = found["cascade, 5 weighted" if name == "weighted" else name]
        assert len(each) == 4 and row[1].startswith(f"{np.mean(each):.4f} ± ")
    assert (tmp_path / "one" / "examples.png").stat().st_size > 1000
    # what was saved is what was measured
    pipe = VisualInContextPipeline(str(tmp_path / "one" / "model"))
    assert isinstance(pipe.model.selector, CascadeSelector) and pipe.model.config.candidates == 7
    scenes = make_scenes(4, "test", "segmentation")
    masks = [output["prediction"] for output in pipe([scene["image"] for scene in scenes])]
    task = pipe.visual_task
    truth = [np.asarray(task.label(scene["mask"], scene["image"]))[..., 0] > 0 for scene in scenes]
    scores = [(one & other).sum() / max(1, (one | other).sum()) for one, other in zip(masks, truth)]
    assert scores == pytest.approx(report["scores"]["cascade"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:on the pool's own images")
def test_two_processes_fit_the_same_cascade(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit_cascade.main([*SMALL, "--output_dir", "one"])
    found = table(capsys.readouterr().out)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    printed = run(*TWO, str(SCRIPT), *SMALL, "--output_dir", "two", cwd=tmp_path)
    assert table(printed) == found and printed.count("| nearest |") == 1
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["fit"] == pytest.approx(report["fit"], abs=1e-5)
    for name, each in report["scores"].items():
        assert two["scores"][name] == pytest.approx(each, abs=1e-5)


def test_a_misspelt_argument_is_told_as_argparse_tells_it(capsys):
    with pytest.raises(SystemExit):
        fit_cascade.parse(["--macss", "3"])
    assert "error: unrecognized arguments: --macss 3" in capsys.readouterr().err


def test_settings_come_from_a_file_and_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: some/photos\nlabel_budget: 0\nhead: listwise\n")
    args = fit_cascade.parse(["--config", str(file), "--passes", "6"])
    assert (args.dataset_name, args.model) == ("some/photos", "BAAI/seggpt-vit-large")
    assert (args.label_budget, args.head, args.passes, args.candidates) == (0, "listwise", 6, 50)
    args = fit_cascade.parse([])
    assert args.dataset_name is None and args.model == train_ranker.DIGITS["model"] and args.max_queries == 48
    assert fit_cascade.parse(["--dataset_name", "x"]).label_column == "label"
    file.write_text("lable_budget: 4\n")
    with pytest.raises(ValueError, match=r"sets \['lable_budget'\]"):
        fit_cascade.parse(["--config", str(file)])


def test_the_gap_and_its_error():
    rng = np.random.default_rng(0)
    nearest, gap = rng.random(2000), rng.random(2000)
    scores = {
        "nearest": nearest,
        "oracle": nearest + gap,
        "half": nearest + gap / 2,
        "luck": nearest + gap * (rng.random(2000) < 0.3),
    }
    assert fitting.gap_closed(scores, "nearest", 1) == (0, 0)
    assert fitting.gap_closed(scores, "half", 1) == (pytest.approx(50), pytest.approx(0, abs=1e-9))
    closed, error = fitting.gap_closed(scores, "luck", 1)
    some = [rng.integers(0, 2000, 2000) for _ in range(400)]
    again = [100 * (scores["luck"] - nearest)[one].sum() / gap[one].sum() for one in some]
    assert closed == pytest.approx(30, abs=3 * error) and error == pytest.approx(np.std(again), rel=0.15)
    losses = {name: -values for name, values in scores.items()}
    assert fitting.gap_closed(losses, "luck", -1) == (pytest.approx(closed), pytest.approx(error))
    assert np.isnan(fitting.gap_closed({"nearest": [1.0, 2.0], "oracle": [1.0, 2.0]}, "oracle", 1)).all()


def test_the_shipped_cascade_and_ranker_choose_for_new_scenes():
    cards = ROOT / "model_cards"
    pipe = VisualInContextPipeline(model=str(cards / "tiny-cascade-digits"))
    scenes = make_scenes(16, "test", "segmentation", 7)
    images, masks = [scene["image"] for scene in scenes], [scene["mask"] for scene in scenes]
    ranker = RankerSelector(ListwiseRanker.from_pretrained(cards / "tiny-ranker-digits"))
    score, task = {}, pipe.visual_task
    truth = task.labels(masks, images, (48, 48))
    for strategy in ("nearest", "cascade", ranker):
        outputs = pipe(images, strategy=strategy, candidates=16)
        assert all(set(output["example_ids"]) <= set(pipe.pool.ids) for output in outputs)
        painted = task.labels([output["prediction"] for output in outputs], images, (48, 48))
        score[getattr(strategy, "kind", strategy)] = float(task.score(painted, truth).mean())
    assert pipe.model.config.strategy == "cascade" and score["cascade"] > score["nearest"] + 0.1
