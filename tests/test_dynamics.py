import logging
import math
import os
import random
import signal
import statistics
import time
from contextlib import suppress
from pathlib import Path

import dynamics_run
import numpy as np
import pytest
import tiny_run
import torch
from datasets import Dataset
from dynamics_run import EPOCHS, ROWS, STEPS, Net, Rows, assert_same_tensors, files, names
from forked import Script
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_effdl import DynamicsCallback, WeightedTrainer, dynamics_scores, load_dynamics
from hf_effdl.samples.scores.dynamics import aum, dual, dyn_unc, forgetting, mean_el2n, row_dynamics
from hf_effdl.structure.training.trainer import last_complete_checkpoint


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


class Snapshots(TrainerCallback):
    """The weights at the end of every epoch."""

    def __init__(self):
        self.states = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.states.append({name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()})


class Chain(TrainerCallback):
    """A function called at one event."""

    def __init__(self, **events):
        for name, function in events.items():
            setattr(self, name, lambda args, state, control, _call=function, **kwargs: _call(state, **kwargs))


def finished_run(folder, noise: bool) -> Trainer:
    run = dynamics_run.trainer(folder, rows=Rows(noise=noise))
    run.snapshots = Snapshots()
    run.add_callback(run.snapshots)
    run.train()
    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run, on noisy rows, that others must equal."""
    return finished_run(tmp_path_factory.mktemp("run"), noise=True)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The same on rows that are always the same."""
    return finished_run(tmp_path_factory.mktemp("quiet"), noise=False)


# ---- the numbers of one epoch


def by_hand(logits: list[float], label: int) -> tuple[float, float, float]:
    total = sum(math.exp(z) for z in logits)
    p = [math.exp(z) / total for z in logits]
    error = math.sqrt(sum((p[c] - (c == label)) ** 2 for c in range(len(p))))
    return p[label], logits[label] - max(z for c, z in enumerate(logits) if c != label), error


def test_the_numbers_of_a_row_are_those_of_the_definitions():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logits[:2] = torch.tensor([[9.0, 0, -50, -50], [0, 300, -50, -50]])  # surer than float32 is exact
    labels = torch.arange(50) % 4
    labels[:2] = 0
    found = row_dynamics(logits, labels)
    expected = torch.tensor([by_hand(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)])
    assert torch.allclose(torch.stack(list(found.values()), 1), expected, rtol=1e-4, atol=1e-8)
    assert list(found) == ["p_label", "margin", "el2n"]
    assert all(value.dtype == torch.float32 for value in found.values())


def test_every_epoch_is_recorded_as_its_model_predicts_it(quiet):
    rows, folder = Rows(), Path(quiet.args.output_dir)
    records = load_dynamics(folder)
    assert records["epoch"].tolist() == [1, 2, 3, 4] and len(quiet.snapshots.states) == EPOCHS
    net = Net().eval()
    for epoch, state in enumerate(quiet.snapshots.states):
        net.load_state_dict(state)
        for i in range(ROWS):  # one row at a time
            row = rows[i]
            logits = net(row["x"][None])["logits"][0].tolist()
            p, margin, el2n = by_hand(logits, int(row["labels"]))
            assert records["p_label"][epoch, i].item() == pytest.approx(p, abs=1e-5)
            assert records["margin"][epoch, i].item() == pytest.approx(margin, abs=1e-5)
            assert records["el2n"][epoch, i].item() == pytest.approx(el2n, abs=1e-5)
            assert records["correct"][epoch, i].item() == (logits.index(max(logits)) == int(row["labels"]))
    assert all(records[name].dtype == torch.float32 for name in ("p_label", "margin", "el2n"))
    assert records["correct"].dtype == torch.bool and 0 < records["correct"].float().mean() < 1
    assert_same_tensors(load_dynamics(folder / "dynamics"), records)


# ---- training is left alone


