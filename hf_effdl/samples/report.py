"""What a selection did, in numbers."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class SelectionReport:
    """Stub."""

    values: dict[str, Any]

    @classmethod
    def of(cls, selection) -> "SelectionReport":
        table, plan = selection.table, selection.plan
        return cls({"rows": plan.rows, "selected": len(plan), "kish": plan.kish, **plan.settings})
