"""Grams: what the consumers of a group are given and should say, summed up over calibration rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_effdl.processes import same_fate, summed
from hf_effdl.structure.calibration.batches import at_least_float32, mask_of
from hf_effdl.structure.calibration.consumer import Consumer
from hf_effdl.structure.calibration.replay import Replay
from hf_effdl.structure.calibration.taps import Heard, Joint, Taps
from hf_effdl.structure.groups.inputs import full_precision


POSITIONS = 2**15  # of one batch; of more, as many images have, only one in so many is looked at
LARGEST = 2**26  # numbers that patches of one piece of a batch may be
SUMS = ("products", "targets", "sums", "target_sums", "weights", "squares")
QUIET = 0.01  # of the typical size: answers smaller than that count as that


@dataclass(eq=False)
class Gram:
    """Sums over positions of the inputs `a` of a consumer and of what it should say, `t`.

    Each position is weighted by one over the squared size of the answer there in the whole model, so that it counts by
    its relative error; where the answer joins a stream, over the size of the answer times that of the stream. Without
    that the few tokens with massive activations own the sums; by the answer alone those tokens do to which a layer
    says next to nothing.

    Args:
        products: `G = sum w a a^T`, `(inputs, inputs)`, float64.
        targets: `C = sum w t a^T`, `(outputs, inputs)`; `W G` as long as nothing before has changed.
        sums: `sum w a`, `(inputs,)`.
        target_sums: `sum w t`, `(outputs,)`.
        weights: `sum w`, one number.
        squares: `sum w |t|^2`, one number.
        positions: how many were summed up.
    """

    products: Tensor
    targets: Tensor
    sums: Tensor
    target_sums: Tensor
    weights: Tensor
    squares: Tensor
    positions: int = 0

    @classmethod
    def empty(cls, consumer: Consumer) -> "Gram":
        """Of no positions yet."""
        weight = consumer.layer.weight
        # the first has no float64
        kind = {"dtype": torch.float32 if weight.device.type == "mps" else torch.float64, "device": weight.device}
        inputs, outputs = consumer.inputs, weight.numel() // consumer.inputs
        return cls(
            *(torch.zeros(size, **kind) for size in ((inputs, inputs), (outputs, inputs), inputs, outputs, (), ()))
        )

    def add(self, rows: Tensor, wanted: Tensor, size: Tensor, quiet: float = 0.0) -> None:
        """Add positions: inputs, what should be said to them, and the squared size that an error counts against.

        Sizes below `quiet` count as that.
        """
        said = size > 0  # blank places, say
        rows, wanted, size = at_least_float32(rows[said]), at_least_float32(wanted[said]), size[said]
        if len(rows):
            weights = 1 / size.clamp_min(quiet)
            weighted = rows * weights[:, None]
            with full_precision():
                self.products += weighted.T @ rows
                self.targets += wanted.T @ weighted
            self.sums += weighted.sum(0)
            self.target_sums += weights @ wanted
            self.weights += weights.sum()
            self.squares += weights @ wanted.square().sum(1)
            self.positions += len(rows)

    def over_processes(self) -> "Gram":
        """The sums of all processes."""
        positions = summed(torch.tensor(self.positions, device=self.products.device))
        return Gram(*(summed(getattr(self, name)) for name in SUMS), int(positions))

    def error(self, matrix: Tensor, shift: Tensor | None = None) -> float:
        """`sum w |t - M a - s|^2` per position: the mean relative error of a layer with another matrix and bias.

        Args:
            matrix: `M`, `(outputs, inputs)`.
            shift: `s`, `(outputs,)`: what is added to the bias.
        """
        matrix = matrix.to(self.products)
        error = self.squares + ((matrix @ self.products - 2 * self.targets) * matrix).sum()
        if shift is not None:
            shift = shift.to(self.products)
            error += self.weights * shift.square().sum() + 2 * shift @ (matrix @ self.sums - self.target_sums)
        error = float(error) / max(self.positions, 1)
        return max(error, 0.0) if error == error else float("inf")  # nothing is worse than NaN


Pair = tuple[list[Gram], list[Gram]]


@dataclass(eq=False)
class Ensemble:
    """The whole model and the copy that does without some units, side by side.

    Args:
        whole: as it was.
        slim: of the same architecture.
        batches: this process's share, by number: from 0 on those to fit on, below it those held out.
        sizes: squared size that the answers of each layer typically have in the whole model.
    """

    whole: Replay
    slim: Replay
    batches: dict[int, Any] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)

    def grams(self, consumers: Sequence[Consumer], joints: Sequence[Joint | None], calls: int = 0) -> Pair:
        """The Grams of every consumer of a group, over all processes: of the rows to fit on, and of those held out.

        A consumer is to say what it says in the whole model, and beside that what the layers before it have failed to
        add to the stream that its answer joins. One that no forward pass calls has a Gram of no positions.

        Args:
            consumers: layers of the slim model.
            joints: of each.
            calls: see `Taps`.
        """
        originals = [consumer.in_model(self.whole.model) for consumer in consumers]
        whole = Taps(self.whole.model, originals, joints, calls)
        slim = Taps(self.slim.model, consumers, joints, calls)
        fit, held_out = ([Gram.empty(consumer) for consumer in consumers] for _ in range(2))
        with same_fate():
            for number, batch in self.batches.items():
                expected = whole.listen(lambda: self.whole.run(batch, number))  # noqa: B023 - called at once
                heard = slim.listen(lambda: self.slim.run(batch, number))  # noqa: B023
                for place, gram in enumerate(fit if number >= 0 else held_out):
                    pair = (originals[place], expected[place]), (consumers[place], heard[place])
                    quiet = QUIET * self.sizes.get(consumers[place].name, 0.0)
                    _add(gram, *pair, joints[place], mask_of(batch), quiet)
        return [gram.over_processes() for gram in fit], [gram.over_processes() for gram in held_out]


@contextmanager
def answer_sizes(consumers: Sequence[Consumer]) -> Iterator[dict[str, Tensor]]:
    """`log_sums` of the squared sizes of layers' answers without bias, by layer, of all passes in the block."""
    sums = {consumer.name: torch.zeros(2, dtype=torch.float64) for consumer in consumers}

    def hook_for(consumer: Consumer) -> Any:
        def hook(layer: Any, args: tuple, said: Tensor) -> None:
            sums[consumer.name] += log_sums(at_least_float32(consumer.outputs(said.detach())).square().sum(1))

        return hook

    handles = [consumer.layer.register_forward_hook(hook_for(consumer)) for consumer in consumers]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def log_sums(sizes: Tensor) -> Tensor:
    """The sum of the logarithms of what is above zero, and how many those are."""
    sizes = sizes[sizes > 0].double().cpu()
    return torch.stack([sizes.log().sum(), sizes.new_tensor(len(sizes))])


