"""Which ranks of which modules a budget keeps: one list over all modules, the best first, as far as it reaches."""

from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor

from hf_effdl.checks import one_of, real_number


UNITS = ("params", "ranks")


def limit_of(budget: float, unit: str, costs: Mapping[str, int], ranks: Mapping[str, int]) -> int:
    """A budget as a number of parameters or ranks.

    Args:
        budget: a share in (0, 1] where it is a float, else a number.
        unit: of the number, `"params"` or `"ranks"`.
        costs: parameters of one rank, by module.
        ranks: by module.
    """
    one_of("unit", unit, UNITS)
    whole = sum(count * (costs[name] if unit == "params" else 1) for name, count in ranks.items())
    if isinstance(budget, Integral) and 1 < budget <= whole:
        return int(budget)
    share = real_number("budget", budget)
    if not 0 < share <= 1:
        raise ValueError(
            f"budget={budget!r}: it must be a share in (0, 1], or a whole number of {unit} from 2 to the adapter's "
            f"{whole:,}"
        )
    return int(share * whole + 1e-6)


def check_limit(costs: Mapping[str, int], limit: int, least: Mapping[str, int]) -> None:
    """Refuse a limit that not even the ranks of `least`, or one rank, keep; see `ranks_within`."""
    smallest = sum(costs[name] * least.get(name, 0) for name in costs) or min(costs.values())
    if limit < smallest:
        raise ValueError(
            f"the budget allows {limit:,}, and the smallest adapter of these modules costs {smallest:,}; ask for at "
            "least that"
        )


def ranks_within(
    scores: Mapping[str, Tensor], costs: Mapping[str, int], limit: int, least: Mapping[str, int]
) -> dict[str, Tensor]:
    """Ranks to keep, ascending by module: the best of all modules as long as each fits, the best of `least` first.

    Args:
        scores: a score per rank, by module; comparable over modules.
        costs: of one rank, by module.
        limit: what all kept ranks may cost.
        least: ranks that a module keeps in any case, by module.

    Raises:
        ValueError: not even those, or no rank at all, fit.
    """
    order = {name: torch.argsort(score, descending=True, stable=True).tolist() for name, score in scores.items()}
    forced = {name: order[name][: least.get(name, 0)] for name in scores}
    check_limit(costs, limit, least)
    spent = sum(costs[name] * len(units) for name, units in forced.items())
    rest = [(name, rank) for name, ranks in order.items() for rank in ranks[len(forced[name]) :]]
    # Python's sort keeps equals in their order: the earlier module first
    rest.sort(key=lambda pair: -scores[pair[0]][pair[1]].item())
    kept = forced
    for name, rank in rest:
        if spent + costs[name] <= limit:
            spent += costs[name]
            kept[name] = [*kept[name], rank]
    return {name: torch.tensor(sorted(ranks), dtype=torch.long) for name, ranks in kept.items()}
