"""Two processes score, choose and record what one does."""

import shutil

import dynamics_run
import pytest
import selection_run
import torch
from dynamics_run import EPOCHS, STEPS, Net, Rows, assert_same_tensors, files, names
from forked import Script
from safetensors.torch import load_file

from hf_effdl import load_dynamics
from hf_effdl.samples.probes import scoring
from hf_effdl.samples.scores.dynamics import row_dynamics


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder in which two processes left what they had done."""
    folder = tmp_path_factory.mktemp("two")
    Script("samples_run.py", folder, processes=2, env={"ACCELERATE_USE_CPU": "true"}).finish()
    return folder


def test_two_processes_score_and_choose_the_same(outcome, monkeypatch):
    monkeypatch.setattr(scoring, "PART", selection_run.PART)
    alone = selection_run.scored_and_chosen()
    assert selection_run.same(torch.load(outcome / "selection.pt", weights_only=True), alone)


def test_two_processes_share_the_rows_of_linear_probes_and_have_the_same_heads(outcome):
    alone = selection_run.linear_probes()
    both = [torch.load(outcome / f"probes-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [int(found.pop("rows")) for found in both] == [48, 42] and alone.pop("rows") == 90
    assert_same_tensors(both[0], both[1])  # of one process's fit
    assert all(torch.allclose(both[0][name], value, atol=1e-5) for name, value in alone.items())


def test_two_processes_record_what_one_does(outcome, tmp_path):
    assert list(files(outcome / "with")) == names(1, 2, 3, 4)
    ends = {name: [torch.load(outcome / name / f"{rank}.pt") for rank in (0, 1)] for name in ("with", "without")}
    for rank in (0, 1):  # training is left alone, what differs between the processes included
        assert_same_tensors(ends["with"][rank], ends["without"][rank])
    assert not torch.equal(ends["with"][0]["body.1.running_mean"], ends["with"][1]["body.1.running_mean"])
    for epoch in range(1, EPOCHS + 1):  # one process that continues from a checkpoint records its epoch anew
        checkpoint = f"checkpoint-{epoch * STEPS}"
        out = tmp_path / f"one-{epoch}"
        shutil.copytree(outcome / "with" / checkpoint, out / checkpoint)
        one = dynamics_run.trainer(out, rows=Rows(), max_steps=epoch * STEPS)
        one.train(resume_from_checkpoint=str(out / checkpoint))
        name = names(epoch)[0]
        assert files(out) == {name: files(outcome / "with")[name]}
    net = Net().eval()  # three rows: the second process has none of its own
    net.load_state_dict(load_file(outcome / "few" / f"checkpoint-{STEPS}" / "model.safetensors"))
    expected = row_dynamics(net(Rows(3).x)["logits"], Rows(3).labels)
    records = load_dynamics(outcome / "few")
    assert all(torch.allclose(records[name][0], expected[name], atol=1e-6) for name in expected)
