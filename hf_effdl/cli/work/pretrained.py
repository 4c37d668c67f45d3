"""A smaller checkpoint of one that is trained: by its path, or on calibration rows."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import create_repo, upload_folder
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_effdl.cli.arguments import UsageError
from hf_effdl.cli.work.cards import write_slim_card
from hf_effdl.cli.work.cost import Cost, rehearsal, seconds_each, size_of, tell
from hf_effdl.cli.work.data import check_column, load_any, load_tokenizer, split_of
from hf_effdl.files import filled_beside, locked
from hf_effdl.hub.cards import markdown_table
from hf_effdl.structure.groups.find import find_groups
from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.inputs import guess_inputs
from hf_effdl.structure.path.path import FILE_NAME as PATH_FILE
from hf_effdl.structure.path.path import SparsePath
from hf_effdl.structure.slim.batch_norm import recalibrate_batch_norm
from hf_effdl.structure.slim.slim import slim


# Passes over the calibration rows that it takes as long as: three through the layers, others to compare outputs, and
# what solving takes, which counts the more, the fewer the rows. On DINOv2-small it was 7.3 to 7.8 in processor time.
PASSES = (5, 10)
COLUMNS = {"input_ids": "text", "pixel_values": "image"}


def load_checkpoint(options: Any) -> PreTrainedModel:
    """The checkpoint in float32, as the class that it names."""
    config = AutoConfig.from_pretrained(options.model_name_or_path)
    name = options.model_class or next(iter(config.architectures or []), None)
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise ValueError(
            f"{options.model_name_or_path} names the class {name!r}, which transformers has not; set --model_class"
        )
    model = kind.from_pretrained(options.model_name_or_path, dtype=torch.float32).eval()
    return model.to(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else model


def load_rows(options: Any, column: str) -> list[Any]:
    """So many texts or images, drawn at random; empty lines of a text file are left out."""
    data = load_any(options.calibration, options.dataset_config)
    rows = split_of(data, options.calibration, options.split, "split")
    check_column(rows, options.calibration, column, "column")
    rows = rows.shuffle(seed=options.seed)
    found = (row for row in rows[column] if not isinstance(row, str) or row.strip())
    return list(islice(found, options.rows))


def batches(options: Any, model: PreTrainedModel, most: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """The rows as the model takes them."""
    name = model.main_input_name
    if name not in COLUMNS:
        raise ValueError(f"{type(model).__name__} reads {name!r}; this script knows {list(COLUMNS)}")
    rows = load_rows(options, options.column or COLUMNS[name])[:most]
    if name == "pixel_values":
        processor = AutoImageProcessor.from_pretrained(options.model_name_or_path)
    else:
        tokenizer = load_tokenizer(options.model_name_or_path)
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    for start in range(0, len(rows), options.batch_size):
        some = rows[start : start + options.batch_size]
        if name == "pixel_values":
            pictures = [image.convert(mode) for image in some]
            yield {name: processor(pictures, return_tensors="pt")[name]}
        else:
            cut = {"padding": True, "truncation": True, "max_length": options.max_length}
            found = tokenizer(some, return_tensors="pt", **cut)
            yield {name: found[name] for name in ("input_ids", "attention_mask")}


def on_its_device(batch: dict[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch where the model is."""
    return {name: value.to(model.device) for name, value in batch.items()}


def wanted(groups: list[Group], units: str) -> list[Group]:
    """All groups, or those of neurons, each of which is one row of a layer; a head is many."""
    neurons = [group for group in groups if all(part.block == 1 for part in group.slices if part.role == "row")]
    chosen = groups if units == "all" else neurons
    if not chosen:
        raise ValueError(f"the model has no group of {units}; set --units all")
    return chosen


def printed(report: dict[str, Any]) -> str:
    """The report of a slim model as a table."""
    names = {"params": "parameters", "macs": "multiply-accumulates", "latency_ms": "latency, ms"}
    rows = [{"what": text, **report[key]} for key, text in names.items()]
    if told := report.get("calibration"):
        rows.append({"what": f"error on {told['held_out']} held-out rows", "before": 0, "after": told["error"]})
        rows.append({"what": "the same without refits", "before": 0, "after": told["error_without"]})
    return markdown_table(rows, {"what": "", "before": "before", "after": "after", "ratio": "ratio"})


