"""Finding where the answer of a layer is added to a residual stream, by what a push does to it.

Nothing is known of the model: the answer is pushed by random numbers, and the first module afterwards that is given
something that moved in step, entry by entry, and is more than the answer itself, is given the stream.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.calibration.batches import answer, without_labels
from hf_effdl.structure.calibration.consumer import Consumer
from hf_effdl.structure.calibration.taps import Joint, first_input


TOLERANCE = 1e-3


class _Found(Exception):
    """Ends the search."""


@torch.no_grad()
def joints_of(
    model: nn.Module, consumers: Mapping[str, Sequence[Consumer]], batch: Any
) -> dict[str, list[Joint | None]]:
    """By group, the joint of every consumer, or None where its answer is added to no stream that a module is given.

    Args:
        model: in eval mode, deterministic.
        consumers: by group, layers of `model`; one that a forward pass calls several times has no joint.
        batch: some rows.
    """
    batch = without_labels(batch)
    before = _given_to_all(model, batch)
    return {
        name: [_Search(model, consumer, before).run(batch) for consumer in layers]
        for name, layers in consumers.items()
    }


def _given_to_all(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """What every module was given first, at its only call."""
    given: dict[str, Tensor] = {}
    several: set[str] = set()

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            first = first_input(args, kwargs)
            if name in given:
                several.add(name)
            elif isinstance(first, Tensor) and first.is_floating_point():
                given[name] = first.detach().clone()

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, module in model.named_modules()
    ]
    try:
        answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: tensor for name, tensor in given.items() if name not in several}


class _Search:
    """One forward pass in which the answer of one consumer is pushed."""

    def __init__(self, model: nn.Module, consumer: Consumer, before: dict[str, Tensor]) -> None:
        self.model, self.consumer, self.before = model, consumer, before
        self.said: Tensor | None = None
        self.push: Tensor | None = None
        self.joint: Joint | None = None

    def run(self, batch: Any) -> Joint | None:
        if self.consumer.name not in self.before:
            return None
        handles = [
            module.register_forward_pre_hook(self._looker(name), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name in self.before and name != self.consumer.name
        ]
        handles.append(self.consumer.layer.register_forward_hook(self._pusher()))
        try:
            answer(self.model, batch)
        except _Found:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return self.joint

    def _pusher(self) -> Any:
        def hook(layer: nn.Module, args: tuple, said: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            push = torch.randn(said.shape, generator=generator).to(said)
            # away from zero, since the answer is divided by it
            self.push = (push.sign() * (0.5 + push.abs())) * said.std().clamp_min(1e-6)
            self.said = said + self.push
            return self.said

        return hook

    def _looker(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            now = first_input(args, kwargs)
            if self.push is None or not isinstance(now, Tensor) or now.shape != self.push.shape:
                return
            if now.shape != self.before[name].shape:
                return
            moved = self._rows(now - self.before[name])
            if not bool(moved.any()):
                return
            scale = self._scale(moved)
            if scale is None:
                raise _Found  # behind a norm or another function nothing is in step any more
            others = self._rows(now) - scale * self._rows(self.said)
            if float(others.std(0).max()) > TOLERANCE * float(self._rows(self.said).std()):
                self.joint = Joint(name, scale)
                raise _Found

        return hook

    def _scale(self, moved: Tensor) -> Tensor | None:
        """By how much every output moved per unit of the push, if that is one number for all positions."""
        push = self._rows(self.push)
        scale = (moved * push).sum(0) / push.square().sum(0)
        in_step = (moved - scale * push).abs().max() <= TOLERANCE * moved.abs().max()
        return scale if bool(in_step) and bool((scale != 0).all()) else None

    def _rows(self, tensor: Tensor) -> Tensor:
        return self.consumer.by_position(tensor).float()
