"""Forward passes that start in the middle: blocks that are done with are passed over.

Most networks are a list of blocks, each given what the one before said. What a block was given is remembered for every
batch, so that going through all groups costs about as much as a few whole passes, not a few per group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.structure.calibration.batches import answer, without_labels
from hf_effdl.structure.calibration.taps import first_input
from hf_effdl.structure.groups.inputs import output_tensors


class _Reached(Exception):
    """Ends a forward pass at the block whose input is wanted."""


class Replay:
    """A model that can be run from a block on.

    Args:
        model: in eval mode, deterministic; its forward is as before outside `run`.
        blocks: called once each, one after the other, the first input of each what the one before answered; none:
            every pass is a whole one.
        is_settled: no weight changes any more, so that what a pass gives to the next block need not be asked again.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module] = (), is_settled: bool = False) -> None:
        self.model, self.blocks, self.is_settled = model, list(blocks), is_settled
        self.start = 0  # the block that passes begin at
        self.given: dict[int, Tensor] = {}  # to that block, by batch
        self.next: dict[int, Tensor] = {}  # to the one behind it

    def run(self, batch: Any, number: int) -> Any:
        """What the model says to a batch; `number` tells batches apart."""
        with self._passing_over(self.given.get(number)), self._noting(number):
            return answer(self.model, without_labels(batch), number)

    @torch.no_grad()
    def advance(self, start: int, batches: dict[int, Any]) -> None:
        """Let passes begin at a later block: the blocks before change no more."""
        if not self.blocks or start <= self.start:
            return
        known = self.next if start == self.start + 1 else {}
        given = {
            number: known[number] if number in known else self._reach(start, batch, number)
            for number, batch in batches.items()
        }
        self.start, self.given, self.next = start, given, {}

    def rewind(self) -> None:
        """Let passes begin at the start again."""
        self.start, self.given, self.next = 0, {}, {}

    def block_of(self, layers: Sequence[nn.Module]) -> int:
        """The first block that holds one of some layers."""
        inside = [set(block.modules()) for block in self.blocks]
        return min((i for i, modules in enumerate(inside) if modules.intersection(layers)), default=0)

    def _reach(self, start: int, batch: Any, number: int) -> Tensor:
        found: list[Tensor] = []

        def hook(block: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(first_input(args, kwargs).detach())
            raise _Reached

        handle = self.blocks[start].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            self.run(batch, number)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextmanager
    def _noting(self, number: int) -> Iterator[None]:
        if not self.is_settled or self.start + 1 >= len(self.blocks):
            yield
            return

        def hook(block: nn.Module, args: tuple, kwargs: dict) -> None:
            self.next[number] = first_input(args, kwargs).detach()

        # before other hooks, which may end the pass there
        block = self.blocks[self.start + 1]
        handle = block.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _passing_over(self, given: Tensor | None) -> Iterator[None]:
        if given is None or not self.start:
            yield
            return

        def put(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (given, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): given}

        handle = self.blocks[self.start].register_forward_pre_hook(put, with_kwargs=True)
        skipped = self.blocks[: self.start]
        for block in skipped:
            block.forward = _say_what_was_heard
        try:
            yield
        finally:
            handle.remove()
            for block in skipped:
                del block.forward


def _say_what_was_heard(*args: Any, **kwargs: Any) -> Any:
    return first_input(args, kwargs)


@torch.no_grad()
def replay_of(model: nn.Module, layers: Sequence[str], batch: Any) -> Replay:
    """A replay along the longest list of blocks that holds all of some layers, if passing blocks over changes nothing.

    Args:
        model: in eval mode.
        layers: names; each lies in one block.
        batch: some rows, to try it on.
    """
    batch = without_labels(batch)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if not all(layer.startswith(prefix) for layer in layers):
            continue
        replay = Replay(model, list(module))
        if _is_exact(replay, batch):
            return replay
    return Replay(model)


def _is_exact(replay: Replay, batch: Any) -> bool:
    """Whether the answer is the same to the last bit when all blocks but the last are passed over."""
    if any("forward" in vars(block) for block in replay.blocks):  # somebody else's forward, which is to stay
        return False
    try:
        whole = output_tensors(answer(replay.model, batch))
        replay.advance(len(replay.blocks) - 1, {0: batch})
        part = output_tensors(replay.run(batch, 0))
    except (ValueError, IndexError, AttributeError, TypeError):
        return False
    finally:
        replay.rewind()
    return len(whole) == len(part) > 0 and all(map(torch.equal, whole, part))
