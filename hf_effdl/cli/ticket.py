"""Find early in a run which units a net needs: the ticket, and the small net to train in place of the dense one.

    hf-effdl ticket --model_name_or_path microsoft/resnet-18 --dataset_name beans --macs 0.25 \\
        --output_dir runs/ticket --num_train_epochs 30
    hf-effdl ticket --config run.yaml --train True     # train the small net for the rest of the run, too

The run stops once the units that the budget keeps no longer change, `--within` a fifth of it at the latest. The ticket
is in `output_dir`, the small net to train in `output_dir`/small; with `--train` the trained small net is in
`output_dir`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_effdl.cli.arguments import UsageError
from hf_effdl.cli.options import TaskOptions, check_share, one_of_budgets
from hf_effdl.cli.sparsify import parse


@dataclass(kw_only=True)
class TicketOptions(TaskOptions):
    """What is looked for in which run."""

    from_scratch: bool = field(default=True, metadata={"help": "New weights, which a ticket is of."})
    macs: float | None = field(default=None, metadata={"help": "Share of the multiply-accumulates to keep."})
    params: float | None = field(default=None, metadata={"help": "Share of the parameters to keep."})
    keep: float | None = field(default=None, metadata={"help": "Share of every group's units to keep."})
    within: float = field(default=0.2, metadata={"help": "Share of the run after which it is taken at the latest."})
    at_epoch: float | None = field(default=None, metadata={"help": "Take it there, settled or not."})
    weights: str = field(
        default="step",
        metadata={"choices": ["step", "start"], "help": "Of the small net: where it was found, or the first ones."},
    )
    train: bool = field(default=False, metadata={"help": "Train the small net for the rest of the run."})

    def __post_init__(self) -> None:
        self.budget()
        check_share("within", self.within)
        if self.train and self.at_epoch is not None:
            raise UsageError("--at_epoch says where to take a ticket, and --train goes on by itself: leave one out")

    def budget(self) -> dict[str, float]:
        """The one that is set."""
        return one_of_budgets(macs=self.macs, params=self.params, keep=self.keep)


def main(argv: Sequence[str] | None = None) -> None:
    options, args = parse(argv, None, __doc__, TicketOptions, "hf-effdl ticket")
    from hf_effdl.cli.work.structure import ticket

    ticket(options, args)
