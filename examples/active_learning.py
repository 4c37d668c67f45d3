# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "datasets>=5.1",
#     "scikit-learn>=1.6",
#     "torch>=2.10",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Have rows labelled in rounds: the model says which, a person (or a column) says what they are.

    python examples/active_learning.py        # digits, labels from a column: strategies side by side
    python examples/active_learning.py --dataset_name texts.csv --input_column text --output_dir runs/labels \\
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --classes praise complaint question

The second writes `asked-0000.csv` into the output folder and ends. Fill in its column `label`, and run the same
command again: it reads the labels, trains, and writes the next file, until `--rounds` are done.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer

from hf_effdl import ActiveLearner, ColumnAnswers, CsvAnswers, LinearProbes
from hf_effdl.cli.arguments import Options, leave, parse_arguments, refuse_several_processes
from hf_effdl.cli.work.data import load_any
from hf_effdl.pictures import bare, figure, shades


@dataclass(kw_only=True)
class ScriptArguments(Options):
    """Which rows, which model, who answers."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Texts: a CSV file, or a data set; default: digits."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Encoder of the texts."})
    train_split: str = field(default="train", metadata={"help": "Split to label."})
    input_column: str = field(default="text", metadata={"help": "Column with the texts."})
    classes: list[str] = field(default_factory=list, metadata={"help": "Names of the classes."})
    strategies: list[str] = field(
        default_factory=lambda: ["default", "random", "margin"],
        metadata={"help": "To compare on digits; of texts the first counts."},
    )
    rounds: int = field(default=8, metadata={"help": "Rounds of labelling."})
    batch: int = field(default=20, metadata={"help": "Rows a round."})
    output_dir: Path = field(default=Path("runs/active"), metadata={"help": "Folder of the rounds."})
    seed: int = field(default=0, metadata={"help": "Of draws and of training."})


def label_texts(script: ScriptArguments) -> None:
    """Rounds with a person, each in a spreadsheet."""
    data = load_any(script.dataset_name)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    encoder = AutoModel.from_pretrained(script.model_name_or_path, dtype=torch.float32)
    options = {"processing_class": tokenizer, "input_column": script.input_column, "names": script.classes}

    def train(rows: Dataset, seed: int) -> LinearProbes:
        return LinearProbes.train(encoder, rows, seed=seed, **options)

    pool, answers = data[script.train_split], CsvAnswers(script.output_dir, [script.input_column])
    settings = {"batch": script.batch, "strategy": script.strategies[0], "seed": script.seed}
    learner = ActiveLearner(pool, train, answers, script.output_dir, **settings)
    if learner.run(script.rounds):
        learner.labelled.to_csv(script.output_dir / "labelled.csv")
        print(f"{len(learner.labelled)} labelled rows are in {script.output_dir / 'labelled.csv'}")


def compare_on_digits(script: ScriptArguments) -> None:
    """Learning curves of strategies, and their picture."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = Dataset.from_dict({"features": (x / 16).tolist(), "label": y.tolist()}).train_test_split(
        797, seed=script.seed
    )
    test = torch.tensor(data["test"]["label"][:])

    def train(rows: Dataset, seed: int) -> LinearProbes:
        names = [str(digit) for digit in range(10)]
        return LinearProbes.train(None, rows, input_column="features", names=names, steps=100, seed=seed)

    def accuracy(probes: LinearProbes) -> float:
        logits = torch.cat(list(probes.batches(data["test"], 256)))
        return (logits.softmax(2).mean(1).argmax(1) == test).double().mean().item()

    curves = {}
    for strategy in script.strategies:
        options = {"batch": script.batch, "strategy": strategy, "seed": script.seed, "evaluate": accuracy}
        options["embed"] = lambda rows: torch.tensor(rows["features"][:])
        folder = script.output_dir / strategy
        learner = ActiveLearner(data["train"], train, ColumnAnswers(), folder, **options)
        learner.run(script.rounds)
        curves[strategy] = learner.curve
        print(f"{strategy:12}" + " ".join(f"{size}: {score:.3f}" for size, score in learner.curve))
    plot(curves, script.output_dir / "curves.png")


def plot(curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    picture = figure(7, 4)
    axes = picture.subplots()
    bare(axes)
    for (name, curve), colour in zip(curves.items(), shades(len(curves)), strict=True):
        axes.plot(*zip(*curve, strict=True), "o-", ms=4, color=colour, label=name)
    axes.set(xlabel="labelled rows", ylabel="accuracy on rows held back")
    axes.set_title("What labels are worth, by who asks for them", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    picture.savefig(file)
    print(f"the picture is {file}")


def main(argv: list[str] | None = None) -> None:
    (script,) = parse_arguments(sys.argv[1:] if argv is None else argv, ScriptArguments, description=__doc__)
    refuse_several_processes("labelling in rounds")
    if script.dataset_name is None:
        compare_on_digits(script)
    elif script.model_name_or_path is None or not script.classes:
        raise ValueError("texts need --model_name_or_path and --classes")
    else:
        label_texts(script)


if __name__ == "__main__":
    main()
    leave()
