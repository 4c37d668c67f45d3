"""Pictures of a selection. Need matplotlib (the extra `plot`)."""

import textwrap
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from datasets import Dataset, Image

from hf_effdl.pictures import CHOSEN, DARK, LINE, OTHER, bare, figure
from hf_effdl.samples.probes.inputs import NOT_INPUTS, check_dataset, is_image, is_text
from hf_effdl.samples.probes.scoring import SCORES
from hf_effdl.samples.selection.findings import (
    SHOWN_CLASSES,
    class_counts,
    clip_value,
    describe_row,
    drawing_score,
    most_changed,
    suspect_positions,
    uncertainty_column,
)
from hf_effdl.samples.selection.rows import SelectedRows


WIDTH, BINS = 13.0, (12, 40)
# heights in inches: of a line of text, of a title over a row of examples
LINE_HEIGHT, TITLE_HEIGHT = 0.165, 0.4
# characters that fit beside each other, measured on the figures that come out
LINE_CHARACTERS, TILE_CHARACTERS, NAME_CHARACTERS = 190, 24, 30
# images beside each other, or fewer would be shown too large; pixels of the longer side of one
TILES, THUMBNAIL = 6, 256
# an array with a shorter side, or a longer shape, is no picture
LEAST_SIDE, LONGEST_RATIO = 8, 4


def plot_scores(selection: SelectedRows) -> Any:
    """The score that rows were drawn by: how it is spread over the pool and over the selected rows.

    Returns:
        A matplotlib Figure. Bars are shares of the pool, the line shares of the selected; the clip is dashed.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a score table without uncertainties.
    """
    sheet = figure(7.5, 4)
    _draw_scores(sheet.subplots(), selection)
    return sheet


def plot_classes(selection: SelectedRows) -> Any:
    """Shares of the classes in the pool and among the selected rows; of many classes those that changed most.

    Returns:
        A matplotlib Figure. Classes are the labels, without them the probes' votes.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a score table without labels and votes.
    """
    sheet = figure(6, _classes_height(selection))
    _draw_classes(sheet.subplots(), selection)
    return sheet


def plot_examples(selection: SelectedRows, count: int = 8, column: str | None = None) -> Any:
    """Rows of the pool: the least certain, the most certain, and the likeliest label errors.

    Args:
        selection: with its `pool`.
        count: rows of each kind.
        column: what to show of a row: an image, an array that is one, or a text; default: the first image column,
            else the longest texts, else the numbers of the row.

    Returns:
        A matplotlib Figure. Selected rows have a red frame or bar. Scripts that matplotlib's font lacks need another
        one: `matplotlib.rcParams["font.family"]`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the data set is not at hand, is another one, or lacks the column.
    """
    rows = _examples(selection, count, column)
    sheet = figure(WIDTH, rows.height)
    rows.draw(sheet)
    return sheet


def plot_overview(selection: SelectedRows) -> Any:
    """`plot_scores` and `plot_classes` beside each other, as far as the score table has what they show."""
    sheet = figure(WIDTH, _classes_height(selection))
    _draw_overview(sheet, selection)
    return sheet


def plot_selection(selection: SelectedRows, count: int = 8, column: str | None = None) -> Any:
    """Everything in one figure; where the data set is not at hand it says so in place of the examples."""
    top = _classes_height(selection)
    if selection.pool is None:
        sheet = figure(WIDTH, top + TITLE_HEIGHT)
        _draw_overview(sheet, selection)
        sheet.supxlabel(
            "No examples: the data set is not at hand. Set selection.pool to the data set that was scored.",
            fontsize=9,
            color=DARK,
        )
        return sheet
    rows = _examples(selection, count, column)
    sheet = figure(WIDTH, top + rows.height)
    upper, lower = sheet.subfigures(2, 1, height_ratios=[top, rows.height])
    _draw_overview(upper, selection)
    rows.draw(lower)
    return sheet


