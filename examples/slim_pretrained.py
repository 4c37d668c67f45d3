# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
#     "accelerate>=1.12",
#     "datasets>=5.1",
#     "torch>=2.9",
#     "transformers>=5.23,<6",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = ".." }
# ///

"""Make a pretrained transformer of the Hub smaller without training: some hundred rows, a minute, a stock checkpoint.

    python examples/slim_pretrained.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --dataset_name questions.txt --output_dir runs/half
    python examples/slim_pretrained.py --model_name_or_path facebook/dinov2-small --dataset_name beans \\
        --output_dir runs/half --rows 128
    python examples/slim_pretrained.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name questions.txt \\
        --output_dir runs/lean --keep 0.75

Every layer keeps that share of its FFN neurons, and the layer behind is refitted on the rows so that it does without
the others; so are the layers behind the heads, to make up for what is lost before them. The data set is a text file
with a row per line, a folder of images, a folder from `save_to_disk`, or an id on the Hub. A fifth of the rows is held
out; what is printed and stands in the checkpoint's config as `effdl_report` are parameters, multiply-accumulates and
latency of one row, and the relative squared error of the outputs on those.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from command_line import ConfigArguments, parse_arguments
from datasets import Dataset, DatasetDict, load_dataset
from image_script import load_any
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from hf_effdl import Group, find_groups, slim
from hf_effdl.hub.cards import markdown_table


COLUMNS = {"input_ids": "text", "pixel_values": "image"}


@dataclass(kw_only=True)
class ScriptArguments(ConfigArguments):
    """What is made smaller, and on which rows."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    dataset_name: str = field(metadata={"help": "Text file, folder, or data set id on the Hub."})
    output_dir: str = field(metadata={"help": "Folder of the smaller checkpoint."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(default="train", metadata={"help": "Split that the rows are drawn from."})
    column: str | None = field(default=None, metadata={"help": "Column of the rows; default: 'text' or 'image'."})
    model_class: str | None = field(default=None, metadata={"help": "Default: the class that the checkpoint names."})
    keep: float = field(default=0.5, metadata={"help": "Share of the units that stays, in (0, 1]."})
    units: str = field(
        default="neurons",
        metadata={"help": "What goes: neurons, or attention heads too.", "choices": ["neurons", "all"]},
    )
    score: str = field(
        default="activation", metadata={"help": "Which units stay.", "choices": ["magnitude", "activation", "obs"]}
    )
    ridge: float | None = field(default=None, metadata={"help": "Of the refits; default: chosen on held-out rows."})
    round_to: int = field(default=1, metadata={"help": "Numbers of units are multiples of this."})
    rows: int = field(default=512, metadata={"help": "How many rows."})
    batch_size: int = field(default=16, metadata={"help": "Rows of a forward pass."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    seed: int = field(default=0, metadata={"help": "Of the rows that are drawn."})


def load_model(script: ScriptArguments) -> PreTrainedModel:
    """The checkpoint in float32, as the class that it names."""
    config = AutoConfig.from_pretrained(script.model_name_or_path)
    name = script.model_class or next(iter(config.architectures or []), None)
    kind = getattr(transformers, name or "", None)
    if kind is None:
        raise ValueError(
            f"{script.model_name_or_path} names the class {name!r}, which transformers has not; set --model_class"
        )
    return kind.from_pretrained(script.model_name_or_path, dtype=torch.float32).eval()


def load_rows(script: ScriptArguments, column: str) -> list[Any]:
    """So many texts or images, drawn at random."""
    if Path(script.dataset_name).is_file():
        data = load_dataset("text", data_files=script.dataset_name).filter(lambda row: bool(row["text"].strip()))
    else:
        data = load_any(script.dataset_name, script.dataset_config)
    if isinstance(data, DatasetDict):
        if script.split not in data:
            raise ValueError(f"{script.dataset_name} has splits {list(data)}, not --split {script.split!r}")
        data = data[script.split]
    assert isinstance(data, Dataset)
    if column not in data.column_names:
        raise ValueError(f"{script.dataset_name} has columns {data.column_names}, not {column!r}; set --column")
    return data.shuffle(seed=script.seed).select(range(min(script.rows, len(data))))[column][:]


def batches(script: ScriptArguments, model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The rows as the model takes them."""
    if model.main_input_name not in COLUMNS:
        raise ValueError(f"{type(model).__name__} reads {model.main_input_name!r}; this script knows {list(COLUMNS)}")
    rows = load_rows(script, script.column or COLUMNS[model.main_input_name])
    if model.main_input_name == "pixel_values":
        processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for start in range(0, len(rows), script.batch_size):
        some = rows[start : start + script.batch_size]
        if model.main_input_name == "pixel_values":
            images = [image.convert("RGB") for image in some]
            yield {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        else:
            options = {"padding": True, "truncation": True, "max_length": script.max_length}
            found = tokenizer(some, return_tensors="pt", **options)
            yield {name: found[name] for name in ("input_ids", "attention_mask")}


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
    told = report["calibration"]
    rows.append({"what": f"error on {told['held_out']} held-out rows", "before": 0, "after": told["error"]})
    rows.append({"what": "the same without refits", "before": 0, "after": told["error_without"]})
    return markdown_table(rows, {"what": "", "before": "before", "after": "after", "ratio": "ratio"})


def main(argv: list[str] | None = None) -> None:
    (script,) = parse_arguments(sys.argv[1:] if argv is None else argv, ScriptArguments, description=__doc__)
    model = load_model(script)
    calibration = list(batches(script, model))
    example = {name: value[:1] for name, value in calibration[0].items()}
    groups = find_groups(model, example)
    keep = {group.name: float(script.keep) for group in wanted(groups, script.units)}
    options = {"score": script.score, "ridge": script.ridge, "round_to": script.round_to}
    small = slim(model, groups, keep, example_inputs=example, calibration=calibration, **options)
    small.save_pretrained(script.output_dir)
    kind = AutoImageProcessor if small.main_input_name == "pixel_values" else AutoTokenizer
    kind.from_pretrained(script.model_name_or_path).save_pretrained(script.output_dir)
    print(f"\n{printed(small.config.effdl_report)}\n")
    is_stock = getattr(small.config, "quantization_config", None) is None
    needs = "nothing but transformers" if is_stock else "`import hf_effdl`"
    print(f"{script.output_dir} holds a {type(small).__name__}; loading it needs {needs}")


if __name__ == "__main__":
    main()
