"""Fine-tuning on weights of rows, turns and tokens: which loss, on which tokens, and what is refused."""

import runpy
import sys

import pytest
import torch
from chat import TEMPLATE, llama, tokenizer
from datasets import Dataset
from forked import Script
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments


trl = pytest.importorskip("trl", reason="the extra trl is not installed")
from weighted_sft_run import rows, run, settings, trained  # noqa: E402

from hf_effdl import WeightedSFTTrainer  # noqa: E402


PACKED = {"packing": True, "max_length": 40}


def made(out, data: Dataset, cls: type = WeightedSFTTrainer, model=None, options: dict | None = None, **changes):
    args = settings(str(out), **changes)
    options = {"processing_class": tokenizer()} | (options or {})
    return cls(model or llama(), args, train_dataset=data, **options)


def tokens(row: dict, answers_only: bool) -> list[tuple[int, bool, float]]:
    """Of every token of a row its number, whether it has a label, and its weight, by the words of the row alone."""
    read, found = tokenizer(), []
    if "prompt" in row:
        parts = [(row["prompt"], not answers_only, 1.0), (row["completion"] + "[EOS]", True, 1.0)]
    else:
        turns = zip(row["messages"], row["turn_weights"], strict=True)
        parts = []
        for message, weight in turns:
            asked = message["role"] == "assistant" or not answers_only
            parts += [
                (f"<{message['role']}>", not answers_only, weight),
                (message["content"] + " [EOS]", asked, weight),
            ]
    for text, counts, weight in parts:
        found += [(number, counts, weight * row["weight"]) for number in read(text)["input_ids"]]
    return found


def by_hand(data: Dataset, answers_only: bool, cut: int | None = None) -> tuple[dict, float]:
    """Parameters after a step down `sum_t w_t l_t / N`, every row asked alone, and that loss."""
    model, total, count = llama(), 0.0, 0
    for row in data:
        numbers, counts, weights = zip(*tokens(row, answers_only)[:cut], strict=True)
        logits = model(torch.tensor([numbers])).logits[0, :-1].double()
        losses = cross_entropy(logits, torch.tensor(numbers[1:]), reduction="none")
        mask = torch.tensor(counts[1:])
        total = total + (losses * torch.tensor(weights[1:], dtype=torch.float64) * mask).sum()
        count += int(mask.sum())
    (total / count).backward()
    return {name: (p - 0.5 * p.grad).detach() for name, p in model.named_parameters()}, (total / count).item()


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(
    "kind, changes, answers_only, cut",
    [
        ("pairs", {}, True, None),
        ("pairs", {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}, True, None),
        ("pairs", {"completion_only_loss": False}, False, None),
        ("pairs", PACKED, True, None),
        ("talk", {}, False, None),
        ("talk", {"assistant_only_loss": True}, True, None),
        ("talk", PACKED | {"shuffle_dataset": True}, False, None),
        ("talk", PACKED | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, False, None),
        ("talk", {"max_length": 10}, False, 10),
        ("talk", {"activation_checkpointing": True}, False, None),
    ],
)
def test_a_step_goes_down_the_weighted_loss_of_the_tokens(kind, changes, answers_only, cut, tmp_path):
    expected, loss = by_hand(rows(kind), answers_only, cut)
    trainer = made(tmp_path, rows(kind), logging_steps=1, **changes)
    assert distance(trained(trainer), expected) < 2e-6 < distance(dict(llama().named_parameters()), expected)
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-4)


