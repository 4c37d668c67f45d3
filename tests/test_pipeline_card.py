"""The card of a saved pipeline: what is in it, and what is said of the selector that a model keeps."""

import pytest

from hf_effdl.vicl.remote_code.configuration_visual_in_context import VisualInContextConfig
from hf_effdl.vicl.remote_code.pipeline_card import write_model_card


REPORT = {
    "images": 1200,
    "nearest": 0.5,
    "stage 1": 0.6,
    "stage 2": 0.65,
    "best tried": 0.7,
    "best": 0.75,
    "plain consensus": 0.55,
}
CASCADE = {"kind": "cascade", "passes": 10, "head": "ridge", "report": REPORT}
RANKER = {
    "kind": "ranker",
    "schedule": "covering",
    "passes": 1,
    "method": "hodge",
    "reliable": None,
    "rankers": {"5": {}, "10": {}},
}


class Pool:
    fingerprint = "abc"

    def __len__(self) -> int:
        return 5000


def card(tmp_path, kept, **changes) -> str:
    values = {
        "frozen_model": {"kind": "seggpt", "backbone": {"id": "BAAI/seggpt-vit-large"}},
        "pool": "me/pool",
        "strategy": kept["kind"] if kept else "nearest",
        "selector": kept,
        "candidates": 40,
    }
    config = VisualInContextConfig(**(values | changes))
    return write_model_card(tmp_path / "card", config, Pool(), "me/model").read_text()


def test_the_card_tells_what_a_cascade_learned_what_it_gains_and_costs(tmp_path):
    text = card(tmp_path, CASCADE)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]]
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert rows["nearest"] == ["0.5", "0%"] and rows["best of the candidates"] == ["0.75", "100%"]
    assert rows["stage 1, before any run of the frozen model"] == ["0.6", "40%"]
    assert rows["stage 2, after 10"] == ["0.65", "60%"] and rows["best of these 10"] == ["0.7", "80%"]
    plain = " ".join(text.split())
    for part in (
        "ranks the 40 nearest examples",
        "10 runs of the frozen model for a prediction",
        "on 1,200 images of the pool",
        "after a change of it, measure and fit again",
        'fusion="weighted"',
        "How examples are chosen (the default)",
    ):
        assert part in plain, part
    assert "Nothing was trained" not in text and "list-wise" not in text
    assert max(map(len, text.splitlines())) < 170
    listwise = card(tmp_path, CASCADE | {"head": "listwise"})
    assert "Its stages are list-wise networks." in " ".join(listwise.split())
    assert not any(line.endswith("-") for line in listwise.splitlines() if not line.startswith("-"))
    assert 'chosen (`strategy="cascade"`)' in card(tmp_path, CASCADE, strategy="nearest")


def test_the_card_of_one_pass_of_losses_and_of_no_gap(tmp_path):
    report = {"images": 10, "nearest": -0.4, "stage 1": -0.3, "best": -0.2}
    text = card(tmp_path, CASCADE | {"passes": 1, "report": report})
    assert "| stage 1, before any run of the frozen model | -0.3 | 50% |" in text and "stage 2" not in text
    assert "1 run of the frozen model for a prediction" in " ".join(text.split())
    text = card(tmp_path, CASCADE | {"report": REPORT | {"best": 0.5}})
    assert "| stage 2, after 10 | 0.65 |  |" in text


def test_the_card_of_a_ranker_and_of_none(tmp_path):
    plain = " ".join(card(tmp_path, RANKER).split())
    for part in (
        "lists of 5 and 10",
        'schedule "covering", joined by "hodge"',
        "1 run of the frozen model",
        "ranks the 40 nearest",
        "the next prediction can use it",
    ):
        assert part in plain, part
    assert "reliable" not in plain and "Nothing was trained" not in plain
    text = card(tmp_path, RANKER | {"reliable": 1500, "passes": 10, "schedule": "partitions", "rankers": {"3": {}}})
    assert (
        "Only 1,500 reliable examples" in text and 'schedule "partitions", 10 passes' in text and "lists of 3," in text
    )
    text = card(tmp_path, None)
    assert "How examples are chosen" not in text and "Nothing was trained for this pool" in text
    assert sum(line.startswith("## ") for line in text.splitlines()) == 2


def test_a_card_is_written_whole_or_not_at_all(tmp_path):
    before = card(tmp_path, None)
    with pytest.raises(UnicodeEncodeError):
        card(tmp_path, None, pool="me/\ud800")
    assert [file.name for file in (tmp_path / "card").iterdir()] == ["README.md"]
    assert (tmp_path / "card" / "README.md").read_text() == before
