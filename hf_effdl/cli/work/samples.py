"""Rows worth training on: select and score."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, DatasetDict, Image, concatenate_datasets
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    set_seed,
)

from hf_effdl.cli.work.cost import Cost, evaluation_cost, rehearsal, seconds_each, tell, training_cost
from hf_effdl.cli.work.data import accuracy, labels_of, load_splits, load_tokenizer, named_splits, padded_by
from hf_effdl.files import filled_beside, locked, sweep, write_whole
from hf_effdl.processes import is_first, together
from hf_effdl.samples.probes.linear_probes import LinearProbes
from hf_effdl.samples.probes.probes import Probes
from hf_effdl.samples.probes.trained_probes import train_probes
from hf_effdl.samples.scale.score_shards import score_shards
from hf_effdl.samples.scale.scorers import ProbeScorer
from hf_effdl.samples.scale.sources import reader
from hf_effdl.samples.selection.selector import UncertaintySelector
from hf_effdl.weighting import WeightedTrainer


@dataclass
class Source:
    """How rows of one data set are fed to models of one kind."""

    options: Any
    column: str
    images: bool
    labels: dict[str, dict]

    @classmethod
    def of(cls, data: DatasetDict, options: Any) -> "Source":
        return cls(options, *find_input(data["train"], options), labels_of(data, options))

    def processor(self) -> Any:
        load = AutoImageProcessor.from_pretrained if self.images else load_tokenizer
        return load(self.options.model_name_or_path)

    def backbone(self) -> torch.nn.Module:
        return AutoModel.from_pretrained(self.options.model_name_or_path, dtype=torch.float32)

    def classifier(self) -> torch.nn.Module:
        """In single precision whatever the checkpoint has: images come in it, and layers want both alike."""
        kind = AutoModelForImageClassification if self.images else AutoModelForSequenceClassification
        name = self.options.model_name_or_path
        model = kind.from_pretrained(name, ignore_mismatched_sizes=True, dtype=torch.float32, **self.labels)
        return model if self.images else padded_by(self.processor(), model)

    def collator(self) -> Callable[[list[dict]], dict[str, Any]]:
        processor, label = self.processor(), self.options.label_column

        def collate(rows: list[dict]) -> dict[str, Any]:
            values = [row[self.column] for row in rows]
            if self.images:
                batch = dict(processor([value.convert("RGB") for value in values], return_tensors="pt"))
            else:
                batch = dict(processor(values, padding=True, truncation=True, return_tensors="pt"))
            batch["labels"] = torch.tensor([row[label] for row in rows])
            if "weight" in rows[0]:
                batch["weight"] = torch.tensor([row["weight"] for row in rows])
            return batch

        return collate

    def for_probes(self, seed: int) -> dict[str, Any]:
        """Arguments of what trains probes."""
        found = {"label_column": self.options.label_column, "num_probes": self.options.num_probes, "seed": seed}
        return found | {"processing_class": self.processor(), "input_column": self.column}


def find_input(rows: Dataset, options: Any) -> tuple[str, bool]:
    """The input column, and whether it holds images."""
    kinds = {
        name: isinstance(feature, Image)
        for name, feature in rows.features.items()
        if isinstance(feature, Image) or getattr(feature, "dtype", None) in ("string", "large_string")
    }
    name = options.input_column or next(iter(sorted(kinds, key=lambda name: not kinds[name])), None)
    if name not in kinds:
        raise ValueError(
            f"no column with images or texts ({name!r} asked for) among {rows.features}; set --input_column"
        )
    return name, kinds[name]


def encoding_cost(source: Source, rows: Dataset, count: int, batch_size: int) -> Cost:
    """Of the backbone's features of so many rows, by some of them."""
    collate, device = source.collator(), Accelerator(cpu=not torch.accelerator.is_available()).device
    backbone = source.backbone().to(device).eval()
    size = min(batch_size, len(rows))
    starts = range(0, len(rows) - size + 1, size)

    def encode(start: int) -> None:
        batch = collate([rows[i] for i in range(start, start + size)])
        with torch.no_grad():
            backbone(**{name: value.to(device) for name, value in batch.items() if name != "labels"})

    each = seconds_each(starts, encode)
    return Cost(each / size * count, 0, [f"{count} rows to encode, {size} took {each:.3g} s"])


