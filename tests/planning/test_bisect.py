"""The smallest plan by bisection: a made-up model that loses more, the smaller it is."""

import pytest

from srcr.errors import SrcrError
from srcr.planning.bisect import smallest_plan
from srcr.plans.objective import Constraint, Objective
from srcr.plans.plan import CompressionPlan, Target
from srcr.records.estimate import Estimate
from srcr.records.evaluation import Divergence, Evaluation, KlEstimate, Perplexity
from srcr.records.run import Rates

RATES = Rates(0, 4, 0.8, 0, 1, 1, 1, "engine", "source")


def evaluation(kl):
    return Evaluation(
        "base", "small", RATES,
        divergence=Divergence(
            KlEstimate(kl, (kl, kl)), Estimate(1 - kl, (0, 1)), Perplexity(1, 1), n_tokens=1
        ),
    )  # fmt: skip


def run(constraint, span=(0.5, 0.9), precision=0.005):
    steps = []

    def evaluate(name, plan):
        steps.append((name, plan.target.tcr))
        return evaluation(plan.target.tcr**4)

    plan_at = lambda rate: CompressionPlan((), Target(tcr=rate))  # noqa: E731
    return smallest_plan(constraint, span, plan_at, evaluate, precision), steps


@pytest.mark.parametrize(
    ("measure", "bound"), [("kl", 0.25), ("kl", 0.4), ("top1", 0.75), ("top1", 0.6)]
)
def test_the_highest_rate_that_holds(measure, bound):
    (rate, plan), steps = run(Constraint(Objective(measure), bound))
    limit = bound if measure == "kl" else 1 - bound
    assert plan.target.tcr == rate
    assert rate**4 <= limit < (rate + 0.006) ** 4
    assert steps[0] == ("tcr 0.7000", 0.7)
    assert len(steps) <= 8


def test_nothing_holds():
    with pytest.raises(SrcrError, match=r"no plan meets kl<=0.01: even at tcr=0.50\d+ it is 0.06"):
        run(Constraint(Objective("kl"), 0.01))


def test_a_single_rate_is_tried():
    (rate, _), steps = run(Constraint(Objective("kl"), 0.25), span=(0.7, 0.7))
    assert (rate, steps) == (0.7, [("tcr 0.7000", 0.7)])
    with pytest.raises(SrcrError, match=r"even at tcr=0.7000 it is 0.24"):
        run(Constraint(Objective("kl"), 0.2), span=(0.7, 0.7))
