"""The plan of an assignment, and the plan that loses least by a table of losses."""

from collections.abc import Sequence
from dataclasses import replace

from srcr.planning.allocate import Option, allocate
from srcr.planning.costs import SizeBudget, check_reachable, fill_budget, group_costs
from srcr.planning.space import Assignment, levels_by_name
from srcr.plans.plan import CompressionPlan, Target
from srcr.plans.specs import CompressionLevel

#: The loss of each level of a group.
LevelLosses = Sequence[tuple[CompressionLevel, float]]


def assignment_plan(
    assignment: Assignment, budget: SizeBudget, target: Target, seed: int
) -> CompressionPlan:
    """The plan of an assignment: what is left over of the budget is given back to pruned linears."""
    levels = fill_budget(levels_by_name(budget.groups, assignment), budget)
    plan = budget.space.plan(levels, budget.topology, seed)
    return replace(plan, target=target)


def allocated_plan(
    losses: Sequence[LevelLosses], budget: SizeBudget, target: Target, seed: int
) -> CompressionPlan:
    """The plan that loses least by the ``losses`` of each group's levels, which are those of the budget's
    space.

    Raises:
        InputError: the target is out of reach.
    """
    levels = budget.space.levels
    check_reachable(budget)
    costs = group_costs(budget.groups, levels, budget)
    options = [
        [Option(option.cost, loss) for option, (_, loss) in zip(group, known, strict=True)]
        for group, known in zip(costs, losses, strict=True)
    ]
    numbers = allocate(options, budget.limit).numbers
    return assignment_plan(tuple(levels[i] for i in numbers), budget, target, seed)
