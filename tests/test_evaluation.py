"""The projected model is evaluated as Trainer evaluates: by every option it has the metrics of a masked model."""

import copy
import logging

import numpy as np
import pytest
import tiny_run
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_effdl import SplitLBI, SplitLBIArguments, SplitLBICallback, SplitLBITrainer
from hf_effdl.structure.groups.surgery import mask
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.training.evaluation import training_inputs


SETTINGS = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 5, "max_steps": 4, "logging_steps": 2}
SETTINGS |= {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "seed": 3}
SETTINGS |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True}


class Net(nn.Module):
    """A classifier whose outputs and labels come in the shape that a case asks for."""

    main_input_name = "pixel_values"

    def __init__(self, answer: str = "logits") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.answer = answer
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head, self.other = nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, pixel_values, labels=None, targets=None):
        body = self.body(pixel_values).flatten(1)
        logits = self.head(body)
        other = self.other(body) if self.answer in ("nested", "two") else None
        labels = targets if labels is None else labels
        classes = labels
        if isinstance(labels, list):  # of a detector: a mapping for every image
            classes = torch.stack([label["class_labels"][0] for label in labels])
        loss = {} if classes is None else {"loss": F.cross_entropy(logits, classes)}
        if self.answer == "tuple" and loss:
            return (loss["loss"], logits)
        answers = {
            "nested": {"logits": (logits, {"inner": other})},
            "none": {"logits": logits, "nothing": None},
            "empty": {"logits": logits, "boxes": logits.new_zeros(len(logits), 0, 4)},
            "two": {"logits": (logits, other)},
        }
        return {**loss, **answers.get(self.answer, {"logits": logits})}


class Sum:
    """Accuracy batch by batch, as `batch_eval_metrics` wants it."""

    def __init__(self):
        self.right = self.rows = 0

    def __call__(self, p, compute_result=False):
        self.right += int((p.predictions.argmax(-1) == p.label_ids).sum())
        self.rows += len(p.label_ids)
        if not compute_result:
            return {}
        value, self.right, self.rows = self.right / self.rows, 0, 0
        return {"accuracy": value}


def first(p):
    return p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions


def accuracy(p):
    return {"accuracy": float((first(p).argmax(-1) == p.label_ids).mean()), "spread": float(first(p).std())}


def renamed(rows):
    return rows.rename_column("labels", "targets")


def detections(rows):
    values = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": values, "labels": [{"class_labels": row["labels"][None]} for row in rows]}


def of_inputs(p):
    return {"rows": len(p.inputs), "pixels": float(np.abs(p.inputs).mean()), "losses": float(np.mean(p.losses))}


CASES = {
    "nothing": {},
    "metrics": {"compute_metrics": accuracy},
    "preprocess": {
        "compute_metrics": lambda p: {"right": float((p.predictions == p.label_ids).mean())},
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
    "batch_eval_metrics": {"compute_metrics": Sum(), "args": {"batch_eval_metrics": True}},
    "include_for_metrics": {"compute_metrics": of_inputs, "args": {"include_for_metrics": ["inputs", "loss"]}},
    "label_names": {"compute_metrics": accuracy, "rows": renamed, "args": {"label_names": ["targets"]}},
    "several sets": {"compute_metrics": accuracy, "sets": True},
    "nested": {"answer": "nested", "compute_metrics": lambda p: {"spread": float(p.predictions[0].std())}},
    "two outputs": {"answer": "two", "compute_metrics": accuracy},
    "two outputs, no metrics": {"answer": "two"},
    "None among outputs": {"answer": "none"},
    "empty outputs": {"answer": "empty", "compute_metrics": accuracy},
    "tuple": {"answer": "tuple", "compute_metrics": accuracy},
    "detection": {"collate": detections, "args": {"remove_unused_columns": False}},
    "lists": {"compute_metrics": lambda p: {"per_class": [0.5, float(first(p).max())], "unknown": None}},
    "eval_accumulation_steps": {"compute_metrics": accuracy, "args": {"eval_accumulation_steps": 1}},
    "not concatenated": {
        "compute_metrics": lambda p: {"batches": len(p.predictions)},
        "args": {"eval_do_concat_batches": False},
    },
    "loss only": {"compute_metrics": accuracy, "args": {"prediction_loss_only": True}},
}


def make(kind, folder, net, case, arguments):
    rows = case.get("rows", lambda rows: rows)
    evaluated = rows(tiny_run.images(13, 2))
    sets = {"a": evaluated, "b": rows(tiny_run.images(7, 4))} if case.get("sets") else evaluated
    more = {name: case[name] for name in ("compute_metrics", "preprocess_logits_for_metrics") if name in case}
    args = arguments(str(folder), **{**SETTINGS, **case.get("args", {})})
    data = {"train_dataset": rows(tiny_run.images(32, 1)), "eval_dataset": sets}
    return kind(net, args, **data, data_collator=case.get("collate"), **more)


def metrics_of(logs, prefix="eval"):
    clocks = ("runtime", "per_second", "preparation_time", "epoch", "step")
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in logs.items()
        if key.startswith(f"{prefix}_") and not any(clock in key for clock in clocks)
    }


