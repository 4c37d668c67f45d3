"""Fine-tune a text classifier by LoRA, let the run choose the ranks, and save the smaller plain adapter.

    hf-effdl lora-ranks --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --dataset_name PolyAI/banking77 \\
        --eval_split test --output_dir runs/ranks --budget 0.25 --finetune_epochs 1

The adapter, its path, picture and card are in the output folder; `--push_to_hub` pushes them. PEFT alone loads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_effdl.cli.arguments import SPLIT_LBI, parse_arguments
from hf_effdl.cli.options import ModelDataOptions, check_share


DEFAULTS = {"base": "adamw", "num_train_epochs": 3, "save_strategy": "no", "report_to": "none"}


@dataclass(kw_only=True)
class LoraOptions(ModelDataOptions):
    """What is adapted, on which rows, and how much of the adapter is kept."""

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    rank: int = field(default=16, metadata={"help": "Of every module at the start; alpha is the same."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Ends of module names, as in LoraConfig."}
    )
    budget: float = field(default=0.25, metadata={"help": "Share of the adapter's parameters that is kept."})
    finetune_epochs: int = field(default=0, metadata={"help": "Epochs for the smaller adapter."})
    from_scratch = False

    def __post_init__(self) -> None:
        check_share("budget", self.budget)


def main(argv: Sequence[str] | None = None, **script: Any) -> None:
    script = {"description": __doc__, "prog": "hf-effdl lora-ranks"} | script
    options, args = parse_arguments(argv, LoraOptions, SPLIT_LBI, defaults=DEFAULTS, **script)
    from hf_effdl.cli.work.structure import lora_ranks

    lora_ranks(options, args)
