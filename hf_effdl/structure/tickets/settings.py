"""What a ticket search may be told, refused by name."""

from collections.abc import Sequence
from typing import Any

from hf_effdl.checks import one_of, real_number, whole_number
from hf_effdl.structure.path.budget import one_budget
from hf_effdl.structure.path.path import ORDERS, WIDTHS


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that are out of range; numbers become those of Python."""
    budgets = {name: settings[name] for name in ("macs", "params", "keep")}
    if any(share is not None for share in budgets.values()):
        name, share = one_budget(**budgets)
        settings[name] = share
    for name, choices in (("order", ORDERS), ("widths", WIDTHS)):
        one_of(name, settings[name], choices)
    for name in ("threshold", "within", "min_path", "at_epoch"):
        if name != "at_epoch" or settings[name] is not None:
            settings[name] = real_number(name, settings[name])
    for name in ("threshold", "within"):
        if not 0 < settings[name] <= 1:
            raise ValueError(f"{name}={settings[name]}: it is a share, in (0, 1]")
    if not settings["min_path"] >= 0:
        raise ValueError(f"min_path={settings['min_path']}: it is a path time, not below 0 (1 is one whole path)")
    for name, least in (("window", 2), ("patience", 1), ("every", 1), ("at_step", 1)):
        if name in ("window", "patience") or settings[name] is not None:
            settings[name] = whole_number(name, settings[name], least)
    _check_given(settings)


def _check_given(settings: dict[str, Any]) -> None:
    """Refuse steps and epochs to take a ticket or weights at that no run has."""
    if settings["at_epoch"] is not None and not settings["at_epoch"] > 0:
        raise ValueError(f"at_epoch={settings['at_epoch']}: it must be above 0")
    if settings["at_step"] is not None and settings["at_epoch"] is not None:
        raise ValueError("give at_step or at_epoch, not both")
    steps = settings["weights_at"]
    if isinstance(steps, str | bytes) or not isinstance(steps, Sequence):
        raise TypeError(f"weights_at={steps!r}: pass a list of steps")
    settings["weights_at"] = list(steps)
    for step in steps:
        if type(step) is not int or step < 0:
            raise ValueError(f"weights_at={settings['weights_at']}: they must be steps, whole numbers not below 0")
