"""What a selection did, in numbers and words."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch

from hf_effdl.files import filled_beside, locked
from hf_effdl.hub.cards import markdown_table
from hf_effdl.samples.drawing.presets import ENOUGH_ROWS, HARD_ROWS_HELP, NEARLY_SOLVED
from hf_effdl.samples.drawing.quotas import even_shares
from hf_effdl.samples.scores.noise import NOISY
from hf_effdl.samples.selection.findings import (
    DAMPED,
    SHOWN_CLASSES,
    SURE,
    agreement,
    capped_share,
    class_counts,
    describe_rows,
    mode_of,
    most_changed,
    noise_of,
    refilled_rows,
    spread,
    suspect_positions,
)
from hf_effdl.samples.selection.pictures import plot_examples, plot_overview, plot_selection
from hf_effdl.samples.selection.rows import SelectedRows


SHOWN_SUSPECTS, SHOWN_NAMES = 20, 8


@dataclass(repr=False)
class SelectionReport:
    """A selection in numbers; `print` it, `save` it, or read the attributes, which are plain values.

    Attributes:
        rows, selected, share: size of the pool, chosen rows, and their ratio.
        mode, preset, regime: of the plan; the last two are None for a plan made by hand.
        recipe: one sentence: which rows, drawn how, and why so.
        noise_rate: share of labels that look wrong; None without labels.
        trial_accuracy: of a small model trained on as many rows, or of the probes (active mode); None if not known.
        agreement: share of rows whose label is the probes' vote; None without labels.
        mean_confidence: mean over the pool of the likeliest class' probability.
        kish, kish_share: effective sample size of the weights, in rows and as a share of the selected.
        max_to_median: largest over median weight.
        refilled: selected rows that the regime's filter did not keep (there were too few others); None: no filter.
        counted_by: `"label"`, or `"predicted"` where there are no labels: what `classes` counts.
        classes: for each class `class` (name), `pool`, `kept` (by the filter; None without one), `selected` (rows) and
            `share` (selected over pool; None for a class without rows).
        uncertainty: `column`; `below_0.005` and `above_0.1`, shares of the pool; `quantiles`.
        capped: share of the pool at or above the clip, which is drawn alike; None without a clip.
        suspect_count: rows whose label is likelier drawn at random than meant (`p_clean < 1/2`).
        suspects: the 20 least likely labels among them: `row_id`, `label`, `vote`, `p_label`, `p_clean`, `selected`.
        warnings: sentences; empty if nothing is odd.

    Example:
        >>> from hf_effdl import Selection, make_plan
        >>> table = {"u_x": torch.rand(100), "predicted": torch.arange(100) % 4, "confidence": torch.ones(100)}
        >>> Selection(make_plan(table, 20, quotas="predicted", weights="none"), table).report()
        SelectionReport(20 of 100 rows, 0 warnings)
    """

    rows: int
    selected: int
    share: float
    mode: str
    preset: str | None
    regime: str | None
    recipe: str
    noise_rate: float | None
    trial_accuracy: float | None
    agreement: float | None
    mean_confidence: float | None
    kish: float
    kish_share: float
    max_to_median: float
    refilled: int | None
    counted_by: str | None
    classes: list[dict[str, Any]]
    uncertainty: dict[str, Any] | None
    capped: float | None
    suspect_count: int | None
    suspects: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    selection: SelectedRows | None = None

    @classmethod
    def of(cls, selection: SelectedRows) -> Self:
        """The report of a selection; score columns that it lacks leave their attributes None."""
        plan, table, settings = selection.plan, selection.table, selection.plan.settings
        noise, weights = noise_of(selection), plan.weights.double()
        suspects = suspect_positions(selection)
        shown = [] if suspects is None else suspects[:SHOWN_SUSPECTS].tolist()
        report = cls(
            rows=plan.rows,
            selected=len(plan),
            share=len(plan) / plan.rows,
            mode=mode_of(selection),
            preset=settings.get("preset"),
            regime=settings.get("regime"),
            recipe=_recipe(settings, noise),
            noise_rate=noise,
            trial_accuracy=settings.get("trial_accuracy"),
            agreement=agreement(selection),
            mean_confidence=table["confidence"].double().mean().item() if "confidence" in table else None,
            kish=plan.kish,
            kish_share=plan.kish / len(plan),
            max_to_median=(weights.max() / weights.median()).item(),
            refilled=refilled_rows(selection),
            counted_by=next((name for name in ("label", "predicted") if name in table), None),
            classes=class_counts(selection),
            uncertainty=spread(selection),
            capped=capped_share(selection),
            suspect_count=None if suspects is None else len(suspects),
            suspects=describe_rows(selection, shown),
            selection=selection,
        )
        report.warnings = _warnings(report, settings)
        return report

    def all_suspects(self) -> list[dict[str, Any]]:
        """Every suspected label error, the least likely label first; see `suspects`."""
        positions = suspect_positions(self.selection)
        return describe_rows(self.selection, [] if positions is None else positions.tolist())

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain values that `json.dumps` takes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "selection"}

    def plot(self, count: int = 8, column: str | None = None) -> Any:
        """See `Selection.plot`."""
        return plot_selection(self.selection, count, column)

    def save(self, folder: str | os.PathLike[str], examples: bool = True) -> list[Path]:
        """Write `report.md`, `report.json`, `selection.png` and `examples.png`, all of them or none.

        Without matplotlib the pictures are left out, with a warning; without the data set the examples are.

        Args:
            folder: made if need be.
            examples: False leaves the picture of rows out, for data that may not be passed on.

        Returns:
            The files written.
        """
        folder, pictures, text = Path(folder), self._pictures(examples), str(self)
        with locked(folder), filled_beside(folder) as scratch:
            for name, picture in pictures.items():
                picture.savefig(scratch / name, format="png")
                text += f"\n\n![{'rows of the pool' if name == 'examples.png' else 'scores and classes'}]({name})"
            numbers = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
            (scratch / "report.md").write_text(text + "\n", encoding="utf-8")
            (scratch / "report.json").write_text(numbers + "\n", encoding="utf-8")
        return [folder / name for name in (*pictures, "report.md", "report.json")]

    def _pictures(self, examples: bool) -> dict[str, Any]:
        try:
            pictures = {"selection.png": plot_overview(self.selection)}
            if examples and self.selection.pool is not None:
                pictures["examples.png"] = plot_examples(self.selection)
        except ImportError as error:
            warnings.warn(f"the report is saved without pictures: {error}", stacklevel=3)
            return {}
        return pictures

    def __repr__(self) -> str:
        named = "".join(f", {k}={v!r}" for k in ("preset", "regime") if (v := getattr(self, k)) is not None)
        count = len(self.warnings)
        return f"SelectionReport({self.selected:,} of {self.rows:,} rows{named}, {count} warning{'s' * (count != 1)})"

    def _repr_markdown_(self) -> str:
        return str(self)

    def __str__(self) -> str:
        blocks = [f"### {self.selected:,} of {self.rows:,} rows selected ({_percent(self.share)})", self.recipe]
        blocks.append("\n".join(f"- {line}" for line in self._lines()))
        if self.warnings:
            blocks.append("**Warnings**\n\n" + "\n".join(f"- {_escape(text)}" for text in self.warnings))
        if self.classes:
            blocks.append(self._class_table())
        if self.suspects:
            blocks.append(self._suspect_table())
        return "\n\n".join(blocks)

    def _lines(self) -> list[str]:
        lines = [
            f"mode `{self.mode}`, "
            + (f"preset `{self.preset}`" if self.preset else "settings given by hand")
            + (f", regime `{self.regime}`" if self.regime else ""),
            f"effective size of the weights (Kish): {self.kish:,.1f} rows, {_percent(self.kish_share)} of the "
            f"selected; the largest weight is {self.max_to_median:.3g} times the median",
        ]
        if self.noise_rate is not None:
            votes = "" if self.agreement is None else f"; {_percent(self.agreement)} are what the probes vote for"
            lines.append(f"labels: about {_percent(self.noise_rate)} look wrong{votes}")
        if self.trial_accuracy is not None:
            whose = (
                "the probes, on rows they were not trained on"
                if self.mode == "active"
                else ("a small model trained on as many random rows")
            )
            lines.append(f"accuracy of {whose}: {self.trial_accuracy:.3f}")
        if self.refilled:
            lines.append(f"{self.refilled:,} selected rows did not pass the filter: it left too few others")
        if self.uncertainty is not None:
            u, q = self.uncertainty, self.uncertainty["quantiles"]
            lines.append(
                f"uncertainty `{u['column']}`: {_percent(u[f'below_{SURE}'])} of the rows below {SURE}, "
                f"{_percent(u[f'above_{DAMPED}'])} above {DAMPED}; median {_number(q['0.5'])}, 5 % to 95 %: "
                f"{_number(q['0.05'])} to {_number(q['0.95'])}"
            )
        if self.mean_confidence is not None:
            lines.append(f"mean confidence of the probes: {self.mean_confidence:.3f}")
        return lines

    def _class_table(self) -> str:
        rows, what = self.classes, "the label" if self.counted_by == "label" else "the class the probes vote for"
        title = f"Rows by {what}"
        if len(rows) > SHOWN_CLASSES:
            rows = [rows[i] for i in most_changed(rows, SHOWN_CLASSES)]
            title += f" ({len(rows)} of {len(self.classes)} classes, those whose share of the rows changed most)"
        columns = {
            "class": "class",
            "pool": "pool",
            "kept": "kept by the filter",
            "selected": "selected",
            "share": "selected / pool",
        }
        if self.refilled is None:
            del columns["kept"]
        shown = [
            row | {"class": _escape(row["class"]), "share": None if row["share"] is None else _percent(row["share"])}
            for row in rows
        ]
        return f"{title}:\n\n{markdown_table(shown, columns)}"

    def _suspect_table(self) -> str:
        rows = [
            suspect
            | {name: _escape(str(suspect[name])) for name in ("row_id", "label", "vote")}
            | {"selected": "yes" if suspect["selected"] else "no", "p_label": _number(suspect["p_label"], 2)}
            for suspect in self.suspects
        ]
        columns = {
            "row_id": "row",
            "label": "label",
            "vote": "probes' vote",
            "p_label": "probability of the label",
            "selected": "selected",
        }
        shown = "" if len(rows) == self.suspect_count else f"; the {len(rows)} least likely"
        count = f"{self.suspect_count:,} row{'s' * (self.suspect_count != 1)}"
        return f"Suspected label errors: {count}{shown}:\n\n{markdown_table(rows, columns)}"


# ---- words


def _recipe(settings: Mapping[str, Any], noise: float | None) -> str:
    """One sentence from the settings, which hold also when some were overridden."""
    score, regime = settings.get("score"), settings.get("regime")
    likely = "rows whose label is not likely to be random"
    which = {"agreement": "rows whose label is what the probes vote for", "clipped": likely, "unclipped": likely}
    # the regimes of active mode filter nothing; only those of labelled pools have read the noise
    first = which.get(regime, "rows") if "noise_rate" in settings else "rows"
    shares = {
        "label": " in equal shares of the classes",
        "predicted": " in equal shares of the classes voted for",
        "strata": f" in equal shares of {settings.get('bins')} strata of {score}",
        "none": " of whatever class",
    }
    words = [first + ("," if first != "rows" else "") + shares.get(settings.get("quotas"), "")]
    if settings.get("sampler") == "top-k":
        words.append(f"those with the largest {score}")
    elif score == "uniform" or settings.get("quotas") == "strata":
        words.append("drawn uniformly" + (" inside each" if settings.get("quotas") == "strata" else ""))
    elif score is not None:
        quantile, clip = settings.get("clip_quantile"), settings.get("clip")
        cap = f" up to {clip:g}" if clip is not None else ""
        if quantile is not None:
            cap = " up to its median" if quantile == 0.5 else f" up to its {quantile:.0%} quantile"
        words.append(f"drawn in proportion to {score}{cap}")
    weights = {
        "p_label": "weighted by the probability of their label",
        "none": "of equal weight",
        "damped": f"weighted by one over the uncertainty, damped at {settings.get('beta')}",
        "exact": "weighted by one over the probability of being drawn",
    }
    words += [weights[settings["weights"]]] if settings.get("weights") in weights else []
    what = ", ".join(words)
    why = _reason(settings, noise)
    return f"{what[0].upper()}{what[1:]}{': ' + why if why else ''}."


def _reason(settings: Mapping[str, Any], noise: float | None) -> str:
    regime, accuracy = settings.get("regime"), settings.get("trial_accuracy")
    if settings.get("preset") == "paper":
        return "the recipe of the released code"
    if regime is None:
        return ""
    labelled = "noise_rate" in settings
    if labelled and noise > NOISY:
        return f"about {_percent(noise)} of the labels look wrong, and above {_percent(NOISY)} filtering pays most"
    if accuracy is None:
        return "it is not known how well a model does on so few rows, and the hardest rows pay only if it does well"
    who = "a small model trained on as many random rows" if labelled else "the probes' vote on rows they have not seen"
    told = f"{who} {'reaches' if labelled else 'has'} an accuracy of {accuracy:.3f}, and "
    rows = settings.get("budget", 0) / settings["classes"] if "classes" in settings else math.inf
    if regime == "agreement" and accuracy >= HARD_ROWS_HELP:
        return f"{told}{rows:.3g} rows a class are too few for hard ones"
    if regime == "clipped" and accuracy >= NEARLY_SOLVED and rows < ENOUGH_ROWS:
        return f"{told}the hardest rows pay only from {ENOUGH_ROWS} rows a class"
    return told + {
        "agreement": f"below {HARD_ROWS_HELP} hard rows hurt",
        "uniform": f"below {HARD_ROWS_HELP} hard rows hurt",
        "clipped": f"from {HARD_ROWS_HELP} hard rows help, the hardest only from {NEARLY_SOLVED}",
        "unclipped": f"from {NEARLY_SOLVED} the hardest rows are worth most",
    }.get(regime, f"the regime is {regime}")


def _warnings(report: SelectionReport, settings: Mapping[str, Any]) -> list[str]:
    warned = _label_warnings(report) + _weight_warnings(report, settings)
    classes = [row for row in report.classes if row["pool"]]
    return warned + _class_warnings(report, settings, classes) if classes else warned


def _label_warnings(report: SelectionReport) -> list[str]:
    """Of labels that look wrong, and of probes that are weak."""
    warned = []
    if unseen := report.selection.info.get("unseen_classes"):
        classes = _names([f"{name} ({count} rows)" for name, count in unseen.items()])
        warned.append(
            f"no probe was trained on a row of {classes}: "
            "the probes cannot judge these labels, so their rows have the median weight and none is suspected"
        )
    if report.noise_rate is not None and report.noise_rate > NOISY:
        warned.append(
            f"about {_percent(report.noise_rate)} of the labels look wrong (weak probes read high); see the "
            "suspected label errors"
        )
    chance = 1 / max(2, len(report.classes))
    # a third of the way from a blind guess to certainty
    if report.mean_confidence is not None and report.mean_confidence < chance + (1 - chance) / 3:
        warned.append(
            f"the probes are weak: their mean confidence is {report.mean_confidence:.2f} with "
            f"{len(report.classes)} classes; their scores say little, train them on more rows or better "
            "features"
        )
    if report.agreement is not None and report.agreement < 0.5:
        warned.append(
            f"the probes vote for only {_percent(report.agreement)} of the labels: they are weak, or most "
            "labels are wrong"
        )
    return warned


def _weight_warnings(report: SelectionReport, settings: Mapping[str, Any]) -> list[str]:
    """Of weights that few rows carry, and of a clip that nearly all rows are above."""
    warned = []
    if report.kish_share < 0.5:
        warned.append(
            f"the weights are worth only {report.kish:,.1f} of {report.selected:,} rows (Kish): few rows "
            "carry the loss; weights='damped' or 'none' spread it"
        )
    if report.max_to_median > 100:
        warned.append(
            f"the largest weight is {report.max_to_median:,.0f} times the median"
            + ("; uniform_share=0.1 bounds exact weights" if settings.get("weights") == "exact" else "")
        )
    if report.capped is not None and report.capped > 0.95:
        warned.append(
            f"{_percent(report.capped)} of the rows are at or above the clip and drawn alike: the draw is "
            "nearly uniform; raise clip=, or use clip_quantile="
        )
    return warned


def _class_warnings(
    report: SelectionReport, settings: Mapping[str, Any], classes: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Of classes that have rows in the pool, and none or few among the kept or the selected ones."""
    warned, votes = [], "" if report.counted_by == "label" else " (by the probes' vote)"
    if missing := [row["class"] for row in classes if not row["selected"]]:
        warned.append(f"no row is selected of {len(missing)} of {len(classes)} classes{votes}: {_names(missing)}")
    if report.refilled is not None:
        warned += _filter_warnings(classes, report.rows)
    how = "equal shares" if settings.get("quotas") in ("label", "predicted") else "the pool's shares"
    pool = torch.tensor([row["pool"] for row in classes])
    fair = (pool * report.share).tolist()
    if how == "equal shares":
        fair = even_shares(pool, report.selected, torch.arange(len(classes))).tolist()
    # the second condition: a small class may come out short by chance
    short = [
        f"{row['class']} ({row['selected']}, not {due:.0f})"
        for row, due in zip(classes, fair, strict=True)
        if 0 < row["selected"] < due / 2 and due - row["selected"] > 2 * due**0.5
    ]
    if short:
        warned.append(
            f"less than half the rows of {how} are selected of {len(short)} of {len(classes)} classes{votes}: "
            + _names(short)
        )
    return warned


def _filter_warnings(classes: Sequence[Mapping[str, Any]], rows: int) -> list[str]:
    mean = sum(row["kept"] for row in classes) / rows
    lost = [row for row in classes if row["kept"] / row["pool"] < mean / 2]
    if not lost:
        return []
    shares = _names([f"{row['class']} ({_percent(row['kept'] / row['pool'])})" for row in lost])
    return [
        f"the filter keeps {_percent(mean)} of the rows, but less than half of that share of "
        f"{len(lost)} of {len(classes)} classes: {shares}; the probes are bad at them or their labels are wrong"
    ]


def _names(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    """A share in words; none that is not 0 or 1 reads as 0 % or 100 %."""
    percent = 100 * share
    if 0 < percent < 0.05:
        return "under 0.1 %"
    if 99.95 <= percent < 100:
        return "over 99.9 %"
    if 10 <= percent < 99.5:
        return f"{percent:.0f} %"
    return f"{percent:.1f}".removesuffix(".0") + " %"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if value == 0 or abs(value) >= 1e-4 else "under 0.0001"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
