"""Training on a `weight` column: which loss, on which data, and what is refused."""

import sys
import warnings
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import tiny_run
import torch
import weighted_run
from datasets import Dataset, Value
from forked import Script
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    ResNetForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    default_data_collator,
    set_seed,
)
from weighted_run import LENGTH, SIZES, WORDS, arguments, classifier, rows, trained

from hf_effdl import SplitLBIArguments, SplitLBITrainer, WeightedTrainer
from hf_effdl.weighting import WeightCollator, WeightedLossMixin, element_losses


BIN = Path(sys.executable).parent


class MixedTrainer(WeightedLossMixin, Trainer):
    """Silent without weights, as the trainers of the structure pillar are."""


class Rows(torch.utils.data.Dataset):
    """A data set that knows its rows and nothing about columns."""

    def __init__(self, data: Dataset) -> None:
        self.rows = list(data)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


class Net(nn.Module):
    """No transformers model; it takes no loss keywords, so that Trainer divides its loss by the accumulation steps."""

    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.words, self.head = nn.Embedding(WORDS, 4).double(), nn.Linear(4, 3).double()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.words(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def moved(parameters: dict, model: nn.Module) -> dict:
    return {name: parameters[name] - p.detach() for name, p in model.named_parameters()}


def with_column(data: Dataset, name: str, values: list) -> Dataset:
    return (data.remove_columns(name) if name in data.column_names else data).add_column(name, values)


def token_rows(count: int, ragged: bool = True) -> Dataset:
    """Rows with a label per token, of which ragged ones have 1 to all."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (count, LENGTH), generator=generator)
    if ragged:
        first = torch.randint(LENGTH, (count, 1), generator=generator)
        labels[torch.arange(LENGTH) < first] = -100
    return with_column(rows(count), "labels", labels.tolist())


def build(cls: type, config: object) -> nn.Module:
    set_seed(0)
    return cls(config).double().eval()


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return build(GPT2LMHeadModel, GPT2Config(vocab_size=WORDS, **sizes, **dropout))


# ---- the loss


BERT = {**SIZES, "num_labels": 3}
DECODER = {name: size for name, size in SIZES.items() if "prob" not in name} | {"num_key_value_heads": 1}


def bert(**changes: object) -> nn.Module:
    return build(BertForSequenceClassification, BertConfig(**BERT | changes))


T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}


def lora(base: nn.Module, task: str, target: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about a name of transformers
        return get_peft_model(base, LoraConfig(task_type=task, target_modules=[target])).eval()


MODELS = {
    "classification": (lambda: bert(), "class"),
    "classification under PEFT": (lambda: lora(bert(), "SEQ_CLS", "query"), "class"),
    "regression": (lambda: bert(num_labels=1), "number"),
    "regression on whole numbers": (lambda: bert(num_labels=1), "class"),
    "regression, several outputs": (lambda: bert(problem_type="regression"), "numbers"),
    "multi-label": (lambda: bert(), "bits"),
    "multi-label, by its config": (lambda: bert(problem_type="multi_label_classification"), "bits"),
    "images": (lambda: build(ResNetForImageClassification, tiny_run.model().config), "bit"),
    "a head that names no task": (lambda: build(BertForNextSentencePrediction, BertConfig(**SIZES)), "bit"),
    "tokens": (lambda: build(BertForTokenClassification, BertConfig(**BERT)), "ragged"),
    "masked tokens": (lambda: build(BertForMaskedLM, BertConfig(**SIZES)), "ragged"),
    "GPT-2": (gpt2, "ragged"),
    "GPT-2 under PEFT": (lambda: lora(gpt2(), "CAUSAL_LM", "c_proj"), "ragged"),
    "Llama": (lambda: build(LlamaForCausalLM, LlamaConfig(**DECODER)), "ragged"),
    "encoder-decoder": (
        lambda: build(T5ForConditionalGeneration, T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)),
        "ragged",
    ),
}


def batch_for(model: nn.Module, kind: str, count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = {
        "class": torch.randint(3, (count,), generator=generator),
        "bit": torch.randint(2, (count,), generator=generator),
        "number": torch.randn(count, generator=generator, dtype=torch.float64),
        "numbers": torch.randn(count, 3, generator=generator, dtype=torch.float64),
        "bits": torch.randint(2, (count, 3), generator=generator).double(),
        "ragged": torch.tensor(token_rows(count)["labels"]),
    }[kind]
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(count, 1, 16, 16, generator=generator).double(), "labels": labels}
    return {"input_ids": torch.randint(1, WORDS, (count, LENGTH), generator=generator), "labels": labels}


def weighted_and_alone(model, batch, tmp_path, **settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted loss of a batch, the weights, and what Trainer makes of each row alone."""
    count = len(batch["labels"])
    weight = torch.rand(count, generator=torch.Generator().manual_seed(7))
    args = arguments(str(tmp_path), **settings)
    loss = WeightedTrainer(model, args).compute_loss(model, {**batch, "weight": weight})
    plain = Trainer(model, args)
    alone = [plain.compute_loss(model, {name: value[[i]] for name, value in batch.items()}) for i in range(count)]
    return loss, weight, torch.stack(alone)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_weighted_mean_of_the_losses_that_the_model_has_on_each_row_alone(name, tmp_path):
    make, kind = MODELS[name]
    model = make()
    loss, weight, alone = weighted_and_alone(model, batch_for(model, kind), tmp_path)
    # transformers takes the logits of tokens to float32
    torch.testing.assert_close(loss.double(), (weight * alone.double()).mean(), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:Label smoothing is not compatible")
@pytest.mark.parametrize("name", ["classification", "tokens", "GPT-2", "multi-label, by its config"])
def test_label_smoothing_smooths_each_row(name, tmp_path):
    make, kind = MODELS[name]
    model = make()
    batch = batch_for(model, kind)
    loss, weight, alone = weighted_and_alone(model, batch, tmp_path, label_smoothing_factor=0.3)
    torch.testing.assert_close(loss, (weight * alone).mean(), rtol=1e-6, atol=0)
    sharp = weighted_and_alone(model, batch, tmp_path)[0]
    if name == "multi-label, by its config":  # Trainer warns and goes without
        assert loss == sharp
    else:
        assert abs(loss - sharp) > 1e-4


def test_a_row_without_any_label_counts_as_a_row_of_loss_zero(tmp_path):
    model = gpt2()
    batch = batch_for(model, "ragged")
    batch["labels"][2] = -100
    weight = torch.full((6,), 1.0)
    trainer = WeightedTrainer(model, arguments(str(tmp_path)))
    loss = trainer.compute_loss(model, {**batch, "weight": weight})
    others = [0, 1, 3, 4, 5]
    rest = trainer.compute_loss(model, {**{k: v[others] for k, v in batch.items()}, "weight": weight[others]})
    torch.testing.assert_close(loss, rest * 5 / 6)


def test_half_precision_logits_give_a_float32_loss(tmp_path):
    model = classifier().bfloat16()
    batch = batch_for(model, "class")
    weight = torch.tensor([0.1, 0.2, 0.3, 1.0, 2.0, 2.4])
    loss = WeightedTrainer(model, arguments(str(tmp_path))).compute_loss(model, {**batch, "weight": weight})
    logits = model(batch["input_ids"]).logits.float()
    expected = (weight * nn.functional.cross_entropy(logits, batch["labels"], reduction="none")).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


# ---- accumulation and processes


@pytest.mark.parametrize("count", [80, 74])
@pytest.mark.parametrize("task", ["classification", "causal language model", "plain module"])
def test_four_micro_batches_of_4_equal_one_batch_of_16_also_when_the_last_ones_are_smaller(task, count, tmp_path):
    make = {"classification": classifier, "causal language model": gpt2, "plain module": Net}[task]
    data = token_rows(count) if make is gpt2 else rows(count)
    shapes = ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4})
    trainers = [WeightedTrainer(make(), arguments(str(tmp_path), **shape), train_dataset=data) for shape in shapes]
    whole, parts = [trained(trainer) for trainer in trainers]
    assert distance(whole, parts) < 1e-8
    assert trainers[0].state.global_step == trainers[1].state.global_step == 5
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in trainers]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-6)
    unweighted = trained(Trainer(make(), arguments(str(tmp_path)), train_dataset=data))
    assert distance(whole, unweighted) > 1e-4


