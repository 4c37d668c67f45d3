"""Show the card of a folder that this package saved, or make it again from the folder's files.

hf-effdl card runs/half
hf-effdl card runs/pool --write
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_effdl.cli.arguments import Options, named_first, parse_arguments, refuse_several_processes


@dataclass(kw_only=True)
class CardOptions(Options):
    """Whose card."""

    folder: Path = field(metadata={"help": "A model, adapter, ticket, selection, pool or pipeline that was saved."})
    write: bool = field(default=False, metadata={"help": "Make it from the files; its own metadata are kept."})


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_arguments(named_first(argv, "folder"), CardOptions, description=__doc__, prog="hf-effdl card")
    refuse_several_processes("writing a card")
    from hf_effdl.cli.work.cards import show_or_write

    show_or_write(options.folder, options.write)
