"""Paths that start dense, on trained weights: what leaves when, what is chosen, and distillation beside it."""

import pytest
import tiny_run
import torch
from datasets import Dataset
from test_path import random_path
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_effdl import (
    Distillation,
    DistillationTrainer,
    EarlyTicketCallback,
    GrowingArguments,
    SplitLBI,
    SplitLBIArguments,
    SplitLBITrainer,
    derive_path,
)
from hf_effdl.structure.optim.schedule import exit_share
from hf_effdl.structure.training.distill import distillation_terms, frozen_copy


def rows(*values, dtype=torch.float64):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype).reshape(len(values), -1))


def dense(p, lr=0.01, momentum=0.0, penalty="group", **hyper):
    return SplitLBI([{"params": [p], "penalty": penalty}], lr=lr, momentum=momentum, start="dense", **hyper)


def descend(opt, p, grad, steps):
    for _ in range(steps):
        p.grad = grad(p.detach())
        opt.step()
    return opt.state[p]


@pytest.mark.parametrize("penalty", ["group", "l1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_gamma_starts_at_the_weights_and_stays_while_the_learning_rate_is_zero(kappa, dtype, penalty):
    p = torch.nn.Parameter(torch.randn(4, 5, dtype=dtype))
    opt, start = dense(p, kappa=kappa, penalty=penalty, rise=1.0), p.detach().clone()
    assert torch.equal(opt.gamma(p), start.float()) and torch.equal(opt.dual(p) * kappa, start.float())
    opt.param_groups[0]["lr"] = 0.0
    state = descend(opt, p, torch.ones_like, 2)
    assert torch.equal(opt.gamma(p), start.float()) and torch.equal(p.detach(), start)
    assert penalty == "l1" or (state["entered"].tolist(), state["left"].tolist()) == ([0] * 4, [-1] * 4)


@pytest.mark.parametrize("kappa,path_scale,curvature", [(1.0, 1.0, 0.0), (1.0, 0.5, 3.0), (2.0, 1.0, 0.4)])
def test_single_weights_on_a_quadratic_follow_the_closed_form_until_they_leave(kappa, path_scale, curvature):
    """W, V and the threshold of one weight are linear in those of the step before: a power of one matrix."""
    lr, nu, rise, target, start = 0.02, 0.7, 1.5, 1.3, 1.0
    p = rows(start)
    opt = dense(p, lr, kappa=kappa, nu=nu, path_scale=path_scale, rise=rise)
    a, b, slope = kappa * lr, lr * path_scale / nu, lr * rise * start / kappa
    # of (W, V, threshold after the rise, 1); Gamma = kappa (V - threshold)
    step = torch.tensor(
        [
            [1 - a * (curvature + 1 / nu), a * kappa / nu, -a * kappa / nu, a * curvature * target],
            [b, 1 - b * kappa, b * kappa, 0],
            [0, 0, 1, slope],
            [0, 0, 0, 1],
        ],
        dtype=torch.float64,
    )
    first = torch.tensor([start, start / kappa, slope, 1], dtype=torch.float64)
    state = descend(opt, p, lambda w: curvature * (w - target), 25)
    expected = torch.linalg.matrix_power(step, 25) @ first
    assert state["left"] == -1
    got = torch.stack([p.detach(), state["dual"], state["threshold"].view(1, 1) + slope]).flatten()
    torch.testing.assert_close(got, expected[:3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_a_unit_of_the_mean_norm_that_nothing_moves_leaves_when_its_path_says(kappa):
    p, lr, steps = rows(0.4, 1.0, 1.6), 1e-3, 4000
    path = derive_path(lr * steps, kappa=kappa, nu=3.0, path_length=2.0, start="dense")
    assert exit_share(lr * steps, lam=1.0, kappa=kappa, **path) == pytest.approx(0.5)
    opt, start = dense(p, lr, kappa=kappa, **path), p.detach().clone()
    for _ in range(steps):
        state = descend(opt, p, torch.zeros_like, 1)
        with torch.no_grad():
            p.copy_(start)
    small, mean, large = state["left"].tolist()
    assert mean == pytest.approx(0.5 * steps, rel=0.01) and 0 < small < mean and large == -1


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("redrawn", [False, True])
def test_units_leave_by_signal_and_without_one_in_no_such_order(base, redrawn):
    """Least squares on 12 inputs of which six matter, from weights of one size; or on labels drawn anew."""
    torch.manual_seed(0)
    x = torch.randn(300, 12, dtype=torch.float64)
    y = torch.randn(300, dtype=torch.float64) if redrawn else x[:, :6].sum(1)
    p, lr = rows(*[1.0] * 12), 0.05 if base == "sgd" else 0.01
    opt = dense(p, lr, base=base, **derive_path(lr * 200, base=base, start="dense"))
    state = descend(opt, p, lambda w: x.T @ (x @ w - y[:, None]) / len(x), 200)
    stayed = torch.where(state["left"] < 0, 201, state["left"]).double()
    assert bool(stayed[:6].min() > stayed[6:].max()) is not redrawn


def test_a_factor_of_the_penalty_makes_units_leave_earlier():
    p = rows(*[1.0] * 4)
    group = {"params": [p], "penalty": "group", "penalty_factor": [1, 2, 4, 0.5]}
    state = descend(SplitLBI([group], lr=0.01, nu=9.0, start="dense", rise=4.0), p, torch.zeros_like, 100)
    half, one, two, four = (state["left"][i] for i in (3, 0, 1, 2))
    assert 0 < four < two < one < half


@pytest.mark.parametrize("order", ["dual", "entry"])
def test_the_order_is_that_of_the_exits_reversed_below_those_inside(order, tmp_path):
    path = random_path("resnet", 0)
    path.start = "dense"
    name, unit = next(iter(path.units.items()))
    count = len(unit["dual"])
    unit["left"][:] = torch.arange(count) % 9 + 1
    unit["dual"], unit["threshold"] = torch.full((count,), 0.5), torch.ones(count)
    unit["dual"][:2], unit["left"][:2] = torch.tensor([1.1, 3.0]), -1
    path.save(tmp_path)
    best = type(path).load(tmp_path).scores(order)[name].argsort(descending=True).tolist()
    assert best[:2] == [1, 0] and unit["left"][best[2:]].tolist() == sorted(unit["left"][2:].tolist(), reverse=True)
    kept = path.select(keep=0.5, order=order)[name].tolist()
    assert sorted(best[: len(kept)]) == kept


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rise": None}, "start='dense' in group 'unnamed' needs rise="),
        ({"rise": 0.0}, "rise=0.0"),
        ({"start": "full"}, "start='full'"),
    ],
)
def test_optimizers_that_cannot_start_dense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SplitLBI([{"params": [rows(1.0)], "penalty": "group"}], lr=0.1, **{"start": "dense", "rise": 1.0, **change})


# ---- in the trainer


QUIET = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder, net = str(tmp_path_factory.mktemp("net")), tiny_run.model()
    args = {**tiny_run.SHARED, **QUIET, "num_train_epochs": 4, "learning_rate": 0.01}
    Trainer(net, TrainingArguments(folder, **args), train_dataset=tiny_run.images(64, 1)).train()
    net.save_pretrained(folder)
    return folder


def trainer(net, out, data=None, **changes):
    args = {**tiny_run.SHARED, **QUIET, **changes}
    args = {name: value for name, value in args.items() if value is not None}
    teacher = {"teacher": args.pop("teacher")} if "teacher" in args else {}
    data = tiny_run.images(64, 1) if data is None else data
    return SplitLBITrainer(net, SplitLBIArguments(str(out), **args), train_dataset=data, **teacher)


@pytest.mark.parametrize("base,rate", [("sgd", 0.01), ("adamw", 1e-4)])
def test_a_pretrained_net_starts_dense_and_is_not_erased(pretrained, tmp_path, capsys, base, rate):
    net = ResNetForImageClassification.from_pretrained(pretrained)
    run = trainer(net, tmp_path, base=base, learning_rate=None, num_train_epochs=5)
    before = run.evaluate_model(net, tiny_run.images(64, 1))["loss"]
    run.train()
    said = capsys.readouterr().out
    assert run.state.global_step == 40 and said.count("so the path starts dense") == 1
    assert "a unit of mean, unchanged norm leaves at epoch" in said
    assert (run.args.start, run.args.learning_rate) == ("dense", rate) and run.path.start == "dense"
    assert run.evaluate_model(net, tiny_run.images(64, 1))["loss"] < 2 * before
    left = torch.cat([unit["left"] for unit in run.path.units.values()])
    assert (left > 0).any() and len(left.unique()) > 3
    assert run.slim(macs=0.5).config.effdl_report["macs"]["ratio"] <= 0.5


def test_what_is_said_wins_and_fresh_weights_start_empty(pretrained, tmp_path):
    net = ResNetForImageClassification.from_pretrained(pretrained)
    named = ResNetForImageClassification(net.config)
    said = {"start": "empty", "learning_rate": None}
    runs = [trainer(net, tmp_path, **said), trainer(named, tmp_path), trainer(tiny_run.model(), tmp_path)]
    starts = [group["start"] for run in runs for group in run.create_optimizer().param_groups]
    assert set(starts) == {"empty"} and runs[0].args.learning_rate == 0.1
    assert trainer(net, tmp_path).args.learning_rate == tiny_run.SHARED["learning_rate"]


def test_a_resumed_run_goes_on_as_it_started(tmp_path):
    saving = {"save_strategy": "steps", "max_steps": 8, "distill": 0.5, "learning_rate": 0.05}
    whole = trainer(tiny_run.model(), tmp_path, start="dense", **saving)
    whole.train()
    again = trainer(tiny_run.model(), tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = (tiny_run.outcome(run) for run in (whole, again))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    for name, unit in one["path"].items():
        assert all(torch.equal(value, other["path"][name][key]) for key, value in unit.items())
    assert again.path.start == "dense"
    other_teacher = ResNetForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    for changes, why in (({"distill": 0.0}, "has no teacher"), ({"teacher": other_teacher}, "another teacher")):
        run = trainer(tiny_run.model(), tmp_path, **saving | changes)
        with pytest.raises(ValueError, match=why):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_what_asks_who_enters_refuses_a_dense_start(tmp_path):
    for change, why in (({"start": "dense"}, "it starts empty"), ({"distill": 0.5}, "the smallest of all")):
        with pytest.raises(ValueError, match=why):
            GrowingArguments(str(tmp_path), use_cpu=True, **change)
    run = trainer(tiny_run.model(), tmp_path, start="dense", max_steps=1)
    run.add_callback(EarlyTicketCallback())
    with pytest.raises(ValueError, match="the path starts dense, so nothing enters"):
        run.train()


# ---- distillation


def test_what_a_student_lacks_is_the_divergence_of_torch_or_a_squared_error():
    mine, theirs, labels = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([[0, 1, -100], [2, 3, 0]])
    terms, counted = distillation_terms(mine, theirs, labels, temperature=3.0)
    soft = F.softmax(theirs / 3, -1)
    expected = 9 * (soft * (soft.log() - F.log_softmax(mine / 3, -1))).sum(-1)
    torch.testing.assert_close(terms, expected)
    assert torch.equal(counted, labels != -100)
    shifted = distillation_terms(mine, theirs, labels, shifted=True)[1]
    assert shifted.tolist() == [[True, False, False], [True, True, False]]
    terms, counted = distillation_terms(mine[:, 0], theirs[:, 0])
    torch.testing.assert_close(terms[:, 0], (mine[:, 0] - theirs[:, 0]).square().mean(1))
    assert counted.all()


SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXTS = {"input_ids": [[2, 7, 4, 1], [3, 9, 5, 6], [8, 1, 1, 2], [4, 4, 6, 3]] * 2}
TASKS = {
    "classes": (BertForSequenceClassification, BertConfig, [0, 1, 1, 0] * 2),
    "next tokens": (
        LlamaForCausalLM,
        LlamaConfig,
        [[2, 7, 4, -100], [3, 9, 5, 6], [8, 1, -100, -100], [4, 4, 6, 3]] * 2,
    ),
}


@pytest.mark.parametrize("hidden", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_do_not_change_what_a_teacher_says(task, weighted, hidden, tmp_path):
    kind, config, labels = TASKS[task]
    weights = {"weight": [0.5, 1.5, 1.0, 1.0] * 2} if weighted else {}
    data = Dataset.from_dict({**TEXTS, "labels": labels, **weights}).with_format("torch")
    got = []
    for rows_at_once, parts in ((8, 1), (2, 4)):
        set_seed(1)
        student, teacher = (kind(config(**SIZES)).eval() for _ in range(2))
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=parts,
            max_steps=1,
            optim="sgd",
            learning_rate=10.0,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        distillation = Distillation(teacher, weight=1.0, hidden=hidden)
        run = DistillationTrainer(student, args, train_dataset=data, distillation=distillation)
        start = frozen_copy(student)
        run.train()
        got.append(torch.cat([(p - q).flatten() for p, q in zip(student.parameters(), start.parameters())]).detach())
    assert got[0].abs().max() > 1e-3
    torch.testing.assert_close(got[1], got[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("change", [{"distill": 1.5}, {"distill_temperature": 0.0}, {"distill_hidden": -1.0}])
def test_distillation_out_of_range_is_refused_by_name(change, tmp_path):
    with pytest.raises(ValueError, match=next(iter(change))):
        SplitLBIArguments(str(tmp_path), use_cpu=True, **change)
    with pytest.raises(ValueError, match="teacher= has no say with distill=0"):
        trainer(tiny_run.model(), tmp_path, teacher=tiny_run.model())
