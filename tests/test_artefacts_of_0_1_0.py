"""What version 0.1.0 saved loads with the code of today and gives the answers that 0.1.0 gave.

Only public names of the package are used here, as its inner modules may move. The script that wrote the files, with
0.1.0, is in the history: `git log --diff-filter=D -- tests/fixtures/make.py`.
"""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    set_seed,
)

import hf_effdl


FIXTURES = Path(__file__).parent / "fixtures"
PIPELINE = FIXTURES / "pipeline"
QUERIES = [str(file) for file in sorted((PIPELINE / "queries").glob("*.png"))]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # machines round differently


def plain(name: str, kind: str = "expected") -> Any:
    return json.loads((FIXTURES / name / f"{kind}.json").read_text())


def tensors(name: str, kind: str = "expected") -> dict[str, Tensor]:
    return load_file(FIXTURES / name / f"{kind}.safetensors")


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors and numbers in nested plain values, by their way there."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, (bool, int, float)):
        return {name: torch.tensor(value, dtype=torch.float64)}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found: dict[str, Tensor] = {}
    for key, part in parts:
        found |= flat(part, f"{name}/{key}".lstrip("/"))
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value, **{**CLOSE, **tolerance}, msg=lambda m: f"{name}: {m}")  # noqa: B023


def near(value: Any) -> Any:
    """Nested plain values whose floats need only be about equal."""
    if isinstance(value, dict):
        return {name: near(part) for name, part in value.items()}
    if isinstance(value, list):
        return [near(part) for part in value]
    return pytest.approx(value, abs=1e-5, rel=1e-5) if isinstance(value, float) else value


def test_every_public_name_is_still_there():
    names = json.loads((FIXTURES / "public_names.json").read_text())
    assert len(names) > 60 and set(names) <= set(hf_effdl.__all__)
    for name in names:
        assert getattr(hf_effdl, name) is not None


OLD_PATHS = json.loads((FIXTURES / "names_of_0_1_0.json").read_text())


