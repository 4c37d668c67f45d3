"""One recorded forward pass, from which autograd says what reaches what.

The output of every product with a weight is cut out of the graph: a fresh leaf takes its place. So gradients of what
one layer reads end at the layers nearest before it, and where they are zero nothing connects the two. That takes no
names and no knowledge of the modules in between, be it an activation, a gate, rotary embeddings or attention.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_effdl.structure.groups.counting import is_transposed
from hf_effdl.structure.groups.inputs import call


CONVOLUTIONS = tuple(f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3))


@dataclass(frozen=True, eq=False)
class Product:
    """A product of a weight and a signal.

    Args:
        kind: `"linear"`, `"lookup"` (a row of a table) or `"convolution"`.
        weight, bias: names of the parameters; no bias: None.
        out_axis: axis of the weight along which the outputs lie; the inputs of a linear one lie along the other.
        given: the signal it reads, with its graph; None for a lookup.
        leaf: stands for its result, in a graph of its own.
        channels: axis of `given` and `leaf` along which inputs and outputs lie.
    """

    kind: str
    weight: str
    bias: str | None
    out_axis: int
    given: Tensor | None
    leaf: Tensor
    channels: int = -1


def record(model: nn.Module, inputs: Any) -> list[Product]:
    """Every product with a weight in one forward pass of a model in eval mode, in order.

    Raises:
        Exception: whatever the model raises.
    """
    recorder = _Recorder(model)
    with torch.enable_grad(), recorder:
        call(model, inputs)
    return recorder.products


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = {p.data_ptr(): (name, p) for name, p in model.named_parameters() if p.numel()}
        self.generator = torch.Generator().manual_seed(0)
        self.products: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "").strip("_")
        operands = _operands(kind, args, kwargs or {})
        if operands is None or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        given, weight, bias, out_axis = operands
        name, transposed = self._parameter(weight)
        if name is None:
            return result
        if transposed:
            out_axis = 1 - out_axis
        # between 0.1 and 1.1 no usual activation is flat, whatever the weights make of the signal
        leaf = torch.rand(result.shape, generator=self.generator).add_(0.1).to(result.device, result.dtype)
        leaf.requires_grad_()
        channels = -1 if kind not in CONVOLUTIONS else 1 - weight.ndim
        sort = "convolution" if kind in CONVOLUTIONS else "lookup" if kind == "embedding" else "linear"
        self.products.append(Product(sort, name, self._parameter(bias)[0], out_axis, given, leaf, channels))
        return leaf.clone()  # a leaf itself cannot be changed in place

    def _parameter(self, tensor: Any) -> tuple[str | None, bool]:
        """Name of the parameter that a tensor is, and whether it is it transposed."""
        if not isinstance(tensor, Tensor):
            return None, False
        name, p = self.places.get(tensor.data_ptr(), (None, None))
        if p is None or sorted(tensor.shape) != sorted(p.shape):
            return None, False
        return name, is_transposed(tensor, p)


def _operands(kind: str, args: Sequence[Any], kwargs: Any) -> tuple[Any, Any, Any, int] | None:
    """Signal, weight, bias, and the weight's axis of outputs; None for a function that is no such product."""

    def argument(place: int, name: str) -> Any:
        return args[place] if len(args) > place else kwargs.get(name)

    if kind == "linear" or kind in CONVOLUTIONS:
        return argument(0, "input"), argument(1, "weight"), argument(2, "bias"), int("transpose" in kind)
    if kind == "embedding":
        return None, argument(1, "weight"), None, 1
    if kind == "addmm":
        return argument(1, "mat1"), argument(2, "mat2"), argument(0, "input"), 1
    if kind in ("matmul", "mm"):
        return argument(0, "input"), argument(1, "other"), None, 1
    return None


# ---- what reaches what


def leaves_of(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor is computed from: those of products, and parameters."""
    found, seen, waiting = {}, set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        waiting += [following for following, _ in node.next_functions]
    if tensor.requires_grad and tensor.grad_fn is None:
        found[id(tensor)] = tensor
    return list(found.values())


class Probe:
    """Asks which entries of some leaves reach chosen channels of what a product reads.

    Args:
        product: the product.
        leaves: `(leaf, axis)`: the axis along which its entries are told apart.
    """

    def __init__(self, product: Product, leaves: Iterable[tuple[Tensor, int]]) -> None:
        self.leaves = list(leaves)
        self.given, self.axis = product.given, product.channels
        generator = torch.Generator().manual_seed(1)
        weights = torch.rand(self.given.shape, generator=generator).add_(0.5).to(self.given)
        self.weighted = self.given * weights  # no two gradients cancel

    @property
    def channels(self) -> int:
        return self.given.shape[self.axis]

    def reached(self, chosen: Tensor) -> list[Tensor]:
        """For every leaf, which of its entries reach the chosen channels (bool, `(channels,)`); bool as well."""
        signal = self.weighted.movedim(self.axis, -1)[..., chosen.to(self.given.device)].sum()
        grads = torch.autograd.grad(signal, [leaf for leaf, _ in self.leaves], retain_graph=True, allow_unused=True)
        return [
            torch.zeros(leaf.shape[axis], dtype=torch.bool)
            if grad is None
            else grad.movedim(axis, -1).reshape(-1, leaf.shape[axis]).ne(0).any(0).cpu()
            for (leaf, axis), grad in zip(self.leaves, grads, strict=True)
        ]

    def units(self, block: int) -> list[Tensor]:
        """For every leaf, the unit that each of its entries reaches: its number, -1 for none, -2 for several.

        Channel `i` belongs to unit `i // block`. Two gradients per binary digit of the units' numbers.
        """
        number = torch.arange(self.channels) // block
        units = [torch.zeros(leaf.shape[axis], dtype=torch.int64) for leaf, axis in self.leaves]
        for digit in range(max(1, int(number[-1]).bit_length())):
            ones = (number >> digit & 1).bool()
            for unit, with_one, with_zero in zip(units, self.reached(ones), self.reached(~ones), strict=True):
                several, none = with_one & with_zero, ~(with_one | with_zero)
                unit[with_one & (unit >= 0)] += 1 << digit
                unit[none & (unit >= 0)] = -1
                unit[several] = -2
        return units
