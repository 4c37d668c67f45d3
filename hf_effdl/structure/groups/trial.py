"""Trying groups out: a model without some units must compute what the model with those units silent does.

Every trial takes random units of its own out of every group, so that units that meet out of the tracer's sight (behind
`detach`, in numpy, under `no_grad`) no longer fit. What shows in one setting alone is looked for there: a head that
runs in train mode or with labels, a norm that does nothing to small signals, a branch that is seldom taken.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_effdl.random_state import seed_all
from hf_effdl.structure.groups.group import BATCH_NORMS, Group
from hf_effdl.structure.groups.inputs import all_values, call, copy_of, each_tensor, output_tensors, twice, with_labels
from hf_effdl.structure.groups.reading import Reading
from hf_effdl.structure.groups.surgery import cut, mask


FAINT = 1 / 16


def _about_zero(values: Tensor) -> Tensor:
    return values - values.mean() if values.numel() > 1 and values.std() > 0 else values


# A gate that opens at some size, sign or mean of the inputs is at both of its sides at one of them.
SCALES = {
    " on inputs about zero, 4 times as large": (4.0, _about_zero),
    " on negative inputs, 16 times as large": (16.0, lambda values: -1 - values.abs()),
    " at the scale of pixels": (255.0, Tensor.abs),  # of images that nobody has rescaled
}
SMALL = 1_000_000  # parameters of a model that costs little to try out twice
BATCH = 8  # rows
CHEAP = 2**16  # numbers in a batch of inputs
BRANCHES = 4  # conditions of a forward pass that are turned round, one after the other
# what is random, or cannot work on one row, in train mode
AS_IN_EVAL = (
    *BATCH_NORMS,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


@dataclass(frozen=True)
class Setting:
    """A model and its inputs as groups are tried out on them.

    Args:
        model: copied for every trial.
        inputs: that it runs on.
        words: which setting this is, for messages.
        exact: in double precision already, or in what the model insists on: a failure needs no second look.
        fine: in double precision throughout: a norm over channels that is all but neutral shows too.
        may_overflow: on inputs larger than the model may be made for.
        draws: how often units are drawn: of a few units there are some whose absence does not show.
        least: as few units stay as may, one of each group: a forward pass may ask for more (`x.topk(4, 1)`).
        against: number of the condition that is told the other way round, see `Reading`.
    """

    model: nn.Module
    inputs: Any
    words: str = ""
    exact: bool = False
    fine: bool = False
    may_overflow: bool = False
    draws: int = 1
    least: bool = False
    against: int | None = None

    def doubled(self) -> "Setting":
        """The same in double precision, where the model runs in that."""
        model, inputs, fine = in_double(self.model, self.inputs)
        return replace(self, model=model, inputs=inputs, exact=True, fine=fine)


@torch.no_grad()
def in_double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any, bool]:
    """A model and its inputs in double precision, where it runs in that: what a few units change shows up better.

    And whether it computes in double precision alone, so that what differs by more than rounding differs.
    """
    try:
        double, doubled = copy_of(model).double(), each_tensor(_double, inputs)
        with Reading() as reading:
            answer = output_tensors(call(double, doubled))
        # a mask of the lowest number there is, with a bias added, is minus infinity in double precision alone
        if all(tensor.dtype == torch.float64 and not tensor.isnan().any() for tensor in answer):
            return double, doubled, reading.double
    except Exception:  # noqa: BLE001 - a dtype written into the forward pass, a device without double precision
        pass
    return model, inputs, False


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


# ---- settings


@torch.no_grad()
def settings_for(model: nn.Module, inputs: Any, labels: Any = None) -> list[Setting]:
    """The settings in which the groups of a model are tried out.

    Args:
        model: in eval mode, its signals about one in size.
        inputs: one row.
        labels: of that row; None: made up, where the model takes some.
    """
    draws = 2 if _is_small(model) else 1
    settings = [Setting(model, inputs, draws=draws).doubled()]
    least = replace(settings[0], words=" where one unit of each is left", draws=1, least=True)
    if any(tensor.is_floating_point() for tensor in all_values(inputs)):  # tokens have no size
        faint = replace(least, inputs=_changed(lambda values: FAINT * values, least.inputs))
        least = faint if _answers(faint) else least
        scaled = [_at_scale(model, inputs, words, draws) for words in SCALES]
        settings += [setting for setting in scaled if setting is not None]
    training, labelled = _training(model), with_labels(model, inputs, labels)
    rows = _cheap_batch(inputs)
    heads = [_that_runs(model, rows, f" on a batch of {BATCH} rows")]
    heads.append(_that_runs(training, [*labelled, *map(twice, labelled)], " in train mode with labels"))
    if heads[-1] is None:  # otherwise what runs without labels runs with them too
        heads.append(_that_runs(training, [*rows, inputs, twice(inputs)], " in train mode"))
        heads += [Setting(model, with_them, " with labels") for with_them in labelled]
    settings += [head for head in heads if head is not None]
    return [*settings, *[b for setting in settings if not setting.may_overflow for b in _branches(setting)], least]


def _branches(setting: Setting) -> list[Setting]:
    """The same where conditions that hold do not, and the other way round; those that end in an error are left out."""
    with Reading() as reading:
        call(setting.model, setting.inputs)
    words = setting.words + " on a branch that it seldom takes"
    draws = (
        5 if _is_small(setting.model) else 2
    )  # no other setting takes this branch: two units are drawn in every way
    places = range(min(reading.truths, BRANCHES))
    branches = [replace(setting, words=words, against=place, draws=draws) for place in places]
    return [branch for branch in branches if _runs(branch)]


def _runs(setting: Setting) -> bool:
    try:
        with Reading(setting.against):
            call(setting.model, setting.inputs)
    except Exception:  # noqa: BLE001 - a model's own reasons
        return False
    return True


def _is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < SMALL


def _at_scale(model: nn.Module, inputs: Any, words: str, draws: int) -> Setting | None:
    """A setting of `SCALES`, of the example's own signs where it answers to no others; None where it refuses both."""
    scale, change = SCALES[words]
    large = _changed(lambda values: scale * change(values), inputs)
    setting = Setting(model, large, words, may_overflow=True, draws=draws)
    if not _answers(setting):
        setting = replace(setting, inputs=_changed(lambda values: scale * values, inputs))
        if not _runs(setting):
            return None
    return setting.doubled() if draws > 1 else setting  # a small model: what is faint shows too