def _draw_overview(sheet: Any, selection: SelectedRows) -> None:
    # a table made by hand may lack what one of them shows
    panels = [(_draw_scores, 1.2)] if drawing_score(selection)[0] is not None else []
    panels += [(_draw_classes, 1)] if class_counts(selection) or not panels else []
    widths = [width for _, width in panels]
    row = sheet.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (draw, _) in zip(row, panels, strict=True):
        draw(axes, selection)


# ---- scores


def _draw_scores(axes: Any, selection: SelectedRows) -> None:
    scores, name = drawing_score(selection)
    if scores is None:
        raise ValueError(f"the score table holds {sorted(selection.table)}, neither the score of the draw nor u_x")
    values, clip = scores.double().numpy(), clip_value(selection)
    edges, log = _edges(values, len(selection))
    chosen = values[selection.plan.positions.numpy()]
    _draw_bars(axes, values, edges, color=OTHER, label=f"pool ({len(values):,} rows)")
    line = {"histtype": "step", "lw": 1.8}
    _draw_bars(axes, chosen, edges, color=CHOSEN, label=f"selected ({len(selection):,} rows)", **line)
    if log:
        _log_axis(axes, edges)
    if clip is not None:
        label = f"clip {clip:.3g}: {(values >= clip).mean():.0%} of the pool at or above"
        axes.axvline(clip, ymax=0.85, color=LINE, ls="--", lw=1.4, label=label)
    axes.set_title(_scores_title(name, selection.plan.settings), loc="left", fontsize=11)
    beyond = [f"first bar: below {edges[0]:.3g}"] if values.min() < edges[0] else []
    beyond += [f"last bar: above {edges[-1]:.3g}"] if values.max() > edges[-1] else []
    axes.set_xlabel(name + (f" ({', '.join(beyond)})" if beyond else ""))
    axes.set_ylabel("share of the rows, %")
    # room for the legend, which would else cover bars
    axes.margins(x=0.01)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.22)
    axes.legend(fontsize=8, loc="upper left", frameon=False, ncols=2 if clip is None else 3, columnspacing=1.2)
    bare(axes)


def _draw_bars(axes: Any, values: np.ndarray, edges: np.ndarray, **how: Any) -> None:
    # rows beyond the ends stand in the first and last bar
    shares = np.full(len(values), 100 / len(values))
    axes.hist(values.clip(edges[0], edges[-1]), edges, weights=shares, **how)


def _scores_title(name: str, settings: Mapping[str, Any]) -> str:
    title = f"{'Uncertainty' if name in ('u_x', 'u_y') else 'Score'} {name}"
    if settings.get("quotas") == "strata":
        return f"{title}: rows were drawn uniformly in each stratum"
    how = {name: ": the draw's score", "uniform": ": rows were drawn uniformly"}
    return title + how.get(settings.get("score"), "")


def _log_axis(axes: Any, edges: np.ndarray) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    # matplotlib's own labels between the powers of ten run into each other
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 300 * edges[0] else (1,), numticks=12))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _edges(values: np.ndarray, selected: int) -> tuple[np.ndarray, bool]:
    """Edges of the bars, and whether they are logarithmic: where the bulk of the scores spans more than a decade."""
    bars = int(np.clip(2 * selected**0.5, *BINS)) + 1  # few rows in many bars are all noise
    least, low, bottom, top, high, most = np.quantile(values, [0.0, 0.01, 0.05, 0.95, 0.99, 1.0])
    # the axis goes to the ends of the scores unless one per cent of them would take most of it
    if bottom > 0 and top / bottom > 10:
        return np.geomspace(least if least > low / 3 else low, most if most < 3 * high else high, bars), True
    if high == low:
        return np.linspace(low - 0.5, low + 0.5, bars), False
    room = (high - low) / 3
    return np.linspace(max(least, low - room), min(most, high + room), bars), False


# ---- classes


def _classes_height(selection: SelectedRows) -> float:
    return max(3.6, 1.2 + 0.2 * min(len(class_counts(selection)), SHOWN_CLASSES))