def test_two_processes_equal_one_also_when_their_last_batches_differ_in_size(tmp_path):
    # 22 rows in batches of 4: process 0 gets 4, 4, 4 and process 1 gets 4, 4, 2; two of each make a step
    Script("weighted_run.py", tmp_path, 22, 4, 2, processes=2).finish()
    two = torch.load(tmp_path / "final.pt", weights_only=True)
    assert distance(two, weighted_run.run(str(tmp_path), 22, 16, 1)) < 1e-8


# ---- what a weight means


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("task", ["classification", "tokens"])
def test_weights_of_one_train_as_no_weights(task, accumulate, tmp_path):
    data = rows(64) if task == "classification" else token_rows(64, ragged=False)
    shape = {"per_device_train_batch_size": 16 // accumulate, "gradient_accumulation_steps": accumulate}

    def make() -> nn.Module:
        return classifier() if task == "classification" else build(BertForTokenClassification, BertConfig(**BERT))

    ones = with_column(data, "weight", [1.0] * 64)
    weighted = trained(WeightedTrainer(make(), arguments(str(tmp_path), **shape), train_dataset=ones))
    # in one batch: these models take num_items_in_batch and leave it alone, so that Trainer itself does not average
    # their micro batches
    plain = trained(Trainer(make(), arguments(str(tmp_path)), train_dataset=data))
    assert distance(weighted, plain) < 1e-12
    assert max(change.abs().max() for change in moved(weighted, make()).values()) > 0.01


def test_rows_of_weight_zero_have_no_influence(tmp_path):
    data = with_column(rows(32), "weight", [0.0, 2.0] * 16)
    other = with_column(data, "labels", [(y + 1) % 3 if i % 2 == 0 else y for i, y in enumerate(data["labels"])])
    args = arguments(str(tmp_path))
    one, two = (trained(WeightedTrainer(classifier(), args, train_dataset=d)) for d in (data, other))
    assert distance(one, two) < 1e-14


# ---- which data is weighted


def arrangements(data: Dataset) -> dict[str, object]:
    stream = data.to_iterable_dataset()
    unknown = data.to_iterable_dataset().map(lambda row: row)
    assert "weight" in stream.column_names and unknown.column_names is None
    bare = data.remove_columns("weight")
    weight = dict(enumerate(data["weight"]))
    return {
        "torch format": data.with_format("torch"),
        "numpy format": data.with_format("numpy"),
        "a transform that passes it on": data.with_transform(lambda batch: dict(batch)),
        "a transform that makes it": bare.add_column("row", list(weight)).with_transform(
            lambda batch: batch | {"weight": [weight[i] for i in batch.pop("row")]}
        ),
        "stream": stream,
        "stream of unknown columns": unknown,
        "torch data set": Rows(data),
        "torch subset": torch.utils.data.Subset(data, range(len(data))),
        "numbers of another type": data.cast_column("weight", Value("float32")),
    }


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    args = arguments(str(tmp_path_factory.mktemp("run")))
    return trained(WeightedTrainer(classifier(), args, train_dataset=rows(16)))


@pytest.mark.parametrize("name", arrangements(rows(2)))
def test_every_kind_of_data_set_trains_on_its_weights(name, one_step, tmp_path):
    data = rows(16)
    transform = "transform" in name  # it needs the columns that the model does not take
    args = arguments(str(tmp_path), max_steps=1, remove_unused_columns=not transform)
    for cls in (WeightedTrainer, MixedTrainer):
        found = trained(cls(classifier(), args, train_dataset=arrangements(data)[name]))
        assert distance(found, one_step) < 1e-8


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )


