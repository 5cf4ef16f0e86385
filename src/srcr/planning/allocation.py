"""One option for every decision unit, with the least loss that a budget allows: a multiple-choice knapsack.

Solved by dynamic programming over Pareto fronts: units are merged one after the other, and a partial
choice stays only if none is both smaller and better. Fronts longer than ``RESOLUTION`` are thinned to the
best of each slice of cost; the costs themselves stay exact, so a budget is never exceeded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from srcr.errors import InputError

#: Partial choices that are kept after each unit, unless another number is given.
RESOLUTION = 8192
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """What a unit costs, in whole bits or bytes, and loses when it is treated one way."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The option chosen for each unit by its number, what all cost, and what they lose together."""

    choice: tuple[int, ...]
    cost: int
    loss: float


def allocate(
    options: Sequence[Sequence[Option]], budget: int, resolution: int = RESOLUTION
) -> Allocation:
    """The choice with the least summed loss among those that cost at most ``budget`` (exact where the fronts
    are not thinned).

    Raises:
        InputError: even the cheapest choice costs more, or a unit has no options.
    """
    if not options or any(not unit for unit in options):
        raise InputError("there is nothing to choose from: every unit needs at least one option")
    least = [min(option.cost for option in unit) for unit in options]
    if sum(least) > budget:
        raise InputError(f"the smallest choice costs {sum(least)}, the budget is {budget}")
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Ints, Ints]] = []
    later = sum(least)
    for unit, cheapest in zip(options, least, strict=True):
        later -= cheapest
        more = np.array([option.cost for option in unit], np.int64)
        lost = np.array([option.loss for option in unit])
        cost, loss = (costs[:, None] + more).ravel(), (losses[:, None] + lost).ravel()
        kept = _front(cost, loss, budget - later, resolution)
        steps.append((kept // len(unit), kept % len(unit)))
        costs, losses = cost[kept], loss[kept]
    best = int(np.argmin(losses))
    found = Allocation((), int(costs[best]), float(losses[best]))
    choice: list[int] = []
    for before, taken in reversed(steps):
        choice.append(int(taken[best]))
        best = int(before[best])
    return replace(found, choice=tuple(reversed(choice)))


def _front(cost: Ints, loss: Floats, budget: int, resolution: int) -> Ints:
    """Which partial choices to keep: affordable, none both smaller and at least as good, not too many."""
    order = np.lexsort((loss, cost))
    order = order[cost[order] <= budget]
    lowest = np.minimum.accumulate(loss[order])
    order = order[np.r_[True, loss[order][1:] < lowest[:-1]]]
    if len(order) > resolution:
        low, high = int(cost[order[0]]), int(cost[order[-1]])
        bucket = (cost[order] - low) * resolution // (high - low + 1)
        last = np.r_[bucket[1:] != bucket[:-1], True]  # the best of each slice is its dearest
        order = order[last]
    return order