def slim_checkpoint(options: Any) -> None:
    """See the verb."""
    path = path_of(options)
    model = load_checkpoint(options)
    if options.dry_run:
        with rehearsal():
            tell("slim", _cost(options, model))
        return
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # what cannot be written to is told before the work
    calibration = [on_its_device(batch, model) for batch in batches(options, model)] if options.calibration else None
    small = _slimmed(options, model, path, calibration)
    if calibration:
        recalibrate_batch_norm(small, calibration)
    _save(small, options)
    print(f"\n{printed(small.config.effdl_report)}\n")
    is_stock = getattr(small.config, "quantization_config", None) is None
    needs = "nothing but transformers" if is_stock else "`import hf_effdl`"
    print(f"{options.output_dir} holds a {type(small).__name__}; loading it needs {needs}")
    if options.push_to_hub:
        repo_id = create_repo(options.push_to_hub, exist_ok=True).repo_id
        print(upload_folder(repo_id=repo_id, folder_path=options.output_dir, commit_message="A slim model"))


def path_of(options: Any) -> SparsePath | None:
    """The path that the checkpoint was trained with, where it is asked for or there.

    Raises:
        UsageError: for a budget or score that needs one where none is, or widths that need rows.
    """
    folder = Path(options.model_name_or_path)
    if (folder / PATH_FILE).is_file() and options.score in (None, "path"):
        return SparsePath.load(folder)
    if options.score == "path" or options.keep is None:
        asked = "--score path" if options.score == "path" else "--macs and --params"
        raise UsageError(
            f"{asked} go by a path, and {options.model_name_or_path} is no folder with {PATH_FILE}, as sparsify makes "
            "one: set --keep and another --score"
        )
    if options.widths == "free" and not options.calibration:
        raise UsageError("--widths free asks the model on rows what it can do without: set --calibration")
    return None


def _one(options: Any, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One row to count with: a picture of the size that the checkpoint's processor makes, else a guess."""
    found = guess_inputs(model)
    if set(found) != {"pixel_values"}:
        return found
    try:
        processor = AutoImageProcessor.from_pretrained(options.model_name_or_path)
    except OSError:  # the checkpoint came without one
        return found
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    pixels = processor([Image.new(mode, (64, 64))], return_tensors="pt")["pixel_values"]
    return on_its_device({"pixel_values": pixels}, model)


def _slimmed(
    options: Any, model: PreTrainedModel, path: SparsePath | None, calibration: list[dict[str, Any]] | None
) -> PreTrainedModel:
    example = {name: value[:1] for name, value in calibration[0].items()} if calibration else _one(options, model)
    groups = find_groups(model, example)
    if path is not None:
        round_to = options.round_to if options.round_to > 1 else None
        keep = path.select(**options.budget(), widths=options.widths, round_to=round_to)
        score, widths = None, "stock"  # the path has chosen
    else:
        keep = {group.name: float(options.keep) for group in wanted(groups, options.units)}
        score, widths = options.score, options.widths
    more = {"calibration": calibration, "score": score, "ridge": options.ridge, "round_to": options.round_to}
    return slim(model, groups, keep, example_inputs=example, widths=widths, **more)


def _save(small: PreTrainedModel, options: Any) -> None:
    """All of it or nothing: a run that is killed leaves no half of a checkpoint, and an earlier one as it was."""
    kind = AutoImageProcessor if small.main_input_name == "pixel_values" else AutoTokenizer
    try:
        processor = kind.from_pretrained(options.model_name_or_path)
    except OSError:  # the checkpoint came without one
        if options.calibration:
            raise
        processor = None
    with locked(options.output_dir):
        with filled_beside(options.output_dir) as folder:
            for part in filter(None, (small, processor)):
                part.save_pretrained(folder)
        write_slim_card(options.output_dir, options.model_name_or_path, options.calibration)


def _cost(options: Any, model: PreTrainedModel) -> Cost:
    """Of calibration, which takes nearly all of the time."""
    size = size_of(model)
    if not options.calibration:
        return Cost(0, size, ["no rows are read"])
    some = batches(options, model, 4 * options.batch_size)
    with torch.no_grad():
        each = seconds_each(some, lambda batch: model(**on_its_device(batch, model)))
    count = -(-options.rows // options.batch_size)
    least, most = (each * count * passes for passes in PASSES)
    passes = " to ".join(map(str, PASSES))
    told = (
        f"a batch of {options.batch_size} takes {each:.3g} s, and {count} with all that is solved {passes} times that"
    )
    return Cost(least, size, [told], most)