def strict(features: list[dict]) -> dict[str, torch.Tensor]:
    """As the collators that people write: it names what it takes, and here takes offence at anything else."""
    assert all(row.keys() == {"input_ids", "labels"} for row in features)
    return {name: torch.tensor([row[name] for row in features]) for name in ("input_ids", "labels")}


COLLATORS = {
    "one's own": (lambda: strict, classifier, [0, 1, 2, 1]),
    "default": (lambda: default_data_collator, classifier, [0, 1, 2, 1]),
    "padding": (lambda: DataCollatorWithPadding(tokenizer()), classifier, [0, 1, 2, 1]),
    "tokens": (
        lambda: DataCollatorForTokenClassification(tokenizer()),
        lambda: build(BertForTokenClassification, BertConfig(**BERT)),
        [[0, 1, 2], [1, 1], [2, 0, 1, 1], [0]],
    ),
    "language": (lambda: DataCollatorForLanguageModeling(tokenizer(), mlm=False), gpt2, None),
}


@pytest.mark.parametrize("name", COLLATORS)
def test_collators_never_see_the_weight_and_the_batch_has_it(name, tmp_path):
    make_collator, make_model, labels = COLLATORS[name]
    lengths = [3, 3, 3, 3] if name in ("default", "one's own") else [3, 2, 4, 1]
    data = Dataset.from_dict({"input_ids": [[2 + i] * n for i, n in enumerate(lengths)]})
    data = data if labels is None else data.add_column("labels", labels)
    data = data.add_column("extra", list("abcd"))
    weight = [0.1, 0.4, 1.5, 2.0]
    args = arguments(str(tmp_path), max_steps=1, train_sampling_strategy="sequential")
    trainer = WeightedTrainer(make_model(), args, make_collator(), data.add_column("weight", weight))
    [batch] = trainer.get_train_dataloader()
    [plain] = Trainer(make_model(), args, make_collator(), data).get_train_dataloader()
    torch.testing.assert_close(batch.pop("weight"), torch.tensor(weight))
    assert batch.keys() == plain.keys()
    for key in plain:
        assert torch.equal(batch[key], plain[key])
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.state.log_history[0]["loss"] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_without_the_column_it_is_trainer_bit_for_bit(workers, tmp_path):
    data = rows(30).remove_columns("weight")
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "dataloader_num_workers": workers}
    args = arguments(str(tmp_path), **shape)
    for dataset in (data, Rows(data)):
        mixed = MixedTrainer(classifier(), args, train_dataset=dataset)
        plain = Trainer(classifier(), args, train_dataset=dataset)
        assert distance(trained(mixed), trained(plain)) == 0
        assert "loss_is_scaled_for_ga" not in vars(mixed)


