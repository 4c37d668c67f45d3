"""Who goes first: a number per unit, from what the layers behind are given, or from the loss."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.processes import same_fate, summed
from hf_effdl.structure.calibration.batches import LABELS, answer, count_rows
from hf_effdl.structure.calibration.consumer import Consumer
from hf_effdl.structure.calibration.grams import Gram
from hf_effdl.structure.calibration.refit import inverse


ROUNDS = 32  # in which units leave; between them what is left takes over
OBS_RIDGE = 0.01


def activation(consumers: Sequence[Consumer], grams: Sequence[Gram]) -> Tensor:
    """`|W_j| rms(a_j)` per unit, over its columns and consumers: how much of what is said comes through the unit.

    The rms is that of the Gram's weighted positions, each consumer relative to what it says in all.
    """
    total = 0.0
    for consumer, gram in zip(consumers, grams, strict=True):
        columns = consumer.columns(torch.arange(consumer.units)).to(gram.products.device)
        size = consumer.matrix.square().sum(0).to(gram.products) * gram.products.diagonal()
        total = total + size[columns].sum(1) / max(gram.positions, 1)
    return total.sqrt().float().cpu()


def obs(consumers: Sequence[Consumer], grams: Sequence[Gram], keep: int, rounds: int = ROUNDS) -> Tensor:
    """What a unit's leaving costs after the others have taken over for it: the later it leaves, the higher it scores.

    The cost of unit `j` is `tr(W_j [H_jj]^-1 W_j^T)` with `H = (G + r I)^-1` and the matrix `W = C H`. Units leave in
    rounds, the cheapest first, and `W` and `H` become those of the inputs that are left (optimal brain surgeon, with
    updates; Hassibi and Stork, NIPS 1992).

    Args:
        consumers: of one group.
        grams: theirs.
        keep: how many units are still there at the end, in the order of their costs then.
        rounds: in how many steps the others leave.
    """
    surgeons = [_Surgeon(c, gram) for c, gram in zip(consumers, grams, strict=True) if gram.positions]
    units = consumers[0].units
    left, rank, place = torch.arange(units), torch.zeros(units), 0
    sizes = dict.fromkeys(round(units + (keep - units) * (i + 1) / rounds) for i in range(rounds))
    for size in sizes:
        order = _costs(surgeons, len(left)).argsort(stable=True)
        going, staying = order[: len(left) - size], order[len(left) - size :].sort().values
        rank[left[going]] = torch.arange(place, place + len(going), dtype=rank.dtype)
        place += len(going)
        for surgeon in surgeons:
            surgeon.remove(going, staying)
        left = left[staying]
    rank[left[_costs(surgeons, len(left)).argsort(stable=True)]] = torch.arange(place, units, dtype=rank.dtype)
    return rank


def _costs(surgeons: Sequence["_Surgeon"], units: int) -> Tensor:
    return sum((surgeon.costs() for surgeon in surgeons), torch.zeros(units, dtype=torch.float64))


class _Surgeon:
    """The matrix and the inverse Gram of one consumer while its units leave.

    Columns of units come first, those of no unit after them.
    """

    def __init__(self, consumer: Consumer, gram: Gram) -> None:
        own = consumer.columns(torch.arange(consumer.units))
        columns = torch.cat([own.flatten(), consumer.kept_columns(torch.arange(0))]).to(gram.products.device)
        self.width, self.units, self.positions = own.shape[1], consumer.units, gram.positions
        self.inverse = inverse(gram.products[columns][:, columns], OBS_RIDGE)
        self.matrix = gram.targets[:, columns] @ self.inverse

    def costs(self) -> Tensor:
        """Of every unit that is left, relative to what the consumer says."""
        used = self.units * self.width
        if self.width == 1:
            cost = self.matrix[:, :used].square().sum(0) / self.inverse.diagonal()[:used]
        else:
            blocks = _diagonal_blocks(self.inverse, self.units, self.width)
            columns = self.matrix[:, :used].unflatten(1, (self.units, self.width)).transpose(0, 1)
            cost = (torch.linalg.solve(blocks, columns, left=False) * columns).sum((1, 2))
        return cost.cpu().double() / self.positions

    def remove(self, going: Tensor, staying: Tensor) -> None:
        """Let the others take over for some units: `W -= W_g H_gg^-1 H_g`, and the same of the inverse."""
        going, staying = self._columns(going), self._columns(staying)
        others = torch.arange(self.units * self.width, len(self.inverse), device=going.device)
        left = torch.cat([staying, others])
        share = torch.linalg.solve(self.inverse[going][:, going], self.inverse[going][:, left])
        self.matrix = self.matrix[:, left] - self.matrix[:, going] @ share
        rows = self.inverse[left]
        self.inverse = rows[:, left] - rows[:, going] @ share
        self.units = len(staying) // self.width

    def _columns(self, units: Tensor) -> Tensor:
        columns = units[:, None] * self.width + torch.arange(self.width)
        return columns.flatten().to(self.inverse.device)


def _diagonal_blocks(square: Tensor, units: int, width: int) -> Tensor:
    used = square[: units * width, : units * width].unflatten(0, (units, width)).unflatten(2, (units, width))
    return used.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def fisher(model: nn.Module, consumers: Mapping[str, Sequence[Consumer]], batches: Iterable[Any]) -> dict[str, Tensor]:
    """`sum over rows of (sum of a_j dL/da_j)^2` per unit: the squared first-order change of the loss without it.

    One forward and one backward pass per batch, for all groups at once.

    Args:
        model: in eval mode; gives a `loss` for batches with labels, as transformers models do.
        consumers: of every group.
        batches: dicts with `labels`.
    """
    scores = {name: torch.zeros(layers[0].units, dtype=torch.float64) for name, layers in consumers.items()}
    with same_fate():
        for number, batch in enumerate(batches):
            changes = _loss_changes(model, consumers, batch, number)
            for name, change in changes.items():
                scores[name] += (change * count_rows(batch)).square().sum(0).double().cpu()
    device = next(model.parameters()).device
    return {name: summed(score.float().to(device)).sqrt().cpu() for name, score in scores.items()}


def _loss_changes(
    model: nn.Module, consumers: Mapping[str, Sequence[Consumer]], batch: Any, number: int
) -> dict[str, Tensor]:
    """By group, `a_j dL/da_j` summed over a row's positions and all consumers, `(rows, units)`."""
    given: list[tuple[str, Consumer, Tensor]] = []

    def hook_for(name: str, consumer: Consumer) -> Any:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            first = args[0] if args else next(iter(kwargs.values()))
            # a view of its own: several consumers may be given the same tensor
            watched = first.view_as(first) if first.requires_grad else first.detach().requires_grad_()
            given.append((name, consumer, watched))
            return (watched, *args[1:]), ({} if not args else kwargs)

        return hook

    handles = [
        consumer.layer.register_forward_pre_hook(hook_for(name, consumer), with_kwargs=True)
        for name, layers in consumers.items()
        for consumer in layers
    ]
    try:
        with torch.enable_grad():
            loss = _loss(answer(model, batch, number), batch, model)
            gradients = torch.autograd.grad(loss, [watched for _, _, watched in given], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    rows = count_rows(batch)
    result: dict[str, Tensor] = {}
    for (name, consumer, watched), gradient in zip(given, gradients, strict=True):
        if gradient is not None:
            change = _by_unit(consumer, (watched.detach() * gradient).float(), rows)
            result[name] = result[name] + change if name in result else change
    return result


def _by_unit(consumer: Consumer, products: Tensor, rows: int) -> Tensor:
    """Products of inputs and gradients summed over a row's positions and a unit's entries, `(rows, units)`."""
    axis = -1 if consumer.layer.weight.ndim == 2 else -(consumer.layer.weight.ndim - 1)
    products = products.movedim(axis, -1).reshape(rows, -1, products.shape[axis]).sum(1)
    start = consumer.part.start
    own = products[:, start : start + consumer.units * consumer.part.block]
    return own.unflatten(1, (consumer.units, consumer.part.block)).sum(2)


def _loss(said: Any, batch: Any, model: nn.Module) -> Tensor:
    loss = said.get("loss") if isinstance(said, Mapping) else None
    if not isinstance(loss, Tensor) or not isinstance(batch, Mapping) or LABELS not in batch:
        raise ValueError(
            f'score="fisher" needs a loss: calibration batches must be dicts with "labels", of a model that gives a '
            f"loss for them as transformers models do; {type(model).__name__} gave none. Use 'activation' or 'obs'"
        )
    return loss


def check_finite(scores: Tensor, group: str) -> Tensor:
    """Refuse scores that are not numbers."""
    if not all(map(math.isfinite, scores.tolist())):
        raise ValueError(f"the calibration rows give scores that are not finite for group {group!r}: check the inputs")
    return scores
