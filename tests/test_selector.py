"""From a data set and a budget to the rows: scoring, planning, applying, on images, texts and tables."""

import numpy as np
import pytest
import selection_run
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from forked import Script
from PIL import Image as Picture
from torch import nn
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    TrainingArguments,
)

import hf_effdl.samples.scores.uncertainty as formulas
from hf_effdl import LinearProbes, Probes, UncertaintySelector, WeightedTrainer, fit_label_noise, train_probes
from hf_effdl.samples.probes import scoring, trained_probes
from hf_effdl.samples.probes.linear_probes import fit_heads
from hf_effdl.samples.probes.scoring import SCORES, UNLABELLED


@pytest.fixture(scope="module")
def probes():
    return LinearProbes.train(None, selection_run.rows(90, 1), input_column="x", steps=50)


@pytest.fixture
def pool():
    return selection_run.rows(200, 2)


class Table(nn.Module):
    """Logits by row number, to score what we like."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return self.logits[row.long()]


def table_probes(logits: torch.Tensor) -> tuple[Probes, Dataset]:
    """Probes that give these logits `(N, M, C)`, and a pool to ask them about."""
    models = [Table(logits[:, m]) for m in range(logits.shape[1])]
    labels = torch.arange(len(logits)) % max(2, logits.shape[2])
    return Probes(models), Dataset.from_dict({"row": range(len(logits)), "label": labels.tolist()})


# ---- scoring


@pytest.mark.parametrize(("classes", "preset"), [(4, "default"), (1, "default"), (4, "paper")])
def test_scores_are_those_of_the_formulas(classes, preset, monkeypatch):
    monkeypatch.setattr(scoring, "PART", 17)
    logits = torch.randn(50, 5, classes, generator=torch.Generator().manual_seed(0)) * 2
    probes, pool = table_probes(logits)
    labels = torch.tensor(pool["label"][:])
    scored = UncertaintySelector(probes, batch_size=7, preset=preset).score(pool)
    assert set(scored.column_names) == {*pool.column_names, *SCORES} and len(scored) == 50
    gauge = "drop-first" if preset == "paper" else "invariant"
    expected = {
        "u_x": formulas.uncertainty(logits, gauge=gauge),
        "u_y": formulas.uncertainty(logits, labels, gauge=gauge),
        "p_label": formulas.p_label(logits, labels),
        "el2n": formulas.el2n(logits, labels),
        **{name: getattr(formulas, name)(logits) for name in ("entropy", "margin", "least_confidence", "bald")},
    }
    p = formulas.mean_probability(logits)
    expected |= {"confidence": p.amax(1), "predicted": p.argmax(1)}
    expected["p_clean"] = fit_label_noise(p, labels).p_clean(p, labels)
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(scored[name][:]), values, rtol=1e-5, atol=1e-6, check_dtype=False)
    for value in (float("nan"), float("inf")):
        logits[37, 1, 0] = value
        with pytest.raises(ValueError, match="probe 1 gives NaN or infinite logits for row 37"):
            UncertaintySelector(table_probes(logits)[0], batch_size=8).score(pool)


def test_heads_fitted_with_counts_equal_heads_fitted_on_the_resampled_rows(probes):
    x = probes.standardise(probes.encode(probes.probe_set.rows))
    labels, counts = probes.probe_set.labels, probes.probe_set.counts
    places = torch.arange(len(labels)).repeat_interleave(counts[0])
    once = fit_heads(x, labels, counts[:1], classes=3, steps=20)
    again = fit_heads(x[places], labels[places], torch.ones(1, len(places)), classes=3, steps=20)
    torch.testing.assert_close(once, again, rtol=1e-4, atol=1e-5)
    assert (counts.sum(1) == len(labels)).all() and (counts == 0).any()


def test_out_of_bag_predictions_use_only_heads_that_did_not_see_the_row(probes):
    with torch.no_grad():
        logits = torch.cat(list(probes.batches(probes.probe_set.rows, 64)))
    found = probes.out_of_bag()
    for row in range(20):
        unseen = probes.probe_set.counts[:, row] == 0
        expected = logits[row, unseen].softmax(1).mean(0)
        torch.testing.assert_close(found[row], expected, equal_nan=True)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(scoring, "PART", selection_run.PART)


@pytest.fixture
def uninterrupted(small_parts):
    return selection_run.scored_and_chosen()


def test_scoring_that_was_killed_goes_on_where_it_was(uninterrupted, tmp_path):
    run = Script("selection_run.py", "out.pt", "cache", "0.03", cwd=tmp_path)
    run.wait_for(lambda: len(list(tmp_path.glob("cache/*/*.safetensors"))) >= 2)
    run.kill()
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("cache/*/*.safetensors")}
    assert 2 <= len(kept) < 6 and not (tmp_path / "out.pt").exists()
    assert selection_run.same(selection_run.scored_and_chosen(str(tmp_path / "cache")), uninterrupted)
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())
    assert len(list(tmp_path.glob("cache/*/*"))) == 6  # and nothing of the part that was cut off


# ---- selecting


def test_a_selection_has_the_budget_weights_of_mean_one_and_the_pools_order(probes, pool):
    selector = UncertaintySelector(probes)
    subset = selector.select(pool, 0.15)
    assert len(subset) == 30 and subset.column_names == [*pool.column_names, "weight", "inclusion_probability"]
    assert np.mean(subset["weight"][:]) == pytest.approx(1)
    places = [int(name.split()[1]) for name in subset["name"][:]]
    assert places == sorted(places) == selector.selection.plan.positions.tolist()
    for row in (0, 10, 29):
        assert subset[row]["x"] == pool[places[row]]["x"]
    again = UncertaintySelector(probes).select(pool, 30)
    assert again["name"][:] == subset["name"][:] and again["weight"][:] == subset["weight"][:]
    assert UncertaintySelector(probes, seed=1).select(pool, 30)["name"][:] != subset["name"][:]


def test_budgets_of_numpy_and_torch_count_as_pythons(probes, pool):
    selector = UncertaintySelector(probes, trial=False)
    scored = selector.score(pool)
    for budget, rows in ((np.int64(5), 5), (torch.tensor(5), 5), (np.float32(0.2), 40), (torch.tensor(0.2), 40)):
        assert len(selector.plan(scored, budget)) == rows


def test_a_score_of_ones_own_is_drawn_by(probes, pool):
    selector = UncertaintySelector(probes, trial=False)
    scored = selector.score(pool).add_column("hardness", np.arange(200) / 200)
    options = {"score": "hardness", "keep": None, "quotas": "none", "cut_hardest": 0.1}
    largest = selector.plan(scored, 60, **options, sampler="top-k").plan.positions
    assert largest.tolist() == list(range(120, 180))
    spread = selector.plan(scored, 60, **options | {"quotas": "strata"}, bins=10).plan.positions
    assert np.histogram(spread, 10, (0, 180))[0].tolist() == [6] * 10
    with pytest.raises(ValueError, match="no column 'hardnes'.*hardness"):
        selector.plan(scored, 60, score="hardnes")
    # by name of a selector's own too
    subset = selector.select(pool, 40, weights="none", quotas="none", score="entropy")
    assert set(subset["weight"][:]) == {1.0}
    settings = selector.selection.info["settings"]
    assert (settings["score"], settings["quotas"], settings["weights"]) == ("entropy", "none", "none")


def test_a_data_set_dict_needs_the_split_named_and_comes_back_with_it_replaced(probes, pool):
    data = DatasetDict(train=pool, test=selection_run.rows(30, 3))
    with pytest.raises(TypeError, match=r"DatasetDict with the splits \['train', 'test'\]"):
        UncertaintySelector(probes).select(data, 20)
    with pytest.raises(ValueError, match="split='valid': the DatasetDict has"):
        UncertaintySelector(probes).select(data, 20, split="valid")
    chosen = UncertaintySelector(probes).select(data, 20, split="train")
    assert len(chosen["train"]) == 20 and len(chosen["test"]) == 30 and "weight" in chosen["train"].column_names


def noisy(share: float, count: int = 600, seed: int = 0) -> Dataset:
    data = selection_run.rows(count, seed)
    x = np.array(data["x"][:]) + 6 * np.eye(6)[np.array(data["label"][:])]
    rng = np.random.default_rng(seed)
    labels = np.array(data["label"][:])
    wrong = rng.random(count) < share
    labels[wrong] = (labels[wrong] + rng.integers(1, 3, wrong.sum())) % 3
    return Dataset.from_dict({"x": x.tolist(), "label": labels.tolist(), "wrong": wrong.tolist()})


def test_wrong_labels_are_seen_and_left_out():
    pool = noisy(0.25, 2000)
    selector = UncertaintySelector(LinearProbes.train(None, noisy(0.25, 150, 1), input_column="x"))
    subset = selector.select(pool, 120)
    settings = selector.selection.info["settings"]
    assert settings["regime"] == "agreement" and abs(settings["noise_rate"] - np.mean(pool["wrong"][:])) < 0.07
    assert np.mean(subset["wrong"][:]) < 0.02


def test_on_clean_and_solved_data_hard_rows_are_drawn():
    pool = noisy(0.0)
    selector = UncertaintySelector(LinearProbes.train(None, noisy(0.0, 150, 1), input_column="x"))
    selector.select(pool, 120)
    settings = selector.selection.info["settings"]
    assert settings["regime"] == "unclipped" and settings["trial_accuracy"] > 0.98 and settings["noise_rate"] < 0.02
    u_x, chosen = selector.selection.table["u_x"], selector.selection.plan.positions
    in_proportion = u_x.square().mean() / u_x.mean()  # the mean of a draw in proportion to u_x
    assert u_x[chosen].mean() > 0.95 * in_proportion > 1.05 * u_x.mean()


def test_the_trial_trains_on_the_given_rows_and_is_measured_on_the_probe_set():
    probes = LinearProbes.train(None, noisy(0.0, 150, 1), input_column="x")
    pool = noisy(0.0)
    labels = torch.tensor(pool["label"][:])
    trial = probes.trial(pool, labels)
    places = torch.arange(60)
    assert trial(places, torch.ones(60)) > 0.95
    turned = probes.trial(pool, (labels + 1) % 3)
    assert turned(places, torch.ones(60)) < 0.05
    # weights count: the rows with turned labels have none
    mixed = labels.clone()
    mixed[:30] = (mixed[:30] + 1) % 3
    assert probes.trial(pool, mixed)(places, torch.cat([torch.zeros(30), torch.ones(30)])) > 0.95


def test_active_mode_never_looks_at_the_labels(probes, pool):
    unlabelled = pool.remove_columns("label")
    first = UncertaintySelector(probes, mode="active").select(pool, 30)
    second = UncertaintySelector(probes, label_column=None, mode="active").select(unlabelled, 30)
    assert first["name"][:] == second["name"][:] and set(second["weight"][:]) == {1.0}


# ---- images, texts, tables


def pictures(count: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = [
        Picture.fromarray((rng.integers(0, 80, (20, 20, 3)) + np.eye(3)[c] * 120).astype(np.uint8)) for c in labels
    ]
    features = Features({"image": Image(), "label": ClassLabel(names=["red", "green", "blue"])})
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


NAMES = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
PROCESSOR = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0)


def resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(ResNetConfig(**RESNET, **NAMES))


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        **({"num_train_epochs": 2} | options),
    )


def test_images_with_linear_probes_on_a_backbone_then_training_on_the_weights(tmp_path):
    probes = LinearProbes.train(ResNetModel(ResNetConfig(**RESNET)), pictures(60, 1), processing_class=PROCESSOR)
    subset = UncertaintySelector(probes).select(pictures(80), 0.5)
    assert len(subset) == 40 and subset[0]["image"].size == (20, 20)
    assert repr(probes) == "LinearProbes(8 x linear heads on ResNetModel, 3 classes, trained on 60 rows)"

    def collate(rows):
        batch = dict(PROCESSOR([row["image"] for row in rows], return_tensors="pt"))
        return batch | {
            key: torch.tensor([row[name] for row in rows]) for key, name in (("labels", "label"), ("weight", "weight"))
        }

    args = arguments(tmp_path, remove_unused_columns=False, max_steps=3)
    result = WeightedTrainer(resnet(), args, data_collator=collate, train_dataset=subset).train()
    assert np.isfinite(result.training_loss)


def test_probes_see_what_a_transform_returns():
    pool = pictures(30)

    def transform(rows):
        return {"pixel_values": PROCESSOR(rows["image"], return_tensors="pt")["pixel_values"], "labels": rows["label"]}

    torch.manual_seed(0)
    models = [resnet() for _ in range(3)]
    plain = UncertaintySelector(models, processing_class=PROCESSOR).score(pool)
    turned = UncertaintySelector(models).score(pool.with_transform(transform)).with_format(None)
    for name in UNLABELLED:
        np.testing.assert_allclose(plain[name][:], turned[name][:], rtol=1e-4, atol=1e-5)


def test_several_number_columns_are_one_input():
    rng = np.random.default_rng(0)
    data = {"width": rng.normal(size=90), "height": rng.normal(size=90)}
    labels = (data["width"] + data["height"] > 0).astype(int)
    pool = Dataset.from_dict({**data, "label": labels})
    probes = LinearProbes.train(None, pool.select(range(40)), input_column=["width", "height"], steps=50)
    assert probes.heads.shape == (8, 3, 2)
    scored = UncertaintySelector(probes).score(pool.select(range(40, 90)))
    assert np.mean(np.array(scored["predicted"][:]) == labels[40:]) > 0.85


# ---- training probes


def test_trained_probes_differ_by_bootstrap_and_are_kept(tmp_path, monkeypatch):
    rows = pictures(40, 1)
    probes = train_probes(resnet, arguments(tmp_path), rows, num_probes=3, processing_class=PROCESSOR)
    assert len(probes) == 3 and probes.names == ["red", "green", "blue"] and probes.describe()["bootstrap"]
    assert repr(probes) == "TrainedProbes(3 x ResNetForImageClassification, 3 classes, trained on 40 rows)"
    UncertaintySelector(probes, trial=False).select(pictures(50), 12)
    runs = []
    original = WeightedTrainer.train
    monkeypatch.setattr(WeightedTrainer, "train", lambda self: (runs.append(1), original(self))[1])
    again = train_probes(resnet, arguments(tmp_path), rows, num_probes=3, processing_class=PROCESSOR)
    assert not runs and again.fingerprint == probes.fingerprint
    (tmp_path / "probe-1" / "probe.safetensors").unlink()
    third = train_probes(resnet, arguments(tmp_path), rows, num_probes=3, processing_class=PROCESSOR)
    assert len(runs) == 1 and third.fingerprint == probes.fingerprint
    other = train_probes(
        resnet, arguments(tmp_path, learning_rate=0.01), rows, num_probes=3, processing_class=PROCESSOR
    )
    assert len(runs) == 4 and other.fingerprint != probes.fingerprint


def test_trained_probes_can_try_a_training_set_out(tmp_path):
    rows = pictures(60, 1)
    args = arguments(tmp_path, num_train_epochs=4, learning_rate=0.02, optim="adamw_torch")
    probes = train_probes(resnet, args, rows, num_probes=2, processing_class=PROCESSOR)
    pool = pictures(60)
    labels = torch.tensor(pool["label"][:])
    state = torch.get_rng_state()
    right = probes.trial(pool, labels)(torch.arange(60), torch.ones(60))
    wrong = probes.trial(pool, (labels + 1) % 3)(torch.arange(60), torch.ones(60))
    assert right > 0.8 and wrong < 0.3
    assert not (tmp_path / "trial").exists()
    assert torch.equal(state, torch.get_rng_state()), "trying a set out must not move the user's random numbers"


def test_the_paper_preset_trains_ten_probes_on_all_rows(tmp_path, monkeypatch):
    seen = []

    def train(self):
        seen.append((len(self.train_dataset), self.args.seed))

    monkeypatch.setattr(trained_probes.WeightedTrainer, "train", train)
    probes = train_probes(resnet, arguments(tmp_path), pictures(20), preset="paper", processing_class=PROCESSOR)
    assert seen == [(20, m) for m in range(10)] and not probes.describe()["bootstrap"]


# ---- bad input


def test_budgets_out_of_range_are_refused_before_the_long_work(probes, pool, monkeypatch):
    monkeypatch.setattr(LinearProbes, "logits", None)
    selector = UncertaintySelector(probes)
    for budget, message in (
        (0, "budget=0: it must be from 1 to the 200 rows"),
        (201, "budget=201"),
        (1.5, "share must be above 0"),
        (-0.1, "share must be"),
        (2, "budget=2 is below the 3 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            selector.select(pool, budget)
    for budget in (True, "10", None):
        with pytest.raises(TypeError, match="pass a number of rows"):
            selector.select(pool, budget)
    assert selector.selection is None


def labelled(values):
    return lambda pool: pool.remove_columns("label").add_column("label", values)


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        ({"label_column": "lable"}, None, ValueError, r"no column 'lable'.*near ones \['label'.*label_column="),
        ({"id_column": "id"}, None, ValueError, "no column 'id'"),
        ({"id_column": "label"}, None, ValueError, "names some rows alike"),
        ({}, lambda pool: pool.select([]), ValueError, "has no rows"),
        ({}, lambda pool: pool.to_iterable_dataset(), TypeError, "IterableDataset"),
        ({}, lambda pool: [{"x": 1}], TypeError, "is a list"),
        ({}, lambda pool: pool.add_column("weight", [1.0] * 200), ValueError, r"columns \['weight'\] already"),
        ({}, lambda pool: pool.add_column("margin", ["wide"] * 200), ValueError, r"columns \['margin'\] already"),
        # labels that are no classes
        ({}, labelled([3] * 200), ValueError, "200 labels are outside the 3 classes"),
        ({}, labelled([-1] + [0, 1, 2, 0] * 49 + [0] * 3), ValueError, "first is -1 at row 0"),
        ({}, labelled([0.5] * 200), TypeError, "probes of one class a row need"),
        ({}, labelled(["red"] * 200), ValueError, "class_encode_column"),
        ({}, labelled([None] + [1] * 199), ValueError, "1 rows without a label"),
    ],
)
def test_pools_that_nothing_can_be_selected_from_are_refused(probes, pool, options, change, error, message):
    with pytest.raises(error, match=message):
        UncertaintySelector(probes, **options).select(change(pool) if change else pool, 20)


def test_steps_in_another_order_are_refused(probes, pool):
    selector = UncertaintySelector(probes)
    scored = selector.score(pool)
    for step, message in (
        (lambda: selector.score(scored), "to score it anew"),
        (lambda: selector.plan(pool, 20), "no score columns"),
        (lambda: selector.report(), "call select"),
    ):
        with pytest.raises(ValueError, match=message):
            step()


def linear(classes: int = 3) -> nn.Module:
    return nn.Linear(6, classes)


def swapped() -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**RESNET, id2label={0: "green", 1: "red", 2: "blue"}))


@pytest.mark.parametrize(
    ("models", "options", "data", "message"),
    [
        ([linear], {}, None, r"1 probe\(s\)"),
        ([resnet, swapped], {}, None, "probe 1 maps classes to labels as"),
        ([linear] * 2, {"mode": "pool"}, None, "mode='pool'"),
        ([linear] * 2, {"preset": "best"}, None, "preset='best'"),
        ([linear] * 2, {"label_column": None}, None, "set label_column"),
        ([swapped] * 2, {"processing_class": PROCESSOR}, pictures, "in another order"),
        ([linear, lambda: linear(4)], {"input_column": "x"}, selection_run.rows, "logits of shapes"),
        ([linear] * 2, {}, selection_run.rows, "cannot tell which of the columns"),
    ],
)
def test_probes_that_do_not_fit_together_or_the_data_are_refused(models, options, data, message):
    with pytest.raises(ValueError, match=message):
        selector = UncertaintySelector([model() for model in models], **options)
        selector.select(data(30, 2), 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_init": None}, "model_init=None: pass a function that makes a fresh model"),
        ({"model_init": nn.Linear(6, 3)}, "model_init=a Linear: pass a function"),
        ({"model_init": lambda: "a model"}, r"model_init\(\) returned a str"),
        ({"args": None}, "args=None: pass the TrainingArguments"),
        ({"rows": None}, "the probe set is a NoneType"),
        ({"num_probes": 2.5}, "num_probes=2.5: it must be a whole number"),
        ({"num_probes": 1}, "num_probes=1"),
    ],
)
def test_arguments_that_train_no_probes_are_refused(change, message, tmp_path):
    given = {"model_init": linear, "args": arguments(tmp_path), "rows": selection_run.rows(30, 0), "input_column": "x"}
    with pytest.raises((ValueError, TypeError), match=message):
        train_probes(**given | change)