def assert_metrics(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == (b[key] if value is None else pytest.approx(b[key], rel=1e-4, abs=1e-5)), key


@pytest.mark.parametrize("name", CASES)
def test_the_projected_model_has_the_metrics_of_a_masked_one_by_every_option(name, tmp_path, caplog):
    case = CASES[name]
    run = make(SplitLBITrainer, tmp_path / "run", Net(case.get("answer", "logits")), case, SplitLBIArguments)
    run.train()
    got = run.evaluate()
    assert "was not evaluated" not in caplog.text
    masked = copy.deepcopy(run.model)
    kept = {name: inside.nonzero().flatten() for name, inside in run.path.support.items()}
    recalibrate_batch_norm(mask(masked, run.groups, kept), training_inputs(run.get_train_dataloader(), 8, masked))
    dense, sparse = (
        metrics_of(make(Trainer, tmp_path / "plain", net, case, TrainingArguments).evaluate())
        for net in (run.model, masked)
    )
    mine = metrics_of({key: value for key, value in got.items() if not key.startswith("eval_sparse")})
    theirs = metrics_of(got, "eval_sparse")
    if "compute_metrics" not in case and name != "detection":  # the accuracy of a classifier is ours
        theirs.pop("accuracy", None)
    assert_metrics(mine, dense)
    assert_metrics(theirs, sparse)
    logged = {key: value for entry in run.state.log_history for key, value in entry.items()}
    assert theirs.keys() <= metrics_of(logged, "eval_sparse").keys()


def test_a_plain_trainer_with_the_callback_evaluates_as_its_arguments_say(tmp_path, caplog):
    calls = []

    def metrics(p):
        calls.append(p.predictions.shape)
        return {"rows": len(p.inputs), "right": float((p.predictions == p.label_ids).mean())}

    run = tiny_run.plain_trainer(
        str(tmp_path), num_train_epochs=1, include_for_metrics=["inputs"], eval_do_concat_batches=True
    )
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, SplitLBICallback))
    callback.compute_metrics = metrics
    callback.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    run.train()
    assert calls and set(calls) == {(32,)} and "was not evaluated" not in caplog.text
    assert run.evaluate()["eval_sparse_rows"] == 32


def test_what_fails_in_the_extra_evaluation_is_a_warning(tmp_path, caplog):
    calls = []

    def metrics(p):
        calls.append(1)
        if len(calls) % 2 == 0:  # the projected model's turn
            raise KeyError("no such class")
        return {}

    case = {"compute_metrics": metrics}
    run = make(SplitLBITrainer, tmp_path, Net(), case, SplitLBIArguments)
    run.train()
    assert run.state.global_step == 4 and len(calls) == 2
    assert "the projected model was not evaluated: KeyError: 'no such class'" in caplog.text
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.evaluate()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())


