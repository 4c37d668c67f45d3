"""`GrowingArguments`: the settings of a run that grows."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_effdl.checks import flag, real_number, whole_number
from hf_effdl.structure.growing.new_units import INITS
from hf_effdl.structure.path.path import WIDTHS
from hf_effdl.structure.training.arguments import SplitLBIArguments


@dataclass
class GrowingArguments(SplitLBIArguments):
    """`SplitLBIArguments` with the settings of growth.

    After each of `growth_rounds` equal parts of the first `growth_until` of the run, every group of which at least
    `growth_threshold` of the units are in the support grows from n to `max(n + growth_add, int(growth_ratio n))`.

    Args:
        growth_rounds: rounds of growth, at steps `round(max_steps growth_until i / growth_rounds)`.
        growth_until: share of the run in which the rounds take place, in (0, 1).
        growth_threshold: share of a group's units in the support from which it counts as saturated, in (0, 1].
        growth_add: new units at least, at saturation.
        growth_ratio: factor of growth, at least 1.
        growth_init: what the new units start with, see `widen`.
        growth_release: let go of the ridge after the last round (`nu` and `path_scale` times `RELEASE`), and give
            lifted tensors the weight decay of the others: the grown net then trains as with the plain base optimizer,
            and the order of its units goes on being recorded.
        growth_batch: training rows that `growth_init="gradmax"` looks at.
        growth_patience: rounds in a row without growth after which there are no more.
        max_macs: multiply-accumulates of one input row that growth must not pass; default: no bound.
        max_params: parameters that growth must not pass.
        max_width: units per group that growth must not pass.
        widths: `"stock"`: groups that one number of the config sizes grow together, by the share of all their units;
            `"free"`: every group alone, see `SplitLBITrainer.slim`.
        path_share: defaults to `growth_until / growth_rounds`, one path per round.
        growth_restart: begin anew after the last round: new weights, no momentum, and the whole learning rate schedule
            over the steps that are left. What a seed has learned late in a run costs the grown net more than it gives.

    Raises:
        ValueError: for a number out of range; for DeepSpeed or FSDP; for `load_best_model_at_end`, `save_only_model`,
            `save_strategy="best"`, `save_on_each_node` or `ignore_data_skip`, which cannot work across growth.
    """

    growth_rounds: int = field(default=2, metadata={"help": "Rounds of growth."})
    growth_until: float = field(default=0.1, metadata={"help": "Share of the run in which the rounds take place."})
    start: str | None = field(default="empty", metadata={"help": "Growth begins empty.", "choices": ["empty"]})
    growth_threshold: float = field(default=0.8, metadata={"help": "Support share of a saturated group."})
    growth_add: int = field(default=8, metadata={"help": "New units at least."})
    growth_ratio: float = field(default=3.0, metadata={"help": "Factor of growth."})
    growth_init: str = field(default="fresh-rows", metadata={"help": "What new units start with."})
    growth_release: bool = field(default=True, metadata={"help": "No ridge after the last round."})
    growth_batch: int = field(default=64, metadata={"help": "Training rows for growth_init='gradmax'."})
    growth_patience: int = field(default=2, metadata={"help": "Rounds without growth after which it stops."})
    max_macs: int | None = field(default=None, metadata={"help": "Bound on the MACs of one input row."})
    max_params: int | None = field(default=None, metadata={"help": "Bound on the parameters."})
    max_width: int | None = field(default=None, metadata={"help": "Bound on the units of a group."})
    widths: str = field(default="stock", metadata={"help": "'stock' or 'free'."})
    path_share: float | None = field(default=None, metadata={"help": "Default: growth_until / growth_rounds."})
    growth_restart: bool = field(default=False, metadata={"help": "New weights and schedule after the last round."})

    def __post_init__(self) -> None:
        self._check_growth()
        if self.path_share is None:
            self.path_share = self.growth_until / self.growth_rounds
        _refuse(self)
        if self.start != "empty":
            raise ValueError(
                f"start={self.start!r}: growing adds units where the support fills up, so it starts empty"
            )
        super().__post_init__()
        if self.save_strategy == SaveStrategy.BEST:
            raise ValueError(
                "save_strategy='best' would leave out the checkpoints that growth needs; use 'steps', 'epoch' or 'no'"
            )

    def _check_growth(self) -> None:
        for name in ("growth_rounds", "growth_add", "growth_batch", "growth_patience"):
            setattr(self, name, whole_number(name, getattr(self, name), 1))
        for name in ("max_macs", "max_params", "max_width"):
            value = getattr(self, name)
            if value is not None and not 0 < real_number(name, value) < float("inf"):
                raise ValueError(f"{name}={value!r}: it must be a positive number, or None for no bound")
        flag("growth_release", self.growth_release)
        flag("growth_restart", self.growth_restart)
        if not 0 < real_number("growth_until", self.growth_until) < 1:
            raise ValueError(
                f"growth_until={self.growth_until}: it is a share of the run, above 0 and below 1; what "
                "grows at the end is not trained any more"
            )
        if not 0 < real_number("growth_threshold", self.growth_threshold) <= 1:
            raise ValueError(f"growth_threshold={self.growth_threshold}: it is a share of units, in (0, 1]")
        if not 1 <= real_number("growth_ratio", self.growth_ratio) < float("inf"):
            raise ValueError(f"growth_ratio={self.growth_ratio}: it must be a finite factor, at least 1")
        for name, choices in (("growth_init", INITS), ("widths", WIDTHS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: it must be one of {choices}")

    def growth_steps(self, max_steps: int) -> list[int]:
        """The optimizer steps after which the rounds take place.

        Raises:
            ValueError: for a run with fewer steps than that takes.

        Example:
            >>> GrowingArguments("out", growth_rounds=4, growth_until=0.5).growth_steps(100)
            [12, 25, 38, 50]
        """
        steps = [
            round(max_steps * self.growth_until * i / self.growth_rounds) for i in range(1, self.growth_rounds + 1)
        ]
        if steps[0] < 1 or len(set(steps)) < len(steps) or steps[-1] >= max_steps:
            raise ValueError(
                f"growth_rounds={self.growth_rounds} do not fit into growth_until={self.growth_until} of a run of "
                f"{max_steps} steps; train longer, or with fewer rounds"
            )
        return steps


def _refuse(args: TrainingArguments) -> None:
    reasons = {
        "distill": "by default the teacher is the model at the start, the smallest of all; leave it off",
        "deepspeed": "DeepSpeed flattens the parameters, so there are no units to add to; use DDP",
        "fsdp": "FSDP shards parameters of fixed shapes, and a checkpoint of shards cannot be widened; use DDP",
        "load_best_model_at_end": "the best checkpoint may be of a smaller net than the one at the end, and its "
        "weights do not fit; load it with from_pretrained after training",
        "save_only_model": "growth reads the optimizer state in a checkpoint; leave it off",
        "save_on_each_node": "one process grows the checkpoint, so all nodes must see its folder; use a shared one",
        "ignore_data_skip": "every round goes on within an epoch, and would begin it anew; leave it off",
    }
    for name, reason in reasons.items():
        if getattr(args, name):
            raise ValueError(f"growing cannot work with {name}={getattr(args, name)!r}: {reason}")
