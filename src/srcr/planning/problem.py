"""What one search looks for, and everything that decides its result."""

from dataclasses import dataclass, replace

from srcr.environment import versions
from srcr.planning.context import SearchContext
from srcr.planning.costs import SizeBudget, group_costs
from srcr.planning.objective import EvaluationData, evaluation_data
from srcr.planning.plans import assignment_plan
from srcr.planning.proposals import CostTable
from srcr.planning.space import Assignment, SearchSpace
from srcr.planning.specs import SearchSpec
from srcr.planning.uniform import nearby_levels, uniform_levels
from srcr.plans.objective import Constraint, Objective
from srcr.plans.plan import CompressionPlan, Target
from srcr.plans.specs import CompressionLevel
from srcr.serialize import digest, to_dict

#: Settings that change neither what a trial measures nor whether work in progress can be continued, and one
#: that changes no trial: a study may be shared by searches that differ in them.
_BESIDE_THE_WORK = ("trials",)
_BESIDE_THE_TRIALS = ("trials", "objective", "exploration", "training", "structures")


@dataclass(frozen=True, eq=False)
class SearchProblem:
    """A ``target`` (or a constraint) for the model of a ``context``, the ``space`` of levels to reach it by,
    and the ``uniform`` ones among them; the checkpoint's format; what finalists are chosen by, and the data
    for it (``choice``) and for the last word (``test``). ``settings``: everything that decides the result by
    name, a value or a hash each."""

    context: SearchContext
    target: Target | Constraint
    space: SearchSpace
    uniform: tuple[CompressionLevel, ...]
    format_name: str
    objective: Objective
    choice: EvaluationData
    test: EvaluationData
    settings: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the result."""
        return digest(self.settings)

    @property
    def run_settings(self) -> dict[str, str]:
        """Settings that work in progress must have been begun with."""
        return {k: v for k, v in self.settings.items() if k not in _BESIDE_THE_WORK}

    @property
    def study_fingerprint(self) -> str:
        """A hash of everything that decides a trial's result."""
        return digest({k: v for k, v in self.settings.items() if k not in _BESIDE_THE_TRIALS})

    @property
    def tcr_span(self) -> tuple[float, float]:
        """The TCr of the largest and of the smallest plan."""
        budget = self.budget(Target(tcr=0.0))
        costs = group_costs(budget.groups, self.space.levels, budget)
        base = 16 * budget.total_weights
        low, high = (
            1
            - (budget.fixed + sum(choose(option.cost for option in group) for group in costs))
            / base
            for choose in (max, min)
        )
        return low, high

    def budget(self, target: Target) -> SizeBudget:
        """What a target allows."""
        return SizeBudget.of(target, self.context.blocks, self.space, self.format_name)

    def cost_table(self, target: Target) -> CostTable:
        """What each group costs at each level, and what a target allows for all."""
        budget = self.budget(target)
        return CostTable(group_costs(budget.groups, self.space.levels, budget), budget.limit)

    def plan(self, assignment: Assignment, target: Target) -> CompressionPlan:
        """The plan of an assignment for a target."""
        return assignment_plan(assignment, self.budget(target), target, self.context.seed)

    def uniform_at(self, target: Target) -> list[CompressionLevel]:
        """The uniform levels that meet a target."""
        return uniform_levels(self.budget(target), [level.num_bits for level in self.space.levels])


def search_problem(
    context: SearchContext,
    target: Target | Constraint,
    space: SearchSpace,
    format_name: str,
    spec: SearchSpec,
) -> SearchProblem:
    """The problem; of the space only what costs about what a target allows, and the uniform levels.

    Raises:
        InputError: there is too little text for the objective.
    """
    objective = target.objective if isinstance(target, Constraint) else spec.objective
    choice, test = evaluation_data(objective, context.splits)
    settings = search_settings(
        context, target, space, format_name, replace(spec, objective=objective)
    )
    problem = SearchProblem(
        context, target, space, (), format_name, objective, choice, test, settings
    )
    if isinstance(target, Constraint):
        return problem
    uniform = tuple(problem.uniform_at(target))
    nearby = nearby_levels(space.levels, problem.budget(target))
    levels = tuple(sorted({*nearby, *uniform}))
    return replace(problem, space=replace(space, levels=levels), uniform=uniform)


def search_settings(
    context: SearchContext,
    target: Target | Constraint,
    space: SearchSpace,
    format_name: str,
    spec: SearchSpec,
) -> dict[str, str]:
    """Everything that decides the result of a search by name: a value, or the hash of one."""
    measurement = to_dict(spec.measurement)
    del measurement["cache_bytes"]  # decides what is computed again, and no number
    others = {} if spec.recovery is None else {"training": digest(spec.recovery)}
    if spec.structures:
        others["structures"] = digest([to_dict(each) for each in spec.structures])
    exploration = {"spec": to_dict(spec.exploration), "tcr_precision": spec.tcr_precision}
    return {
        "model": context.opened.sha256,
        "data": digest([part.sha256 for part in context.splits.parts()]),
        "target": digest(target),
        "levels": digest(space),
        "objective": digest(spec.objective),
        "trials": str(spec.trials),
        "exploration": digest(exploration),
        "measurement": digest(measurement),
        "seed": str(context.seed),
        "format": format_name,
        "device": context.device,
        "precision": str(context.blocks.running),
        **others,
        **versions(),
    }
