"""What grows in a round, and by how much; from the share of units in the support alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import nn

from hf_effdl.structure.groups.group import Group
from hf_effdl.structure.groups.ties import Tie, complete_ties, config_ties, stock_builds
from hf_effdl.structure.growing.arguments import GrowingArguments
from hf_effdl.structure.growing.history import Row, rounds_without_growth
from hf_effdl.structure.path.budget import Cut, Limit, Steps


def growth_ties(model: nn.Module, groups: Sequence[Group], widths: str) -> list[Tie]:
    """What grows together: with `widths="stock"` the groups that one number of the config sizes, else every group.

    Ties in which no group is lifted are left out: there is no support to go by.
    """
    ties = complete_ties(config_ties(model, groups) if widths == "stock" else (), {g.name: g.units for g in groups})
    lifted = {group.name for group in groups if group.lifted}
    return [tie for tie in ties if lifted.intersection(tie.shares)]


def fits(groups: Sequence[Group], sizes: Mapping[str, int], args: GrowingArguments) -> bool:
    """Whether sizes hold the bounds `max_macs`, `max_params` and `max_width` of the arguments."""
    if args.max_width is not None and any(size > args.max_width for size in sizes.values()):
        return False
    if args.max_macs is None and args.max_params is None:
        return True
    counts = groups[0].network.count(groups, sizes)
    bounds = {"macs": args.max_macs, "params": args.max_params}
    return all(bound is None or counts[name] <= bound for name, bound in bounds.items())


def plan_growth(
    groups: Sequence[Group],
    ties: Sequence[Tie],
    support: Mapping[str, tuple[int, int]],
    args: GrowingArguments,
    model: nn.Module | None = None,
) -> dict[str, int]:
    """New units by group for one round.

    A tie is saturated when the share of its units in the support is at least `growth_threshold`. Its largest group
    grows from n to `max(n + growth_add, int(growth_ratio n))` units and the others in proportion. What would pass a
    bound is cut down to what fits: alike for all saturated ties, and what is left goes to the most saturated first.

    Args:
        groups: the groups of the model.
        ties: from `growth_ties`.
        support: per lifted group, units in the support and units in all.
        args: `GrowingArguments`.
        model: where its config sizes the ties, sizes are cut down also to what the stock class builds: rarely two
            widths become equal where it would leave out a projection.
    """
    before = {group.name: group.units for group in groups}
    saturated = _saturated(ties, support, args.growth_threshold)
    if not saturated:
        return {}
    wishes = [replace(tie, steps=_steps_wished(tie, args)) for tie in saturated]
    # a limit of costs 0 and 1, because bounds hold exactly
    limit = Limit("growth", 0.5, lambda sizes: float(not fits(groups, before | sizes, args)))
    cut = Cut(wishes, _alike_for_all(saturated, wishes), limit, _stock_widths(model, groups, ties))
    cut.drop()
    # from the most saturated on, what more fits into what is left
    for i, wish in enumerate(wishes):
        for steps in range(wish.steps, cut.steps[i], -1):
            if cut.give_back(i, steps):
                break
    return {name: size - before[name] for name, size in cut.sizes.items() if size > before[name]}


def _saturated(ties: Sequence[Tie], support: Mapping[str, tuple[int, int]], threshold: float) -> list[Tie]:
    """The ties that grow, the most saturated first."""
    shares = []
    for tie in ties:
        counts = [support[name] for name in tie.shares if name in support]
        inside, units = (sum(count[i] for count in counts) for i in (0, 1))
        shares.append(inside / units if units else 0.0)
    order = sorted(range(len(ties)), key=lambda i: -shares[i])
    return [ties[i] for i in order if shares[i] >= threshold]


def _steps_wished(tie: Tie, args: GrowingArguments) -> int:
    share = max(tie.shares.values())
    largest = share * tie.steps
    return -(-max(largest + args.growth_add, int(args.growth_ratio * largest)) // share)


def _alike_for_all(ties: Sequence[Tie], wishes: Sequence[Tie]) -> list[Steps]:
    """From the wishes down to what is there: one cut for every share of the growth at which a tie loses a step."""
    cuts: dict[Fraction, Steps] = {}
    for i, (tie, wish) in enumerate(zip(ties, wishes, strict=True)):
        room = wish.steps - tie.steps
        for more in range(1, room + 1):
            cuts.setdefault(Fraction(more, room), {})[i] = tie.steps + more - 1
    return [cuts[share] for share in sorted(cuts, reverse=True)]


def _stock_widths(
    model: nn.Module | None, groups: Sequence[Group], ties: Sequence[Tie]
) -> Callable[[dict[str, int]], bool] | None:
    """Which sizes of the growing groups the stock class builds; None where the config sizes none."""
    if model is None or not any(tie.fields for tie in ties):
        return None
    before = {group.name: group.units for group in groups}
    return lambda sizes: stock_builds(model, groups, ties, before | sizes)


def growth_is_over(
    model: nn.Module,
    groups: Sequence[Group],
    args: GrowingArguments,
    history: Sequence[Row],
    sizes: Mapping[str, int] | None = None,
) -> bool:
    """Whether no further round can bring anything: too many went by without growth, or no tie has room for a step.

    `sizes`: units by group, where they are not those of `model`.
    """
    if rounds_without_growth(history) >= args.growth_patience:
        return True
    if args.max_macs is None and args.max_params is None and args.max_width is None:
        return False
    sizes = sizes or {group.name: group.units for group in groups}
    ties = growth_ties(model, groups, args.widths)
    one_more = (sizes | {name: sizes[name] + a for name, a in tie.shares.items()} for tie in ties)
    return not any(fits(groups, wanted, args) for wanted in one_more)
