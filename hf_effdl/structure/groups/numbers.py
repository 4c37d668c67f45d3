"""Whole numbers that modules keep of their units: as attributes, or in the config that they share."""

from collections.abc import Iterator
from typing import Any

from torch import nn


IN_CONFIG = "config."  # how the name of a number in a config starts


class OwnConfig:
    """The config that all modules of a model share, in which one module has some numbers of its own.

    A Phi-3 reads the number of its heads off the shared config at every step, so a layer with fewer heads needs its
    own. All else is read from the shared config, and written to it.

    Args:
        shared: of the model.
        own: the module's own numbers, by entry.
    """

    def __init__(self, shared: Any, own: dict[str, int]) -> None:
        vars(self).update(shared=shared, own=own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked while copies of this are made
            raise AttributeError(name)
        own = vars(self)["own"]
        return own[name] if name in own else getattr(vars(self)["shared"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["shared"], name, value)


def numbers_of(module: nn.Module, in_config: bool) -> Iterator[tuple[str, int]]:
    """Names and values of the whole numbers that a module keeps, as attributes or in its config."""
    if not in_config:
        values = vars(module)
    else:
        config = getattr(module, "config", None)
        values = {name: getattr(config, name, None) for name in config.to_dict()} if hasattr(config, "to_dict") else {}
    for name, value in sorted(values.items()):
        if type(value) is int and not name.startswith("_"):
            yield IN_CONFIG * in_config + name, value


def number_of(module: nn.Module, name: str) -> int | None:
    """A number of `numbers_of`; None where the module keeps none of that name."""
    if name.startswith(IN_CONFIG):
        value = getattr(getattr(module, "config", None), name.removeprefix(IN_CONFIG), None)
    else:
        value = vars(module).get(name)
    return value if type(value) is int else None


def set_number(module: nn.Module, name: str, value: int) -> None:
    """Change a number of `numbers_of`; one in a shared config changes for this module alone."""
    if not name.startswith(IN_CONFIG):
        setattr(module, name, value)
        return
    config, entry = module.config, name.removeprefix(IN_CONFIG)
    before = vars(config)["own"] if isinstance(config, OwnConfig) else {}
    module.config = OwnConfig(shared_config(module), {**before, entry: value})


def shared_config(module: nn.Module) -> Any:
    """The config that a module shares with others; None where it has none."""
    config = getattr(module, "config", None)
    return vars(config)["shared"] if isinstance(config, OwnConfig) else config


def own_numbers(module: nn.Module) -> dict[str, int]:
    """The numbers of a module's own in its config."""
    config = getattr(module, "config", None)
    return vars(config)["own"] if isinstance(config, OwnConfig) else {}


def is_number_name(name: str) -> bool:
    """Whether a text can name a number of a module: a plain attribute, or one of its config."""
    plain = name.removeprefix(IN_CONFIG)
    return plain.isidentifier() and not plain.startswith("_")