def test_a_run_without_weights_after_one_with_them_is_trainer_again(tmp_path):
    data = with_column(rows(16), "weight", [0.5, 1.5] * 8)
    args = arguments(str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2)
    mixed = MixedTrainer(Net(), args, train_dataset=data)
    start = trained(mixed)
    mixed.train_dataset = data.remove_columns("weight")
    mixed.optimizer = mixed.lr_scheduler = None
    net = Net()
    net.load_state_dict(start)
    plain = trained(Trainer(net, args, train_dataset=mixed.train_dataset))
    assert distance(trained(mixed), plain) < 1e-12 < distance(plain, start)


def test_another_trainer_takes_the_mixin(tmp_path):
    class WeightedSeq2SeqTrainer(WeightedLossMixin, Seq2SeqTrainer):
        pass

    args = Seq2SeqTrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    model = MODELS["encoder-decoder"][0]()
    trainer = WeightedSeq2SeqTrainer(model, args, train_dataset=token_rows(8), eval_dataset=token_rows(8))
    before = trainer.evaluate()["eval_loss"]
    bare = token_rows(8).remove_columns("weight")
    assert before == Seq2SeqTrainer(model, args, eval_dataset=bare).evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before


# ---- evaluation


@pytest.mark.parametrize("keep_unused", [False, True])
@pytest.mark.parametrize("kind", ["data set", "torch data set", "stream"])
def test_evaluation_is_unweighted(kind, keep_unused, tmp_path):
    make = {"data set": lambda d: d, "torch data set": Rows, "stream": Dataset.to_iterable_dataset}[kind]
    data, bare = rows(20), rows(20).remove_columns("weight")
    args = arguments(str(tmp_path), per_device_eval_batch_size=8, remove_unused_columns=not keep_unused)

    def accuracy(prediction) -> dict[str, float]:
        return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}

    model = classifier()
    weighted = WeightedTrainer(model, args, train_dataset=rows(8), eval_dataset=make(data), compute_metrics=accuracy)
    plain = Trainer(model, args, eval_dataset=make(bare), compute_metrics=accuracy)
    assert all("weight" not in batch for batch in weighted.get_eval_dataloader())
    assert all("weight" not in batch for batch in weighted.get_test_dataloader(make(data)))
    found, expected = weighted.evaluate(), plain.evaluate()
    for key in ("eval_loss", "eval_accuracy"):
        assert found[key] == expected[key]
    batch = batch_for(model, "class")
    loss, logits, _ = weighted.prediction_step(model, {**batch, "weight": torch.arange(6.0)}, False)
    by_trainer = plain.prediction_step(model, batch, False)
    assert loss == by_trainer[0] and torch.equal(logits, by_trainer[1])
    found, expected = weighted.predict(make(data)), plain.predict(make(bare))
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]
    assert (found.predictions == expected.predictions).all()