def _draw_classes(axes: Any, selection: SelectedRows) -> None:
    classes = class_counts(selection)
    if not classes:
        raise ValueError(f"the score table holds {sorted(selection.table)}, neither labels nor the probes' votes")
    shown = range(len(classes)) if len(classes) <= SHOWN_CLASSES else most_changed(classes, SHOWN_CLASSES)
    places = np.arange(len(shown))
    for key, color, label, shift in (("pool", OTHER, "pool", -0.2), ("selected", CHOSEN, "selected", 0.2)):
        total = sum(row[key] for row in classes)
        axes.barh(places + shift, [100 * classes[c][key] / total for c in shown], 0.4, color=color, label=label)
    axes.set_yticks(places, [_shorten(classes[c]["class"], NAME_CHARACTERS) for c in shown], fontsize=8)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name may hold dollar signs
    inches = _classes_height(selection) - 1.3  # what is left for the bars
    axes.set_ylim(len(shown) - 0.4, -0.6 - 0.3 * len(shown) / inches)  # room for the legend
    axes.set_xlabel("share of the rows, %")
    what = "Classes" if "label" in selection.table else "Classes the probes vote for"
    some = "" if len(shown) == len(classes) else f": {len(shown)} of {len(classes)}, those that changed most"
    axes.set_title(what + some, loc="left", fontsize=11)
    axes.legend(fontsize=8, loc="upper left", frameon=False, ncols=2)
    bare(axes)


# ---- rows


UNSURE, SURE, SUSPECTS = "Least certain", "Most certain", "Suspected label errors"


class _Examples:
    """Rows to show: what their kinds are, what is shown of them, and, as subclasses know, how much room that takes."""

    height: float

    def __init__(self, selection: SelectedRows, kinds: dict[str, list[int]], shown: dict[int, Any]) -> None:
        self.selection, self.kinds, self.shown = selection, kinds, shown
        self.chosen = set(selection.plan.positions.tolist())

    def draw(self, sheet: Any) -> None:
        raise NotImplementedError

    def describe(self, position: int, kind: str) -> tuple[Mapping[str, Any], str]:
        """What is known of a row, and the number it is shown for."""
        row, name = describe_row(self.selection, position), uncertainty_column(self.selection)
        if kind == SUSPECTS or name is None:
            return row, f"p(label) {row['p_label']:.2g}"
        return row, f"u {self.selection.table[name][position].item():.3g}"


class _Tiles(_Examples):
    """Images beside each other, a strip for each kind."""

    def __init__(self, selection: SelectedRows, kinds: dict[str, list[int]], shown: dict[int, Any]) -> None:
        super().__init__(selection, kinds, shown)
        self.across = max(TILES, *map(len, kinds.values()))
        self.height = len(kinds) * (WIDTH / self.across + TITLE_HEIGHT + 0.5)

    def draw(self, sheet: Any) -> None:
        strips = sheet.subfigures(len(self.kinds), 1, squeeze=False)[:, 0]
        for strip, (kind, positions) in zip(strips, self.kinds.items(), strict=True):
            strip.suptitle(f"{kind}  (red frame: selected)", x=0.01, ha="left", fontsize=11)
            for place, axes in enumerate(strip.subplots(1, self.across, squeeze=False)[0]):
                if place >= len(positions):
                    axes.set_axis_off()
                    continue
                self._draw_image(axes, positions[place], kind)

    def _draw_image(self, axes: Any, position: int, kind: str) -> None:
        image = self.shown[position]
        if image is not None:
            axes.imshow(image, cmap="gray" if image.ndim == 2 else None)
        else:
            axes.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=8, color=DARK)
            axes.set_box_aspect(1)
        axes.set_anchor("N")  # captions of wide and of tall images stand on one line
        axes.set_xticks([])
        axes.set_yticks([])
        inside = position in self.chosen
        for spine in axes.spines.values():
            spine.set(color=CHOSEN if inside else OTHER, linewidth=2.5 if inside else 0.8)
        row, number = self.describe(position, kind)
        names = [f"{key} {_shorten(row[key], TILE_CHARACTERS - 6)}" for key in ("label", "vote") if row[key]]
        axes.set_title("\n".join(names), fontsize=8, parse_math=False, pad=4)
        axes.set_xlabel(f"row {_tail(row['row_id'], TILE_CHARACTERS - 6)}\n{number}", fontsize=8, parse_math=False)


