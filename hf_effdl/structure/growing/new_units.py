"""What new units start with: their entries in every tensor of a group that is widened."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_effdl.random_state import random_state_kept
from hf_effdl.structure.groups.group import Group, Slice
from hf_effdl.structure.groups.inputs import copy_of
from hf_effdl.structure.groups.surgery import set_sizes


INITS = ("zero-out", "fresh-rows", "gradmax", "split", "fresh")
ROUNDS = 12  # of the power iteration of "gradmax"
Growth = Sequence[tuple[Group, int]]  # groups and how many units each gains
Entries = dict[tuple[str, int], Tensor]  # new entries by tensor and axis


def zero_out(tensors: Mapping[str, Tensor], growth: Growth, seed: int) -> dict[str, Tensor]:
    """Grown tensors whose new units nobody listens to yet: their rows are drawn, their outgoing slices zero."""
    return _assemble(tensors, growth, _zero_out_entries(tensors, growth, seed))


def fresh_rows(tensors: Mapping[str, Tensor], growth: Growth, seed: int, model: nn.Module) -> dict[str, Tensor]:
    """Grown tensors as `zero_out` gives them, with rows as long as those of a new layer, and its batch norm."""
    new = _zero_out_entries(tensors, growth, seed)
    built = built_anew(model, seed).state_dict()
    for _, add, part, shape, _ in _regions(tensors, growth):
        if part.role in ("bias", "input"):
            continue
        start = built[part.tensor].double().cpu()
        if part.role == "row":
            length = _to_rows(start, part, start.shape[part.axis] // part.block).norm(dim=1).mean()
            rows = _to_rows(new[_key(part)], part, add)
            new[_key(part)] = _from_rows(length * rows / rows.norm(dim=1, keepdim=True), shape, part)
        else:
            new[_key(part)] = start.mean().expand(shape)
    return _assemble(tensors, growth, new)


def fresh(tensors: Mapping[str, Tensor], growth: Growth, seed: int) -> dict[str, Tensor]:
    """Grown tensors whose new entries are those of a new layer of the grown size."""
    new = {}
    for group, _, part, shape, final in _regions(tensors, growth):
        if part.role in ("row", "input"):
            new[_key(part)] = _draw(shape, group, part, seed) * sqrt(2 / prod(final[1:]))
        else:
            new[_key(part)] = torch.full(shape, float(part.role in ("scale", "var")))
    return _assemble(tensors, growth, new)


def split(tensors: Mapping[str, Tensor], growth: Growth, seed: int, model: nn.Module) -> dict[str, Tensor]:
    """Grown tensors in which every new unit is a copy of an old one and the copies share its outgoing slices."""
    result = dict(tensors)
    origins, shares = {}, {}
    for group, add in growth:
        largest = group.norm(model).argsort(descending=True, stable=True)
        origin = torch.cat([torch.arange(group.units), largest[torch.arange(add) % group.units]])
        # apart from the start, or an original and its copy would learn the same: 0.55 to 0.6 and 0.4 to 0.45 of a pair
        drawn = 0.4 + 0.05 * torch.rand(len(origin), generator=_generator(seed, group.name, group.units)).double()
        drawn[: group.units] += 0.15
        total = torch.zeros(group.units, dtype=torch.float64).index_add_(0, origin, drawn)
        # a unit without copies keeps its slices bit by bit: x / x is 1
        origins[group.name], shares[group.name] = origin, drawn / total[origin]
    for group, _, part in _in_order(growth):
        old = result[part.tensor]
        origin = torch.arange(group.units * part.block).view(group.units, part.block)[origins[group.name]].flatten()
        copies = old.index_select(part.axis, origin.to(old.device))
        if part.role == "input":
            share = shares[group.name].repeat_interleave(part.block).to(old.device)
            shape = [-1 if axis == part.axis else 1 for axis in range(old.ndim)]
            copies = (copies * share.view(shape)).to(old.dtype)
        result[part.tensor] = copies
    return result


def gradmax(
    tensors: Mapping[str, Tensor],
    growth: Growth,
    seed: int,
    model: nn.Module,
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
) -> dict[str, Tensor]:
    """Grown tensors as `zero_out` gives them, with the rows that make the gradient of the outgoing slices largest.

    With R the new rows of a group and g(R) the squared norm of the loss gradient with respect to its new outgoing
    slices, a round takes for R the nearest orthonormal rows to dg/dR, of the length that they had. Where the units are
    linear in R this is power iteration, and g never falls. Elsewhere it may (behind batch norm dg/dR is at right
    angles to R); the next round then goes half as far, from the best R so far. Groups do not disturb each other:
    nothing reads their new units yet.
    """
    new = _zero_out_entries(tensors, growth, seed)
    with random_state_kept(), torch.enable_grad():
        trial = _trial(model, _assemble(tensors, growth, new))
        single = {name: _single(tensor) for name, tensor in tensors.items()}
        climbs = [_Climb(group, add) for group, add in growth]
        entries = {key: value.to(single[key[0]]) for key, value in new.items()}
        for step in range(ROUNDS + 1):
            leaves = {key: entries[key].detach().requires_grad_() for climb in climbs for key in climb.keys}
            value = _loss(_call_with(trial, _assemble(single, growth, entries | leaves), batch), loss)
            sizes = _pulls(value, climbs, leaves)
            total = sum(sizes)
            if step == 0 and not total.isfinite():
                raise ValueError('init="gradmax": the loss or its gradient is not finite on this batch; pass another')
            if not total.requires_grad:  # no new unit has a part in the loss
                break
            turns = _gradients(total, {key: leaves[key] for climb in climbs for key in climb.rows})
            for climb, size in zip(climbs, sizes, strict=True):
                entries |= climb.go_on(size, entries, turns)
    if not any(climb.largest > 0 for climb in climbs):
        raise ValueError(
            'init="gradmax": on this batch the loss gives the new outgoing slices no gradient, so that no row is '
            "better than another; look at `batch` and `loss`, or choose another init"
        )
    for climb in climbs:
        entries |= climb.best
    return _assemble(tensors, growth, entries)


class _Climb:
    """The search for a group's new rows: the best so far, where they turn to, and how far the next round goes."""

    def __init__(self, group: Group, add: int) -> None:
        self.add = add
        self.rows = {_key(part): part for part in group.slices if part.role == "row"}
        self.readers = [_key(part) for part in group.slices if part.role == "input"]
        self.keys = [*self.rows, *self.readers]
        self.largest, self.pull = -1.0, 1.0
        self.best: Entries = {}
        self.direction: Entries = {}

    def go_on(self, size: Tensor, entries: Entries, turns: Entries) -> Entries:
        """The rows to try next, after those in `entries` gave the gradient a size and `turns` its slope."""
        if size > self.largest:
            self.largest = size.item()
            self.best = {key: entries[key] for key in self.rows}
            self.direction = {key: turns[key].detach() for key in self.rows}
        else:
            self.pull /= 2
        return {
            key: _turned(self.best[key], self.direction[key], self.pull, part, self.add)
            for key, part in self.rows.items()
        }


