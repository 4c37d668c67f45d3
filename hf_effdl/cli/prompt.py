"""Predict for images by showing a frozen vision model the right labelled examples of a pool.

    hf-effdl prompt --images photo.jpg --model me/segment-food --output_dir runs/answers
    hf-effdl prompt --images photos --pool runs/food --model BAAI/seggpt-vit-large --strategy dense \\
        --output_dir runs/answers

`--model` is a pipeline that was saved or pushed, which knows its pool, or a frozen model: SegGPT, SAM 3, or any vision
encoder, which matches features. Masks are written as white on black, colours as pictures; `answers.json` says for
every image its prediction, the ids of the examples shown, best first, their scores and how sure the answer is;
`panel.png` shows the first images beside their examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_effdl.cli.arguments import LongOptions, parse_arguments, refuse_several_processes


@dataclass(kw_only=True)
class PromptOptions(LongOptions):
    """Which images, by which examples."""

    images: list[str] = field(metadata={"help": "Files, or folders of them."})
    model: str = field(metadata={"help": "Pipeline or frozen model, id on the Hub or folder."})
    output_dir: str = field(metadata={"help": "Gets predictions, answers.json and panel.png."})
    pool: str | None = field(default=None, metadata={"help": "Folder or repository; default: the pipeline's own."})
    strategy: str | None = field(
        default=None,
        metadata={
            "choices": ["random", "nearest", "static", "dense", "transfer", "cascade", "ranker", "auto"],
            "help": "How examples are chosen; default: as the model says.",
        },
    )
    num_examples: int = field(default=1, metadata={"help": "Examples shown for each image."})
    candidates: int | None = field(default=None, metadata={"help": "Nearest examples that the strategy ranks."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Ids of examples that are not to be shown."})
    batch_size: int = field(default=8, metadata={"help": "Images at a time."})
    shown: int = field(default=4, metadata={"help": "Images on the panel; 0: no panel."})


def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_arguments(argv, PromptOptions, description=__doc__, prog="hf-effdl prompt")
    refuse_several_processes("prompting")
    from hf_effdl.cli.work.answers import prompt

    prompt(options)