class _Texts(_Examples):
    """Texts below each other, a column for each kind."""

    def __init__(self, selection: SelectedRows, kinds: dict[str, list[int]], shown: dict[int, Any]) -> None:
        super().__init__(selection, kinds, shown)
        self.lines = {kind: [self._lines(i, kind) for i in positions] for kind, positions in kinds.items()}
        self.deepest = max(sum(len(lines) + 0.6 for lines in column) for column in self.lines.values())
        self.height = self.deepest * LINE_HEIGHT + TITLE_HEIGHT + 0.2

    def draw(self, sheet: Any) -> None:
        for axes, (kind, column) in zip(
            sheet.subplots(1, len(self.kinds), squeeze=False)[0], self.lines.items(), strict=True
        ):
            axes.set_title(f"{kind}  (red bar: selected)", loc="left", fontsize=11)
            axes.set_axis_off()
            axes.set(xlim=(0, 1), ylim=(self.deepest, 0))
            top = 0.2
            for position, lines in zip(self.kinds[kind], column, strict=True):
                color = CHOSEN if position in self.chosen else OTHER
                axes.plot([0.006, 0.006], [top, top + len(lines)], color=color, lw=3, solid_capstyle="butt")
                for place, (line, bold) in enumerate(lines):
                    axes.text(
                        0.025,
                        top + place + 0.5,
                        line,
                        fontsize=8,
                        va="center",
                        parse_math=False,
                        clip_on=True,
                        color=DARK,
                        weight="bold" if bold else "normal",
                    )
                top += len(lines) + 0.6

    def _lines(self, position: int, kind: str) -> list[tuple[str, bool]]:
        """The lines about a row, and whether they are bold."""
        row, number = self.describe(position, kind)
        wide = LINE_CHARACTERS // len(self.kinds)
        names = [f"{key} {_shorten(row[key], wide - 8)}" for key in ("label", "vote") if row[key]]
        if row["label"] is not None and row["label"] == row["vote"]:
            names = [f"label and vote {_shorten(row['label'], wide - 18)}"]
        head = [f"row {_tail(row['row_id'], 36)}, {number}", *names]
        body = textwrap.wrap(self.shown[position], wide, max_lines=3, placeholder=" …")
        return [(line, True) for line in head] + [(line, False) for line in body]


def _examples(selection: SelectedRows, count: int, column: str | None) -> _Tiles | _Texts:
    """The rows at both ends and the likeliest label errors, read once."""
    pool, kinds = _pool(selection, column), _kinds(selection, count)
    positions = list(dict.fromkeys(i for of_kind in kinds.values() for i in of_kind))
    values = _read(pool, positions, [column] if column else _columns(selection, pool))
    images = _images(pool, values)
    shown = images or _texts(pool, values, len(positions))
    if column and not any(value is not None and len(value) for value in shown):
        raise ValueError(f"column={column!r} holds {pool.features[column]}, neither images nor texts nor numbers")
    return (_Tiles if images else _Texts)(selection, kinds, dict(zip(positions, shown, strict=True)))


def _pool(selection: SelectedRows, column: str | None) -> Dataset:
    """The data set that was selected from, with the column that is to be shown."""
    if selection.pool is None:
        raise ValueError("the data set is not at hand; set selection.pool to the data set that was scored")
    pool = check_dataset(selection.pool, [column] if column else [], "selection.pool")
    if len(pool) != selection.plan.rows:
        raise ValueError(
            f"selection.pool has {len(pool)} rows and the selection was made from "
            f"{selection.plan.rows}; set it to the data set that was scored"
        )
    return pool


