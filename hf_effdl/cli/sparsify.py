"""Train a model with split LBI, take a smaller one along its path, fine-tune it, save or push both.

    hf-effdl sparsify --model_name_or_path microsoft/resnet-18 --from_scratch --dataset_name beans \\
        --output_dir runs/beans --num_train_epochs 20 --macs 0.5
    hf-effdl sparsify --task text-classification --model_name_or_path google-bert/bert-base-uncased \\
        --dataset_name banking77 --output_dir runs/banking --num_train_epochs 3 --macs 0.5
    accelerate launch -m hf_effdl.cli sparsify --config run.yaml --push_to_hub

Images, labelled texts or plain text, as `--task` or the checkpoint says. From pretrained weights the path starts
dense, with AdamW as its base for texts; with `--from_scratch` it starts empty. The smaller model is in
`output_dir`/slim. Several processes on a machine without a GPU need `--use_cpu`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_effdl.cli.arguments import SPLIT_LBI, UsageError, given, parse_arguments
from hf_effdl.cli.options import SCORES, TASKS, WIDTHS, TaskOptions, check_share


@dataclass(kw_only=True)
class SparsifyOptions(TaskOptions):
    """What is trained on what, and how small the result is."""

    macs: float = field(default=0.5, metadata={"help": "Share of the multiply-accumulates to keep, in (0, 1]."})
    widths: str = field(default="stock", metadata=WIDTHS)
    score: str = field(default="path", metadata={"choices": list(SCORES), "help": "Which units stay."})
    finetune_epochs: float | None = field(
        default=None, metadata={"help": "Of the smaller model; 0: none; default: 3 for images, 1 for texts."}
    )
    teacher_share: float | None = field(
        default=None, metadata={"help": "Of its loss then, in [0, 1]; default: 0 for images, 0.5 for texts."}
    )

    def __post_init__(self) -> None:
        check_share("macs", self.macs)

    def settle(self) -> None:
        """Fill in what depends on the task."""
        images = self.task == "image-classification"
        self.finetune_epochs = (3.0 if images else 1.0) if self.finetune_epochs is None else self.finetune_epochs
        self.teacher_share = (0.0 if images else 0.5) if self.teacher_share is None else self.teacher_share


KINDS = {"ForImageClassification": TASKS[0], "ForSequenceClassification": TASKS[1], "ForCausalLM": TASKS[2]}


def task_of(argv: Sequence[str]) -> str:
    """The task that is asked for, else the one that the checkpoint's class is for.

    Raises:
        UsageError: where neither says.
    """
    if (task := given(argv, "task")) is not None:
        return task
    if (name := given(argv, "model_name_or_path")) is None:
        return TASKS[0]  # and the parser says what is missing
    from transformers import AutoConfig

    classes = AutoConfig.from_pretrained(name).architectures or ["no class"]
    found = next((task for end, task in KINDS.items() if classes[0].endswith(end)), None)
    if found is None:
        raise UsageError(f"{name} holds a {classes[0]}, which may be trained for several tasks: set --task")
    return found


def parse(
    argv: Sequence[str] | None = None,
    task: str | None = None,
    description: str | None = __doc__,
    kind: type = SparsifyOptions,
    prog: str | None = "hf-effdl sparsify",
) -> tuple[Any, Any]:
    """The options and `SplitLBIArguments`; of a verb, or of a script that does one task."""
    import sys

    argv = sys.argv[1:] if argv is None else list(argv)
    asks = {"-h", "--help", "--help-all", "--help_all"} & set(argv)
    task = task or (None if asks else task_of(argv))
    defaults = {"task": task} | ({"base": "adamw"} if task in TASKS[1:] else {})
    return parse_arguments(argv, kind, SPLIT_LBI, description=description, defaults=defaults, prog=prog)


def main(argv: Sequence[str] | None = None, **script: Any) -> None:
    options, args = parse(argv, **script)
    options.settle()
    from hf_effdl.cli.work.structure import sparsify

    sparsify(options, args)