def test_training_is_the_same_with_and_without_bit_for_bit(uninterrupted, tmp_path):
    plain = dynamics_run.trainer(tmp_path, callback=False)
    plain.train()
    after = random.random(), np.random.rand(), torch.rand(1)
    again = dynamics_run.trainer(tmp_path)
    again.train()
    assert (random.random(), np.random.rand(), torch.rand(1)) == after
    for run in (uninterrupted, again):
        assert_same_tensors(weights(run), weights(plain))
        losses = [[entry.get("loss") for entry in one.state.log_history] for one in (run, plain)]
        assert losses[0] == losses[1] and any(losses[0])
    assert files(again.args.output_dir) == files(uninterrupted.args.output_dir)


def test_a_split_lbi_run_of_a_transformers_model_is_recorded_and_left_alone(tmp_path):
    pair = [tiny_run.trainer(str(tmp_path / name), num_train_epochs=2, eval_strategy="no") for name in "ab"]
    pair[0].add_callback(DynamicsCallback())
    for run in pair:
        run.train()
    assert_same_tensors(weights(pair[0]), weights(pair[1]))
    records, rows = load_dynamics(tmp_path / "a"), tiny_run.images(64, 1)
    pair[0].model.eval()
    with torch.no_grad():
        logits = pair[0].model(rows["pixel_values"][:]).logits
    assert torch.allclose(records["margin"][-1], row_dynamics(logits, rows["labels"][:])["margin"], atol=1e-4)


def test_modes_and_gradients_are_put_back(tmp_path):
    seen = []

    def freeze(state, model, **kwargs):
        model.body[1].eval()

    def look(state, model, **kwargs):
        seen.append((model.training, model.body[1].training, model.body[3].training, torch.is_grad_enabled()))

    run = dynamics_run.trainer(tmp_path, callback=Chain(on_epoch_end=freeze), num_train_epochs=1)
    run.add_callback(DynamicsCallback())
    run.add_callback(Chain(on_epoch_end=look))
    run.train()
    assert seen == [(True, False, True, True)] and files(tmp_path)


# ---- which epochs


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({"max_steps": 2 * STEPS + 2}, [1, 2]),  # the third epoch is cut off
        ({"max_steps": 2 * STEPS}, [1, 2]),
        ({"gradient_accumulation_steps": 2, "num_train_epochs": 2}, [1, 2]),  # five batches: the last step takes one
        ({"dataloader_drop_last": True, "num_train_epochs": 2}, [1, 2]),
        ({"num_train_epochs": 1.4}, [1]),
        ({"callback": DynamicsCallback(every=2), "num_train_epochs": 5}, [2, 4]),
        ({"max_steps": 3}, []),
    ],
)
def test_whole_epochs_are_recorded_and_others_are_not(tmp_path, caplog, changes, epochs):
    snapshots = Snapshots()
    run = dynamics_run.trainer(tmp_path, rows=Rows(), **changes)
    run.add_callback(snapshots)
    with caplog.at_level(logging.DEBUG, logger="hf_effdl"):
        run.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_effdl")]
    if not epochs:
        assert "no training dynamics were recorded: training ended at epoch 0.60 and every=1" in said[0]
        return
    assert list(files(tmp_path)) == names(*epochs) and not said
    records = load_dynamics(tmp_path)
    assert records["margin"].shape == (len(epochs), ROWS) and records["epoch"].tolist() == epochs
    net = Net().eval()
    net.load_state_dict(snapshots.states[epochs[-1] - 1])
    expected = row_dynamics(net(Rows().x)["logits"], Rows().labels)["margin"]
    assert torch.allclose(records["margin"][-1], expected, atol=1e-5)


# ---- resume


