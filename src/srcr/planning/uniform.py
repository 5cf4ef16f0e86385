"""The same level everywhere: what a search has to beat, and where it starts."""

import math
from collections.abc import Sequence

from srcr.errors import InputError
from srcr.models.topology import Topology
from srcr.planning.allocation import Option
from srcr.planning.budget import Budget
from srcr.planning.levels import Level

#: More zeros than this no uniform candidate has.
MOST_ZEROS = 0.65
#: Levels that a search looks at cost between so many times the average and so many.
CHEAPEST, DEAREST = 0.6, 1.6
#: A budget may be missed from below by so much.
TOLERANCE = 0.005


def uniform_levels(budget: Budget, bits: Sequence[int]) -> list[Level]:
    """The levels that meet a budget when every layer has them: by TCr one for every width, with the zeros it
    takes; by bytes, where zeros save nothing, the widest that fits."""
    total = sum(rows * cols for rows, cols in budget.shapes.values())
    found = []
    for width in sorted(set(bits)):
        zeros = 0.0
        if budget.counts_zeros:
            zeros = max(0.0, math.ceil(1e6 * (1 - budget.limit / total / width)) / 1e6)
        level = Level(zeros, width) if zeros < 1 else None
        while level is not None and budget.counts_zeros and cost_of(budget, level) > budget.limit:
            zeros += 1e-6  # each layer's count of zeros is rounded
            level = Level(zeros, width)
        if level is not None and zeros <= MOST_ZEROS and cost_of(budget, level) <= budget.limit:
            found.append(level)
    if not budget.counts_zeros:
        return found[-1:]
    return [level for level in found if cost_of(budget, level) >= (1 - TOLERANCE) * budget.limit]


def cost_of(budget: Budget, level: Level) -> int:
    """What all linears cost at one level."""
    return sum(budget.cost(name, level) for name in budget.shapes)


def worthwhile(levels: Sequence[Level], budget: Budget) -> tuple[Level, ...]:
    """The levels but for those with zeros where zeros save nothing."""
    return tuple(level for level in levels if budget.counts_zeros or level.sparsity == 0)


def nearby(levels: Sequence[Level], budget: Budget) -> list[Level]:
    """The worthwhile levels that cost about what the budget allows on the average."""
    return [
        level for level in worthwhile(levels, budget)
        if CHEAPEST * budget.limit <= cost_of(budget, level) <= DEAREST * budget.limit
    ]  # fmt: skip


def check_reachable(
    options: Sequence[Sequence[Option]], budget: Budget, topology: Topology
) -> None:
    """Refuse a budget that no choice can meet, with the range that can be.

    Raises:
        InputError: smaller than the smallest plan, or larger than the largest.
    """
    base = 16 * sum(rows * cols for rows, cols in topology.shapes.values())
    least = sum(min(option.cost for option in unit) for unit in options)
    most = sum(max(option.cost for option in unit) for unit in options)
    if least <= budget.limit and budget.limit * (1 - TOLERANCE) <= most:
        return

    def said(cost: int) -> str:
        if budget.unit == "bits":
            return f"tcr={1 - cost / base:.4f}"
        return f"{(cost + budget.fixed) / 1e6:.3f} MB"

    raise InputError(
        f"the target {said(budget.limit)} cannot be met: with these levels {said(least)} is the smallest "
        f"plan and {said(most)} the largest"
    )