# ---- a loss of the user's own


def test_a_loss_function_that_returns_rows_is_weighted_and_evaluates(tmp_path):
    def focal(outputs, labels, num_items_in_batch=None):
        p = outputs["logits"].softmax(1).gather(1, labels[:, None])[:, 0]
        return -((1 - p) ** 2) * p.log()

    model = classifier()
    batch, weight = batch_for(model, "class"), torch.tensor([0.0, 1, 2, 0, 1, 2])
    trainer = WeightedTrainer(model, arguments(str(tmp_path)), compute_loss_func=focal, eval_dataset=rows(9))
    loss = trainer.compute_loss(model, {**batch, "weight": weight})
    expected = (weight * focal(model(batch["input_ids"]), batch["labels"])).mean()
    torch.testing.assert_close(loss, expected)
    data = rows(9).with_format("torch")[:]
    expected = focal(model(data["input_ids"]), data["labels"]).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_loss_function_that_returns_one_number_is_refused(tmp_path):
    def mean(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = WeightedTrainer(classifier(), arguments(str(tmp_path)), train_dataset=rows(16), compute_loss_func=mean)
    with pytest.raises(ValueError, match=r"compute_loss_func returned shape \(\).*one loss per row.*\(16,\)"):
        trainer.train()


# ---- structure


def test_split_lbi_trains_on_weights_and_slims_and_evaluates_without(tmp_path):
    def run(data: Dataset) -> SplitLBITrainer:
        args = SplitLBIArguments(str(tmp_path), **{**tiny_run.SHARED, "max_steps": 4, "save_strategy": "no"})
        trainer = SplitLBITrainer(tiny_run.model(), args, train_dataset=data, eval_dataset=data)
        trainer.end = trained(trainer)
        return trainer

    data = tiny_run.images(32, 1)
    bare = run(data)
    assert distance(run(data.add_column("weight", [1.0] * 32)).end, bare.end) < 1e-5
    plain = data.with_format(None)
    flipped = with_column(plain, "labels", [1 - y if i % 2 else y for i, y in enumerate(plain["labels"])])
    half, other = (run(d.add_column("weight", [2.0, 0.0] * 16).with_format("torch")) for d in (data, flipped))
    assert distance(half.end, bare.end) > 1e-3 and distance(half.end, other.end) < 1e-6
    assert "weight" not in half.example()
    small = half.slim(macs=0.7, bn_batches=2)
    assert half.evaluate_model(small) == half.evaluate_model(small, data)
    assert half.evaluate_masked(bn_batches=2).keys() == {"loss", "accuracy"}


# ---- what is refused


@pytest.mark.parametrize(
    "values, match",
    [
        ([1.0, -0.5], r"row 1 has -0\.5"),
        ([float("nan"), 1.0], "row 0 has nan"),
        ([1.0, float("inf")], "row 1 has inf"),
        ([1.0, None], "row 1 has nan"),
        ([None, None], "must hold one number per row"),
        (["1.0", "1.0"], "must hold one number per row"),
        ([[1.0], [1.0]], r"must hold one number per row.*\(2, 1\)"),
        ([0.0, 0.0], "all 0"),
    ],
)
@pytest.mark.parametrize("cls", [WeightedTrainer, MixedTrainer])
def test_bad_weights_are_refused_when_the_trainer_is_made(cls, values, match, tmp_path):
    with pytest.raises(ValueError, match=f"'weight' of train_dataset.*{match}"):
        cls(classifier(), arguments(str(tmp_path)), train_dataset=with_column(rows(2), "weight", values))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), None, "1", [1.0], "absent"])
