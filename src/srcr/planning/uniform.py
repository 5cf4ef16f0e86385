"""The same level everywhere: what a search has to beat, and where it starts."""

import math
from collections.abc import Sequence

from srcr.planning.costs import TOLERANCE, SizeBudget
from srcr.plans.specs import CompressionLevel


def uniform_levels(
    budget: SizeBudget, bits: Sequence[int], max_sparsity: float = 0.65
) -> list[CompressionLevel]:
    """The levels that meet a budget when every linear has them: by TCr one for every width, with the zeros
    it takes; by bytes, where zeros save nothing, the widest that fits. ``max_sparsity``: with more zeros than
    this, no model is worth comparing with."""
    candidates = []
    for width in sorted(set(bits)):
        level = _level_of(budget, width)
        if level is not None and level.sparsity <= max_sparsity:
            candidates.append(level)
    if not budget.counts_zeros:
        return candidates[-1:]
    least = (1 - TOLERANCE) * budget.limit
    return [level for level in candidates if budget.cost_everywhere(level) >= least]


def _level_of(budget: SizeBudget, width: int) -> CompressionLevel | None:
    """The level of a width that costs at most what the budget allows, with as few zeros as that takes; None
    where there is none."""
    zeros = 0.0
    if budget.counts_zeros:
        zeros = max(0.0, math.ceil(1e6 * (1 - budget.limit / budget.chosen_weights / width)) / 1e6)
    while zeros < 1:
        level = CompressionLevel(zeros, width)
        if budget.cost_everywhere(level) <= budget.limit:
            return level
        if not budget.counts_zeros:
            return None
        zeros += 1e-6  # each linear's count of zeros is rounded
    return None


def worthwhile_levels(
    levels: Sequence[CompressionLevel], budget: SizeBudget
) -> tuple[CompressionLevel, ...]:
    """The levels but for those with zeros where zeros save nothing."""
    return tuple(level for level in levels if budget.counts_zeros or level.sparsity == 0)


def nearby_levels(
    levels: Sequence[CompressionLevel],
    budget: SizeBudget,
    cheapest: float = 0.6,
    dearest: float = 1.6,
) -> list[CompressionLevel]:
    """The worthwhile levels that cost, everywhere, between ``cheapest`` and ``dearest`` times the budget:
    what costs far less or more on the average is not what a plan near the budget is made of."""
    return [
        level
        for level in worthwhile_levels(levels, budget)
        if cheapest * budget.limit <= budget.cost_everywhere(level) <= dearest * budget.limit
    ]
