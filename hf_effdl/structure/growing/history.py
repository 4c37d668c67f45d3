"""What a growing run did: one row per round and group, the training cost so far, and a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hf_effdl.structure.groups.record import LARGEST, listed, named, number, plain_values, require, text, whole


CLOCKS = ("runtime", "per_second", "preparation_time")
BACKWARD = 3  # a training step costs about three forward passes
NOT_METRICS = ("round", "step", "group", "from", "to", "support", "macs", "params", "training_macs", "restarted")

Row = dict[str, Any]


def checked_history(rows: Any, where: Any) -> list[Row]:
    """The rows of a history that a file holds.

    Raises:
        ValueError: they are no history; names the file and the entry.
    """
    try:
        for row in listed(rows, "history"):
            _check_row(named(row, "history"))
    except (KeyError, ValueError) as error:
        why = str(error) if isinstance(error, ValueError) else f"a row has no entry {error}"
        raise ValueError(f"the growth history in {where} is damaged ({why}); go on from an earlier one") from error
    return [dict(row) for row in rows]


def _check_row(row: Mapping[str, Any]) -> None:
    text(row["group"], "group")
    for name in ("round", "step", "macs", "params", "training_macs"):
        whole(row[name], name, 0, 2**100)
    require(whole(row["from"], "from", 1, LARGEST) <= whole(row["to"], "to", 1, LARGEST), "to", "is below from")
    if row["support"] is not None:
        require(0 <= number(row["support"], "support") <= 1, "support", "is no share")
    plain_values(row, "history")


def by_round(history: Iterable[Row]) -> list[list[Row]]:
    """The rows of every round, in order."""
    rounds: dict[int, list[Row]] = {}
    for row in history:
        rounds.setdefault(row["round"], []).append(row)
    return [rounds[number] for number in sorted(rounds)]


def grew(rows: Iterable[Row]) -> dict[str, int]:
    """New units by group in one round; groups that stayed are left out."""
    return {row["group"]: row["to"] - row["from"] for row in rows if row["to"] > row["from"]}


def rounds_without_growth(history: Iterable[Row]) -> int:
    """How many of the last rounds went by without growth."""
    count = 0
    for rows in reversed(by_round(history)):
        if grew(rows):
            break
        count += 1
    return count


def restarted_at(history: Iterable[Row]) -> int:
    """The step at which the grown net began anew, 0 where it did not."""
    return max((row["step"] for row in history if row.get("restarted")), default=0)


def metrics_at(log: Iterable[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What the evaluation at a step found, without its clocks: `eval_loss` as `loss`."""
    metrics = {}
    for entry in log:
        if entry.get("step") == step:
            metrics |= {key.removeprefix("eval_"): entry[key] for key in entry if _is_metric(key)}
    return metrics


def _is_metric(key: str) -> bool:
    return key.startswith("eval_") and not any(clock in key for clock in CLOCKS)


def training_macs(history: Sequence[Row], step: int, seed_macs: int, rows_seen: Callable[[int], int]) -> int:
    """Multiply-accumulates of all training up to a step, `sum(3 MACs of the net at the time x rows)`.

    Args:
        history: rows of rounds before or at the step count.
        step: optimizer steps taken.
        seed_macs: of one input row, before any growth.
        rows_seen: rows that training went through in so many steps.
    """
    total, macs, seen = 0, seed_macs, 0
    for row in (rows[0] for rows in by_round(history) if rows[0]["step"] <= step):
        total, macs, seen = row["training_macs"], row["macs"], rows_seen(row["step"])
    return total + BACKWARD * macs * (rows_seen(step) - seen)


def growth_curve(
    history: Sequence[Row], log: Iterable[Mapping[str, Any]], seed_macs: int, rows_seen: Callable[[int], int]
) -> list[dict[str, float]]:
    """Every evaluation of a run with what training had cost by then: `{"step", "training_macs", "loss", ...}`."""
    log = list(log)
    steps = dict.fromkeys(entry["step"] for entry in log if any(key.startswith("eval_") for key in entry))
    return [
        {"step": step, "training_macs": training_macs(history, step, seed_macs, rows_seen), **metrics_at(log, step)}
        for step in steps
    ]


def growth_table(history: Sequence[Row]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One line per round for a card, and the headings of its columns."""
    lines = [_line(rows) for rows in by_round(history)]
    metrics = dict.fromkeys(key for line in lines for key in line if key not in (*NOT_METRICS, "growth"))
    columns = {
        "round": "round",
        "step": "step",
        "growth": "units (support before)",
        "macs": "MACs",
        "params": "parameters",
        "training_macs": "training MACs so far",
    }
    return lines, columns | {name: name for name in metrics}


def _line(rows: Sequence[Row]) -> dict[str, Any]:
    common = {key: value for key, value in rows[0].items() if key not in ("group", "from", "to", "support")}
    growth = ", ".join(_growth_of(row) for row in rows if row["to"] > row["from"])
    return common | {"growth": growth or "none"}


def _growth_of(row: Row) -> str:
    share = "" if row["support"] is None else f" ({row['support']:.0%})"
    return f"`{row['group']}` {row['from']} → {row['to']}{share}"