# ---- select


def select(options: Any, args: Any) -> None:
    """See the verb."""
    set_seed(args.seed)
    args.remove_unused_columns = False  # the collator reads columns that the model does not know
    PartialState()  # joins the other processes, if there are any
    if options.dry_run:
        with rehearsal(args):
            tell("select", _select_cost(options, args))
        return
    data = load_splits(options, args.seed)
    source, data = Source.of(data, options), split_off_probes(data, options, args.seed)
    out = Path(args.output_dir)
    if is_first():
        told = f"{len(data['probe'])} rows train the probes, {len(data['pool'])} are scored"
        print(f"{told}: each is encoded once, and a bar says how long that takes", flush=True)
    selector = UncertaintySelector(
        _probes(source, data["probe"], options, args),
        options.label_column,
        preset=options.preset,
        seed=args.seed,
        cache_dir=out / "scores",
        source=None if Path(options.dataset_name).exists() else options.dataset_name,  # no path goes into a card
        batch_size=args.per_device_eval_batch_size,
    )
    subset = selector.select(data["pool"], options.budget if options.budget <= 1 else int(options.budget))
    if is_first():
        print(selector.report(), flush=True)
        _save_selected(selector, subset, out)
        print(f"{len(subset)} rows with their weights are in {out / 'rows'}: datasets.load_from_disk reads them")
    if options.train or options.compare:
        _compare(source, data, subset, options, args, out)
    if options.push_selection and is_first():
        print(selector.selection.push_to_hub(options.push_selection))


def _save_selected(selector: UncertaintySelector, subset: Dataset, out: Path) -> None:
    """Report, selection and rows of one run, never of two; the rows last, and a run that is killed leaves none."""
    with locked(out, ".lock-select"):
        (out / "rows" / "state.json").unlink(missing_ok=True)  # without which no rows are loaded
        selector.report().save(out / "report")
        selector.selection.save(out / "selection", card=True)
        with locked(out / "rows"), filled_beside(out / "rows") as folder:
            subset.save_to_disk(folder)


def split_off_probes(data: DatasetDict, options: Any, seed: int) -> DatasetDict:
    """The data set as `{"probe", "pool", "eval"}`; every class has its share of the probe rows."""
    parts = data["train"].train_test_split(
        test_size=options.probe_share, seed=seed, stratify_by_column=options.label_column
    )
    return DatasetDict(probe=parts["test"], pool=parts["train"], eval=data["eval"])


def _probes(source: Source, rows: Dataset, options: Any, args: Any) -> Probes:
    common = source.for_probes(args.seed)
    if options.probes == "linear":
        return LinearProbes.train(source.backbone(), rows, **common)
    output_dir, args.output_dir = args.output_dir, str(Path(args.output_dir, "probes"))
    try:
        return train_probes(source.classifier, args, rows, **common)
    finally:
        args.output_dir = output_dir


def _weighted_trainer(source: Source, rows: Dataset, test: Dataset, args: Any) -> WeightedTrainer:
    set_seed(args.seed)
    weighted = rows if "weight" in rows.column_names else rows.add_column("weight", [1.0] * len(rows))
    return WeightedTrainer(
        source.classifier(),
        args,
        data_collator=source.collator(),
        train_dataset=weighted,
        eval_dataset=test,
        processing_class=source.processor(),
        compute_metrics=accuracy,
    )


def _compare(source: Source, data: DatasetDict, subset: Dataset, options: Any, args: Any, out: Path) -> None:
    """Train on the selected rows, and on as many random ones where asked."""
    plan = {"selected": subset}
    if options.compare:
        plan["random"] = data["pool"].shuffle(seed=args.seed).select(range(len(subset)))
    results = {}
    for name, rows in plan.items():
        args.output_dir = str(out / name)
        trainer = _weighted_trainer(source, rows, data["eval"], args)
        trainer.train()
        results[name] = trainer.evaluate()
        trainer.save_model()
    if is_first():
        for name, metrics in results.items():
            print(f"{name} rows: accuracy {metrics['eval_accuracy']:.4f}, loss {metrics['eval_loss']:.4f}")


