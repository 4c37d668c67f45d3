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


def shades(count: int) -> list[tuple[float, float, float]]:
    """Colours from the first of the house to its grey, for so many lines."""
    from matplotlib.colors import to_rgb

    marks = [to_rgb(colour) for colour in (CHOSEN, LINE, OTHER)]
    places = [2 * i / max(count - 1, 1) * 0.9 for i in range(count)]
    return [
        tuple(a + (b - a) * (place % 1) for a, b in zip(marks[int(place)], marks[int(place) + 1], strict=True))
        for place in places
    ]