def test_bad_weights_of_a_stream_are_refused_in_their_batch(value, tmp_path):
    data = Rows(rows(4))
    for row in data.rows[1:3]:
        row["weight"] = value
    if value == "absent":
        del data.rows[1]["weight"], data.rows[2]["weight"]
    trainer = WeightedTrainer(classifier(), arguments(str(tmp_path)), train_dataset=data)
    with pytest.raises(ValueError, match="2 of 4 rows .* no 'weight'" if value == "absent" else "'weight' must"):
        trainer.train()


def test_a_mean_that_is_not_one_warns_once(tmp_path):
    args = arguments(str(tmp_path), max_steps=1)
    heavy = with_column(rows(4), "weight", [3.0] * 4)
    with pytest.warns(UserWarning, match="has mean 3.*should have mean 1") as caught:
        trainer = WeightedTrainer(classifier(), args, train_dataset=heavy)
        trainer.train()
    assert len([w for w in caught if "has mean" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        WeightedTrainer(classifier(), args, train_dataset=with_column(rows(4), "weight", [1.0009] * 4))


def test_a_weighted_trainer_without_weights_names_the_columns_and_the_nearest(tmp_path):
    args = arguments(str(tmp_path))
    near = rows(4).rename_column("weight", "sample_weights")
    with pytest.raises(
        ValueError, match=r"\['input_ids', 'labels', 'sample_weights'\]; did you mean 'sample_weights'"
    ):
        WeightedTrainer(classifier(), args, train_dataset=near)
    with pytest.raises(ValueError, match=r"\['input_ids', 'labels'\]\. Select"):
        WeightedTrainer(classifier(), args, train_dataset=rows(4).remove_columns("weight"))
    # whether these have weights is seen in the first batch only
    for data in (Rows(near), near.to_iterable_dataset().map(dict)):
        trainer = WeightedTrainer(classifier(), arguments(str(tmp_path), max_steps=1), train_dataset=data)
        with pytest.raises(ValueError, match="did you mean 'sample_weights'"):
            trainer.train()
    WeightedTrainer(classifier(), args, eval_dataset=rows(4).remove_columns("weight")).evaluate()


@pytest.mark.parametrize("cls", [WeightedTrainer, MixedTrainer])
def test_a_column_that_does_not_reach_the_batches_is_refused(cls, tmp_path):
    hidden = rows(4).with_format("torch", columns=["input_ids", "labels"])
    dropped = rows(4).with_transform(lambda batch: {name: batch[name] for name in ("input_ids", "labels")})
    for data in (hidden, dropped):
        trainer = cls(classifier(), arguments(str(tmp_path), remove_unused_columns=False), train_dataset=data)
        with pytest.raises(ValueError, match=r"batches have only \['input_ids', 'labels'\].*transform, set_format"):
            trainer.train()


def test_a_model_whose_own_loss_is_not_the_mean_of_the_rows_is_refused(tmp_path):
    class ClassWeighted(BertForSequenceClassification):
        class_weights = (1.0, 1.0, 1.0)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: object):
            output = super().forward(input_ids, labels=labels)
            output.loss = nn.functional.cross_entropy(
                output.logits, labels, weight=output.logits.new_tensor(self.class_weights)
            )
            return output

    model = build(ClassWeighted, BertConfig(**BERT))
    trainer = WeightedTrainer(model, arguments(str(tmp_path)), train_dataset=rows(16))
    trainer.train()
    model.class_weights = (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="loss of ClassWeighted is .* as single_label.*compute_loss_func"):
        trainer.train()
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    model = build(MixtralForCausalLM, MixtralConfig(**DECODER, **experts)).float()
    trainer = WeightedTrainer(model, arguments(str(tmp_path)), train_dataset=token_rows(16))
    with pytest.raises(ValueError, match="auxiliary loss"):
        trainer.train()


def test_models_without_a_known_loss_per_row_are_refused(tmp_path):
    model = build(BertForQuestionAnswering, BertConfig(**SIZES))
    data = rows(4).rename_column("labels", "start_positions").add_column("end_positions", [1, 2, 1, 2])
    with pytest.raises(ValueError, match=r"needs 'labels'.*'start_positions'.*compute_loss_func"):
        WeightedTrainer(model, arguments(str(tmp_path)), train_dataset=data).train()

    class Regression(nn.Module):
        def __init__(self, hide: bool = False) -> None:
            super().__init__()
            self.linear, self.hide = nn.Linear(LENGTH, 3), hide

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict:
            logits = self.linear(input_ids.float())
            loss = nn.functional.mse_loss(logits, labels[:, None].expand(-1, 3).float())
            return {"loss": loss} if self.hide else {"loss": loss, "logits": logits}

    floats = rows(4).cast_column("labels", Value("float32"))
    with pytest.raises(
        ValueError, match=r"no loss per row.*Regression with logits \(4, 3\).*float32.*compute_loss_func"
    ):
        WeightedTrainer(Regression(), arguments(str(tmp_path)), train_dataset=floats).train()
    with pytest.raises(ValueError, match=r"Regression returned no logits.*use_liger_kernel.*compute_loss_func"):
        WeightedTrainer(Regression(hide=True), arguments(str(tmp_path)), train_dataset=floats).train()


def test_packed_rows_are_refused(tmp_path):
    def pack(features: list[dict]) -> dict:
        return {
            "input_ids": torch.tensor([sum((f["input_ids"] for f in features), [])]),
            "labels": torch.tensor([sum((f["labels"] for f in features), [])]),
        }

    trainer = WeightedTrainer(gpt2(), arguments(str(tmp_path), per_device_train_batch_size=2), pack, token_rows(2))
    with pytest.raises(ValueError, match="2 weights and 1 rows.*packing"):
        trainer.train()


def test_rows_that_are_spread_over_processes_are_refused(tmp_path, monkeypatch):
    trainer = WeightedTrainer(classifier(), arguments(str(tmp_path)), train_dataset=rows(4))
    monkeypatch.setattr(trainer, "get_cp_size", lambda: 2)
    with pytest.raises(ValueError, match="context and sequence parallelism"):
        trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))


