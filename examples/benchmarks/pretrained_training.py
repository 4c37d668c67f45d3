"""Fine-tuning a classifier from pretrained weights: plainly, or in a way that presses units out as it goes.

    plain          AdamW
    lasso          AdamW and, after every step, the prox of a group lasso on whole units, rows and columns
    path           `SplitLBI` from a dense start; units stay by when they leave
    path, OBS      the same; the threshold of a unit rises the faster, the less its leaving costs at the start
    path, Fisher   the same by the first-order change of the loss at the start, when the head is fresh
    path, refit    the path; at the end of every epoch the layers behind units that have left are refitted

The ridge weighted by the Gram has no arm: it takes a coupling per unit, which `SplitLBI` does not have.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl import SparsePath, SplitLBI, derive_path
from hf_effdl.structure.calibration.compensate import Wish, compensate, unit_scores
from hf_effdl.structure.groups.group import Group, rows_of
from hf_effdl.structure.training.distill import distillation_terms


BATCH = 32
STRENGTH = 0.5  # of the lasso, summed over the run, in mean initial norms of a unit
SPREAD = 3.0  # by which the threshold of the cheapest unit rises faster than at the mean, and of the dearest slower


class Plain:
    """AdamW, and nothing else.

    Args:
        groups: whose units are pressed out; here none are.
        calibration: batches.
    """

    def __init__(self, groups: Sequence[Group] = (), calibration: Sequence[Any] = ()) -> None:
        self.groups, self.calibration = groups, calibration

    def start(self, model: nn.Module, rates: tuple[float, float], shares: Sequence[float]) -> torch.optim.Optimizer:
        """The optimizer of a run of so many steps, with rates of the encoder and of the head."""
        self.model, self.rates, self.shares = model, rates, shares
        head = {id(p) for p in model.head.parameters()}
        body = [p for p in model.parameters() if id(p) not in head]
        return torch.optim.AdamW(
            [{"params": body, "lr": rates[0]}, {"params": model.head.parameters(), "lr": rates[1]}], weight_decay=0.01
        )

    def after_step(self, step: int) -> None:
        """What is done to the weights besides."""

    def after_epoch(self) -> None:
        """The same, seldom."""

    def scores(self) -> dict[str, Tensor]:
        """What every unit is worth in the end, by group."""
        return {group.name: group.norm(self.model) for group in self.groups}


class Lasso(Plain):
    """`unit <- unit max(0, 1 - t / ||unit||)` after every step, over a unit's rows and columns.

    Every tensor is divided by its mean initial norm per unit; t adds up to `STRENGTH` over the run.
    """

    def start(self, model: nn.Module, rates: tuple[float, float], shares: Sequence[float]) -> torch.optim.Optimizer:
        self.scales = {
            (group.name, part): self._rows(model, group, part).norm(dim=1).mean()
            for group in self.groups
            for part in self._parts(group)
        }
        return super().start(model, rates, shares)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        threshold = STRENGTH * self.shares[step] / sum(self.shares)
        for group in self.groups:
            parts = self._parts(group)
            squares = [
                (self._rows(self.model, group, part).norm(dim=1) / self.scales[group.name, part]).square()
                for part in parts
            ]
            share = (1 - threshold / sum(squares).sqrt().clamp_min(1e-12)).clamp_min(0)
            for part in parts:
                p = self.model.get_parameter(part.tensor)
                shape = [-1 if axis == part.axis else 1 for axis in range(p.ndim)]
                there = p.narrow(part.axis, part.start, group.units * part.block)
                there.mul_(share.repeat_interleave(part.block).view(shape))

    @staticmethod
    def _parts(group: Group) -> list[Any]:
        return [part for part in group.slices if part.role in ("row", "input")]

    @staticmethod
    def _rows(model: nn.Module, group: Group, part: Any) -> Tensor:
        return rows_of(model.get_parameter(part.tensor), part, group.units)


class Path(Plain):
    """`SplitLBI` from a dense start.

    Args:
        score: by which thresholds rise; None: all of a group alike.
        refits: whether the layers behind units that have left are refitted after every epoch.
    """

    def __init__(
        self,
        groups: Sequence[Group] = (),
        calibration: Sequence[Any] = (),
        score: str | None = None,
        refits: bool = False,
    ) -> None:
        super().__init__(groups, calibration)
        self.score, self.refits = score, refits

    def start(self, model: nn.Module, rates: tuple[float, float], shares: Sequence[float]) -> torch.optim.Optimizer:
        super().start(model, rates, shares)
        lifted = [group.param_group(model) | {"weight_decay": 0.0} for group in self.groups]
        for group, values in zip(lifted, self._factors(model), strict=True):
            group["penalty_factor"] = values
        taken = {id(p) for group in lifted for p in group["params"]} | {id(p) for p in model.head.parameters()}
        rest = [p for p in model.parameters() if id(p) not in taken]
        settings = derive_path(rates[0] * sum(shares), base="adamw", start="dense")
        params = [*lifted, {"params": rest}, {"params": list(model.head.parameters()), "lr": rates[1]}]
        self.optimizer = SplitLBI(
            params, lr=rates[0], base="adamw", start="dense", weight_decay=0.01, fused=False, **settings
        )
        return self.optimizer

    def _factors(self, model: nn.Module) -> list[list[float] | None]:
        """By the rank of a unit's score in its group: `SPREAD` for the lowest, one over it for the highest."""
        if self.score is None:
            return [None] * len(self.groups)
        found = unit_scores(model, self.groups, self.calibration, self.score)
        ranks = [found[group.name].argsort(stable=True).argsort() / (group.units - 1) for group in self.groups]
        return [(SPREAD ** (1 - 2 * rank)).tolist() for rank in ranks]

    def after_epoch(self) -> None:
        inside = SparsePath.from_optimizer(self.optimizer, self.groups).support if self.refits else {}
        kept = {name: units.nonzero().flatten() for name, units in inside.items() if units.any() and not units.all()}
        if kept:
            wishes = {name: Wish(len(units), units) for name, units in kept.items()}
            done = compensate(self.model, self.groups, wishes, self.calibration)
            self.model.load_state_dict(done.model.state_dict())

    def scores(self) -> dict[str, Tensor]:
        return SparsePath.from_optimizer(self.optimizer, self.groups).scores("dual", relative=False)


