"""A pool of labelled examples: build it from a data set, add and remove rows, see what is in it.

    hf-effdl pool build --dataset_name EduardoPacheco/FoodSeg103 --label_column label --foreground 17 \\
        --encoder facebook/dinov2-base --output_dir runs/food
    hf-effdl pool add --pool runs/food --dataset_name more
    hf-effdl pool remove --pool runs/food --ids 3 17
    hf-effdl pool info --pool runs/food

A pool is a folder, or a data set repository that `--push_to_hub` made; only folders are changed. All processes of
`accelerate launch` share the encoding, and a build that was cut off goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_effdl.cli.arguments import LongOptions, Options, parse_arguments, which


@dataclass(kw_only=True)
class RowOptions(Options):
    """Which rows."""

    dataset_name: str = field(metadata={"help": "Data set id on the Hub, a folder, or one from save_to_disk."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    split: str = field(default="train", metadata={"help": "Split with the examples."})
    batch_size: int = field(default=32, metadata={"help": "Images encoded at once."})
    on_bad_row: str = field(
        default="raise", metadata={"choices": ["raise", "skip"], "help": "What to do with rows that cannot be used."}
    )


@dataclass(kw_only=True)
class BuildOptions(RowOptions, LongOptions):
    """Of which columns, and how they are read."""

    output_dir: str = field(metadata={"help": "Folder of the pool."})
    encoder: str = field(metadata={"help": "Vision encoder, id or folder."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with masks or boxes."})
    id_column: str | None = field(default=None, metadata={"help": "Column with the names of rows; default: numbers."})
    group_column: str | None = field(default=None, metadata={"help": "Column of what a row belongs to, as a video."})
    class_column: str | None = field(default=None, metadata={"help": "Column of what a row's object is."})
    task: str = field(
        default="segmentation",
        metadata={
            "choices": ["segmentation", "detection", "colourisation", "image-to-image"],
            "help": "What the labels are.",
        },
    )
    foreground: list[int] | None = field(default=None, metadata={"help": "Mask values of the object; default: not 0."})
    boxes: str | None = field(
        default=None, metadata={"choices": ["xyxy", "xywh"], "help": "Order of a box's numbers; default: xyxy."}
    )
    keep_grids: bool = field(default=False, metadata={"help": "Keep feature maps, which 'dense' compares."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push the pool to this data set repository."})


@dataclass(kw_only=True)
class AddOptions(RowOptions):
    """To which pool."""

    pool: str = field(metadata={"help": "Folder of the pool."})
    encoder: str | None = field(default=None, metadata={"help": "Default: the one that the pool names."})


@dataclass(kw_only=True)
class RemoveOptions(Options):
    """What is taken out of which pool."""

    pool: str = field(metadata={"help": "Folder of the pool."})
    ids: list[str] = field(metadata={"help": "Names of the rows."})


@dataclass(kw_only=True)
class InfoOptions(Options):
    """Which pool."""

    pool: str = field(metadata={"help": "Folder or repository of the pool."})


ACTIONS = {"build": BuildOptions, "add": AddOptions, "remove": RemoveOptions, "info": InfoOptions}


def main(argv: Sequence[str] | None = None) -> None:
    action, argv = which(argv, ACTIONS, __doc__, "hf-effdl pool")
    prog = f"hf-effdl pool {action}"
    (options,) = parse_arguments(argv, ACTIONS[action], description=ACTIONS[action].__doc__, prog=prog)
    from hf_effdl.cli.work import pools

    getattr(pools, action)(options)
