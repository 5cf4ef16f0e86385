"""An option for every group of linears, with the least loss that a budget allows: a multiple-choice knapsack.

Solved by dynamic programming over Pareto fronts: groups are merged one after the other, and a partial
choice stays only if none is both smaller and better. Fronts longer than ``resolution`` are thinned to the
best of each slice of cost; the costs themselves stay exact, so a budget is never exceeded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from srcr.errors import InputError

#: Partial choices that stay after each group unless another number is given. A slice of cost is then far
#: below the 0.5 % by which a budget may be missed.
RESOLUTION = 8192
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """What a group costs, in whole bits or bytes, and loses when it is compressed a certain way."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The number of the option of each group, what all cost, and what they lose together."""

    numbers: tuple[int, ...]
    cost: int
    loss: float


def allocate(
    options: Sequence[Sequence[Option]], budget: int, resolution: int = RESOLUTION
) -> Allocation:
    """The allocation with the least summed loss among those that cost at most ``budget`` (exact where the
    fronts are not thinned).

    Raises:
        InputError: even the cheapest allocation costs more, or a group has no options.
    """
    if not options or any(not group for group in options):
        raise InputError("there is nothing to choose from: every group needs at least one option")
    least = [min(option.cost for option in group) for group in options]
    if sum(least) > budget:
        raise InputError(f"the smallest choice costs {sum(least)}, the budget is {budget}")
    costs, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Ints, Ints]] = []
    later = sum(least)
    for group, cheapest in zip(options, least, strict=True):
        later -= cheapest
        added = np.array([option.cost for option in group], np.int64)
        lost = np.array([option.loss for option in group])
        cost, loss = (costs[:, None] + added).ravel(), (losses[:, None] + lost).ravel()
        front = _front(cost, loss, budget - later, resolution)
        steps.append((front // len(group), front % len(group)))
        costs, losses = cost[front], loss[front]
    best = int(np.argmin(losses))
    cost_of_best, loss_of_best = int(costs[best]), float(losses[best])
    numbers: list[int] = []
    for before, taken in reversed(steps):
        numbers.append(int(taken[best]))
        best = int(before[best])
    return Allocation(tuple(reversed(numbers)), cost_of_best, loss_of_best)


def _front(cost: Ints, loss: Floats, budget: int, resolution: int) -> Ints:
    """Which partial choices stay: affordable, none both smaller and at least as good, not too many."""
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