def _select_cost(options: Any, args: Any) -> Cost:
    data = load_splits(options, args.seed)
    source, data = Source.of(data, options), split_off_probes(data, options, args.seed)
    pool = data["pool"]
    cost = encoding_cost(source, pool, len(pool) + len(data["probe"]), args.per_device_eval_batch_size)
    if options.probes == "trained":
        part = training_cost(_weighted_trainer(source, data["probe"], data["eval"], args))
        told = [*part.how, f"{options.num_probes} probes"]
        cost = Cost(cost.seconds * options.num_probes, 0, cost.how)
        cost += Cost(part.seconds * options.num_probes, part.disk * options.num_probes, told)
    runs = bool(options.train or options.compare) + bool(options.compare)
    share = options.budget if options.budget <= 1 else options.budget / len(pool)
    rows = pool.select(range(max(1, round(share * len(pool)))))
    if runs:
        trainer = _weighted_trainer(source, rows, data["eval"], args)
        part = training_cost(trainer) + evaluation_cost(trainer, 1)
        cost += Cost(part.seconds * runs, part.disk * runs, [*part.how, f"{runs} trainings"])
    return cost + Cost(0, 100 * len(pool) + _stored(rows))  # scores of a row are a dozen numbers


def _stored(rows: Dataset) -> float:
    """Bytes that rows take in a folder, by some of them."""
    few = rows.select(range(min(len(rows), 64)))
    with tempfile.TemporaryDirectory() as folder:
        few.save_to_disk(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir()) / len(few) * len(rows)


# ---- score


def score(options: Any) -> None:
    """See the verb."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    if options.dry_run:
        with rehearsal():
            tell("score", _score_cost(options))
        return
    data = named_splits(options, ("label_column",))
    source = Source.of(data, options)
    probe_rows, others = _probe_rows(data["train"], options)
    probes = LinearProbes.train(source.backbone(), probe_rows, **source.for_probes(options.seed))
    label = options.label_column if options.labelled else None
    if options.files:
        scorer = ProbeScorer(probes, label, batch_size=options.batch_size)
        how = {"id_column": options.id_column, "batch_rows": options.batch_rows}
        found = score_shards(options.files, options.output_dir, scorer, **how)
        if state.is_main_process:
            rows = sum(one["rows"] for one in found["outputs"])
            print(f"scores of {rows} rows in {len(found['outputs'])} tables in {options.output_dir}")
        return
    mode = "coreset" if options.labelled else "active"
    selector = UncertaintySelector(probes, options.label_column, mode, batch_size=options.batch_size)
    scored = selector.score(others)
    if state.is_main_process:
        table = scored.remove_columns([name for name in others.column_names if name != "row_id"])
        file = Path(options.output_dir, "scores.parquet")
        with locked(file.parent):
            sweep(file.parent, file.name)
            write_whole(file, table.to_parquet)
        print(f"scores of {len(table)} rows in {file}; row_id is their place in {options.train_split!r}")
    together()


def _probe_rows(rows: Dataset, options: Any) -> tuple[Dataset, Dataset]:
    """Rows that train the probes, and the others; `row_id` is the place of a row in the split."""
    count = min(options.probe_rows, len(rows) // 2)
    if count < options.probe_rows:
        warnings.warn(f"{len(rows)} rows: half of them, {count}, train the probes", stacklevel=2)
    if "row_id" not in rows.column_names:
        rows = rows.add_column("row_id", list(range(len(rows))))
    parts = rows.shuffle(seed=options.seed)
    classes = {int(label): place for place, label in enumerate(parts[options.label_column])}
    first = parts.select(range(count))
    if missing := set(classes) - set(first[options.label_column]):
        named = [classes[label] for label in sorted(missing)]
        rest = sorted(set(range(count, len(parts))) - set(named))
        return concatenate_datasets([first, parts.select(named)]), parts.select(rest).sort("row_id")
    return first, parts.select(range(count, len(parts))).sort("row_id")


def _score_cost(options: Any) -> Cost:
    data = named_splits(options, ("label_column",))
    source, rows = Source.of(data, options), data["train"]
    count = len(rows)
    if options.files:
        count = min(options.probe_rows, len(rows) // 2) + sum(_rows_of(options.files))
    cost = encoding_cost(source, rows, count, options.batch_size)
    return cost + Cost(0, 100 * count)


def _rows_of(files: list[str]) -> Iterator[int]:
    for file in files:
        with reader(file) as opened:
            yield opened.metadata.num_rows
