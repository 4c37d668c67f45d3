"""Models of several sizes in one repository: what is pushed, what loads, and which one is chosen."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from hub import LoopbackHub
from huggingface_hub import ModelCard, eval_result_entries_to_yaml, parse_eval_result_entries
from transformers import AutoModelForImageClassification

from hf_effdl import choose
from hf_effdl.cli.__main__ import main
from hf_effdl.structure.slim.family import FILE_NAME, family_record, read_family, write_family


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A trained run, its family in a folder, and one of the models after a change of its own."""
    home = tmp_path_factory.mktemp("family")
    run = tiny_run.trainer(home / "run", num_train_epochs=1, save_strategy="no")
    run.train()
    own = run.slim(macs=0.4, calibration=False, latency_batch=0)
    with torch.no_grad():
        own.classifier[1].bias.add_(1.0)
    slim = {0.7: run.slim(macs=0.7, calibration=False), 0.4: own}
    revisions = run.save_family(slim, home / "fam", dataset="tester/patches", tasks="image-classification")
    return run, home / "fam", revisions, slim


def test_every_size_loads_and_the_largest_from_the_top(family):
    run, folder, revisions, models = family
    assert revisions == ["macs-0.7", "macs-0.4"] and run.results == {}
    x = torch.linspace(-1, 1, 512).view(2, 1, 16, 16)
    for place, share in ((".", 0.7), ("macs-0.7", 0.7), ("macs-0.4", 0.4)):
        loaded = AutoModelForImageClassification.from_pretrained(folder / place).eval()
        torch.testing.assert_close(loaded(x).logits, models[share].eval()(x).logits, rtol=0, atol=0)
    record = read_family(folder)
    for member, share in zip(record["members"], (0.7, 0.4), strict=True):
        assert member["macs"] == models[share].config.effdl_report["macs"]["after"]
        assert member["metrics"] == pytest.approx(run.evaluate_model(models[share]))
    timed, untimed = (member["latency_ms"] for member in record["members"])
    assert record["metric"] == "accuracy" and timed > 0 and untimed is None


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_is_cut_off_while_weights_are_written_leaves_what_was_there_and_no_family(family, tmp_path, monkeypatch):
    run, _, _, models = family
    run.save_slim(models[0.7], tmp_path / "slim")
    run.save_family(models, tmp_path / "fam")
    before = contents(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kwargs: 1 / 0)
    for save in (
        lambda: run.save_slim(models[0.4], tmp_path / "slim"),
        lambda: run.save_family(models, tmp_path / "fam"),
    ):
        with pytest.raises(ZeroDivisionError):
            save()
    before.pop(Path("fam", FILE_NAME))
    assert contents(tmp_path) == before
    with pytest.raises(FileNotFoundError, match="holds no family"):
        choose(tmp_path / "fam", macs=10**9)


def test_the_cards_show_all_sizes_and_results_of_their_own(family):
    run, folder, revisions, models = family
    top, small = (ModelCard.load(folder / place / "README.md") for place in (".", "macs-0.4"))
    for card in (top, small):
        assert all(f"| {name} |" in card.text for name in ("dense", *revisions))
    assert 'choose("fam"' in top.text and "family.png" in top.text and (folder / "family.png").stat().st_size > 5_000
    assert 'from_pretrained("fam", revision="macs-0.4")' in small.text and small.data.datasets == ["tester/patches"]
    found = {result.metric_type: result.metric_value for result in small.data.eval_results}
    assert found["accuracy"] == pytest.approx(run.evaluate_model(models[0.4])["accuracy"])


def test_a_member_that_was_saved_anew_is_not_chosen_by_what_is_known_of_the_one_before(family, tmp_path):
    run, folder, revisions, models = family
    shutil.copytree(folder, tmp_path / "fam")
    assert choose(tmp_path / "fam", macs=10**9) in revisions
    for revision in revisions:
        (left := tmp_path / "fam" / revision / ".README.md.killed").mkdir()
        run.save_slim(models[0.4 if revision == revisions[0] else 0.7], tmp_path / "fam" / revision)
        assert not left.exists()
    with pytest.raises(ValueError, match="was saved anew since family.json"):
        choose(tmp_path / "fam", macs=10**9)


