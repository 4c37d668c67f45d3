"""What probes are fed and trained on: taken as it is meant, or refused by name before any long work."""

import io
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from forked import Script
from PIL import Image as Picture
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from hf_effdl import LinearProbes, UncertaintySelector
from hf_effdl.processes import refuse_lone_processes, same_fate
from hf_effdl.samples.probes.inputs import Inputs


def rows(count: int, seed: int = 0, classes: int = 3, **more) -> Dataset:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, count)
    x = rng.normal(size=(count, 6)).astype("float32")
    x[np.arange(count), label] += 3
    return Dataset.from_dict({"x": x, "label": label} | more)


def trained(count: int = 90, seed: int = 1, **options) -> LinearProbes:
    return LinearProbes.train(None, rows(count, seed), input_column="x", steps=20, **options)


# ---- pictures and texts


class Taken:
    """An image processor that keeps what it is given."""

    def __call__(self, images, return_tensors=None):
        self.images = [np.asarray(image) for image in images]
        return {}


@pytest.mark.parametrize("kind", ["uint16", "int32"])
def test_sixteen_bit_images_keep_their_grey_levels(kind):
    ramp, processor = np.arange(256).reshape(16, 16) * 257, Taken()
    for image in (Picture.fromarray(ramp.astype(kind)), ramp.astype("uint16")):
        Inputs(processor, "image")([{"image": image}])
        seen = processor.images[0]
        assert (seen if seen.ndim == 2 else seen[..., 0]).flatten().tolist() == list(range(256))
    with pytest.raises(ValueError, match="mode 'F' holds floating-point numbers, whose white is not known"):
        Inputs(processor, "image")([{"image": Picture.fromarray(ramp.astype("float32"))}])
    with pytest.raises(ValueError, match="values from -1 to .*whose white is not known"):
        Inputs(processor, "image")([{"image": Picture.fromarray(ramp.astype("int32") - 1)}])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1", "P", "I;16"])
@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_images_are_fed_alike_in_every_format_of_the_data_set(mode, kind):
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Picture.fromarray(colours[..., 0].astype("uint16") * 257)
    else:
        image = Picture.fromarray(colours).quantize(7) if mode == "P" else Picture.fromarray(colours).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    table = {"image": [{"bytes": stream.getvalue(), "path": None}] * 2}
    data = Dataset.from_dict(table).cast_column("image", Image())
    seen = []
    for one in (data, data.with_format(kind)):
        inputs = Inputs(processor := Taken(), "image").bind(one)
        inputs(inputs.read(one, [0, 1]))
        seen.append(processor.images)
    assert np.array_equal(*seen) and seen[0][0].shape == (8, 8, 3)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return BertTokenizer.from_pretrained(folder), BertModel(
        BertConfig(vocab_size=45, max_position_embeddings=32, **sizes)
    ).eval()


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(0, 40, rng.integers(2, 9))) for _ in range(count)]


def test_pairs_of_texts_and_long_texts_are_fed_as_the_model_takes_them(language):
    tokenizer, model = language
    first, second = texts(40), texts(40)[::-1]
    data = Dataset.from_dict({"a": [*first[:39], "w1 " * 100], "b": second, "label": [0, 1] * 20})
    pair = Inputs(tokenizer, ["a", "b"]).bind(data, model)([data[0]])
    right = tokenizer([first[0]], [second[0]], return_tensors="pt")
    assert all(pair[name].equal(right[name]) for name in right)
    assert Inputs(tokenizer, "a").bind(data, model)([data[39]])["input_ids"].shape == (1, 32)
    LinearProbes.train(model, data, processing_class=tokenizer, input_column=["a", "b"], steps=2)
    with pytest.raises(ValueError, match="a tokenizer takes one text, or a pair of texts, not 3"):
        Inputs(tokenizer, ["a", "b", "a"]).bind(data, model)([data[0]])
    with pytest.raises(TypeError, match="column 'b' holds None among texts"):
        Inputs(tokenizer, ["a", "b"])([{"a": "w1", "b": None}])
    long = Dataset.from_dict({"input_ids": [[2] * 40] * 4, "label": [0, 1] * 2})
    with pytest.raises(ValueError, match="40 tokens in 'input_ids', and the model takes 32; tokenize with truncation"):
        LinearProbes.train(model, long, steps=2)