@pytest.mark.parametrize("module", OLD_PATHS)
def test_old_paths_lead_to_where_names_are_now(module):
    place = importlib.import_module(f"hf_effdl.{module}")
    rooms = {room.name for room in pkgutil.iter_modules(getattr(place, "__path__", ()))}
    names = [name for name in OLD_PATHS[module] if name not in rooms and name not in vars(place)]
    for name in names:
        with pytest.warns(FutureWarning, match=rf"hf_effdl.{module}.{name} is hf_effdl\.\S+\.{name} now"):
            assert getattr(place, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'gone'"):
        place.gone  # noqa: B018


def test_rooms_of_today_come_before_old_names():
    from hf_effdl.structure.slim import report, slim  # the function of 0.1.0 is a room now

    assert (report.__name__, slim.__name__) == ("hf_effdl.structure.slim.report", "hf_effdl.structure.slim.slim")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_arguments_of_an_old_run_can_be_read():
    args = torch.load(FIXTURES / "trainer" / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert type(args) is hf_effdl.SplitLBIArguments and args.num_train_epochs == 3


# ---- prompt selection


def answers(pipe: Any) -> list[list]:
    outputs = pipe(QUERIES) + pipe(QUERIES, num_examples=3)
    return [[out["example_ids"], out["scores"], np.asarray(out["prediction"]).tolist()] for out in outputs]


def check_answers(found: list[list], kind: str = "expected") -> None:
    expected, painted = plain("pipeline", kind), tensors("pipeline", kind)["predictions"].numpy()
    for (ids, scores, prediction), one, image in zip(found, expected, painted, strict=True):
        assert ids == one["ids"] and scores == near(one["scores"])
        # a pixel on the edge may fall to the other side on another machine
        assert np.shape(prediction) == image.shape and (np.array(prediction) != image).mean() <= 0.002


def test_a_pipeline_with_a_cascade_chooses_and_paints_the_same():
    pipe = hf_effdl.VisualInContextPipeline(model=str(PIPELINE / "saved"))
    assert pipe.model.config.strategy == "cascade" and len(pipe.pool) == 20
    check_answers(answers(pipe))
    again = hf_effdl.VisualInContextPipeline(
        AutoModel.from_pretrained(PIPELINE / "saved"),  # the class is registered: no trust_remote_code
        pool=hf_effdl.ExamplePool.from_pretrained(PIPELINE / "saved" / "pool"),
    )
    assert type(again.model) is hf_effdl.VisualInContextModel
    assert isinstance(again.model.selector, hf_effdl.CascadeSelector)
    check_answers(answers(again))


def test_a_model_with_a_ranker_chooses_the_same_and_saves_again(tmp_path):
    model = hf_effdl.VisualInContextModel.from_pretrained(PIPELINE / "ranker")
    assert isinstance(model.selector, hf_effdl.RankerSelector)
    pool = hf_effdl.ExamplePool.from_pretrained(PIPELINE / "saved" / "pool")
    pipe = hf_effdl.VisualInContextPipeline(model, pool=pool)
    check_answers(answers(pipe), "ranker")
    pipe.save_pretrained(tmp_path)
    check_answers(answers(hf_effdl.VisualInContextPipeline(model=str(tmp_path))), "ranker")


def test_a_cascade_of_list_wise_networks_has_weights_of_the_same_names():
    config = hf_effdl.VisualInContextConfig.from_pretrained(PIPELINE / "listwise")
    state = hf_effdl.VisualInContextModel(config).state_dict()
    assert {name: "x".join(map(str, value.shape)) for name, value in state.items()} == plain("pipeline", "listwise")


BLOCKED = """
import json, sys
sys.modules["hf_effdl"] = None  # importing it raises
import numpy as np, torch
from safetensors.torch import load_file
from transformers import AutoModel, pipeline
torch.set_num_threads(1)
saved, queries, ranker, given = json.loads(sys.argv[1])
pipe = pipeline(model=saved, trust_remote_code=True)
outputs = pipe(queries) + pipe(queries, num_examples=3)
answers = [[out["example_ids"], out["scores"], out["prediction"].tolist()] for out in outputs]
model = AutoModel.from_pretrained(ranker, trust_remote_code=True).eval()
given = {name: value for name, value in load_file(given).items() if name not in ("loss", "scores")}
with torch.no_grad():
    print(json.dumps([answers, model(**given).scores.tolist()]))
"""


def test_without_the_package_the_code_beside_the_weights_answers_the_same(tmp_path):
    ranker = FIXTURES / "ranker"
    # in a copy, as transformers may write beside code that it loads
    for source, name in ((PIPELINE / "saved", "pipeline"), (ranker / "saved", "ranker")):
        shutil.copytree(source, tmp_path / name)
    given = [str(tmp_path / "pipeline"), QUERIES, str(tmp_path / "ranker"), str(ranker / "expected.safetensors")]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(given)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, scores = json.loads(done.stdout.strip().splitlines()[-1])
    check_answers(found)
    torch.testing.assert_close(torch.tensor(scores), tensors("ranker")["scores"], **CLOSE)


def test_measured_parts_are_taken_up_and_not_measured_again(tmp_path):
    shutil.copytree(PIPELINE / "measured", tmp_path / "measured")
    model = hf_effdl.VisualInContextModel.from_pretrained(PIPELINE / "saved")
    pool = hf_effdl.ExamplePool.from_pretrained(PIPELINE / "saved" / "pool")
    model.frozen.predict = None  # so that a run of it would fail
    candidates, performance = hf_effdl.measure_examples(model, pool, cache_dir=tmp_path / "measured", progress=False)
    assert_close({"candidates": candidates, "performance": performance}, tensors("pipeline", "measured"))


def test_a_ranker_scores_the_same():
    given = tensors("ranker")
    expected = {name: given.pop(name) for name in ("loss", "scores")}
    for load in (hf_effdl.ListwiseRanker.from_pretrained, AutoModel.from_pretrained):
        model = load(FIXTURES / "ranker" / "saved").eval()
        assert type(model) is hf_effdl.ListwiseRanker
        output = model(**given)
        assert_close({"loss": output.loss, "scores": output.scores}, expected)


def test_a_pool_holds_and_finds_the_same_and_can_be_changed(tmp_path):
    shutil.copytree(FIXTURES / "pool" / "saved", tmp_path / "pool")
    expected = plain("pool")
    pool = hf_effdl.ExamplePool.from_pretrained(tmp_path / "pool")
    pool.verify()
    for _ in range(2):
        rows = torch.arange(len(pool))
        similarities, found = pool.search(pool.vectors, 3, exclude=rows)
        plain_values = {name: getattr(pool, name) for name in ("ids", "task", "encoder", "fingerprint")}
        labels = [pool.label(row) for row in range(5)]
        assert plain_values | {"labels": labels, "found": found.tolist()} == expected
        images = torch.stack([torch.from_numpy(np.array(pool.image(row))) for row in range(5)])
        assert_close(
            {"vectors": pool.vectors, "tokens": pool.tokens(rows), "similarities": similarities, "images": images},
            tensors("pool"),
        )
        pool.save_pretrained(tmp_path / "again")  # without the row that was removed
        pool = hf_effdl.ExamplePool.from_pretrained(tmp_path / "again")
    pool.remove(["scene 2"])
    assert pool.ids == ["scene 0", "scene 1", "scene 3", "scene 5"] and pool.fingerprint != expected["fingerprint"]


def test_splits_are_read():
    splits = hf_effdl.read_splits(FIXTURES / "splits" / "splits.json")
    parts = ("queries", "pool", "dropped")
    assert {name: {part: list(getattr(split, part)) for part in parts} for name, split in splits.items()} == plain(
        "splits"
    )


# ---- structure


@pytest.mark.parametrize("widths", ["stock", "free"])
def test_a_slim_model_loads_and_has_the_same_logits(widths, tmp_path):
    expected = tensors("slim")
    model = AutoModelForImageClassification.from_pretrained(FIXTURES / "slim" / widths).eval()
    assert model.config.effdl_report["params"]["after"] == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(model(expected["x"]).logits, expected[widths], **CLOSE)
    model.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(expected["x"]).logits, expected[widths], **CLOSE)
    groups = hf_effdl.find_groups(model, expected["x"])
    smaller = hf_effdl.slim(model, groups, 0.5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def net(values: dict[str, Any]) -> ResNetForImageClassification:
    set_seed(0)
    return ResNetForImageClassification(ResNetConfig(**values))


def test_a_ticket_says_the_same_and_rewinds_to_the_same_networks(tmp_path):
    expected, logits = plain("ticket"), tensors("ticket")
    ticket = hf_effdl.Ticket.from_pretrained(FIXTURES / "ticket" / "saved")
    found = {name: getattr(ticket, name) for name in ("step", "settled", "init", "distances")}
    found |= {"report": ticket.report(), "model": expected["model"]}
    found["kept"] = {name: index.tolist() for name, index in ticket.kept.items()}
    assert json.loads(json.dumps(found)) == near(expected)
    ticket.save_pretrained(tmp_path)
    for one in (ticket, hf_effdl.Ticket.from_pretrained(tmp_path)):
        assert sorted(one.weights) == [0, 3, 9]
        for step in one.weights:
            small = hf_effdl.rewind(lambda: net(expected["model"]), one, to=step).eval()
            torch.testing.assert_close(small(logits["x"]).logits, logits[f"logits {step}"], **CLOSE)


def test_a_path_selects_the_same(tmp_path):
    expected = plain("path")
    path = hf_effdl.SparsePath.load(FIXTURES / "path" / "saved")
    path.save(tmp_path)
    for one in (path, hf_effdl.SparsePath.load(tmp_path)):
        assert one.step == expected["step"] and one.curve == near(expected["curve"])
        assert one.support_share() == near(expected["share"])
        for widths in ("stock", "free"):
            kept = one.select(macs=0.6, widths=widths)
            assert {name: index.tolist() for name, index in kept.items()} == expected[widths]
        assert_close(
            flat({"units": one.units, "dual": one.scores("dual"), "entry": one.scores("entry")}), tensors("path")
        )


def resumed(name: str, kind: Any, arguments: Any, folder: Path) -> Any:
    """A run that goes on from a checkpoint of 0.1.0, which had three epochs in all."""
    given, data = plain(name, "run"), tensors(name, "run")
    rows = {"pixel_values": (data["pixels"].float() / 50 - 1).numpy(), "labels": data["labels"].numpy()}
    rows = Dataset.from_dict(rows).with_format("torch")
    [source] = (FIXTURES / name).glob("checkpoint-*")
    checkpoint = folder / source.name
    shutil.copytree(source, checkpoint)
    run = kind(net(given["model"]), arguments(str(folder), **given["arguments"]), train_dataset=rows)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 15 > int(source.name[11:])
    parts = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.optimizer.state_dict(),
        "path": run.path.units,
    }
    assert_close(flat(parts), tensors(name), atol=3e-5, rtol=1e-4)
    return run


def test_a_split_lbi_run_goes_on_to_the_same_end(tmp_path):
    run = resumed("trainer", hf_effdl.SplitLBITrainer, hf_effdl.SplitLBIArguments, tmp_path)
    assert hf_effdl.SparsePath.load(FIXTURES / "trainer" / "checkpoint-6").step == 6
    assert isinstance(run.optimizer.optimizer, hf_effdl.SplitLBI)


def test_a_growing_run_goes_on_to_the_same_end(tmp_path):
    arguments = partial(hf_effdl.GrowingArguments, growth_init="split")  # the default of 0.1.0
    run = resumed("growing", hf_effdl.GrowingTrainer, arguments, tmp_path)
    expected = plain("growing")
    assert [row["step"] for row in run.history] == [4] * 4 + [9] * 4
    grown = Path("checkpoint-4", "grown", "model.safetensors")  # taken as it is: the first round is not made again
    assert (tmp_path / grown).stat().st_mtime_ns == (FIXTURES / "growing" / grown).stat().st_mtime_ns
    assert run.history == near(expected["history"]) and run.model.config.hidden_sizes == expected["hidden_sizes"]


# ---- samples


@pytest.mark.parametrize("name", ["default", "named"])
def test_a_selection_has_the_same_rows_and_draws_others_alike(name, tmp_path):
    source = Dataset.from_dict(plain("selection", "source"))
    shutil.copytree(FIXTURES / "selection" / "saved", tmp_path / "saved")
    expected = {
        key.partition("/")[2]: value for key, value in tensors("selection").items() if key.startswith(f"{name}/")
    }
    hf_effdl.Selection.load(tmp_path / "saved", name).save(tmp_path / "again", name)
    for folder in (tmp_path / "saved", tmp_path / "again"):
        selection = hf_effdl.Selection.load(folder, name)
        rows = hf_effdl.load_selection(folder, source, config_name=name)
        plan = selection.plan
        found = {name: getattr(plan, name) for name in ("positions", "weights", "probabilities")}
        found |= {"redrawn": selection.redraw(10, data=source).plan.positions, "scores": selection.scores()}
        assert_close(flat(found | {"applied": torch.tensor(rows["x"][:])}), expected)
        assert isinstance(plan, hf_effdl.Plan) and selection.info["hf_effdl"] == "0.1.0"
        assert (selection.row_ids is None) == (name == "default") and str(selection.report())


def test_training_dynamics_are_read_and_scored_the_same():
    folder = FIXTURES / "dynamics" / "saved"
    found = {"records": hf_effdl.load_dynamics(folder), "scores": hf_effdl.dynamics_scores(folder)}
    assert found["scores"].pop("dual").shape == found["scores"]["aum"].shape  # later than the fixture
    assert_close(flat(found), tensors("dynamics"))