def results_beside(folder):
    """`{file name: entry}`, read as the Hub's client reads them."""
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (folder / ".eval_results").glob("*.yaml")}
    entries = {name: parse_eval_result_entries(content) for name, content in files.items()}
    for name, content in files.items():
        assert eval_result_entries_to_yaml(entries[name]) == content  # there are no other keys
    return {name: entry for name, (entry,) in entries.items()}


def test_results_of_a_benchmark_lie_where_leaderboards_look(family, tmp_path):
    run, _, revisions, models = family
    details = {"dataset": "tester/patches", "tasks": "image-classification"}
    run.save_family(models, tmp_path / "fam", benchmark={"accuracy": "test", "loss": "a/b c"}, **details)
    for place, share in ((".", 0.7), ("macs-0.7", 0.7), ("macs-0.4", 0.4)):
        found = results_beside(tmp_path / "fam" / place)
        assert found.keys() == {"patches-test", "patches-a_b_c"} and found["patches-a_b_c"].task_id == "a/b c"
        entry, metrics = found["patches-test"], run.evaluate_model(models[share])
        assert (entry.dataset_id, entry.task_id, entry.source_name) == ("tester/patches", "test", "Model card")
        assert entry.value == pytest.approx(metrics["accuracy"]) and entry.source_url.endswith("/fam")
        assert entry.notes == f"{models[share].config.effdl_report['macs']['ratio']:.0%} of the MACs"
        index = ModelCard.load(tmp_path / "fam" / place / "README.md").data.eval_results
        assert entry.value == {result.metric_type: result.metric_value for result in index}["accuracy"]
    run.save_slim(models[0.4], tmp_path / "none", **details)
    assert not results_beside(tmp_path / "none")
    own = run.slim(macs=0.4, calibration=False, latency_batch=0)
    small = run.finetune(own, epochs=1, output_dir=str(tmp_path / "tuned"))
    run.save_slim(small, tmp_path / "slim", benchmark={"accuracy": "test"}, **details)
    assert results_beside(tmp_path / "slim")["patches-test"].value == run.evaluate_model(small)["accuracy"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": None}, "one data set of the Hub"),
        ({"dataset": ["a/b", "a/c"]}, "one data set of the Hub"),
        ({"dataset": "some patches"}, "one data set of the Hub"),
        (
            {"benchmark": {"wer": "test"}},
            r"names \['wer'\], and what was measured of this model is \['accuracy', 'loss'\]",
        ),
        ({"benchmark": "accuracy"}, "pass {metric: task id}"),
        ({"benchmark": {"accuracy": 1}}, "pass {metric: task id}"),
    ],
)
def test_results_of_no_benchmark_are_refused(family, change, message, tmp_path):
    run, _, _, models = family
    details = {"dataset": "tester/patches", "benchmark": {"accuracy": "test"}} | change
    with pytest.raises((ValueError, TypeError), match=message):
        run.save_family(models, tmp_path, **details)
    assert run.results == {}


