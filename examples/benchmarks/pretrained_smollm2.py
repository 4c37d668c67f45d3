# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A small language model made smaller without a training step: its perplexity beside that of the whole one.

SmolLM2-135M-Instruct, a Llama of 30 layers with 1536 FFN neurons and 3 key/value heads each. Every layer keeps the
same number of neurons, or of key/value heads with the query heads that read them; with `--widths free` all layers
together do, more where the model's outputs miss them most. Units stay by chance, norm,
activation, Fisher's score or OBS; the same units stand once with the next layers as they are and once with them
refitted by least squares (`slim(..., calibration=)`). The text is WikiText-2's validation file: perplexity is measured
on `--tokens` tokens of its second half, in windows of 512, behind the first 8,192: on those and with sequences of seed
0, which is not among the seeds here, it was chosen how refits weigh positions. 256 sequences of `--length` tokens
calibrate;
they come from another text, as told by `--calibration`: `instructions` (questions and answers of GSM8K and three kinds
of instructions, another domain than the test's) or `wikitext` (the first half of the file).

    python examples/benchmarks/pretrained_smollm2.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/benchmarks/pretrained_smollm2.py --cuts heads:0.667 --arms random obs --seeds 0
    python examples/benchmarks/pretrained_smollm2.py --cuts ffn:0.75 --arms obs --widths free --calibration wikitext
    python examples/benchmarks/pretrained_smollm2.py --table

Texts are looked for in `wikitext2`, `gsm8k` and `instructions` under HF_EFFDL_DATA; `--model` or HF_EFFDL_SMOLLM2 is
a model id or a folder. Rows go to `--out` as one JSON line per (cut, arm, refit, calibration, length, seed, widths);
rows that are there are skipped.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pretrained_arms import REFITS, SCORES, cell, sized, smaller
from rows import RowFile, machine, parser_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_effdl import Group, find_groups, slim
from hf_effdl.structure.slim.latency import measure_latency


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
MODEL = os.environ.get("HF_EFFDL_SMOLLM2", "HuggingFaceTB/SmolLM2-135M-Instruct")
CUTS = ("ffn:0.75", "ffn:0.5", "heads:0.667")
SEQUENCES, LENGTH, BATCH, WINDOW = 256, 128, 32, 512
LOOKED_AT = 8192  # tokens that choices were made on
KEYS = ("cut", "arm", "refit", "calibration", "length", "seed", "widths")


# ---- texts


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]


