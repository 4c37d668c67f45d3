"""Choose the model of a family that is within some bounds, by its reports or measured here; prints its revision.

hf-effdl choose me/family --latency_ms 5
hf-effdl choose runs/family --macs 2000000000 --params 11000000
hf-effdl choose me/family --latency_ms 5 --device cpu
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_effdl.cli.arguments import Options, named_first, parse_arguments, refuse_several_processes


@dataclass(kw_only=True)
class ChooseOptions(Options):
    """Of which family, within which bounds."""

    family: str = field(metadata={"help": "Repository that `trainer.push_family` made, or a folder like it."})
    macs: float | None = field(default=None, metadata={"help": "At most so many multiply-accumulates of a row."})
    params: int | None = field(default=None, metadata={"help": "At most so many parameters."})
    latency_ms: float | None = field(default=None, metadata={"help": "At most so many milliseconds of a pass."})
    device: str | None = field(default=None, metadata={"help": "Measure that here, on this device."})
    revision: str | None = field(default=None, metadata={"help": "Of the repository; default: its main branch."})


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_arguments(
        named_first(argv, "family"), ChooseOptions, description=__doc__, prog="hf-effdl choose"
    )
    refuse_several_processes("choosing a model")
    from hf_effdl.structure.slim.family import choose

    bounds = {name: getattr(options, name) for name in ("macs", "params", "latency_ms")}
    print(choose(options.family, **bounds, device=options.device, revision=options.revision))