def test_padding_does_not_count_and_labels_may_be_texts(language):
    tokenizer, model = language
    data = Dataset.from_dict({"a": texts(40), "topic": ["animal", "thing"] * 20})
    options = {"processing_class": tokenizer, "input_column": "a", "names": ["animal", "thing"], "steps": 5}
    one, many = (LinearProbes.train(model, data, "topic", batch_size=size, **options) for size in (1, 20))
    torch.testing.assert_close(one.mean, many.mean, rtol=1e-4, atol=1e-5)
    scored = UncertaintySelector(one, label_column="topic", batch_size=7).score(data)
    torch.testing.assert_close(
        scored["u_y"][:], UncertaintySelector(many, label_column="topic").score(data)["u_y"][:], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_every_format_is_fed_alike(kind):
    data = rows(60)
    plain, other = (LinearProbes.train(None, d, input_column="x", steps=3) for d in (data, data.with_format(kind)))
    assert plain.heads.equal(other.heads)


# ---- labels and numbers


class Headed(nn.Module):
    def forward(self, input_ids):
        return {"logits": torch.zeros(len(input_ids), 2)}


Y = [0, 1] * 30
REFUSED = {
    "several labels a row": ({"a": [[0.0]] * 60, "label": [[0], [0, 1]] * 30}, {}, "column 'label' holds"),
    "a missing number": (
        {"a": [1.0, None] * 30, "b": [0.5] * 60},
        {"input_column": ["a", "b"]},
        "column 'a' holds None",
    ),
    "a category": (
        {"a": ["red", "blue"] * 30, "b": [0.5] * 60},
        {"input_column": ["a", "b"]},
        "column 'a' holds 'red'",
    ),
    "a text as a vector": ({"a": ["red", "blue"] * 30}, {}, "column 'a' holds 'red', which is no vector"),
    "ids as labels": ({"a": np.eye(60), "label": [1001, 987654321] * 30}, {}, "ids, it seems.*class_encode_column"),
    "one class": ({"a": np.eye(60), "label": [1] * 60}, {}, "holds one class only, 1"),
    "no label": ({"a": np.eye(60), "label": [1, -1] * 30}, {}, "30 rows of the probe set have a negative label"),
    "NaN": (
        {"a": [[0.0], [float("nan")]] * 30},
        {},
        "30 rows of the probe set are NaN or infinite, the first at row 1",
    ),
    "a seed in words": ({"a": np.eye(60)}, {"seed": "one"}, "seed='one': it must be a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_probe_sets_that_nothing_can_be_learned_from_are_refused_by_name(case):
    table, options, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        LinearProbes.train(None, Dataset.from_dict({"label": Y} | table), **({"input_column": "a"} | options))


def test_rows_of_other_features_than_the_probe_sets_are_refused():
    probes = LinearProbes.train(None, Dataset.from_dict({"a": np.eye(60), "label": Y}), input_column="a", steps=2)
    narrow = Dataset.from_dict({"a": np.eye(60)[:, :50], "label": Y})
    with pytest.raises(ValueError, match="rows have 50 features and the probes were trained on 60"):
        UncertaintySelector(probes).select(narrow, 10)


def test_a_backbone_with_a_head_is_refused_and_equal_features_are_said():
    data = Dataset.from_dict({"input_ids": [[1, 2]] * 60, "label": Y})
    with pytest.raises(ValueError, match=r"backbone Headed returns \['logits'\] and no last_hidden_state"):
        LinearProbes.train(Headed(), data)
    same = Dataset.from_dict({"a": [[0.5]] * 60, "label": Y})
    with pytest.warns(UserWarning, match="features of all 60 rows of the probe set are equal"):
        LinearProbes.train(None, same, input_column="a", steps=2, seed=1_700_000_000_000_000_000)


def test_missing_values_of_the_pool_are_not_blamed_on_the_probes():
    pool = rows(40)
    x = np.array(pool["x"][:])
    x[17, 2] = np.nan
    bad = Dataset.from_dict({"x": x, "label": pool["label"]})
    with pytest.raises(ValueError, match="column 'x' is NaN or infinite in row 17 .*fill missing values in"):
        UncertaintySelector(trained()).score(bad)


# ---- before the long work


def test_what_cannot_be_planned_is_refused_before_a_row_is_scored(monkeypatch):
    pool = rows(120)
    cases = [
        (pool.add_column("weight", np.ones(120)), 30, {}, {}, "columns \\['weight'\\] already"),
        (pool.add_column("id", np.arange(120.0)), 30, {"id_column": "id"}, {}, "column 'id' holds 0.0; row ids are"),
        (pool.add_column("id", [None, *range(119)]), 30, {"id_column": "id"}, {}, "column 'id' is missing at row 0"),
        (pool.add_column("id", [0, *range(119)]), 30, {"id_column": "id"}, {}, "names some rows alike"),
        (pool, 2, {}, {}, "below the 3 classes"),
        (pool, 30, {}, {"quota": "none"}, r"\['quota'\] are no arguments of make_plan; did you mean \['quotas'"),
        (pool, 30, {}, {"score": "mine"}, "no column 'mine'"),
        (pool, 30, {}, {"sampler": "best"}, "sampler='best'"),
        (pool, 30, {}, {"score": "el2n", "weights": "none"}, "depends on the label"),
        (pool, 30, {"preset": "paper"}, {"weights": "exact"}, "weights='exact' needs inclusion probabilities"),
        (pool, 30, {"seed": 0.5}, {}, "seed=0.5"),
    ]
    probes = trained()
    monkeypatch.setattr(UncertaintySelector, "_scored", lambda *_: pytest.fail("scored"))
    for data, budget, options, overrides, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            UncertaintySelector(probes, **options).select(data, budget, **overrides)


class Counted(nn.Module):
    fed = 0

    def forward(self, x):
        Counted.fed += len(x)
        return x


@pytest.mark.parametrize("mode", ["coreset", "active"])
def test_planning_feeds_no_row_again(mode):
    probes = LinearProbes.train(Counted(), rows(90, 1), input_column="x", steps=20)
    selector = UncertaintySelector(probes, mode=mode)
    scored = selector.score(rows(200))
    Counted.fed = 0
    for budget in (30, 60):
        fast = selector.plan(scored, budget)
    assert Counted.fed == 0
    probes._known = {}
    assert selector.plan(scored, 60).plan.positions.equal(fast.plan.positions) and Counted.fed > 0


def test_features_are_made_anew_once_the_backbone_was_changed_in_place():
    probes, pool = LinearProbes.train(nn.Linear(6, 4), rows(90, 1), input_column="x", steps=5), rows(40)
    UncertaintySelector(probes).score(pool)
    before = probes.encode(pool)
    probes.backbone.weight.data.mul_(2)  # which no version counter sees
    probes.backbone.bias.data.mul_(2)
    torch.testing.assert_close(probes.encode(pool), 2 * before)


def test_classes_that_no_probe_saw_are_named_and_not_muted():
    seen = rows(150, 1).filter(lambda row: row["label"] != 1)
    probes = LinearProbes.train(None, seen, input_column="x", steps=50)
    selector = UncertaintySelector(probes)
    with pytest.warns(UserWarning, match=r"no probe was trained on a row of 1 classes of the pool: \['1'\]"):
        subset = selector.select(rows(300), 60)
    label, weight = np.array(subset["label"][:]), np.array(subset["weight"][:])
    assert (label == 1).sum() == 20 and weight[label == 1].mean() > 0.7
    assert any("no probe was trained on a row of 1 (" in text for text in selector.report().warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UncertaintySelector(trained()).select(rows(300), 60)


# ---- processes


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    refuse_lone_processes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_lone_processes()  # set by a scheduler, without a launcher
    monkeypatch.setenv("RANK", "0")
    for call in (refuse_lone_processes, lambda: UncertaintySelector(trained()).score(rows(40))):
        with pytest.raises(ValueError, match="2 processes were started, but each sees only itself.*--use_cpu"):
            call()


def test_an_error_in_a_single_process_is_its_own():
    with pytest.raises(KeyError), same_fate():
        raise KeyError("mine")


ONE_FAILS = """
import os, sys
import numpy as np, torch
from datasets import Dataset
from torch import nn
from accelerate import PartialState
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.scoring import score_rows
state = PartialState(cpu=True)
def collate(rows):
    if state.process_index == 1 and any(row["n"] == 4 for row in rows):
        raise OSError("row 4 cannot be read")
    return torch.tensor([row["x"] for row in rows])
data = Dataset.from_dict({"x": np.eye(20, 4), "n": list(range(20))})
probes = Probes([nn.Linear(4, 2) for _ in range(2)], data_collator=collate)
try:
    score_rows(probes, data, batch_size=3, progress=False)
except Exception as error:
    print(state.process_index, type(error).__name__, error, flush=True)
"""


def test_an_error_of_one_process_ends_all(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(ONE_FAILS)
    said = Script(script, processes=2, env={"ACCELERATE_USE_CPU": "true"}).finish()
    lines = [line for line in said.splitlines() if line and not line.startswith("[Gloo]")]  # torch 2.10's own
    assert sorted(lines) == [
        "0 RuntimeError process 1 failed: OSError: row 4 cannot be read",
        "1 OSError row 4 cannot be read",
    ]
