"""Options as dataclasses: from the command line, else a YAML file, else their defaults; and the help on them.

Nothing here imports torch, so that help comes at once: a dataclass that needs it is named by a text, `"module:Name"`.
"""

import argparse
import dataclasses
import gc
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from textwrap import fill
from typing import Any, get_args

import yaml
from transformers import HfArgumentParser

from hf_effdl.launched import count_started, refuse_unstarted


TRAINING = "transformers:TrainingArguments"
SPLIT_LBI = "hf_effdl.structure.training.arguments:SplitLBIArguments"
GROWING = "hf_effdl.structure.growing.arguments:GrowingArguments"
OFTEN = "output_dir num_train_epochs max_steps learning_rate per_device_train_batch_size seed use_cpu bf16 report_to"
OFTEN += " save_strategy resume_from_checkpoint push_to_hub hub_model_id"


class UsageError(ValueError):
    """What was asked for is no command: an option that nobody knows."""


@dataclass(kw_only=True)
class Options:
    """The first option of every verb."""

    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of the arguments as `name: value`; the command line wins."}
    )


@dataclass(kw_only=True)
class LongOptions(Options):
    """The first options of a verb that can take long."""

    dry_run: bool = field(default=False, metadata={"help": "Say what time, memory and disk it takes; write nothing."})