def wikitext() -> tuple[str, str]:
    """Both halves of the validation file; they meet at the head of an article."""
    file = DATA / "wikitext2" / "valid.txt"
    if not file.is_file():
        raise SystemExit(f"no file {file}: set HF_EFFDL_DATA")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    heads = [i for i, line in enumerate(lines) if line.startswith(" = ") and not line.startswith(" = =")]
    middle = min(heads, key=lambda i: abs(i - len(lines) // 2))
    return "".join(lines[:middle]), "".join(lines[middle:])


def instructions() -> str:
    """Questions with their answers, in an order that mixes the kinds."""
    lines = (DATA / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    for name in ("codegen", "roleplay", "toolformer"):
        found = json.loads((DATA / "instructions" / f"{name}.json").read_text(encoding="utf-8"))
        rows += ["\n".join(filter(None, map(row.get, ("instruction", "input", "response")))) for row in found]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return "\n\n".join(rows[i] for i in order[:4000])


def calibration(tokenizer: Any, source: str, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Sequences that start anywhere in the text, as batches; the model's own tokens are the labels."""
    text = tokens_of(tokenizer, wikitext()[0] if source == "wikitext" else instructions())
    starts = torch.randperm(len(text) // length, generator=torch.Generator().manual_seed(seed))[:SEQUENCES] * length
    rows = text[starts[:, None] + torch.arange(length)]
    return [{"input_ids": part, "labels": part} for part in rows.split(BATCH)]


# ---- what is measured


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean negative log likelihood of the next token, by window."""
    found = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1]
        found.append(nn.functional.cross_entropy(logits.float(), window[1:]))
    return torch.stack(found).double()


def compared(model: nn.Module, windows: Tensor, dense: Tensor) -> dict[str, float]:
    """Perplexity, its ratio to the dense model's, and the ratio's standard error over windows."""
    found = losses(model, windows)
    behind = found - dense
    ratio = math.exp(behind.mean())
    error = ratio * behind.std().item() / len(behind) ** 0.5 if len(behind) > 1 else 0.0
    return {"perplexity": math.exp(found.mean()), "ratio": ratio, "ratio error": error}


@torch.no_grad()
def speed(model: nn.Module, small: nn.Module, rows: Tensor, repeats: int = 5, tokens: int = 24) -> dict[str, float]:
    """Tokens per second, of reading 128 at once and of writing one after the other, beside the whole model's."""
    read = measure_latency([model, small], {"input_ids": rows}, repeats=repeats)
    wrote: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(repeats):
        for place, one in enumerate((model, small)):
            start = time.perf_counter()
            one.generate(input_ids=rows[:, :16], min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            wrote[place].append(time.perf_counter() - start)
    write = [min(wrote[place]) for place in (0, 1)]
    return {
        "read tokens/s": 1000 * rows.numel() / read[1],
        "read ratio": read[0] / read[1],
        "write tokens/s": tokens / write[1],
        "write ratio": write[0] / write[1],
    }


# ---- rows


def members(groups: Sequence[Group], model: nn.Module, cut: str) -> tuple[list[Group], float]:
    """The groups that a cut is of, and the share of their units that stays."""
    kind, _, share = cut.partition(":")
    units = {"ffn": model.config.intermediate_size, "heads": model.config.num_key_value_heads}
    if kind not in units:
        raise SystemExit(f"--cuts {cut}: a cut is ffn:SHARE or heads:SHARE")
    return sized(groups, units[kind]), float(share)


def run(options: Any, file: RowFile) -> None:
    """All rows that are missing."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = tokens_of(tokenizer, wikitext()[1])[LOOKED_AT:][: options.tokens]
    windows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    dense = losses(model, windows)
    if file.key_of({"arm": "dense"}) not in file:
        said = {"arm": "dense", "perplexity": math.exp(dense.mean()), "tokens": windows.numel()}
        said["precision"] = options.precision
        file.add(said | machine(), hide=("platform",))
    start = time.process_time()
    groups = find_groups(model, {"input_ids": windows[:1, :32]})
    looking = time.process_time() - start
    for seed in options.seeds:
        for cut, arm in ((cut, arm) for arm in options.arms for cut in options.cuts):
            key = {"cut": cut, "arm": arm, "calibration": options.calibration, "length": options.length, "seed": seed}
            key |= {"widths": "free"} if options.widths == "free" else {}  # rows of equal widths do not say so
            if any(file.key_of(key | {"refit": refit}) not in file for refit in REFITS):
                some, share = members(groups, model, cut)
                batches = calibration(tokenizer, options.calibration, options.length, seed)
                others = [group for group in groups if group not in some]
                start = time.process_time()
                pair = list(smaller(model, some, share, arm, batches, seed, others=others, widths=options.widths))
                seconds = round(looking + time.process_time() - start, 1)
                for small in pair:
                    found = compared(small.model, windows, dense) | small.facts | {"seconds": seconds}
                    file.add(key | {"refit": small.refit} | found, hide=("ridges",))
    for cut in options.cuts:
        row = {"cut": cut, "arm": "speed"}
        if file.key_of(row) not in file:
            some, share = members(groups, model, cut)
            file.add(row | speed(model, slim(model, some, share), windows[:1, :LENGTH]), hide=())


# ---- the table


def table(rows: list[dict]) -> None:
    """Means over seeds; seconds are the processor's, of looking for groups, choosing and refitting."""
    for row in rows:
        if row["arm"] == "dense":
            print(f"whole model: perplexity {row['perplexity']:.2f} on {row['tokens']:,} tokens\n")
    print("| kept | units by | 256 sequences of | as they are | refitted | ratio to the whole | seconds | seeds |")
    print("|---" * 8 + "|")
    fitted_rows = [row for row in rows if "length" in row]
    keys = [(row["cut"], row["arm"], source_of(row)) for row in fitted_rows]
    for cut, arm, source in sorted(dict.fromkeys(keys), key=lambda key: (order(key[0]), SCORES.index(key[1]), key[2])):
        mine = [row for row, key in zip(fitted_rows, keys, strict=True) if key == (cut, arm, source)]
        plain, fitted = ([row for row in mine if row["refit"] is refit] for refit in REFITS)
        texts = [cell([row["perplexity"] for row in some]) for some in (plain, fitted)]
        texts += [cell([row["ratio"] for row in fitted], 3), cell([row["seconds"] for row in fitted], 0)]
        print(f"| {cut} | {arm} | {source} | {' | '.join(texts)} | {len(fitted)} |")
    print("\n| kept | tokens read per second | ratio | tokens written per second | ratio |\n|---|---|---|---|---|")
    names = ("read tokens/s", "read ratio", "write tokens/s", "write ratio")
    for row in rows:
        if row["arm"] == "speed":
            print(f"| {row['cut']} | {' | '.join(f'{row[name]:.3g}' for name in names)} |")


def source_of(row: dict) -> str:
    """What calibrates, and how widths are chosen where they are not equal."""
    return f"{row['calibration']}, {row['length']} tokens" + (", free widths" if row.get("widths") == "free" else "")


def order(cut: str) -> tuple[str, float]:
    kind, _, share = cut.partition(":")
    return kind, -float(share)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "pretrained_smollm2")
    parser.add_argument("--model", default=MODEL, help="model id or folder; default: HF_EFFDL_SMOLLM2")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3), help="of the sequences that calibrate")
    parser.add_argument("--cuts", nargs="+", default=CUTS, help="ffn:SHARE or heads:SHARE")
    parser.add_argument("--arms", nargs="+", choices=SCORES, default=SCORES)
    parser.add_argument("--calibration", choices=("instructions", "wikitext"), default="instructions")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sequence that calibrates")
    parser.add_argument("--widths", choices=("stock", "free"), default="stock", help="equal in all layers, or not")
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest", help="medium: bf16 products")
    parser.add_argument("--tokens", type=int, default=16384, help="how many perplexity is measured on")
    options = parser.parse_args(arguments)
    if options.widths == "free" and "random" in options.arms:
        parser.error("--widths free goes by a score: leave random out of --arms")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)
    file = RowFile(options.out, KEYS)
    if not options.table:
        run(options, file)
    table(file.rows)


if __name__ == "__main__":
    main()
