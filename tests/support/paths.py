"""What tests of paths share."""

from hf_effdl import SparsePath
from hf_effdl.structure.groups.ties import Tie, complete_ties


def ties_of(path: SparsePath, widths: str) -> list[Tie]:
    """What moves together in a path, as `select(widths=...)` has it."""
    units = {name: len(unit["dual"]) for name, unit in path.units.items()}
    return complete_ties(path.ties if widths == "stock" else (), units)