def test_two_processes_step_as_one(tmp_path):
    Script("weighted_sft_run.py", tmp_path, 3, 2, processes=2).finish()
    two = torch.load(tmp_path / "final.pt", weights_only=True)
    assert distance(two, by_hand(rows(), True)[0]) < 2e-6
    assert distance(two, run(str(tmp_path), 12, 1)) < 2e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 12, "shuffle_dataset": True},
        PACKED | {"shuffle_dataset": True},
        PACKED | {"packing_strategy": "wrapped"},
        PACKED | {"max_length": 20, "packing_strategy": "bfd_split"},
        {"padding_free": True, "max_length": None},
    ],
)
def test_weights_of_one_train_as_sft_trainer(changes, tmp_path):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | changes
    plain = rows("talk").select_columns("messages")
    same = trained(made(tmp_path, plain, trl.SFTTrainer, **changes))
    ones = plain.add_column("weight", [1.0] * 12).add_column("turn_weights", [[1.0] * 4] * 12)
    assert distance(trained(made(tmp_path, ones, **changes)), same) == 0
    assert distance(trained(made(tmp_path, rows("talk"), **changes)), same) > 1e-3


def tokenised(data: Dataset, token_weights: bool) -> Dataset:
    def columns(row: dict) -> dict:
        numbers, counts, weights = zip(*tokens(row, True), strict=True)
        labels = [number if counted else -100 for number, counted in zip(numbers, counts, strict=True)]
        return {"input_ids": numbers, "labels": labels} | ({"token_weights": weights} if token_weights else {})

    return data.map(columns, remove_columns=["prompt", "completion"] + (["weight"] if token_weights else []))


SKIPPED = {"dataset_kwargs": {"skip_prepare_dataset": True}}


@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("changes", [{}, PACKED, SKIPPED])
def test_tokenised_rows_carry_weights_of_rows_or_tokens(token_weights, changes, tmp_path):
    data = tokenised(rows(), token_weights)
    assert distance(trained(made(tmp_path, data, **changes)), by_hand(rows(), True)[0]) < 2e-6


def test_a_stream_trains_on_its_weights(tmp_path):
    stream = rows("talk").to_iterable_dataset()
    assert distance(trained(made(tmp_path, stream, max_steps=1)), by_hand(rows("talk"), False)[0]) < 2e-6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it by its old name