def member(revision, accuracy, macs, latency):
    metrics = {} if accuracy is None else {"loss": 1.0, "accuracy": accuracy}
    timed = {} if latency is None else {"latency_ms": latency}
    return (
        {"revision": revision, "class": "ResNetForImageClassification", "macs": macs, "params": macs // 2}
        | timed
        | {"metrics": metrics}
    )


def written(folder, *members, metric="accuracy", greater=True, **inputs):
    inputs = inputs or {"pixel_values": torch.zeros(4, 1, 16, 16)}
    write_family(folder, family_record([member(*values) for values in members], metric, inputs, greater))
    return folder


SIZES = [("a", 0.9, 1000, 9.0), ("b", 0.95, 500, 5.0), ("c", 0.7, 100, 1.0)]


@pytest.mark.parametrize(
    "bounds, metric, chosen",
    [
        ({"latency_ms": 100}, "accuracy", "b"),  # the most accurate, not the largest
        ({"latency_ms": 100}, None, "a"),
        ({"latency_ms": 5.0}, "accuracy", "b"),
        ({"latency_ms": 4.99}, "accuracy", "c"),
        ({"macs": 499}, "accuracy", "c"),
        ({"params": 250, "latency_ms": 5}, None, "b"),
        ({"params": 249, "latency_ms": 5}, None, "c"),
    ],
)
def test_the_best_within_all_bounds_is_chosen(bounds, metric, chosen, tmp_path):
    assert choose(written(tmp_path, *SIZES, metric=metric), **bounds) == chosen


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize(
    "scores, greater, best", [((1.0, 2.0, 3.0), False, "a"), ((float("nan"), 0.2, 0.1), True, "b")]
)
def test_the_best_is_what_the_metric_says_in_any_order(scores, greater, best, order, tmp_path):
    members = [(name, score, 100, 1.0) for name, score in zip("abc", scores)]
    written(tmp_path, *(members[i] for i in order), greater=greater)
    assert choose(tmp_path, macs=100) == best


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.complex64])
def test_a_record_of_any_inputs_can_be_read(dtype, tmp_path):
    written(tmp_path, *SIZES, x=torch.zeros(2, 3, dtype=dtype), large=torch.zeros(1).expand(64, 3, 4096, 4096))
    assert choose(tmp_path, macs=499) == "c"


@pytest.mark.parametrize(
    "metrics, arguments, expected",
    [
        ({"val_loss": 1, "val_accuracy": 0, "test_loss": 2}, {}, ("val_accuracy", True)),
        (
            {"loss": 1, "wer": 0, "f1": 0},
            {"metric_for_best_model": "eval_wer", "greater_is_better": False},
            ("wer", False),
        ),
        ({"loss": 1, "wer": 0, "f1": 0}, {"metric_for_best_model": "f1", "greater_is_better": True}, ("f1", True)),
        ({"loss": 1, "f1": 0}, {"metric_for_best_model": "sparse_f1", "greater_is_better": False}, ("f1", True)),
        ({"loss": 1}, {}, ("loss", False)),
    ],
)
def test_which_is_the_best_follows_the_arguments(family, metrics, arguments, expected, tmp_path, monkeypatch):
    run, _, _, models = family
    for name, value in arguments.items():
        monkeypatch.setattr(run.args, name, value)
    monkeypatch.setattr(run, "evaluate_model", lambda model: {**metrics, "broken": float("nan")})
    run.save_family({0.7: models[0.7]}, tmp_path)
    record = read_family(tmp_path)
    assert (record["metric"], record["greater_is_better"]) == expected
    assert all(set(one["metrics"]) == set(metrics) for one in record["members"])


def test_the_command_line_chooses_as_the_function_does(family, capsys):
    _, folder, _, _ = family
    macs = max(one["macs"] for one in read_family(folder)["members"]) - 1
    assert main(["choose", str(folder), "--macs", str(macs)]) == 0
    assert capsys.readouterr().out.strip() == choose(folder, macs=macs) == "macs-0.4"


def test_where_asked_the_models_are_timed_here_and_not_believed(family, tmp_path):
    _, folder, _, _ = family
    with pytest.raises(ValueError, match="macs-0.4 was not timed: pass device="):
        choose(folder, latency_ms=1e-9)
    assert choose(folder, latency_ms=1e6, device="cpu") in ("macs-0.7", "macs-0.4")
    with pytest.raises(ValueError, match="no model of .* is within {'latency_ms': 1e-09}: .*'macs-0.7'.*'macs-0.4'"):
        choose(folder, latency_ms=1e-9, device="cpu")