def test_label_smoothing_of_a_regression_is_refused(tmp_path):
    model = MODELS["regression"][0]()
    trainer = WeightedTrainer(model, arguments(str(tmp_path), label_smoothing_factor=0.1))
    batch = batch_for(model, "number")
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 has no meaning for regression"):
        trainer.compute_loss(model, {**batch, "weight": torch.ones(6)})
    with pytest.raises(ValueError, match=r"logits \(2, 3\) and labels \(2, 4\) do not fit multi_label"):
        element_losses(torch.zeros(2, 3), torch.zeros(2, 4), "multi_label_classification")


def test_a_collator_that_reads_the_weights_itself_is_served():
    collate = WeightCollator(lambda rows: {"x": torch.tensor([r["x"] * r["weight"] for r in rows])}, keep=True)
    batch = collate([{"x": 1.0, "weight": 3.0}, {"x": 2.0, "weight": 0.5}])
    assert batch["x"].tolist() == [3.0, 1.0] and batch["weight"].tolist() == [3.0, 0.5]
    with pytest.raises(KeyError, match="other"):
        WeightCollator(lambda rows: [row["other"] for row in rows], keep=True)([{"x": 1.0, "weight": 3.0}])


# ---- a subclass that computes the loss itself


class Linear3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        set_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Counting3(Linear3):
    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        output = super().forward(x, labels)
        whole = len(x) if num_items_in_batch is None else num_items_in_batch
        return output | {"loss": output["loss"] * len(x) / whole}