def test_adapters_and_half_precision_go_down_the_same_loss(tmp_path):
    loss = by_hand(rows("talk"), False)[1]
    adapted = made(tmp_path, rows("talk"), options={"peft_config": LoraConfig(target_modules=["q_proj"])})
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters()}
    assert adapted.train().training_loss == pytest.approx(loss, abs=1e-4)
    moved = {name for name, p in adapted.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_B" in name for name in moved)
    half = made(tmp_path, rows("talk"), model=llama().to(torch.bfloat16))
    assert half.train().training_loss == pytest.approx(loss, rel=2e-2)


def test_evaluation_is_unweighted(tmp_path):
    found = {}
    for cls in (WeightedSFTTrainer, trl.SFTTrainer):
        trainer = made(tmp_path, rows(), cls, options={"eval_dataset": rows("pairs", 8)})
        found[cls] = trainer.evaluate()["eval_loss"], trainer.evaluate(rows("pairs", 5))["eval_loss"]
    assert found[WeightedSFTTrainer] == pytest.approx(found[trl.SFTTrainer], abs=1e-6)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    changes = {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2}
    whole = trained(made(tmp_path, rows(), **changes))
    resumed = made(tmp_path, rows(), model=llama(seed=1), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert distance(dict(resumed.model.named_parameters()), whole) < 1e-7


def with_column(data: Dataset, name: str, values: list) -> Dataset:
    return (data.remove_columns(name) if name in data.column_names else data).add_column(name, values)


THOUGHTS = TEMPLATE.replace(
    "{% generation %}{{ m.content }}", "{% generation %}{% if loop.last %}{{ m.content }}{% endif %}"
)
TALK, PAIRS = rows("talk"), rows()
BEYOND = Dataset.from_dict({"prompt": ["w1 " * 30] * 4, "completion": ["w2"] * 4, "weight": [1.0] * 4})


@pytest.mark.parametrize(
    "data, changes, options, message",
    [
        (PAIRS.rename_column("weight", "weights"), {}, {}, "'completion', 'weights'.*did you mean 'weights'.*SFTTr"),
        (with_column(PAIRS, "weight", [-1.0] * 12), {}, {}, "row 0 has -1"),
        (with_column(PAIRS, "weight", [0.0] * 12), {}, {}, "all 0"),
        (with_column(TALK, "turn_weights", [[1.0] * 3] * 12), {}, {}, "row 0 .* has 3 'turn_weights' for 4 messages"),
        (with_column(TALK, "turn_weights", [[1, -1.0, 0, 0]] * 12), {}, {}, "'turn_weights' in row 0 .* row 1 has -1"),
        (with_column(PAIRS, "turn_weights", [[1.0] * 2] * 12), {}, {}, "no conversation"),
        (with_column(PAIRS, "token_weights", [[1.0]] * 12), {}, {}, "row 0 .* has 1 'token_weights' for .* tokens"),
        (TALK, {}, {"processing_class": tokenizer(THOUGHTS)}, "row 0 .* the first 2 of 4 messages"),
        (PAIRS, {"loss_type": "dft"}, {}, "loss_type is set"),
        (PAIRS, {}, {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func is set"),
        (PAIRS, {"packing": True, "max_length": None}, {}, "max_length=None"),
        (with_column(PAIRS, "image", [0] * 12), {}, {}, "images"),
        (with_column(TALK, "turn_weights", [[1.0] * 4] * 11 + [None]), {}, {}, r"row 11 .* None in \['turn_w"),
        (with_column(TALK, "turn_weights", [[0.0] * 4] * 12), {}, {}, "all tokens with a label within .* weight 0"),
        (with_column(TALK, "turn_weights", [1.0] * 12), {}, {}, "row 0 of the data set has 1.0 in 'turn_weights'"),
        (PAIRS.select([]), {}, {}, "train_dataset has no rows"),
        ({"train": PAIRS}, {}, {}, r"is a dict of \['train'\]; pass one of its splits"),
        (BEYOND, {"max_length": 16}, {}, "no row of train_dataset has a token with a label within max_length=16"),
        (BEYOND, {"max_length": 16, "packing": True}, {}, "has a token with a label within max_length=16"),
        (Dataset.from_dict({"input_ids": [[5]] * 4, "weight": [1.0] * 4}), {}, {}, "has a token with a label within"),
    ],
)
def test_what_has_no_weighted_loss_is_refused_at_once(data, changes, options, message, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        made(tmp_path, data, options=options, **changes)


def test_rows_whose_answers_are_cut_off_are_counted(tmp_path):
    some = Dataset.from_dict({"prompt": ["w1 " * 30] + ["w1 "] * 3, "completion": ["w2"] * 4, "weight": [1.0] * 4})
    with pytest.warns(UserWarning, match="1 of 4 rows have no token with a label within max_length=16"):
        assert len(made(tmp_path, some, max_length=16).train_dataset) == 3


def test_without_trl_the_name_is_there_and_says_what_to_install(monkeypatch):
    file = sys.modules[WeightedSFTTrainer.__module__].__file__
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match='pip install "trl>=1.16"'):
        runpy.run_path(file)["WeightedSFTTrainer"](llama(), train_dataset=rows())


def test_a_mean_other_than_one_warns(tmp_path):
    with pytest.warns(UserWarning, match="has mean 2"):
        made(tmp_path, with_column(rows(), "weight", [2.0] * 12))


def test_a_collator_that_moves_tokens_is_refused(tmp_path):
    def reversed_rows(batch: list[dict]) -> dict:
        assert all(row.keys() <= {"input_ids", "labels"} for row in batch)
        ids = [torch.tensor(row["input_ids"]) for row in batch]
        pad = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side="left")
        return {"input_ids": pad, "labels": pad, "attention_mask": pad != 0}

    trainer = made(tmp_path, tokenised(rows(), True), options={"data_collator": reversed_rows})
    with pytest.raises(ValueError, match="does not put the tokens"):
        trainer.train()


def test_plain_arguments_and_the_mean_loss_of_a_model_without_token_counts(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = WeightedSFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no number of tokens"):
        trainer.compute_loss(trainer.model, batch)
    trainer.train()