class ConfigLoader(yaml.SafeLoader):
    """YAML in which a name stands once, and `no`, `on` or a date is the text that it looks like."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in pairs if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value).replace("-", "_") for key, _ in node.value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{self.name} sets {twice} more than once: leave one of the lines")
        return super().construct_mapping(node, deep)


# as the command line has them: `save_strategy: no` is a text, and an option of yes or no takes any of their words
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), "tTfF")


class Parser(HfArgumentParser):
    """One whose help shows the docstring as it stands, what is required, and every default that says something."""

    def __init__(self, kinds: Sequence[type], defaults: Mapping[str, Any], **settings: Any) -> None:
        self.others = defaults
        super().__init__(
            kinds, usage="%(prog)s [arguments]", formatter_class=argparse.RawDescriptionHelpFormatter, **settings
        )
        self.set_defaults(**defaults)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        default = self.others.get(names[0].lstrip("-"), settings.get("default"))
        if settings.get("action") == "store_false":
            settings["help"] = f"Not --{settings['dest']}."
        elif settings.get("required") and default is None:
            settings["help"] = f"{settings.get('help') or ''} (required)"
        elif settings.get("help") and default not in (None, False, [], argparse.SUPPRESS):
            settings["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **settings)


def config_file(argv: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(argv)[0].config


def read_config(argv: Sequence[str]) -> dict[str, Any]:
    """What the file of `--config` says, nothing without one.

    Raises:
        UsageError: it is not in UTF-8, no YAML of lines `name: value`, or says one name twice.
    """
    if (file := config_file(argv)) is None:
        return {}
    try:
        with file.open(encoding="utf-8") as lines:
            values = yaml.load(lines, ConfigLoader) or {}  # noqa: S506 - a SafeLoader
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not in UTF-8, save it as such: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers of any length, nesting without end
        raise UsageError(f"{file} is no YAML of lines `name: value`: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file} holds a {type(values).__name__}: write lines of `name: value`")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def is_given(argv: Sequence[str] | None, name: str) -> bool:
    """Whether the command line (default: this process's own) or the file of `--config` sets an argument."""
    argv = sys.argv[1:] if argv is None else argv
    options = tuple(f"--{spelling}" for spelling in (name, name.replace("_", "-")))
    on_the_line = any(text.partition("=")[0] in options for text in argv)
    return on_the_line or read_config(argv).get(name) is not None


def given(argv: Sequence[str], name: str) -> str | None:
    """What the command line or the file of `--config` sets an argument to, before anything else is read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest="value")
    value = parser.parse_known_args(argv)[0].value
    return read_config(argv).get(name) if value is None else value


def parse_arguments(
    argv: Sequence[str] | None,
    *kinds: type | str,
    description: str | None,
    defaults: Mapping[str, Any] | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """An object of every dataclass: from the command line, else the file of `--config`, else `defaults`, else its own.

    `--help` shows the options of the classes and names those of the texts in a line; `--help-all` shows them too.

    Args:
        argv: without the script's name; None: this process's own.
        kinds: dataclasses, or texts `"module:Name"` of such, in the order of the help: the script's own first.
        description: shown by `--help` above the arguments.
        defaults: of the script, for arguments of all kinds.
        prog: what the command is called in the help and in errors.

    Raises:
        UsageError: where the file sets a name that no dataclass has.
        ValueError: where this is one of several processes that do not know of each other, or fewer were started than
            asked for.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    defaults = dict(defaults or {})
    if {"-h", "--help"} & set(argv):
        _parser([kind for kind in kinds if not isinstance(kind, str)], description, prog, defaults, kinds).print_help()
        raise SystemExit(0)
    kinds = tuple(resolved(kind) for kind in kinds)
    values = read_config(argv)
    _check_names(values, kinds, argv)
    parser = _parser(kinds, description, prog, defaults)
    _check_empty(values, kinds, argv)
    parser.set_defaults(**{name: None for name, value in values.items() if value in (None, [])})
    *found, unknown = parser.parse_args_into_dataclasses(
        [*as_arguments(values), *argv], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(_unknown(unknown, argv, values, names_of(kinds)))
    for one in found:  # a text in its dataclass, where Trainer takes a folder or yes and no
        said = str(getattr(one, "resume_from_checkpoint", None)).lower()
        if said in ("true", "false"):
            one.resume_from_checkpoint = said == "true"
    refuse_unstarted()
    if any(hasattr(kind, "world_size") for kind in kinds):  # those of a Trainer; others make a group of their own
        from hf_effdl.processes import refuse_lone_processes

        refuse_lone_processes()
    return tuple(found)


def _parser(
    kinds: Sequence[type],
    description: str | None,
    prog: str | None,
    defaults: Mapping[str, Any],
    others: Sequence[type | str] = (),
) -> Parser:
    """A parser of some dataclasses; texts among `others` are named below the help."""
    known = names_of(kinds) if others else set(defaults)
    defaults = {name: value for name, value in defaults.items() if name in known}
    parser = Parser(kinds, defaults, description=description, prog=prog, allow_abbrev=False)
    texts = [kind.partition(":")[2] for kind in others if isinstance(kind, str)]
    if texts:
        often = ", ".join(f"--{name}" for name in OFTEN.split())
        parser.epilog = fill(f"and the {texts[0]} of a Trainer, shown by --help-all: {often}, ...", 100)
    trains = texts or any(hasattr(kind, "world_size") for kind in kinds)
    told = "show all options, also those of a Trainer" if trains else argparse.SUPPRESS
    parser.add_argument("--help-all", "--help_all", action="help", help=told)
    return parser


def resolved(kind: type | str) -> type:
    """A dataclass, imported where a text names it."""
    if not isinstance(kind, str):
        return kind
    module, _, name = kind.partition(":")
    return getattr(import_module(module), name)


def names_of(kinds: Sequence[type]) -> set[str]:
    """The options of some dataclasses, also by their other names."""
    fields = [item for kind in kinds for item in dataclasses.fields(kind) if item.init]
    others = {alias.lstrip("-").replace("-", "_") for item in fields for alias in item.metadata.get("aliases", ())}
    return {item.name for item in fields} | others


def _check_names(values: Mapping[str, Any], kinds: Sequence[type], argv: Sequence[str]) -> None:
    names = names_of(kinds) - {"config"}
    if unknown := sorted(set(values) - names):
        hint = _nearest(unknown[0], names)
        raise UsageError(f"{config_file(argv)} sets {unknown}, which this script does not know{hint}; see --help-all")


def _check_empty(values: Mapping[str, Any], kinds: Sequence[type], argv: Sequence[str]) -> None:
    """Refuse an empty value of what is never empty; a parser has resolved the types."""
    for item in (item for kind in kinds for item in dataclasses.fields(kind)):
        never = item.default is not dataclasses.MISSING and type(None) not in get_args(item.type)
        if never and item.default is not None and item.name in values and values[item.name] is None:
            raise UsageError(f"{config_file(argv)} says nothing after {item.name!r}: set it or drop the line")


def _unknown(unknown: Sequence[str], argv: Sequence[str], values: Mapping[str, Any], names: set[str]) -> str:
    """What is said of words that no option takes: an option that nobody knows, or too many values of one."""
    for name, value in values.items():
        if isinstance(value, list) and unknown[0] in map(_as_text, value[1:]):
            return f"{name!r} in the file of --config takes one value, not {value}"
    before = list(argv[: argv.index(unknown[0])]) if unknown[0] in argv else []
    option = next((word for word in reversed(before) if word.startswith("--")), None)
    if not unknown[0].startswith("-") and option is not None and option[2:].replace("-", "_") in names:
        count = len(before) - before.index(option) - 1
        return f"{option} takes {'one value' if count else 'no more'}: {' '.join(unknown)} is too much"
    hint = _nearest(unknown[0].partition("=")[0], [f"--{name}" for name in names])
    return f"unrecognized arguments: {' '.join(unknown)}{hint}"


def _nearest(text: str, names: Iterable[str]) -> str:
    near = get_close_matches(text, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def as_arguments(values: Mapping[str, Any]) -> Iterator[str]:
    """A file's values as they would stand on the command line; what is empty has no such form."""
    for name, value in values.items():
        if value in (None, []):
            continue
        if isinstance(value, list):
            yield from (f"--{name}", *map(_as_text, value))
        else:  # in one word, for what begins with a dash
            yield f"--{name}={_as_text(value)}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def which(
    argv: Sequence[str] | None, kinds: Mapping[str, Any], description: str | None, prog: str | None
) -> tuple[str, list[str]]:
    """The kind that the first argument names, and the other arguments.

    Raises:
        UsageError: for none, or an unknown one.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ("-h", "--help", "--help-all"):
        print(f"usage: {prog} {{{','.join(kinds)}}} [arguments]\n\n{description}")
        raise SystemExit(0)
    if not argv or argv[0] not in kinds:
        said = repr(argv[0]) if argv else "nothing"
        raise UsageError(f"say first what, one of {list(kinds)}, not {said}: see {prog} --help")
    return argv[0], argv[1:]


def named_first(argv: Sequence[str] | None, name: str) -> list[str]:
    """The arguments, with the name of an option in front of a first word that has none.

    Raises:
        UsageError: where the option is there as well.

    Example:
        >>> named_first(["runs/half", "--write"], "folder")
        ['--folder', 'runs/half', '--write']
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        return argv
    if any(word.partition("=")[0] == f"--{name}" for word in argv):
        raise UsageError(f"{argv[0]!r} and --{name} both say the {name}: leave one out")
    return [f"--{name}", *argv]


def refuse_several_processes(what: str) -> None:
    """Refuse a launcher's many processes where the work is one's.

    Raises:
        UsageError: in such a process.
    """
    refuse_unstarted()
    if (count := count_started()) > 1:
        raise UsageError(f"{count} processes were started, and {what} is the work of one: start it by itself")


def leave() -> None:
    """Ends the process group: its threads can abort the interpreter's exit, and a model in DDP holds them."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from accelerate import PartialState

    gc.collect()
    PartialState().destroy_process_group()