def test_a_fresh_run_clears_what_another_left(uninterrupted, tmp_path):
    folder = tmp_path / "dynamics"
    folder.mkdir()
    for name in ("epoch-0009.safetensors", "epoch-0001.safetensors", "epoch-0009.tmp"):
        (folder / name).write_bytes(b"old")
    dynamics_run.trainer(tmp_path).train()
    assert files(tmp_path) == files(uninterrupted.args.output_dir)


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(quiet, tmp_path):
    dynamics_run.trainer(tmp_path, rows=Rows(), save_strategy="steps", save_steps=STEPS + 2).train()
    assert list(files(tmp_path)) == names(1, 2, 3, 4)
    seen = []
    run = dynamics_run.trainer(tmp_path, rows=Rows())
    run.add_callback(Chain(on_epoch_begin=lambda state, **_: seen.append(list(files(tmp_path)))))
    run.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{2 * (STEPS + 2)}")  # in the third epoch
    assert seen[0] == names(1, 2)
    assert files(tmp_path) == files(quiet.args.output_dir)
    assert_same_tensors(weights(run), weights(quiet))


def test_a_checkpoint_at_the_end_of_an_epoch_gets_its_record_on_resume(uninterrupted, tmp_path):
    dynamics_run.trainer(tmp_path, save_strategy="epoch").train()
    for checkpoint in (2 * STEPS, EPOCHS * STEPS):  # then train on, or find that there is nothing left to train
        (tmp_path / "dynamics" / names(checkpoint // STEPS)[0]).unlink()
        dynamics_run.trainer(tmp_path).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{checkpoint}")
        assert files(tmp_path) == files(uninterrupted.args.output_dir)


MOMENTS = ["before", "during", "after", "anywhere-0", "anywhere-quiet-0"]


@pytest.mark.parametrize(
    "points", [MOMENTS, pytest.param(sorted({*dynamics_run.SAVES} - {*MOMENTS}), marks=pytest.mark.slow)]
)
def test_runs_killed_at_any_moment_and_resumed_equal_an_uninterrupted_one(uninterrupted, quiet, tmp_path, points):
    script = Script("dynamics_run.py", tmp_path, *points)
    try:
        for point in points:
            out = tmp_path / point
            script.wait_for((out / "held").exists)
            delay = random.SystemRandom().uniform(0, 0.5) if point.startswith("anywhere") else 0
            time.sleep(delay)
            with suppress(ProcessLookupError):  # it may have finished by now
                os.kill(int((out / "held").read_text()), signal.SIGKILL)
            left = sorted(path.name for path in [*out.iterdir(), *out.glob("dynamics/*")])
            print(f"{point}: killed after {delay:.3f} s, leaving {left}")
            if point in ("before", "during"):
                assert f"checkpoint-{2 * STEPS if point == 'before' else STEPS}" in left
                cut_off = [name for name in left if name.startswith(".epoch-0002.safetensors.")]
                assert "epoch-0002.safetensors" not in left and len(cut_off) == (point == "during")
            same = quiet if "quiet" in point else uninterrupted
            run = dynamics_run.trainer(out, rows=Rows(noise=same is uninterrupted), **dynamics_run.SAVES[point])
            begun = list(out.glob("checkpoint-*/trainer_state.json"))
            run.train(resume_from_checkpoint=last_complete_checkpoint(str(out)) if begun else None)
            assert files(out) == files(same.args.output_dir), point
            assert_same_tensors(weights(run), weights(same))
    finally:
        script.kill()


# ---- what reaches the model


class NeedsLabels(Net):
    def forward(self, x, labels):
        output = super().forward(x, labels)
        return output["loss"], output["logits"]


class NoLabels(Net):
    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("net", [NeedsLabels, NoLabels])
@pytest.mark.parametrize("bf16", [False, True])
def test_models_that_take_or_return_other_things(tmp_path, net, bf16):
    changes = {"num_train_epochs": 1, "bf16": bf16, "rows": Rows()}
    dynamics_run.trainer(tmp_path / "usual", **changes).train()
    if net is NoLabels:
        changes["compute_loss_func"] = lambda output, labels, **_: nn.functional.cross_entropy(output, labels)
        changes["label_names"] = ["labels"]
    dynamics_run.trainer(tmp_path / "other", net=net, **changes).train()
    assert files(tmp_path / "usual") == files(tmp_path / "other")


def test_labels_are_kept_from_a_model_that_can_do_without(tmp_path):
    seen = []

    class Spy(Net):
        def forward(self, x, labels=None):
            seen.append((self.training, labels is not None, torch.is_grad_enabled(), len(x)))
            return super().forward(x, labels)

    dynamics_run.trainer(tmp_path, net=Spy, num_train_epochs=1).train()
    training, recording = {(True, True, True, 8), (True, True, True, ROWS % 8)}, {(False, False, False, 4)}
    assert set(seen) == training | recording | {(False, False, False, 1)}  # and one row to begin with
    seen.clear()
    dynamics_run.trainer(tmp_path, net=Spy, num_train_epochs=1, callback=DynamicsCallback(batch_size=20)).train()
    assert [rows for training, _, _, rows in seen if not training] == [1, 20, 20]


def test_random_views_are_new_in_every_epoch_and_follow_from_the_seed(tmp_path):
    views = {}
    for seed in (1, 1, 2):
        seen = []

        def collate(rows, seen=seen):
            seen.append(torch.stack([row["x"] for row in rows]))
            return {"x": seen[-1], "labels": torch.stack([row["labels"] for row in rows])}

        callback = DynamicsCallback(dataset=Rows(6, noise=True), data_collator=collate, batch_size=6)
        dynamics_run.trainer(tmp_path, callback=callback, num_train_epochs=2, seed=seed).train()
        _, first, second = seen
        assert not torch.isclose(first, second).any()
        assert torch.equal(views.setdefault(seed, first), first)
    assert not torch.isclose(views[1], views[2]).any()


class PopsWeight(Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        inputs = {name: value for name, value in inputs.items() if name != "weight"}
        return super().compute_loss(model, inputs, **kwargs)


def blank(rows):
    return {"x": torch.stack([row["x"] for row in rows]) * 0, "labels": torch.tensor([row["labels"] for row in rows])}


def columns(**more) -> Dataset:
    plain = Rows()
    return Dataset.from_dict({"x": plain.x.numpy(), **more}).with_format("torch")


KINDS = {
    "a weight in plain rows": lambda: {"rows": Rows(weight=2.0), "kind": PopsWeight, "remove_unused_columns": False},
    "a table": lambda: {"rows": columns(label=Rows().labels.numpy(), text=["?"] * ROWS, weight=[2.0] * ROWS)},
    "weights that count": lambda: {
        "rows": columns(labels=Rows().labels.numpy(), weight=[0.5, 1.5] * 18 + [1.0]),
        "kind": WeightedTrainer,
    },
    "other rows and another collator": lambda: {"callback": DynamicsCallback(dataset=Rows(5), data_collator=blank)},
    "a worker process": lambda: {"rows": Rows(), "dataloader_num_workers": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_is_what_the_model_says_of_the_rows_alone(tmp_path, kind):
    options = KINDS[kind]()
    labels = {"label_names": ["label"]} if kind == "a table" else {}
    run = dynamics_run.trainer(tmp_path, num_train_epochs=1, **labels, **options)
    run.train()
    run.model.eval()
    rows = Rows(5) if "callback" in options else Rows()
    expected = row_dynamics(run.model(rows.x * (0 if "callback" in options else 1))["logits"], rows.labels)
    assert torch.allclose(load_dynamics(tmp_path)["margin"][0], expected["margin"], atol=1e-5)


# ---- scores


def table(*columns: list[float]) -> torch.Tensor:
    """Records with one list per row."""
    return torch.tensor(columns).T


def test_forgetting_counts_falls_and_ranks_rows_never_learned_last():
    correct = table(
        [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0]
    )
    assert forgetting(correct).tolist() == [2, 5, 0, 0, 2, 1]
    assert forgetting(correct.bool()).tolist() == forgetting(correct.float()).tolist() == [2, 5, 0, 0, 2, 1]
    assert forgetting(torch.tensor([[True, False]])).tolist() == [0, 1]
    every = torch.tensor([[(i >> t) & 1 for i in range(2**7)] for t in range(7)])  # all histories of seven epochs
    counts = forgetting(every)
    expected = [sum(h[t] > h[t + 1] for t in range(6)) if any(h) else 7 for h in every.T.tolist()]
    assert counts.tolist() == expected
    assert counts[1:].max() < counts[0] == 7


def test_aum_and_el2n_are_means_over_epochs():
    records = table([1.0, -2.0, 4.0], [0.0, 0.0, -3.0])
    assert aum(records).tolist() == [1.0, -1.0]
    errors = table([1.0, 0.5, 0.0], [0.4, 0.2, 0.0])
    assert mean_el2n(errors).tolist() == pytest.approx([0.5, 0.2])
    assert mean_el2n(errors, [0]).tolist() == pytest.approx([1.0, 0.4])
    assert mean_el2n(errors, range(1, 3)).tolist() == pytest.approx([0.25, 0.1])
    assert mean_el2n(errors, [-1]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("epochs", "window"), [(12, 10), (12, 2), (10, 10), (4, 10), (2, 10), (30, 7)])
def test_dyn_unc_is_the_mean_deviation_within_windows(epochs, window):
    p = torch.rand(epochs, 5, generator=torch.Generator().manual_seed(epochs))
    length = min(window, epochs)
    expected = [
        statistics.mean(statistics.stdev(row[k : k + length]) for k in range(epochs - length + 1))
        for row in p.T.tolist()
    ]
    assert dyn_unc(p, window).tolist() == pytest.approx(expected, rel=1e-5)
    windows = [[row[k : k + length] for k in range(epochs - length + 1)] for row in p.T.tolist()]
    hard = [statistics.mean(statistics.stdev(w) * (1 - statistics.mean(w)) for w in row) for row in windows]
    assert dual(p, window).tolist() == pytest.approx(hard, rel=1e-5)


def test_scores_are_difficulties(uninterrupted):
    out = uninterrupted.args.output_dir
    records, scores = load_dynamics(out), dynamics_scores(out)
    assert list(scores) == ["el2n", "aum", "forgetting", "dyn_unc", "dual"]
    assert all(s.shape == (ROWS,) and s.dtype == torch.float32 and (s >= 0).all() for s in scores.values())
    assert torch.equal(scores["el2n"], mean_el2n(records["el2n"]))
    assert torch.equal(scores["forgetting"], forgetting(records["correct"]).float())
    assert torch.equal(scores["dyn_unc"], dyn_unc(records["p_label"]))
    area = aum(records["margin"])
    assert scores["aum"].min() == 0 and torch.allclose(scores["aum"].diff(), -area.diff(), atol=1e-5)
    assert scores["aum"].argmax() == area.argmin()
    # where the model is mostly wrong is harder than where it is mostly right, whichever score is asked
    right = records["correct"].float().mean(0)
    for name in ("el2n", "aum", "forgetting"):
        assert scores[name][right < 0.5].mean() > scores[name][right > 0.5].mean()
    chosen = dynamics_scores(out, el2n_epochs=[2, 4], window=2)
    assert torch.equal(chosen["el2n"], mean_el2n(records["el2n"], [1, 3]))
    assert torch.equal(chosen["dyn_unc"], dyn_unc(records["p_label"], 2))
    early = dynamics_scores(out, window=2, dual_epochs=3)["dual"]
    assert torch.equal(early, dual(records["p_label"][:3], 2)) and not torch.equal(early, chosen["dual"])
    with pytest.raises(ValueError, match=r"el2n_epochs=\[0, 1\]: only epochs \[1, 2, 3, 4\] were recorded"):
        dynamics_scores(out, el2n_epochs=range(2))


# ---- bad input


class Stream(IterableDataset):
    def __iter__(self):
        yield from Rows()

    def __len__(self):
        return ROWS


class Unlabelled(Rows):
    def __getitem__(self, i):
        return {"x": super().__getitem__(i)["x"], "weight": 1.0}


class Regression(Net):
    def forward(self, x, labels=None):
        return {"logits": self.body(x)[:, :1], "loss": self.body(x).sum()}


class Embedding(Net):
    def forward(self, x, labels=None):
        return {"loss": self.body(x).sum(), "embedding": x}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": Unlabelled(), "kind": PopsWeight, "remove_unused_columns": False},
            r"the batches have no 'labels', only \['x'\]",
        ),
        ({"net": Regression}, r"logits have shape \(1, 1\)"),
        ({"net": Embedding}, r"returns \['embedding', 'loss'\]"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_the_first_step(tmp_path, changes, message):
    run = dynamics_run.trainer(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3).long(), "one label per row"),
        (torch.zeros(2, 1), torch.zeros(2).long(), "two classes or more"),
        (torch.zeros(2, 3), torch.zeros(2), "one class index per row"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), "one class index per row"),
        (torch.zeros(2, 3), torch.tensor([0, -100]), "label -100 is none of the 3 classes"),
        (torch.zeros(2, 3), torch.tensor([3, 0]), "label 3 is none of the 3 classes"),
    ],
)
def test_what_is_no_classification_is_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        row_dynamics(logits, labels)


def test_records_of_another_number_of_rows_are_not_continued(tmp_path):
    dynamics_run.trainer(tmp_path, save_strategy="steps", save_steps=STEPS + 2).train()
    run = dynamics_run.trainer(tmp_path, rows=Rows(40))
    with pytest.raises(ValueError, match="epoch-0001.safetensors is a record of 37 rows, but the dataset has 40 now"):
        run.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{STEPS + 2}")
    assert run.state.global_step == STEPS + 2 and list(files(tmp_path)) == names(1)  # before any step

    class Growing(Rows):
        def __len__(self):
            return ROWS if not (tmp_path / "dynamics" / names(1)[0]).exists() else ROWS - 1

    with pytest.raises(ValueError, match="is a record of 37 rows, but the dataset has 36 now"):
        dynamics_run.trainer(tmp_path, callback=DynamicsCallback(dataset=Growing())).train()


OTHERS = {
    "relabelled": lambda data: data.add_column("y", np.array(data["labels"])[::-1]).remove_columns("labels"),
    "reordered": lambda data: data.select(range(ROWS - 1, -1, -1)),
    "other values": lambda data: data.map(lambda row: {"x": row["x"] * 2}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_records_of_other_rows_are_not_continued_nor_mixed(tmp_path, other):
    data = columns(labels=Rows().labels.numpy())
    dynamics_run.trainer(tmp_path / "a", rows=data, save_strategy="epoch", num_train_epochs=2).train()
    changed = OTHERS[other](data)
    changed = changed.rename_column("y", "labels") if "y" in changed.column_names else changed
    checkpoint = tmp_path / "a" / f"checkpoint-{STEPS}"
    run = dynamics_run.trainer(tmp_path / "a", rows=changed, num_train_epochs=3)
    with pytest.raises(ValueError, match="epoch-0001.safetensors is a record of other rows"):
        run.train(resume_from_checkpoint=str(checkpoint))
    dynamics_run.trainer(tmp_path / "b", rows=changed, num_train_epochs=2).train()
    (tmp_path / "b/dynamics" / names(2)[0]).replace(tmp_path / "a/dynamics" / names(2)[0])
    with pytest.raises(ValueError, match="epoch-0002.safetensors is a record of other rows"):
        load_dynamics(tmp_path / "a")


def test_epochs_are_in_the_order_of_their_numbers_and_records_that_do_not_fit_are_not_loaded(tmp_path):
    def write(epoch, values):
        save_file({name: values.clone() for name in ("p_label", "margin", "el2n")}, tmp_path / names(epoch)[0])

    with pytest.raises(FileNotFoundError, match="a Trainer with DynamicsCallback"):
        load_dynamics(tmp_path)
    for epoch in (10000, 2, 9999):
        write(epoch, torch.full((2,), float(epoch)))
    records = load_dynamics(tmp_path)
    assert records["epoch"].tolist() == [2, 9999, 10000] == records["margin"][:, 0].tolist()
    write(2, torch.zeros(2))
    assert load_dynamics(tmp_path)["correct"][:2].tolist() == [[False, False], [True, True]]  # a tie is not right
    write(9999, torch.zeros(5))
    with pytest.raises(ValueError, match="epoch-9999.safetensors is a record of 5 rows, but"):
        load_dynamics(tmp_path)


STREAM = Dataset.from_list([{"x": 0, "labels": 0}]).to_iterable_dataset()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *(({"every": value}, ValueError, f"every={value!r}") for value in (0, -1, 1.5, True, "2")),
        *(({"batch_size": value}, ValueError, f"batch_size={value!r}") for value in (0, 1.5, True)),
        ({"dataset": Rows(0)}, ValueError, "empty"),
        *(({"dataset": stream}, TypeError, "is a stream") for stream in (Stream(), STREAM)),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        DynamicsCallback(**arguments)
    if error is TypeError:
        with pytest.raises(error, match=message):
            dynamics_run.trainer(tmp_path, rows=arguments["dataset"], max_steps=2).train()


BROKEN = torch.zeros(3, 2)
BROKEN[1, 0] = float("nan")


@pytest.mark.parametrize(
    ("score", "arguments", "message"),
    [
        *(
            (s, (BROKEN,), r"\[1, 0\] is nan: the recorded run had broken down")
            for s in (mean_el2n, aum, dyn_unc, dual)
        ),
        *(
            (s, (torch.zeros(4),), r"of shape \(4,\) must have shape \(epochs, rows\)")
            for s in (mean_el2n, aum, dyn_unc, dual)
        ),
        (dyn_unc, (torch.zeros(1, 4),), "with 2 epochs or more"),
        (dyn_unc, (torch.zeros(4, 4), 1), "window=1"),
        (forgetting, (torch.zeros(0, 4),), "with 1 epochs or more"),
        *(
            (mean_el2n, (torch.zeros(3, 2), epochs), "must be one or more positions in the 3 epochs")
            for epochs in ([], [3], [-4])
        ),
    ],
)
def test_records_that_make_no_score_are_refused(score, arguments, message):
    with pytest.raises(ValueError, match=message):
        score(*arguments)


# ---- rows without a class, damage


def test_rows_without_a_class_are_found_before_training_or_do_not_end_it(tmp_path, caplog):
    plain = Rows()
    labels = plain.labels.clone()
    labels[7] = -100
    table = Dataset.from_dict({"x": plain.x.numpy(), "labels": labels.numpy()}).with_format("torch")
    run = dynamics_run.trainer(tmp_path / "table", rows=table, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"column 'labels' is -100 at row 7 \(1 rows have no class\)"):
        run.train()
    assert run.state.global_step == 0
    plain.labels = labels  # no table, whose rows are only seen when they come
    run = dynamics_run.trainer(tmp_path / "plain", rows=plain, num_train_epochs=2)
    run.train()
    margin = load_dynamics(tmp_path / "plain")["margin"]
    assert margin[:, 7].isnan().all() and margin.isfinite().all(0).sum() == ROWS - 1
    with pytest.raises(ValueError, match=r"\[0, 7\] is nan: .*or the row had no label"):
        dynamics_scores(tmp_path / "plain")