def geometric_mean(sums: Tensor, device: torch.device) -> float:
    """The mean of `log_sums` over all processes: a size that a few huge ones do not move, and that adds up."""
    total = summed(sums.to(device, torch.float32 if device.type == "mps" else None))
    return float((total[0] / total[1]).exp()) if total[1] else 0.0


def _add(
    gram: Gram,
    whole: tuple[Consumer, Heard],
    slim: tuple[Consumer, Heard],
    joint: Joint | None,
    mask: Tensor | None,
    quiet: float,
) -> None:
    """Add all calls of a consumer in one forward pass."""
    (original, expected), (consumer, heard) = whole, slim
    for call, (given, said) in enumerate(zip(heard.given, expected.said, strict=True)):
        wanted = at_least_float32(original.outputs(said))
        size = wanted.square().sum(1)
        if joint is not None and len(heard.stream) > call:
            stream = at_least_float32(expected.stream[call])
            size = (size.clamp_min(quiet) * consumer.by_position(stream).square().sum(1)).sqrt()
            missing = stream - at_least_float32(heard.stream[call])
            wanted = at_least_float32(consumer.outputs(heard.said[call])) + consumer.by_position(missing) / joint.scale
        if mask is not None and given.ndim == 3 and given.shape[:2] == mask.shape:
            there = mask.flatten().bool()
            gram.add(consumer.rows(given)[there], wanted[there], size[there], quiet)
            continue
        step = -(-len(wanted) // POSITIONS)
        for place, piece in _pieces(consumer, given, len(wanted)):
            rows = consumer.rows(piece)
            chosen = slice(place, place + len(rows), step)
            gram.add(rows[::step], wanted[chosen], size[chosen], quiet)


def _pieces(consumer: Consumer, given: Tensor, positions: int) -> Iterator[tuple[int, Tensor]]:
    """Rows of a batch that fit into memory as patches of a convolution, and the place of their first position."""
    if consumer.layer.weight.ndim == 2:
        yield 0, given
        return
    each = positions // len(given)  # of a row
    rows = max(1, LARGEST // (each * consumer.inputs))
    yield from ((start * each, given[start : start + rows]) for start in range(0, len(given), rows))
