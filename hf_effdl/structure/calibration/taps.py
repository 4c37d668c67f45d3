"""Listening to some layers during a forward pass, and ending it when the last of them has spoken."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.calibration.consumer import Consumer


class _HeardEnough(Exception):
    """Ends a forward pass whose rest nobody looks at."""


@dataclass(frozen=True, eq=False)
class Joint:
    """Where what a layer says is added to a residual stream: `stream = others + scale * said`.

    Args:
        module: the first module that is given the stream afterwards.
        scale: `(outputs,)`, not zero; of a layer scale or a norm in between.
    """

    module: str
    scale: Tensor


@dataclass(eq=False)
class Heard:
    """What one consumer was given and answered in a forward pass, and the stream that it adds to, call by call."""

    given: list[Tensor] = field(default_factory=list)
    said: list[Tensor] = field(default_factory=list)
    stream: list[Tensor] = field(default_factory=list)


class Taps:
    """Hooks on the consumers of one group.

    Args:
        model: that holds them.
        consumers: layers of `model`.
        joints: one per consumer, or None.
        calls: how often these are called in a forward pass, which ends then, see `count_calls`; 0: it goes to its end.
    """

    def __init__(
        self, model: nn.Module, consumers: Sequence[Consumer], joints: Sequence[Joint | None], calls: int = 0
    ) -> None:
        self.model, self.consumers, self.joints, self.calls = model, consumers, joints, calls
        self.heard: list[Heard] = []
        self.count = 0

    @torch.no_grad()
    def listen(self, run: Callable[[], Any]) -> list[Heard]:
        """What every consumer hears and says while `run` calls the model."""
        with self.attached():
            try:
                run()
            except _HeardEnough:
                pass
        return self.heard

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are there, and nothing has been heard yet."""
        self.heard, self.count = [Heard() for _ in self.consumers], 0
        handles = [handle for place in range(len(self.consumers)) for handle in self._tap(place)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap(self, place: int) -> list[Any]:
        consumer, joint = self.consumers[place], self.joints[place]

        def after(layer: nn.Module, args: tuple, kwargs: dict, said: Tensor) -> None:
            heard = self.heard[place]
            heard.given.append(first_input(args, kwargs).detach())
            heard.said.append(said.detach())
            self._one_more()

        def joined(module: nn.Module, args: tuple, kwargs: dict) -> None:
            heard, stream = self.heard[place], first_input(args, kwargs)
            # the call that follows the consumer's
            if len(heard.stream) < len(heard.said) and stream.shape == heard.said[-1].shape:
                heard.stream.append(stream.detach())
                self._one_more()

        handles = [consumer.layer.register_forward_hook(after, with_kwargs=True)]
        if joint is not None:
            module = self.model.get_submodule(joint.module)
            handles.append(module.register_forward_pre_hook(joined, with_kwargs=True))
        return handles

    def _one_more(self) -> None:
        self.count += 1
        if self.count == self.calls:
            raise _HeardEnough


@torch.no_grad()
def count_calls(
    model: nn.Module,
    consumers: Mapping[str, Sequence[Consumer]],
    joints: Mapping[str, Sequence[Joint | None]],
    run: Callable[[], Any],
) -> dict[str, int]:
    """By group, how many calls of its consumers and their joints one forward pass makes."""
    taps = {name: Taps(model, layers, joints[name]) for name, layers in consumers.items()}
    with ExitStack() as stack:
        for tap in taps.values():
            stack.enter_context(tap.attached())
        run()
    return {name: tap.count for name, tap in taps.items()}


def first_input(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first thing a module was given, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()), None)
