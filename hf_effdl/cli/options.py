"""What several verbs ask for."""

from dataclasses import dataclass, field

from hf_effdl.cli.arguments import LongOptions, Options, UsageError


TASKS = ("image-classification", "text-classification", "text-generation")
SCORES = ("path", "magnitude", "activation", "obs", "fisher")
INPUT = {
    "aliases": ["--text_column", "--image_column"],  # as the verbs say that train on one of them
    "help": "Images or texts; default: the first such.",
}
WIDTHS = {"choices": ["stock", "free"], "help": "Sizes of the stock config, or any (loading needs hf_effdl)."}


@dataclass(kw_only=True)
class ModelDataOptions(LongOptions):
    """Which model, on which rows."""

    model_name_or_path: str = field(metadata={"help": "Model id on the Hub, or a folder."})
    dataset_name: str = field(
        metadata={"help": "Id on the Hub, a folder, one from save_to_disk, or a file: CSV, JSON, Parquet, text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    label_column: str = field(default="label", metadata={"help": "Column with the class labels."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on; default: 10%% of train."})


@dataclass(kw_only=True)
class ImageOptions(ModelDataOptions):
    """The same, of images."""

    image_column: str = field(default="image", metadata={"help": "Column with the images."})


@dataclass(kw_only=True)
class TaskOptions(ImageOptions):
    """The same, of any task that a model is trained for."""

    task: str | None = field(
        default=None, metadata={"choices": list(TASKS), "help": "What to train; default: as the checkpoint says."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the texts."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    from_scratch: bool = field(default=False, metadata={"help": "Use the model's config with new weights."})


@dataclass(kw_only=True)
class PoolOptions(Options):
    """What is shown to which frozen model."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set id on the Hub, a folder, or one from save_to_disk."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    pool_split: str = field(default="train", metadata={"help": "Split that examples are chosen from."})
    query_split: str | None = field(
        default=None, metadata={"help": "Split of the queries; default: test, validation, or 10%% of the pool's."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    label_column: str = field(default="label", metadata={"help": "Column with masks or boxes."})
    foreground: list[int] | None = field(default=None, metadata={"help": "Mask values of the object; default: not 0."})
    task: str = field(
        default="segmentation",
        metadata={
            "choices": ["segmentation", "detection", "colourisation", "image-to-image"],
            "help": "What the labels are.",
        },
    )
    model: str = field(default="BAAI/seggpt-vit-large", metadata={"help": "SegGPT, or an encoder for matching."})
    encoder: str | None = field(default=None, metadata={"help": "Of the pool; default: the model's own features."})
    candidates: int = field(default=50, metadata={"help": "Nearest examples that a strategy ranks."})
    label_budget: int | None = field(default=None, metadata={"help": "Pool images to measure on; default: all."})
    max_pool: int | None = field(default=None, metadata={"help": "Use at most so many examples."})
    max_queries: int | None = field(default=None, metadata={"help": "Predict at most so many images."})


def check_share(name: str, value: float | None) -> None:
    """Refuse what is no share of a whole."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"--{name} {value}: it must be a share of the whole model, in (0, 1]")


def one_of_budgets(**budgets: float | None) -> dict[str, float]:
    """The one budget that is given.

    Raises:
        UsageError: for none or several.
        ValueError: for one that is no share.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        names = " or ".join(f"--{name}" for name in budgets)
        raise UsageError(f"set one budget, {names}; these are {given or 'none'}")
    for name, value in given.items():
        check_share(name, value)
    return given