@pytest.mark.parametrize(
    "bounds, message",
    [
        ({}, "give one bound or more"),
        ({"macs": 0}, "each above 0"),
        ({"macs": "few"}, "macs='few': it must be a number"),
        ({"macs": 5}, "no model of .* is within {'macs': 5.0}"),
        ({"latency_ms": 5, "device": "here"}, "device='here' is none of torch"),
        ({"macs": 500, "device": 0}, "device=0 measures how long"),
        ({"macs": 500, "device": "cpu"}, "device='cpu' measures how long a pass takes: give latency_ms="),
    ],
)
def test_bounds_that_nothing_is_within_are_refused(bounds, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        choose(written(tmp_path, *SIZES), **bounds)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"members": []},
        {"members": [member("../x", 0.9, 1, 1.0)]},
        {"members": [member("a", 0.9, -1, 1.0)]},
        {"members": [{"revision": "a"}]},
        {"members": "all"},
        {"inputs": {"x": ["torch.float32", 10**20]}},
        {"greater_is_better": "no"},
        {"inputs": {"x": ["os.system", 1]}},
        {"metric": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("signed", [True, False])
def test_records_of_strangers_are_refused_by_name(change, signed, tmp_path):
    written(tmp_path, *SIZES)
    record = {**json.loads((tmp_path / FILE_NAME).read_text()), **change}
    if signed:
        write_family(tmp_path, {name: value for name, value in record.items() if name != "sha256"})
    else:
        (tmp_path / FILE_NAME).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="entry|format|damaged|upgrade|greater_is_better"):
        choose(tmp_path, latency_ms=1.0)


def test_bad_budgets_are_refused_before_anything_is_made(family, tmp_path):
    run, folder, _, models = family
    for budgets in (
        [],
        "half",
        [0.5, 0.5],
        [0.5, 2],
        [0.0],
        {0.5: torch.nn.Linear(1, 1)},
        [0.5, None],
        [0.5, 0.50000001],
    ):
        with pytest.raises((ValueError, TypeError), match="budgets"):
            run.save_family(budgets, tmp_path / "none")
    with pytest.raises(ValueError, match="budget='time': it must be one of"):
        run.save_family([0.5], tmp_path / "none", budget="time")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file' is a file: name a folder"):
        run.save_family(models, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="holds no family: there is no family.json"):
        choose(folder / "macs-0.4", macs=1)


PUSH = """
import sys; sys.path.insert(0, {support!r})
import tiny_run
run = tiny_run.trainer("run", num_train_epochs=1, save_strategy="no")
run.train()
options = {{"calibration": False, "latency_batch": 8}}
for turn in range(2):  # a push that was cut off is repeated
    urls = run.push_family([0.7, 0.4], "tester/family", options=options)
print(*urls)
"""
LOAD = """
import hf_effdl
from transformers import AutoModelForImageClassification
name = hf_effdl.choose("tester/family", macs={macs})
model = AutoModelForImageClassification.from_pretrained("tester/family", revision=name)
print(name, model.config.effdl_report["macs"]["after"])
"""


@pytest.mark.slow
def test_a_family_is_pushed_chosen_from_and_loaded_over_http(tmp_path):
    with LoopbackHub() as hub:
        support = str(Path(tiny_run.__file__).parent)
        printed = hub.run(PUSH.format(support=support), tmp_path / "push").splitlines()[-1]
        assert printed.split() == ["macs-0.7", "macs-0.4", "main"]
        repo = hub.repos["model", "tester/family"]
        assert not any(path.startswith("macs-") for path in repo.head.tree)  # each size in its own revision alone
        record = json.loads(repo.head.tree[FILE_NAME])
        small = record["members"][1]["macs"]
        name, macs = hub.run(LOAD.format(macs=small), tmp_path / "load").split()[-2:]
        assert name == "macs-0.4" and int(macs) == small
