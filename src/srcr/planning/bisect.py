"""The smallest model that meets a constraint, by bisection over TCr."""

from collections.abc import Callable

from srcr.errors import SrcrError
from srcr.planning.objective import holds, objective_value
from srcr.plans.objective import Constraint
from srcr.plans.plan import CompressionPlan
from srcr.records.evaluation import Evaluation

#: The plan of a TCr.
PlanAt = Callable[[float], CompressionPlan]
#: What a plan that was compressed keeps of the choice text; its name says which it is.
EvaluatePlan = Callable[[str, CompressionPlan], Evaluation]


def smallest_plan(
    constraint: Constraint,
    span: tuple[float, float],
    plan_at: PlanAt,
    evaluate: EvaluatePlan,
    precision: float,
) -> tuple[float, CompressionPlan]:
    """The highest TCr within ``span`` whose plan meets the constraint, to ``precision``, and that plan; every
    step is compressed and evaluated.

    Raises:
        SrcrError: no plan does.
    """
    low, high = span
    best: tuple[float, CompressionPlan] | None = None
    failed: float | None = None
    # A single level has a span without width: it is tried too.
    while high - low > precision or (best is None and failed is None):
        rate = round((low + high) / 2, 4)
        plan = plan_at(rate)
        evaluation = evaluate(f"tcr {rate:.4f}", plan)
        if holds(constraint, evaluation):
            best, low = (rate, plan), rate
        else:
            failed, high = objective_value(constraint.objective, evaluation), rate
    if best is None:
        raise SrcrError(
            f"no plan meets {constraint.text}: even at tcr={high:.4f} it is {failed}; ask for less, or allow "
            "--widths up to 8"
        )
    return best
