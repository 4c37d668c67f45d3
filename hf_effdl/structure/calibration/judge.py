"""How far a model's outputs have moved from what they were, on rows that nothing was fitted on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_effdl.processes import same_fate, summed
from hf_effdl.structure.calibration.batches import at_least_float32, mask_of
from hf_effdl.structure.calibration.grams import QUIET, geometric_mean, log_sums
from hf_effdl.structure.calibration.replay import Replay
from hf_effdl.structure.groups.inputs import output_tensors


LIKELIEST = 64  # classes that are looked at one by one
WIDE = 1024  # of an axis longer than that, so many fixed places are looked at: a vocabulary would fill the memory


class Judge:
    """Remembers what a model says to some rows, and compares.

    The error is the mean over positions (a row, a token; padding left out) of `|o - o'|^2 / |o|^2`, then over all
    outputs, over all processes.

    Args:
        whole: the model as it is before anything changes.
        batches: this process's held-out rows, by number.
    """

    def __init__(self, whole: Replay, batches: dict[int, Any]) -> None:
        self.batches = batches
        with same_fate():
            self.expected = {number: self._said(whole, number) for number in batches}
            if not all(bool(output.isfinite().all()) for outputs in self.expected.values() for output in outputs):
                name = type(whole.model).__name__
                raise ValueError(f"the outputs of {name} on calibration rows are not finite: check rows and weights")
        self.quiet = self._quiet(next(whole.model.parameters()).device)

    def _quiet(self, device: torch.device) -> list[float]:
        """By output, the squared size below which a position counts as that."""
        outputs = list(zip(*self.expected.values(), strict=True))
        return [
            QUIET * geometric_mean(sum(log_sums(part.square().sum(1)) for part in parts), device) for parts in outputs
        ]

    @torch.no_grad()
    def error(self, slim: Replay) -> float:
        """Mean relative error of the outputs of a model; 0 for the model as it was, 1 for one that says nothing."""
        device = next(slim.model.parameters()).device
        total = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        with same_fate():
            for number, expected in self.expected.items():
                for before, now, quiet in zip(expected, self._said(slim, number), self.quiet, strict=True):
                    total += _relative_error(before, now, quiet).to(total)
        total = summed(total)
        error = float(total[0] / total[1])
        return error if error == error else float("inf")  # nothing is worse than NaN

    @torch.no_grad()
    def _said(self, model: Replay, number: int) -> list[Tensor]:
        batch = self.batches[number]
        outputs = output_tensors(model.run(batch, number))
        if not outputs:
            name = type(model.model).__name__
            raise ValueError(
                f"{name} answers with no floating point tensor, so nothing can be judged: slim it without calibration="
            )
        return [_positions(output, mask_of(batch)) for output in outputs if output.ndim]


class Divergence:
    """Remembers the probabilities that a model gives to classes or next tokens on some rows, and compares.

    The error is the mean over positions of `sum_k p_k log(p_k / q_k)`, `p` of the whole model, over its `LIKELIEST`
    classes and all others taken together. In the squared error of logits every class counts alike, and what the last
    layers say of the likely ones is lost among the many others.

    Args:
        whole, batches: see `Judge`.
    """

    def __init__(self, whole: Replay, batches: dict[int, Any]) -> None:
        self.batches = batches
        self.expected: dict[int, tuple[Tensor, Tensor]] = {}
        with same_fate():
            for number in batches:
                said = self._said(whole, number)
                places = said.topk(min(LIKELIEST, said.shape[1])).indices
                self.expected[number] = places, _with_rest(said.gather(1, places))

    @classmethod
    def of(cls, whole: Replay, batches: dict[int, Any]) -> "Divergence | None":
        """None for a model whose answer holds no logits of classes that exclude each other."""
        problem = getattr(getattr(whole.model, "config", None), "problem_type", None)
        if not batches or problem in ("regression", "multi_label_classification"):
            return None
        number = next(iter(batches))
        with torch.no_grad(), same_fate():
            said = whole.run(batches[number], number)
        logits = said.get("logits") if isinstance(said, Mapping) else None
        fits = isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1
        return cls(whole, batches) if fits else None

    @torch.no_grad()
    def error(self, slim: Replay) -> float:
        """Mean divergence of a model's probabilities from those of the whole one, over all processes."""
        device = next(slim.model.parameters()).device
        total = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        with same_fate():
            for number, (places, before) in self.expected.items():
                now = _with_rest(self._said(slim, number).gather(1, places))
                # both sum to one, so that this is `sum p log(p / q)`, without its cancellations
                gain = (now - before).clamp_max(80)
                divergence = (before.exp() * (gain.expm1() - gain)).sum(1)
                total += torch.stack([divergence.sum(), divergence.new_tensor(len(divergence))]).to(total)
        total = summed(total)
        error = float(total[0] / total[1])
        return error if error == error else float("inf")  # nothing is worse than NaN

    @torch.no_grad()
    def _said(self, model: Replay, number: int) -> Tensor:
        """Logarithms of probabilities, `(positions, classes)`; padding left out."""
        batch = self.batches[number]
        logits, mask = model.run(batch, number)["logits"], mask_of(batch)
        is_text = mask is not None and logits.ndim == 3 and logits.shape[:2] == mask.shape
        logits = logits[mask.bool()] if is_text else logits.flatten(0, -2)
        return at_least_float32(logits).log_softmax(-1)


def _with_rest(said: Tensor) -> Tensor:
    """Logarithms of probabilities, and behind them that of what they leave to one."""
    rest = (1 - said.exp().sum(1, keepdim=True)).clamp_min(1e-7)
    return torch.cat([said, rest.log()], 1)


def _relative_error(before: Tensor, now: Tensor, quiet: float) -> Tensor:
    """The sum over positions of the relative squared error, and their number."""
    wrong, size = (before - now).square().sum(1), before.square().sum(1)
    relative = wrong / size.clamp_min(max(quiet, torch.finfo(size.dtype).tiny))
    return torch.stack([relative.sum(), relative.new_tensor(len(relative))])


def _positions(output: Tensor, mask: Tensor | None) -> Tensor:
    """An output as `(positions, numbers)` in float32 or better: tokens where it has some, else rows."""
    output = at_least_float32(output.detach())
    if output.shape[-1] > WIDE and output.ndim <= 3:
        output = output[..., torch.linspace(0, output.shape[-1] - 1, WIDE).long().to(output.device)]
    if output.ndim == 1:
        return output[:, None]
    if output.ndim != 3:
        return output.flatten(1)
    is_text = mask is not None and output.shape[:2] == mask.shape
    return output[mask.bool()] if is_text else output.flatten(0, 1)
