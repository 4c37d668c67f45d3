"""What a search for a ticket is asked for, checked before it starts."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerState

from hf_effdl.structure.optim.sharding import is_sharded
from hf_effdl.structure.path.path import ORDERS, one_budget
from hf_effdl.structure.training.callbacks import check_split_lbi


def check_search(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range."""
    given = {name: settings[name] for name in ("macs", "params", "keep") if settings[name] is not None}
    if given:
        one_budget(**{name: settings[name] for name in ("macs", "params", "keep")})
    if settings["order"] not in ORDERS:
        raise ValueError(f"order={settings['order']!r}: it must be one of {ORDERS}")
    if settings["widths"] not in ("stock", "free"):
        raise ValueError(f"widths={settings['widths']!r}: it must be 'stock' or 'free'")
    for name in ("threshold", "within"):
        if not 0 < settings[name] <= 1:
            raise ValueError(f"{name}={settings[name]}: it is a share, in (0, 1]")
    if not settings["min_path"] >= 0:
        raise ValueError(f"min_path={settings['min_path']}: it is a path time, not below 0 (1 is one whole path)")
    for name, least in (("window", 2), ("patience", 1), ("every", 1), ("at_step", 1)):
        value = settings[name]
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r}: it must be a whole number, at least {least}")
    if settings["at_epoch"] is not None and not settings["at_epoch"] > 0:
        raise ValueError(f"at_epoch={settings['at_epoch']}: it must be above 0")
    if settings["at_step"] is not None and settings["at_epoch"] is not None:
        raise ValueError("give at_step or at_epoch, not both")
    for step in settings["weights_at"]:
        if type(step) is not int or step < 0:
            raise ValueError(f"weights_at={settings['weights_at']}: they must be steps, whole numbers not below 0")


def last_step(settings: Mapping[str, Any], state: TrainerState) -> int:
    """The step at which the ticket is taken at the latest."""
    within, step, epoch = (settings[name] for name in ("within", "at_step", "at_epoch"))
    last = max(1, math.floor(within * state.max_steps + 1e-9))
    if step is not None and step > last:
        raise ValueError(
            f"at_step={step} lies after within={within} of this run, which is step {last} of "
            f"{state.max_steps}; lower at_step or raise within"
        )
    if epoch is not None and epoch > within * state.num_train_epochs + 1e-9:
        raise ValueError(
            f"at_epoch={epoch} lies after within={within} of this run of {state.num_train_epochs} "
            "epochs; lower at_epoch or raise within"
        )
    return last


def check_run(model: nn.Module, optimizer: Any) -> None:
    """Refuse a run that no ticket can be read from."""
    check_split_lbi(model, optimizer, "a ticket is read from")
    if any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "the weights are sharded (FSDP2), and a ticket holds whole ones: find it with DDP, which a "
            "search this short rarely needs more than"
        )
    if not any(group["penalty"] == "group" for group in optimizer.param_groups):
        raise ValueError(
            "no param group of SplitLBI has penalty='group', so there are no units to select; pass "
            "params=param_groups(model, find_groups(model))"
        )
