"""Rows with several labels, or with a label for each token: scores are means over them."""

import chat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from compare import assert_close
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

import hf_effdl.samples.scores.uncertainty as formulas
from hf_effdl import Probes, ProbeScorer, Selection, UncertaintySelector, score_shards
from hf_effdl.samples.probes.scoring import OF_ONE_CLASS, SCORES


ROWS, PROBES, LABELS, TOKENS, CLASSES = 24, 3, 5, 5, 3
NAMES = ("u_x", "entropy", "margin", "least_confidence", "bald", "u_y", "p_label", "el2n")


class Stored(nn.Module):
    """Logits by row number."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, row: Tensor, attention_mask: Tensor) -> Tensor:
        return self.logits[row.long()]


def made(task: str) -> tuple[Tensor, Tensor, Dataset, Probes]:
    """Logits with the decisions of a row beside each other, which count (0, 1) or not (-100), and the same as data."""
    rng = torch.Generator().manual_seed(0)
    shape = (ROWS, PROBES, LABELS) if task == "labels" else (ROWS, PROBES, TOKENS, CLASSES)
    logits = 2 * torch.randn(shape, generator=rng)
    given = torch.randint(2 if task == "labels" else CLASSES, (ROWS, *shape[2:3]), generator=rng)
    if task == "tokens":
        given[:, 0] = -100
        given[::2, 3] = -100
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[::3, 4], given[::3, 4:] = 0, given[::3, 4:] if task == "labels" else -100
    columns = {"row": range(ROWS), "attention_mask": mask.tolist(), "label": given.tolist()}
    models = [Stored(logits[:, m]) for m in range(PROBES)]
    return logits, given, Dataset.from_dict(columns), Probes(models, input_column=None, task=task)


def by_hand(name: str, logits: Tensor, given: Tensor, row: int, counted: Tensor) -> float:
    """The mean of a score over the decisions of a row, one after the other."""
    found = []
    for k in counted.nonzero().flatten().tolist():
        one = logits[row : row + 1, :, k]
        labels = (given[row : row + 1, k],) if name in ("u_y", "p_label", "el2n") else ()
        formula = formulas.uncertainty if name in ("u_x", "u_y") else getattr(formulas, name)
        found.append(formula(one, *labels).item())
    return sum(found) / len(found)


@pytest.mark.parametrize("mode", ["coreset", "active"])
@pytest.mark.parametrize("task", ["labels", "tokens"])
def test_scores_are_means_over_the_decisions(task, mode):
    logits, given, data, probes = made(task)
    scored = UncertaintySelector(probes, mode=mode, batch_size=7).score(data)
    names = [name for name in NAMES if mode == "coreset" or name not in ("u_y", "p_label", "el2n")]
    assert set(scored.column_names) - {*data.column_names} == {*names, "confidence", "score_key"}
    for row in range(ROWS):
        counted = given[row] != -100
        if mode == "active" and task == "tokens":
            counted = torch.tensor(data[row]["attention_mask"]).bool()
        for name in names:
            assert scored[name][row] == pytest.approx(by_hand(name, logits, given, row, counted), rel=1e-5), name


@pytest.mark.parametrize("task", ["labels", "tokens"])
def test_rows_are_chosen_without_classes_and_told_of(task, tmp_path):
    _, _, data, probes = made(task)
    selector = UncertaintySelector(probes)
    scored = selector.score(data)
    subset = selector.select(scored, 10)
    plan = selector.selection.plan
    assert subset["label"] == [scored["label"][i] for i in plan.positions.tolist()] and len(subset) == 10
    assert not {*SCORES} & {*subset.column_names}
    p = torch.tensor(scored["p_label"][:])[plan.positions] + 0.001
    assert_close(torch.tensor(subset["weight"][:]), p / p.mean(), 1e-6)
    report = selector.report()
    assert report.classes == [] and report.suspect_count is None and "up to its median" in report.recipe
    report.save(tmp_path / "report")
    selector.selection.save(tmp_path / "selection")
    again = Selection.load(tmp_path / "selection")
    assert again.redraw(data=scored, budget=5).plan.positions.shape == (5,)
    chosen = UncertaintySelector(probes, mode="active").select(data, 10)
    assert chosen["weight"] == [1.0] * 10


@pytest.mark.parametrize("task", ["labels", "tokens"])
def test_shards_are_scored_alike(task, tmp_path):
    _, _, data, probes = made(task)
    pq.write_table(data.with_format("arrow")[:], tmp_path / "0.parquet")
    score_shards([tmp_path / "0.parquet"], tmp_path / "out", ProbeScorer(probes), batch_rows=10)
    table = pq.read_table(next((tmp_path / "out").glob("scores-*")))
    whole = UncertaintySelector(probes).score(data)
    assert not {*OF_ONE_CLASS} & {*table.column_names}
    for name in (*NAMES, "confidence"):
        assert_close(torch.tensor(table[name].to_pylist()), torch.tensor(whole[name][:]), 1e-6)
    assert isinstance(table, pa.Table)


def bert(kind: type, seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return kind(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes, **options)).eval()


def test_transformers_models_say_what_they_decide_and_padding_on_either_side_does_not_count():
    models = [bert(BertForTokenClassification, seed, num_labels=CLASSES) for seed in range(PROBES)]
    lengths, tokenizer = [3, 7, 5, 2], chat.tokenizer()
    rows = {
        "input_ids": [[5 + i + t for t in range(n)] for i, n in enumerate(lengths)],
        "labels": [[-100] + [t % CLASSES for t in range(n - 1)] for n in lengths],
    }
    rows["attention_mask"] = [[1] * n for n in lengths]
    data, tables = Dataset.from_dict(rows), []
    for side, size in (("right", 4), ("left", 4), ("right", 1)):
        tokenizer.padding_side = side
        probes = Probes(models, tokenizer)
        assert probes.task == "tokens"
        for mode in ("coreset", "active"):
            scored = UncertaintySelector(probes, "labels", mode, batch_size=size).score(data)
            tables.append(torch.tensor(scored["u_x"][:]))
    # BERT's places are counted from the left end of the batch: only padding on the right leaves a row as it is
    assert_close(tables[0], tables[4], 1e-5)
    assert_close(tables[1], tables[5], 1e-5)
    assert tables[2].isfinite().all() and not torch.equal(tables[0], tables[1])


def test_a_head_of_several_labels_is_known_by_its_problem_type():
    options = {"num_labels": LABELS, "problem_type": "multi_label_classification"}
    models = [bert(BertForSequenceClassification, seed, **options) for seed in range(PROBES)]
    assert Probes(models).task == "labels" and Probes(models, task="classes").task == "classes"
    with pytest.raises(ValueError, match=r"different things, \['classes', 'labels'\]"):
        Probes([models[0], bert(BertForSequenceClassification, 0, num_labels=LABELS)])


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("labels", 1, "holds 1 in row 2.*list of 0 and 1.*task='classes'"),
        ("labels", None, "holds None in row 2"),
        ("labels", [0, 1, 2, 0, 0], "has 2 among its labels in row 2"),
        ("labels", [0, 1], "row 2 has 2 labels, and the probes tell 5 labels of it"),
        ("tokens", [0, 1], "row 2 has 2 labels, and the probes tell 5 tokens of it; align"),
        ("tokens", [-100] * TOKENS, "has none of its labels in row 2"),
        ("tokens", [0, 0, 3, 0, 0], "row 2 has a label 3, and the probes tell 3 classes apart"),
        ("tokens", [0, 0, -1, 0, 0], "has -1 among its labels in row 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_their_row(task, labels, message):
    _, _, data, probes = made(task)
    values = data["label"][:]
    if isinstance(labels, list):
        values[2] = labels
    else:
        values = [labels if i >= 2 else row for i, row in enumerate(values)]
    wrong = data.remove_columns("label")
    if labels == 1:  # no column holds lists and numbers
        wrong, message = wrong.add_column("label", [1] * ROWS), message.replace("row 2", "row 0")
    else:
        wrong = wrong.add_column("label", values)
    with pytest.raises((ValueError, TypeError), match=message):
        UncertaintySelector(probes).score(wrong)


def test_what_rows_without_a_class_cannot_have_is_refused():
    _, _, data, probes = made("labels")
    with pytest.raises(ValueError, match="quotas='label': rows whose labels are decided have no class"):
        UncertaintySelector(probes).select(data, 5, quotas="label")
    with pytest.raises(ValueError, match="needs one row of logits.*task='tokens'"):
        UncertaintySelector(Probes(made("tokens")[3].models), mode="active").score(data)
    with pytest.raises(ValueError, match="task='words': it must be one of"):
        Probes(probes.models, task="words")
