"""Plans that remove something whole: at the same size, what is left has finer levels."""

from collections.abc import Sequence
from dataclasses import replace

from srcr.errors import InputError
from srcr.models.checkpoint import OpenModel
from srcr.planning.costs import SizeBudget, group_costs
from srcr.planning.plans import assignment_plan
from srcr.planning.problem import SearchProblem
from srcr.planning.proposals import CostTable, Observations
from srcr.planning.space import SearchSpace
from srcr.plans.plan import CompressionPlan, Target
from srcr.plans.structures import StructureSpec
from srcr.structure.sizes import planned_smaller, resolved, structure_sizes


def check_structures(
    opened: OpenModel, space: SearchSpace, alternatives: Sequence[StructureSpec]
) -> None:
    """Refuse what a search cannot try.

    Raises:
        InputError: layers, of which nobody knows before which go; as
            :func:`srcr.structure.sizes.structure_sizes`.
    """
    for spec in alternatives:
        if spec.layers is not None:
            raise InputError(
                "a search tries channels, heads and experts: which layers go is known too late; remove them "
                "with 'srcr compress --remove layers=...' and look at both"
            )
        planned_smaller(opened, structure_sizes(opened, spec, space.quant.group_size))


def structured_plans(
    problem: SearchProblem,
    target: Target,
    known: Observations,
    alternatives: Sequence[StructureSpec],
) -> dict[str, CompressionPlan]:
    """The plan that loses least by what is known, for each of the ``alternatives``, by name: of the losses of
    every group whole, at the costs of what is left of it. Those that are too large at every level are left
    out."""
    opened, seed = problem.context.opened, problem.context.seed
    plans: dict[str, CompressionPlan] = {}
    for spec in alternatives:
        sizes = structure_sizes(opened, spec, problem.space.quant.group_size)
        smaller = planned_smaller(opened, sizes)
        space = replace(problem.space, common_widths=smaller.topology.common_widths or None)
        budget = SizeBudget.of(target, smaller.blockwise, space, problem.format_name)
        if target.tcr is not None:  # by the shapes of the whole model
            whole = problem.budget(target)
            budget = replace(budget, limit=whole.limit + whole.fixed - budget.fixed)
        options = group_costs(budget.groups, space.levels, budget)
        if sum(min(option.cost for option in group) for group in options) > budget.limit:
            continue
        assignment = known.allocated(CostTable(options, budget.limit))
        plan = assignment_plan(assignment, budget, target, seed)
        left = " and ".join(str(size) for size in sizes)
        plans[f"allocated, {left}"] = replace(plan, structures=resolved(sizes))
    return plans