def plain_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """The usual recipe for weights, which its batches have, also those to evaluate on: the mean over a micro batch."""
    weights, labels = inputs.get("weight", torch.ones(())), inputs["labels"]
    logits = model(x=inputs["x"], labels=labels)["logits"]
    loss = (weights * nn.functional.cross_entropy(logits, labels, reduction="none")).mean()
    return (loss, {"logits": logits}) if return_outputs else loss


def alternating(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """Every other micro batch by the trainer's own loss, the others by one's own."""
    self.calls = getattr(self, "calls", 0) + 1
    own = type(self).__mro__[1].compute_loss if self.calls % 2 else plain_loss
    return own(self, model, inputs, return_outputs, num_items_in_batch)


def logging_first(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """The trainer's own loss is looked at and not used."""
    with torch.no_grad():
        super(type(self), self).compute_loss(model, dict(inputs), False, None)
    return plain_loss(self, model, inputs, return_outputs)


def regularised(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """A term more than the trainer's own loss."""
    loss, outputs = super(type(self), self).compute_loss(model, inputs, True, num_items_in_batch)
    loss = loss + 0.1 * outputs["logits"].square().mean()
    return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("loss", [plain_loss, alternating, logging_first, regularised, "on the instance"])
@pytest.mark.parametrize("net", [Linear3, Counting3])
def test_a_loss_of_the_users_own_is_what_it_is_in_trainer(net, loss, accumulated, tmp_path):
    rng = np.random.default_rng(0)
    bare = Dataset.from_dict({"x": rng.normal(size=(32, 4)).astype("float32"), "labels": rng.integers(0, 3, 32)})
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated, "max_steps": 2}
    args = arguments(str(tmp_path), **shape, remove_unused_columns=False)
    own, ends = loss in (plain_loss, "on the instance"), []
    full = bare.add_column("weight", ([0.5, 1.5] if own else [1.0, 1.0]) * 16)
    for base, data in ((Trainer, full if own else bare), (WeightedTrainer, full)):
        kind = base if loss == "on the instance" else type("Own", (base,), {"compute_loss": loss})
        data = data.with_format("torch")
        trainer = kind(net(), args, train_dataset=data, eval_dataset=data)
        if kind is base:
            trainer.compute_loss = MethodType(plain_loss, trainer)
        trainer.train()
        ends.append((trainer.model.linear.weight.detach(), trainer.evaluate()["eval_loss"]))
    torch.testing.assert_close(*ends)