def test_after_the_best_checkpoint_is_loaded_everything_is_of_its_moment(tmp_path):
    scores = iter([1.0] + [0.0] * 40)
    args = {"max_steps": 40, "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True}
    args |= {"metric_for_best_model": "eval_score"}
    case = {"compute_metrics": lambda p: {"score": next(scores)}, "args": args}
    run = make(SplitLBITrainer, tmp_path, Net(), case, SplitLBIArguments)
    run.train()
    assert run.path.step == 4 and not any(inside.any() for inside in run.path.support.values())
    labels = torch.as_tensor(run.eval_dataset["labels"])
    alone = F.cross_entropy(run.model.head.bias.detach().expand(len(labels), -1), labels).item()
    run.compute_metrics = None
    assert run.evaluate_masked()["loss"] == pytest.approx(alone, abs=1e-4)
    assert run.evaluate()["eval_sparse_loss"] == pytest.approx(alone, abs=0.02)  # mean over unequal batches
    from hf_effdl import SparsePath

    assert SparsePath.load(tmp_path).step == 4


def test_a_model_is_evaluated_on_every_one_of_several_sets(tmp_path):
    run = make(SplitLBITrainer, tmp_path, Net(), {"sets": True}, SplitLBIArguments)
    assert {"a_loss", "b_loss", "a_accuracy"} <= run.evaluate_model(run.model).keys()


def test_batch_norms_are_re_estimated_on_batches_of_the_training_size(tmp_path):
    run = make(SplitLBITrainer, tmp_path, Net(), {"args": {"eval_strategy": "no"}}, SplitLBIArguments)
    run.train()
    conv, norm, *_ = run.slim(keep=0.7, calibration=False, bn_batches=2, latency_batch=0).body
    rows = torch.stack(list(tiny_run.images(32, 1)["pixel_values"]))[::2]  # two batches, spread over the data
    with torch.no_grad():
        batches = [conv(batch).transpose(0, 1).flatten(1) for batch in rows.split(8)]
    for found, statistic in ((norm.running_mean, torch.mean), (norm.running_var, torch.var)):
        torch.testing.assert_close(found, torch.stack([statistic(batch, 1) for batch in batches]).mean(0))


# ---- said or refused


def test_what_cannot_be_evaluated_or_loaded_is_refused_before_anything_is_slimmed(tmp_path, monkeypatch):
    run = make(SplitLBITrainer, tmp_path, Net(), {"args": {"eval_strategy": "no"}}, SplitLBIArguments)
    run.train()
    monkeypatch.setattr(run, "slim", None)
    with pytest.raises(TypeError, match="Net is no transformers model.*state_dict"):
        run.save_family([0.5], tmp_path / "family")
    run.eval_dataset = None
    with pytest.raises(ValueError, match="set eval_dataset="):
        run.evaluate_path()


@pytest.mark.parametrize("method", ["evaluate_masked", "evaluate_path"])
def test_what_needs_a_trained_model_says_so(method, tmp_path):
    run = make(SplitLBITrainer, tmp_path, Net(), {}, SplitLBIArguments)
    with pytest.raises(ValueError, match=rf"{method}\(\) needs a trained model: call train\(\) first"):
        getattr(run, method)()


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_nobody_knows_beforehand_is_refused(schedule, tmp_path):
    with pytest.raises(ValueError, match=f"lr_scheduler_type='{schedule}' sets the learning rate by what the run"):
        SplitLBIArguments(str(tmp_path), lr_scheduler_type=schedule, eval_strategy="epoch", use_cpu=True)


def test_a_collator_of_pairs_gets_two_rows_and_one_that_takes_neither_is_named(tmp_path):
    def pairs(rows):
        assert len(rows) % 2 == 0, "only pairs"
        batch = torch.utils.data.default_collate(rows)
        return {**batch, "pixel_values": (batch["pixel_values"] + batch["pixel_values"].flip(0)) / 2}

    def never(rows):
        raise AssertionError("only eights")

    run = make(
        SplitLBITrainer, tmp_path, Net(), {"collate": pairs, "args": {"eval_strategy": "no"}}, SplitLBIArguments
    )
    run.train()
    other = make(SplitLBITrainer, tmp_path, Net(), {"collate": never}, SplitLBIArguments)
    with pytest.raises(ValueError, match=r"neither one row nor two.*only eights.*pass groups=find_groups"):
        other.train()


def test_the_groups_of_the_model_that_was_made_before_are_not_kept(tmp_path):
    widths = iter([4, 6, 8])

    def net():
        model = Net()
        width = next(widths)
        model.body[0], model.body[1] = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)
        model.head, model.other = nn.Linear(width, 2), nn.Linear(width, 3)
        return model

    args = SplitLBIArguments(str(tmp_path), **{**SETTINGS, "eval_strategy": "no"})
    run = SplitLBITrainer(args=args, model_init=net, train_dataset=tiny_run.images(32, 1))
    for units in (6, 8):
        run.train()
        assert [group.units for group in run.groups] == [units]


def test_pretrained_weights_under_a_learning_rate_for_fresh_ones_are_a_warning(tmp_path, caplog):
    net = tiny_run.model()
    net.config.name_or_path = "someone/resnet"
    changes = {**SETTINGS, "max_steps": 1, "eval_strategy": "no"}
    for rate, warned in ((0.1, True), (0.005, False)):
        caplog.clear()
        args = SplitLBIArguments(str(tmp_path), learning_rate=rate, **changes)
        SplitLBITrainer(net, args, train_dataset=tiny_run.images(32, 1)).train()
        assert ("weights from someone/resnet, and learning_rate=0.1 is for fresh ones" in caplog.text) is warned


def test_units_that_no_gradient_reaches_are_a_warning(tmp_path, caplog):
    class Detached(Net):
        def forward(self, pixel_values, labels=None):
            logits = self.head(self.body(pixel_values).flatten(1).detach())
            return (
                {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}
            )

    net = Detached()
    from hf_effdl import find_groups

    groups = find_groups(Net(), torch.rand(1, 1, 16, 16), unit="row")
    args = SplitLBIArguments(str(tmp_path), **{**SETTINGS, "eval_strategy": "no"})
    SplitLBITrainer(net, args, train_dataset=tiny_run.images(32, 1), groups=groups).train()
    assert "no gradient reaches body.0: the loss does not use them" in caplog.text


def test_an_optimizer_without_a_penalty_says_that_there_is_no_path(caplog):
    p = nn.Parameter(torch.ones(3))
    optimizer = SplitLBI([p], lr=0.1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            p.square().sum().backward()
            optimizer.step()
    assert caplog.text.count("no param group of SplitLBI has a penalty, so this is plain sgd") == 1