WAYS = {
    "lasso": (Lasso, {}),
    "path": (Path, {}),
    "path, OBS": (Path, {"score": "obs"}),
    "path, Fisher": (Path, {"score": "fisher"}),
    "path, refit": (Path, {"refits": True}),
}


def train(
    model: nn.Module,
    data: Any,
    places: Tensor,
    epochs: int,
    rates: tuple[float, float],
    seed: int,
    teacher: tuple[nn.Module, float] | None = None,
    way: Plain | None = None,
    size: int = BATCH,
    precision: torch.dtype = torch.float32,
) -> None:
    """A warm-up over a tenth of the steps and linear decay; dropout as the encoder has it.

    Args:
        model: says a loss; its last layer is its `head`.
        data, places: rows, with `data.batch(places)`.
        epochs: over them.
        rates: of the encoder and of the head.
        seed: of order and dropout.
        teacher: a model, and its share of the loss.
        way: default `Plain()`.
        size: of a batch.
        precision: of products in forward passes.
    """
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    steps, way = epochs * -(-len(places) // size), way or Plain()

    def share(step: int) -> float:
        return min((step + 1) / max(1, steps // 10), (steps - step) / steps)

    optimizer = way.start(model, rates, [share(step) for step in range(steps)])
    schedule, step = torch.optim.lr_scheduler.LambdaLR(optimizer, share), 0
    for _ in range(epochs):
        model.train()
        for part in places[torch.randperm(len(places), generator=rng)].split(size):
            optimizer.zero_grad()
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = loss_of(model, data.batch(part), teacher)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            way.after_step(step)
            schedule.step()
            step += 1
        model.eval()
        way.after_epoch()


def loss_of(model: nn.Module, batch: Mapping[str, Tensor], teacher: tuple[nn.Module, float] | None) -> Tensor:
    """The loss of a batch, a share of it that of what a teacher says."""
    said = model(**batch)
    if teacher is None:
        return said.loss
    whole, share = teacher
    with torch.no_grad():
        taught = whole(**batch).logits
    return (1 - share) * said.loss + share * distillation_terms(said.logits, taught, batch["labels"])[0].mean()
