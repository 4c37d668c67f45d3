"""A layer that reads units: its weight as a matrix, and what it is given as rows."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_effdl.structure.calibration.batches import at_least_float32
from hf_effdl.structure.groups.group import Slice


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer, or a convolution in its linear form, that has units of a group along its inputs.

    With `x` one row of inputs (a token's vector, or the patch under a convolution's kernel), the layer says
    `matrix @ x + bias`.

    Args:
        name: of the layer.
        layer: `nn.Linear`, `nn.Conv1d` to `nn.Conv3d` without groups, or any layer that multiplies its input by a
            weight of two axes.
        part: where the units lie in its weight.
        units: how many there are.
    """

    name: str
    layer: nn.Module
    part: Slice
    units: int

    @property
    def matrix(self) -> Tensor:
        """The weight as `(outputs, inputs)`, in float32 or better."""
        weight = at_least_float32(self.layer.weight.detach())
        return weight.T if self._is_transposed else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """A copy of the bias, if the layer has one."""
        bias = getattr(self.layer, "bias", None)
        return None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def write(self, matrix: Tensor, bias: Tensor | None) -> None:
        """Put a matrix in place of the weight, and a bias in place of the bias."""
        weight = self.layer.weight
        weight.copy_((matrix.T if self._is_transposed else matrix.reshape(weight.shape)).to(weight.dtype))
        if bias is not None:
            self.layer.bias.copy_(bias)

    @property
    def _is_transposed(self) -> bool:
        return self.layer.weight.ndim == 2 and self.part.axis == 0

    @property
    def inputs(self) -> int:
        """Columns of the matrix."""
        weight = self.layer.weight
        return weight.shape[0] if self._is_transposed else prod(weight.shape[1:])

    def columns(self, units: Tensor) -> Tensor:
        """The columns of some units, `(units, columns each)`."""
        kernel = prod(self.layer.weight.shape[2:])
        width = self.part.block * kernel
        start = self.part.start * kernel
        return start + units[:, None] * width + torch.arange(width)

    def kept_columns(self, kept: Tensor) -> Tensor:
        """Ascending: the columns that are left when only some units are; those of no unit are always."""
        left = torch.ones(self.inputs, dtype=torch.bool)
        left[self.columns(torch.arange(self.units)).flatten()] = False
        left[self.columns(kept.cpu()).flatten()] = True
        return left.nonzero().flatten()

    def rows(self, given: Tensor) -> Tensor:
        """What the layer was given, one row per position, `(positions, inputs)`."""
        if self.layer.weight.ndim == 2:
            return given.reshape(-1, given.shape[-1])
        return _patches(self.layer, given)

    def by_position(self, said: Tensor) -> Tensor:
        """What the layer answered, one row per position, `(positions, outputs)`."""
        if self.layer.weight.ndim > 2:
            said = said.movedim(-self.layer.weight.ndim + 1, -1)
        return said.reshape(-1, said.shape[-1])

    def outputs(self, said: Tensor) -> Tensor:
        """The same without the layer's bias: what its matrix says."""
        bias = getattr(self.layer, "bias", None)
        return self.by_position(said) if bias is None else self.by_position(said) - bias.detach()

    def in_model(self, model: nn.Module) -> "Consumer":
        """The same layer of another copy of the model."""
        return replace(self, layer=model.get_submodule(self.name))


def consumer_of(model: nn.Module, part: Slice, units: int) -> Consumer:
    """The layer of a model that has a slice of so many units along its inputs."""
    name = part.tensor.rpartition(".")[0]
    return Consumer(name, model.get_submodule(name), part, units)


def _patches(layer: nn.Module, given: Tensor) -> Tensor:
    """The patches under a convolution's kernel, `(positions, channels * kernel)`, channel after channel."""
    axes = layer.weight.ndim - 2
    given = given if given.ndim == axes + 2 else given[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    given = F.pad(given, [width for axis in reversed(range(axes)) for width in _padding(layer, axis)], mode=mode)
    for axis, (size, dilation, stride) in enumerate(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)):
        given = given.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (rows, channels, *positions, *kernel)
    given = given.movedim(1, 1 + axes)
    return given.reshape(prod(given.shape[: 1 + axes]), -1)


def _padding(layer: nn.Module, axis: int) -> tuple[int, int]:
    """Entries in front of and behind an axis of the image."""
    if layer.padding == "valid":
        return 0, 0
    if layer.padding == "same":
        whole = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        return whole // 2, whole - whole // 2
    return layer.padding[axis], layer.padding[axis]