def _kinds(selection: SelectedRows, count: int) -> dict[str, list[int]]:
    """Positions of the rows of each kind that there is."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"count={count!r}: show one row or more of each kind")
    name = uncertainty_column(selection)
    order = None if name is None else selection.table[name].argsort(stable=True)
    suspects = suspect_positions(selection)
    kinds = {} if order is None else {UNSURE: order.flip(0)[:count].tolist(), SURE: order[:count].tolist()}
    if suspects is not None and len(suspects):
        kinds[SUSPECTS] = suspects[:count].tolist()
    if not kinds:
        raise ValueError(
            f"the score table holds {sorted(selection.table)}, neither uncertainties nor p_clean and "
            "p_label, so there are no examples to single out"
        )
    return kinds


def _columns(selection: SelectedRows, pool: Dataset) -> list[str]:
    """What may be shown of a row; sound and films may not, and need decoders that may not be there."""
    ignored = {*SCORES, *NOT_INPUTS, selection.info.get("label_column"), selection.info.get("id_column")}
    return [
        name
        for name, feature in pool.features.items()
        if name not in ignored and (is_image(feature) or not hasattr(feature, "decode_example"))
    ]


def _read(pool: Dataset, positions: Sequence[int], columns: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The rows' values as they are stored: transforms are for training."""
    rows = pool.with_format(None).select_columns(list(columns)).select(positions)
    for name, feature in rows.features.items():
        if is_image(feature) and not feature.decode:
            rows = rows.cast_column(name, Image())
    return {name: rows[name][:] for name in columns}


def _images(pool: Dataset, values: Mapping[str, Sequence[Any]]) -> list[np.ndarray | None] | None:
    """The first column that holds images, as arrays that matplotlib shows; None if there is none."""
    for name, column in values.items():
        if is_image(pool.features[name]):
            return [None if value is None else _from_pil(value) for value in column]
    for column in values.values():
        images = [_from_array(value) for value in column]
        if all(image is not None for image in images):
            return images
    return None


def _from_pil(image: Any) -> np.ndarray:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))  # a figure of photographs would else take hundreds of megabytes
    if image.mode[0] in "IF":  # 16 and 32 bits a pixel, which a conversion would cut off
        return np.asarray(image, dtype=float)
    return np.asarray(image if image.mode == "L" else image.convert("RGB"))


def _from_array(value: Any) -> np.ndarray | None:
    """An array of shape (H, W), (1 or 3, H, W) or (H, W, 1 or 3) as an image with values in [0, 1]."""
    nested = isinstance(value, (list, np.ndarray)) and len(value) and isinstance(value[0], (list, np.ndarray))
    if not nested:
        return None
    try:
        array = _channels_last(np.asarray(value, dtype=float))
    except ValueError:  # ragged, or texts
        return None
    if not _is_picture(array.shape):
        return None
    low, high = np.nanmin(array), np.nanmax(array)
    return (array - low) / (high - low) if high > low else np.zeros_like(array)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Channels behind, and left out where there is one."""
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _is_picture(shape: tuple[int, ...]) -> bool:
    channels = shape[2:] in ((), (3,))
    return channels and min(shape[:2]) >= LEAST_SIDE and max(shape[:2]) <= LONGEST_RATIO * min(shape[:2])


def _texts(pool: Dataset, values: Mapping[str, Sequence[Any]], rows: int) -> list[str]:
    """The column with the longest texts; else the row's numbers."""
    texts = [
        [" ".join(value.split()) if value else "(empty)" for value in column]
        for name, column in values.items()
        if is_text(pool.features[name])
    ]
    if texts:
        return max(texts, key=lambda column: sum(map(len, column)))
    numbers = {name: column for name, column in values.items() if all(map(_is_number, column))}
    return [", ".join(f"{name} {column[i]:.4g}" for name, column in numbers.items()) for i in range(rows)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _tail(row_id: int | str, characters: int) -> str:
    """The end of a name, where paths and numbers differ."""
    text = str(row_id)
    return text if len(text) <= characters else "..." + text[3 - characters :]


def _shorten(text: str, characters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= characters else text[: characters - 3].rstrip("_- ") + "..."