def _changed(change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Inputs whose sizes, which are floating point numbers, are others."""
    return each_tensor(lambda tensor: change(tensor) if tensor.is_floating_point() else tensor, inputs)


def _answers(setting: Setting) -> bool:
    """Whether a model runs on these inputs, and says numbers."""
    try:
        answer = output_tensors(call(setting.model, setting.inputs))
    except Exception:  # noqa: BLE001 - a model's own reasons
        return False
    return all(tensor.isfinite().all() for tensor in answer)


def _cheap_batch(inputs: Any) -> list[Any]:
    """Inputs of one row as several rows that differ, unless they are large."""
    tensors = all_values(inputs)
    if sum(tensor.numel() for tensor in tensors) * BATCH > CHEAP:
        return []

    def several(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != 1:
            return tensor
        tensor = tensor.repeat(BATCH, *[1] * (tensor.ndim - 1))
        return tensor + torch.randn_like(tensor) if tensor.is_floating_point() else tensor

    return [each_tensor(several, inputs)]


def _training(model: nn.Module) -> nn.Module:
    training = copy_of(model).train()
    for module in training.modules():
        if isinstance(module, AS_IN_EVAL):
            module.eval()
    return training


def _that_runs(model: nn.Module, candidates: Sequence[Any], words: str) -> Setting | None:
    settings = [Setting(model, inputs, words) for inputs in candidates]
    return next((setting for setting in settings if _runs(setting)), None)


# ---- trials


def keep_removable(settings: Sequence[Setting], groups: Sequence[Group], skipped: dict[str, str]) -> list[Group]:
    """Only the groups whose units can be taken out in every setting; the rest goes to `skipped`."""
    left, before = list(groups), -1
    while len(left) != before:  # what is left was tried out together, in every setting
        before = len(left)
        for number, setting in enumerate(settings):
            for draw in range(setting.draws):
                left = _removable(setting, left, skipped, seed=1000 * len(left) + 10 * number + draw)
    return left


def _removable(setting: Setting, groups: list[Group], skipped: dict[str, str], seed: int) -> list[Group]:
    if not groups or is_removable(setting, groups, seed):  # the common case costs two forward passes in all
        return groups
    if len(groups) == 1:
        skipped[groups[0].name] = _why(setting, seed) + setting.words
        return []
    middle = len(groups) // 2
    left = [_removable(setting, half, skipped, seed) for half in (groups[:middle], groups[middle:])]
    if not all(left) or is_removable(setting, [*left[0], *left[1]], seed):
        return [*left[0], *left[1]]
    return _one_by_one(setting, [*left[0], *left[1]], skipped, seed)


@torch.no_grad()
def _why(setting: Setting, seed: int) -> str:
    """Why units of one group cannot be taken out."""
    if any(value.isnan().any() for value in _answer(setting, setting.model, seed) if value.is_floating_point()):
        return (
            "the model answers NaN, so nothing can be compared: pass example_inputs to which it answers with numbers"
        )
    return "a model without some of them is not the model in which those are silent"


def _one_by_one(setting: Setting, groups: list[Group], skipped: dict[str, str], seed: int) -> list[Group]:
    """As many of some groups that can go alone, but not all at once, as go together."""
    together: list[Group] = []
    for group in groups:
        if is_removable(setting, [*together, group], seed):
            together.append(group)
        else:
            skipped[group.name] = (
                f"without some of them, and of {together[-1].name if together else 'others'}, a model is not the one "
                f"in which those are silent{setting.words}"
            )
    return together


@torch.no_grad()
def is_removable(setting: Setting, groups: Sequence[Group], seed: int) -> bool:
    """Whether random units of all groups can be taken out at once."""
    kept = _one_unit(groups, seed) if setting.least else _random_units(groups, seed)
    if _alike(setting, groups, kept, seed):
        return True
    exact = setting if setting.exact else setting.doubled()
    if exact is not setting and exact.model is not setting.model and _alike(exact, groups, kept, seed):
        return True
    return _says_nothing(exact, groups, kept, seed)


def _random_units(groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
    """Ascending indices by group: half of its units or more, so that the signal stays, but never all."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for number, group in enumerate(groups):
        if group.units == 2:  # any two groups differ in one of a few trials
            kept[group.name] = torch.tensor([number >> seed % 5 & 1])
        elif group.units > 2:
            kept[group.name] = _drawn(group.units, generator, with_gap=seed % 2 == 1)
    return kept


def _one_unit(groups: Sequence[Group], seed: int) -> dict[str, Tensor]:
    """Of every group a random unit, by group."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.randint(group.units, (1,), generator=generator) for group in groups if group.units > 1}


def _drawn(units: int, generator: torch.Generator, with_gap: bool) -> Tensor:
    """Ascending indices of some units; with a gap, neighbours are no longer neighbours."""
    while True:
        count = int(torch.randint((units + 1) // 2, units, (), generator=generator))
        index = torch.randperm(units, generator=generator)[:count].sort().values
        if not with_gap or int(index[-1] - index[0]) >= count:
            return index


def _alike(setting: Setting, groups: Sequence[Group], kept: dict[str, Tensor], seed: int) -> bool:
    small = cut(copy_of(setting.model, shared=setting.model.parameters()), groups, kept)  # puts new tensors there
    with _masked(setting.model, groups, kept) as silent_model:
        silent = _answer(setting, silent_model, seed)
    try:
        answer = _answer(setting, small, seed)
    except Exception:  # noqa: BLE001 - a size written into the forward pass may break it in any way
        return False
    return len(silent) == len(answer) > 0 and all(
        _equal(a, b, setting.fine) for a, b in zip(silent, answer, strict=True)
    )


@contextmanager
def _masked(model: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor]) -> Iterator[nn.Module]:
    """A model whose other units are silent for the length of a `with` block."""
    changed = {part.tensor for group in groups for part in group.silent_slices}
    saved = {name: model.get_parameter(name).detach().clone() for name in changed}
    try:
        yield mask(model, groups, kept)
    finally:
        for name, tensor in saved.items():
            model.get_parameter(name).copy_(tensor)


def _answer(setting: Setting, model: nn.Module, seed: int, with_read: bool = True) -> list[Tensor]:
    """What a model says, leaves behind and lets Python read of it."""
    seed_all(seed)
    with Reading(setting.against) as reading:
        answer = all_values(call(model, setting.inputs))
    return (
        answer
        + (reading.values if with_read else [])
        + [value for module in model.modules() for value in _scalars_left_on(module)]
        # a mean over channels that the next pass will use, say
        + [model.get_buffer(name) for name, value in setting.model.named_buffers() if value.numel() == 1]
    )


def _scalars_left_on(module: nn.Module) -> list[Tensor]:
    """Numbers that a forward pass left on a module: an auxiliary loss, say."""
    own = [value for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    return [tensor for value in own for tensor in _scalars_in(value)]


def _scalars_in(value: Any) -> Iterator[Tensor]:
    """Tensors of one entry among a value and what its lists and dicts hold."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _scalars_in(item)


def _says_nothing(setting: Setting, groups: Sequence[Group], kept: dict[str, Tensor], seed: int) -> bool:
    """Whether answers of this setting cannot be compared: they overflow, or are random in train mode."""
    if not setting.words:
        return False
    whole = _answer(setting, copy_of(setting.model), seed, with_read=False)
    if not all(value.isfinite().all() for value in whole):
        return setting.may_overflow
    again = _answer(setting, copy_of(setting.model), seed + 1, with_read=False)
    if all(map(_equal, whole, again)):
        return False
    try:
        small = _answer(setting, cut(copy_of(setting.model), groups, kept), seed, with_read=False)
    except Exception:  # noqa: BLE001 - as above
        return False
    return [value.shape for value in whole] == [value.shape for value in small]


def _equal(a: Tensor, b: Tensor, fine: bool = False) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.numel() or not a.is_floating_point():
        return torch.equal(a, b)
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite], b[~finite]):  # infinities alike; NaN is like nothing
        return False
    a, b = a[finite], b[finite]
    tolerance = (1e-10 if fine else 1e-6) if a.dtype == torch.float64 else 1e-4
    return not a.numel() or bool((a - b).abs().max() <= tolerance * (1 + a.abs().max()))
