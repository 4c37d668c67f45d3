"""What the example scripts share: arguments from the command line and a file, and one run where one was asked for."""

import argparse
import dataclasses
import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import HfArgumentParser, TrainingArguments

from hf_effdl.processes import refuse_lone_processes


@dataclass(kw_only=True)
class ConfigArguments:
    """The first argument of every example."""

    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of the arguments as `name: value`; the command line wins."}
    )


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and every default."""


def config_file(argv: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(argv)[0].config


def read_config(argv: Sequence[str]) -> dict[str, Any]:
    """What the file of `--config` says, nothing without one."""
    file = config_file(argv)
    return {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def is_given(argv: Sequence[str], name: str) -> bool:
    """Whether the command line or the file of `--config` sets an argument."""
    options = tuple(f"--{spelling}" for spelling in (name, name.replace("_", "-")))
    on_the_line = any(text.partition("=")[0] in options for text in argv)
    return on_the_line or read_config(argv).get(name) is not None


def parse_arguments(
    argv: Sequence[str], *kinds: type, description: str | None, defaults: Mapping[str, Any] | None = None
) -> tuple[Any, ...]:
    """An object of every dataclass: from the command line, else the file of `--config`, else `defaults`, else its own.

    Args:
        argv: without the script's name.
        kinds: dataclasses, in the order of the help: the script's own first.
        description: shown by `--help` above the arguments.
        defaults: of the script, for arguments of all kinds.

    Raises:
        ValueError: where the file sets a name that no dataclass has, or this is one of several processes that do not
            know of each other.
    """
    parser = HfArgumentParser(
        kinds, description=description, usage="%(prog)s [arguments]", formatter_class=Help, allow_abbrev=False
    )
    values = read_config(argv)
    names = {item.name for kind in kinds for item in dataclasses.fields(kind) if item.init} - {"config"}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"{config_file(argv)} sets {unknown}, which this script does not know; see --help")
    parser.set_defaults(**(defaults or {}), **{name: None for name, value in values.items() if value in (None, [])})
    *found, unknown = parser.parse_args_into_dataclasses(
        [*as_arguments(values), *argv], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if any(issubclass(kind, TrainingArguments) for kind in kinds):  # other scripts make a group of their own
        refuse_lone_processes()
    return tuple(found)


def as_arguments(values: Mapping[str, Any]) -> Iterator[str]:
    """A file's values as they would stand on the command line; what is empty has no such form."""
    for name, value in values.items():
        if value in (None, []):
            continue
        yield f"--{name}"
        for part in value if isinstance(value, list) else [value]:
            yield part if isinstance(part, str) else json.dumps(part)


def leave() -> None:
    """Ends the process group: its threads can abort the interpreter's exit, and a model in DDP holds them."""
    gc.collect()
    PartialState().destroy_process_group()
