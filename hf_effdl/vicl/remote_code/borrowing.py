"""Modules that use another module without owning it."""

from torch import nn


def borrow(borrower: nn.Module, name: str, module: nn.Module | None) -> None:
    """Set an attribute that torch does not register: the module is neither trained, saved nor moved with the borrower.

    Past `nn.Module.__setattr__`, which registers every module that it is given, whatever descriptor stands in the way.
    """
    object.__setattr__(borrower, name, module)
