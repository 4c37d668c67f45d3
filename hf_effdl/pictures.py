"""What all pictures of the package share: the colours, a figure to draw on, axes without a box."""

from typing import Any


CHOSEN, OTHER, LINE, DARK = "#d1495b", "#c9d1d9", "#2b4c7e", "#24292f"


def figure(width: float, height: float, dpi: int = 110) -> Any:
    """An empty matplotlib Figure in inches; it belongs to no window.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "matplotlib>=3.9"') from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def bare(*axes: Any) -> None:
    """Take the upper and the right border off."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