def _pulls(value: Tensor, climbs: Sequence[_Climb], leaves: Entries) -> list[Tensor]:
    """Squared norm of the gradient of a loss with respect to the new outgoing slices, for every group."""
    slopes = _gradients(value, {key: leaves[key] for climb in climbs for key in climb.readers})
    return [sum(slopes[key].square().sum() for key in climb.readers) for climb in climbs]


def _turned(rows: Tensor, direction: Tensor, pull: float, part: Slice, add: int) -> Tensor:
    """Rows of the length they had, a share `pull` of the way from where they are to the nearest to `direction`."""
    if not (direction.any() and direction.isfinite().all()):
        return rows
    length = _to_rows(rows, part, add).norm(dim=1, keepdim=True)
    goal = (1 - pull) * rows / rows.norm() + pull * direction / direction.norm()
    return _from_rows(_orthonormal(_to_rows(goal, part, add)) * length, rows.shape, part)


def _gradients(value: Tensor, leaves: Entries) -> Entries:
    """Gradients that have gradients themselves."""
    slopes = torch.autograd.grad(
        value, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, slopes, strict=True))


def _trial(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A grown copy to differentiate: at least single precision, no dropout, norms on the statistics of the batch."""
    trial = place(copy_of(model), tensors)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in trial.parameters()):
        trial.float()
    trial.eval()
    for module in trial.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return trial


def _single(value: Any) -> Any:
    """Half precision tensors in single precision, anything else as it is."""
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _call_with(trial: nn.Module, tensors: Mapping[str, Tensor], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return functional_call(trial, dict(tensors), (), {name: _single(value) for name, value in batch.items()})
    batch = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    return functional_call(trial, dict(tensors), tuple(map(_single, batch)))


def _loss(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is None:
        value = output.get("loss") if isinstance(output, Mapping) else None
        if value is None:
            raise ValueError(
                'init="gradmax": the model\'s output has no "loss"; put the labels into `batch`, or pass '
                "loss=, a function of the output"
            )
    else:
        value = loss(output)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ValueError(
            f'init="gradmax": the loss must be one number with a gradient, not {type(value).__name__}'
            f"{f' of shape {tuple(value.shape)}' if isinstance(value, Tensor) else ''}"
        )
    return value


@torch.no_grad()
def place(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put grown tensors in the place of a model's own, in place: their kind, memory format and the layers' sizes."""
    for name, new in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf)
        new = torch.empty_like(new, memory_format=layout(old)).copy_(new)
        setattr(module, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        set_sizes(module)
    return model


def layout(tensor: Tensor) -> torch.memory_format:
    """The memory format that a tensor was put into, also where it has the strides of both."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    plain = last is None or tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
    return torch.contiguous_format if plain else last


# ---- where the new entries lie


def _in_order(growth: Growth) -> Iterator[tuple[Group, int, Slice]]:
    """What produces the new units of all groups, then what reads them: a new row at a new column is the reader's."""
    for reads in (False, True):
        for group, add in growth:
            yield from ((group, add, part) for part in group.slices if (part.role == "input") == reads)


def _regions(
    tensors: Mapping[str, Tensor], growth: Growth
) -> Iterator[tuple[Group, int, Slice, list[int], list[int]]]:
    """Every slice with the shape of its new entries and the shape of the whole grown tensor."""
    final = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for _, add, part in _in_order(growth):
        final[part.tensor][part.axis] += add * part.block
    now = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for group, add, part in _in_order(growth):
        shape = list(now[part.tensor])
        shape[part.axis] = add * part.block
        now[part.tensor][part.axis] += add * part.block
        yield group, add, part, shape, final[part.tensor]


def _assemble(tensors: Mapping[str, Tensor], growth: Growth, new: Entries) -> dict[str, Tensor]:
    result = dict(tensors)
    for _, _, part in _in_order(growth):
        old = result[part.tensor]
        result[part.tensor] = torch.cat([old, new[_key(part)].to(old)], part.axis)
    return result


def _key(part: Slice) -> tuple[str, int]:
    return part.tensor, part.axis


def _to_rows(tensor: Tensor, part: Slice, units: int) -> Tensor:
    return tensor.movedim(part.axis, 0).reshape(units, -1)


def _from_rows(rows: Tensor, shape: Iterable[int], part: Slice) -> Tensor:
    shape = list(shape)
    first = shape.pop(part.axis)
    return rows.reshape(first, *shape).movedim(0, part.axis)


# ---- drawing


def _generator(*identity: Any) -> torch.Generator:
    """The same draws whichever groups are widened together, on every device; others when a group is widened again."""
    return torch.Generator().manual_seed(zlib.crc32(repr(identity).encode()))


def _draw(shape: Sequence[int], group: Group, part: Slice, seed: int) -> Tensor:
    generator = _generator(seed, part.tensor, part.axis, group.units)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def built_anew(model: nn.Module, seed: int) -> nn.Module:
    """The model before any training: as its config builds it, or a copy whose layers are drawn again.

    The copy is for modules without a config, and where the config builds other tensors than the model has.
    """
    with random_state_kept():
        torch.manual_seed(seed)
        if isinstance(model, PreTrainedModel):
            built = type(model)(deepcopy(model.config))
            if _shapes(built) == _shapes(model):
                return built
        built = copy_of(model)
        for module in built.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return built


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _zero_out_entries(tensors: Mapping[str, Tensor], growth: Growth, seed: int) -> Entries:
    new = {}
    for group, add, part, shape, _ in _regions(tensors, growth):
        old = tensors[part.tensor].detach().double().cpu()
        if part.role == "row":
            drawn = _to_rows(_draw(shape, group, part, seed), part, add)
            new[_key(part)] = _from_rows(_beside(_to_rows(old, part, group.units), drawn), shape, part)
        elif part.role in ("bias", "input"):
            new[_key(part)] = torch.zeros(shape, dtype=old.dtype)
        else:  # batch norm
            new[_key(part)] = (old.abs() if part.role == "scale" else old).mean().expand(shape)
    return new


def _beside(old: Tensor, drawn: Tensor) -> Tensor:
    """Drawn rows without what lies in the span of the old ones, as long as there is room, and of their mean norm."""
    units, fan_in = old.shape
    # the columns after those of the old rows are orthogonal to them, also where old rows depend on each other
    outside = torch.linalg.qr(torch.cat([old, drawn])[:fan_in].T).Q.T[units:]
    rows = torch.cat([outside, drawn[len(outside) :]])
    norm = old.norm(dim=1).mean()
    # rows of zeros in front of outgoing slices of zeros would never learn
    return rows / rows.norm(dim=1, keepdim=True) * (norm if norm > 0 else sqrt(2))


def _orthonormal(rows: Tensor) -> Tensor:
    """The nearest orthonormal rows; of more rows than columns, as many at a time as there are columns."""
    parts = []
    for some in rows.split(rows.shape[1]):
        left, _, right = torch.linalg.svd(some, full_matrices=False)
        parts.append(left @ right)
    return torch.cat(parts)
