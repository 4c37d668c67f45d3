# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "peft>=0.21",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""LoRA ranks by the path on a language model: loss on worked answers to maths questions, beside other ways.

SmolLM2-135M (instruct) on GSM8K; LoRA on all linear layers of its blocks, rank 16. The loss is that of the answers'
tokens, on the first 300 test rows. The arms are those of `lora_arms.py`.

    python examples/benchmarks/lora_ranks_smollm2.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # hours on a CPU
    python examples/benchmarks/lora_ranks_smollm2.py --model FOLDER --steps 20 --rows 80 --test 32 --seeds 0
    python examples/benchmarks/lora_ranks_smollm2.py --table

GSM8K is looked for in `gsm8k/train.jsonl` and `test.jsonl` under HF_EFFDL_DATA. Rows go to `--out` as one JSON line
per (arm, budget, seed); rows that are there are skipped.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lora_arms import ARMS, KEYS, Task, add_rows, table
from rows import RowFile, machine, parser_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


DATA = Path(os.environ.get("HF_EFFDL_DATA", Path(__file__).parents[3] / "shared" / "data"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS, RANK, IGNORED = 256, 16, -100
RATES = (2e-3, 2e-3)
FEW = ["q_proj", "v_proj"]
BUDGETS = (0.25, 0.0625)


def read(split: str, count: int, tokenizer: Any, seed: int | None = None) -> list[dict[str, list[int]]]:
    """Questions with their answers as tokens; only the answers have labels. Drawn by a seed, or the first ones."""
    file = DATA / "gsm8k" / f"{split}.jsonl"
    if not file.is_file():
        raise SystemExit(f"no {file}: put GSM8K's {split}.jsonl there, or set HF_EFFDL_DATA")
    lines = file.read_text(encoding="utf-8").splitlines()
    rng = torch.Generator().manual_seed(seed or 0)
    places = range(len(lines)) if seed is None else torch.randperm(len(lines), generator=rng).tolist()
    rows = []
    for place in places[:count]:
        row = json.loads(lines[place])
        question = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = [*tokenizer(f" {row['answer']}")["input_ids"], tokenizer.eos_token_id]
        ids, labels = question + answer, [IGNORED] * len(question) + answer
        rows.append({"input_ids": ids[:TOKENS], "labels": labels[:TOKENS]})
    return rows


def collate(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": IGNORED}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    there = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(longest) < there[:, None]).long()}


@torch.no_grad()
def loss_of(model: nn.Module, rows: Sequence[dict], size: int = 16) -> float:
    """Mean over the answers' tokens."""
    model.eval()
    total, count = 0.0, 0
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), size):
        batch = collate(by_length[start : start + size])
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, count = total + model(**batch).loss.item() * tokens, count + tokens
    return total / count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "lora_ranks_smollm2")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id on the Hub, or a folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the ranks' parameters")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rows", type=int, default=800, help="of training")
    parser.add_argument("--test", type=int, default=300, help="rows that the loss is of")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest", help="medium: bf16 products")
    parser.add_argument("--rates", type=float, nargs=2, default=RATES, metavar=("LORA", "ADALORA"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)
    file = RowFile(options.out, KEYS)
    if not options.table:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        test = read("test", options.test, tokenizer)

        def base() -> nn.Module:
            return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

        def measure(model: nn.Module) -> dict[str, float]:
            return {"loss": loss_of(model, test)}

        for seed in options.seeds:
            rows, config = read("train", options.rows, tokenizer, seed), {"target_modules": TARGETS}
            settings = (collate, options.steps, tuple(options.rates), options.batch)
            task = Task(base, config, RANK, rows, *settings, measure, FEW)
            add_rows(task, options.arms, options.budgets, seed, file)
        print({name: machine()[name] for name in ("cpus", "threads", "torch", "date")})
    print(table(file.rows, "loss", digits=4))


if __name__ == "__main__":
    main()
