"""Small nets trained in earnest: in one call from fresh weights, and fine-tuned; killed, resumed, by two processes."""

import random
import shutil
import time
from pathlib import Path

import pytest
import small_run
import tiny_run
import torch
from compare import assert_close, assert_same
from forked import Script
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from hf_effdl import GrowingArguments, GrowingTrainer, find_ticket, recalibrate_batch_norm
from hf_effdl.structure.slim.report import get_report
from hf_effdl.structure.training.evaluation import training_inputs
from hf_effdl.structure.training.small import longest_search


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run, its net, and what it ends with."""
    run = small_run.trainer(tmp_path_factory.mktemp("small") / "out")
    small = run.train_small(**small_run.SETTINGS)
    return run, small, small_run.outcome(run, small)


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_hand(small, rows, out, **changes):
    """The same training in a plain Trainer with torch's SGD."""
    values = {"learning_rate": 0.1, "optim": "sgd", "optim_args": "momentum=0.9", "seed": 3, "max_grad_norm": 0.0}
    values |= {"per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    Trainer(small, TrainingArguments(str(out), use_cpu=True, **values | changes), train_dataset=rows).train()
    return small


# ---- from fresh weights


def test_one_call_is_a_search_a_cut_and_a_plain_training(tmp_path):
    run = small_run.trainer(tmp_path / "one")
    small = run.train_small(**small_run.SEARCH)
    again = small_run.trainer(tmp_path / "two")
    ticket = find_ticket(again, **small_run.SEARCH)
    expected = again.slim(macs=0.5, calibration=False)
    recalibrate_batch_norm(expected, training_inputs(again.get_train_dataloader(), 8, expected))
    by_hand(expected, again.train_dataset, tmp_path / "three", max_steps=48 - ticket.step)
    assert_same(tensors(small), tensors(expected))
    report = get_report(small)
    assert report["search"] == {"step": ticket.step, "of": 48, "settled": True} and ticket.step < 24
    assert report["tuned"]["steps"] == 48 - ticket.step


@pytest.mark.parametrize(
    "left", ["nothing", "a checkpoint of the search", "the start", "a checkpoint of the small net", "all of it"]
)
def test_a_run_goes_on_from_whatever_is_there(trained, tmp_path, left):
    run, _, expected = trained
    out = tmp_path / "out"
    if left != "nothing":
        shutil.copytree(run.args.output_dir, out)
        newest = f"small/checkpoint-{run.tuner.state.global_step}"
        gone = {"a checkpoint of the search": "small", "the start": "small/checkpoint-*", "all of it": "none"}
        gone = gone.get(left, newest)
        for folder in out.glob(gone):
            shutil.rmtree(folder)
    again = small_run.trainer(out)
    small = again.train_small(**small_run.SETTINGS, resume_from_checkpoint=True)
    assert_same(small_run.outcome(again, small), expected)
    again.save_slim(small, tmp_path / "saved")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same(tensors(loaded), expected["small"])


@pytest.mark.parametrize("attempt", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_end(trained, tmp_path, attempt):
    run = Script("small_run.py", tmp_path)
    run.wait_for(lambda: list(tmp_path.glob("checkpoint-*/trainer_state.json")))
    time.sleep(delay := random.SystemRandom().uniform(0, 1.2))
    run.kill()
    print(f"killed {delay:.3f} s after the first checkpoint: {sorted(map(str, tmp_path.rglob('*-*')))}")
    Script("small_run.py", tmp_path, "--resume").finish()
    assert_same(torch.load(tmp_path / "final.pt", weights_only=True), trained[2], f"after {delay:.3f} s")


def test_two_processes_train_the_same_small_net_as_one(tmp_path):
    alone = small_run.shared(tmp_path / "one", 1)
    small = alone.train_small(**small_run.SETTINGS)
    Script("small_run.py", tmp_path / "two", "--shared", processes=2).finish()
    assert_close(torch.load(tmp_path / "two" / "final.pt", weights_only=True), small_run.outcome(alone, small))


def test_the_accuracy_is_on_the_card_beside_what_it_came_from(trained, tmp_path):
    run, small, _ = trained
    run.save_slim(small, tmp_path)
    card = (tmp_path / "README.md").read_text()
    search, tuned = (get_report(small)[part] for part in ("search", "tuned"))
    assert f"| units cut at step | {search['step']} of 48 |" in card and "| small net, teacher's share | 0.3 |" in card
    rows = {line.split(" | ")[0].strip("| "): line for line in card.splitlines() if "of the MACs," in line}
    name = next(name for name in rows if name.endswith("trained"))
    assert f"| {tuned['metrics']['accuracy']:.4g} |" in rows[name].replace(" | ", " | ")
    assert tuned["metrics"]["accuracy"] == run.evaluate_model(small)["accuracy"]


def test_what_is_asked_for_reaches_the_small_net(tmp_path):
    run = small_run.trainer(
        tmp_path / "a",
        base="adamw",
        learning_rate=0.003,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="loss",
    )
    run.eval_dataset = tiny_run.images(16, 5)
    small = run.train_small(params=0.6, epochs=2, learning_rate=0.01, within=0.4)
    optimizer = run.tuner.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 0.01
    assert run.tuner.state.global_step == 16 and run.tuner.state.best_model_checkpoint
    assert get_report(small)["params"]["ratio"] <= 0.6 and "calibration" not in get_report(small)


@pytest.mark.parametrize("share,within", [(0.5, 0.2), (0.2, 0.2), (0.15, 0.15), (0.02, 0.1)])
def test_a_search_costs_no_more_than_a_net_that_is_a_fifth_of_the_dense_one(share, within):
    assert longest_search(share) == within


BEGUN = "has files of an earlier run: pass resume_from_checkpoint=True"


@pytest.mark.parametrize(
    "change,settings,message",
    [
        ({}, {}, "give exactly one of macs, params, keep"),
        ({}, {"macs": 1.5}, "macs=1.5: a budget is a share"),
        ({}, {"macs": 0.5, "within": 0}, "within=0.0: it is a share"),
        ({}, {"macs": 0.5, "epochs": 0}, "epochs=0.0: it must be a positive"),
        ({}, {"macs": 0.5, "learning_rate": -1}, "learning_rate=-1.0"),
        ({}, {"macs": 0.5, "distill": 2}, "distill=2.0: it is the teacher's share"),
        ({}, {"macs": 0.5, "teacher": torch.nn.Linear(1, 1)}, "teacher= has no say with distill=0"),
        ({}, {"macs": 0.5, "score": "entropy"}, "score='entropy'"),
        ({"start": "dense"}, {"macs": 0.5}, "this path starts dense"),
    ],
)
def test_what_cannot_work_is_refused_before_any_step(tmp_path, change, settings, message):
    run = small_run.trainer(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        run.train_small(**settings)
    assert run.state.global_step == 0 and not list(tmp_path.iterdir())


def test_files_of_another_run_are_neither_mixed_in_nor_lost(trained, tmp_path):
    run, _, _ = trained
    with pytest.raises(ValueError, match="has trained for .* train_small starts from fresh weights"):
        run.train_small(macs=0.5)
    out = Path(run.args.output_dir)
    before = sorted(map(str, out.rglob("*")))
    with pytest.raises(ValueError, match=BEGUN):
        small_run.trainer(out).train_small(**small_run.SETTINGS)
    for change, message in (({"macs": 0.4}, "of a run with search="), ({"distill": 0.0}, "of a run with small=")):
        with pytest.raises(ValueError, match=message):
            small_run.trainer(out).train_small(**small_run.SETTINGS | change, resume_from_checkpoint=True)
    assert sorted(map(str, out.rglob("*"))) == before
    args = GrowingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="a GrowingTrainer"):
        GrowingTrainer(tiny_run.model(), args, train_dataset=tiny_run.images(8, 1)).train_small(macs=0.5)


# ---- fine-tuning


def test_finetuning_is_a_plain_training_with_its_accuracy_on_the_card(tmp_path):
    run = small_run.trainer(tmp_path / "out", num_train_epochs=2)
    run.train()
    small, same = run.slim(macs=0.5), run.slim(macs=0.5)
    assert run.finetune(small, epochs=2) is small
    recalibrate_batch_norm(same, training_inputs(run.get_train_dataloader(), 8, same))
    cut = run.evaluate_model(same)
    by_hand(same, run.train_dataset, tmp_path / "plain", learning_rate=0.05, num_train_epochs=2)
    assert_same(tensors(small), tensors(same))
    names = list(run.measured)
    assert names[0].startswith("dense") and names[-2].endswith("as cut") and names[-1].endswith("2 more epochs")
    assert run.measured[names[-2]]["accuracy"] == cut["accuracy"]
    assert run.measured[names[-1]]["accuracy"] == get_report(small)["tuned"]["metrics"]["accuracy"]
    card = run.save_slim(small, tmp_path / "saved") / "README.md"
    assert all(f"| {name} |" in card.read_text() for name in names)
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        run.finetune(run.slim(macs=0.5), epochs=2)
    killed = shutil.copytree(run.tuner.args.output_dir, tmp_path / "killed")
    shutil.rmtree(killed / "checkpoint-16")
    again = run.finetune(run.slim(macs=0.5), epochs=2, output_dir=killed, resume_from_checkpoint=True)
    assert_same(tensors(again), tensors(small))
    other = run.finetune(run.slim(macs=0.5), epochs=1, distill=0.5, bn_batches=0, output_dir=tmp_path / "taught")
    assert run.tuner.distillation.weight == 0.5 and not torch.equal(*(next(m.parameters()) for m in (other, small)))
    assert_same(tensors(run.tuner.distillation.teacher), tensors(run.model))


@pytest.mark.parametrize(
    "spoilt,message",
    [
        (lambda run, small: "a folder", "small is a str"),
        (lambda run, small: small.requires_grad_(False), "small has no parameter that is trained"),
        (lambda run, small: small.bfloat16(), "the model is in torch.bfloat16"),
        (lambda run, small: setattr(run, "compute_loss", len), r"has its own \['compute_loss'\]"),
        (lambda run, small: setattr(run, "train_dataset", tiny_run.images(8, 1).to_iterable_dataset()), "streamed"),
    ],
)
def test_what_the_trainer_of_a_small_net_would_not_do_is_refused(tmp_path, spoilt, message):
    run, small = small_run.trainer(tmp_path), tiny_run.model()
    with pytest.raises((TypeError, ValueError), match=message):
        run.finetune(spoilt(run, small) or small, epochs=1)
