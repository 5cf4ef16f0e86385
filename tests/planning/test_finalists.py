"""Finalists are compressed once, evaluated as many at a time as fit, and chosen by the choice data alone."""

import pytest
import torch

from srcr.data.tokens import Tokens
from srcr.errors import InputError
from srcr.planning.finalists import FinalistRunner, decide, searched_finalists, uniform_finalists
from srcr.planning.objective import EvaluationData, objective_value
from srcr.planning.proposals import Observations, SearchDomain
from srcr.planning.space import measurement
from srcr.planning.specs import ExplorationSpec
from srcr.plans.objective import Objective
from srcr.plans.plan import CompressionPlan, Target
from srcr.plans.specs import CompressionLevel
from srcr.records.estimate import Estimate
from srcr.records.evaluation import (
    Divergence,
    Evaluation,
    KlEstimate,
    Perplexity,
    Semantic,
    TaskScore,
)
from srcr.records.run import Rates

CHOICE, TEST = (EvaluationData(Tokens.of(torch.tensor([[i, i]]))) for i in (1, 2))
PLANS = {name: CompressionPlan((), Target(tcr=0.8), seed) for seed, name in enumerate("abcde")}
RATES = Rates(0, 4, 0.8, 0, 1, 1, 1, "engine", "source")
A, B, C = CompressionLevel(0.25, 4), CompressionLevel(0, 3), CompressionLevel(0.5, 6)


def evaluation(kl, name="m", **more):
    divergence = Divergence(
        KlEstimate(kl, (kl, kl)), Estimate(1 - kl, (0, 1)), Perplexity(1, 1), n_tokens=1
    )
    return Evaluation("base", name, RATES, divergence=divergence, **more)


class Fake:
    """Compresses nothing; what a plan keeps is made up: on the choice data ``kl``, on the test data the
    reverse."""

    def __init__(self, folder, kl, at_once=99):
        self.kl, self.compressed, self.batches = kl, [], []
        self.runner = FinalistRunner(folder, at_once, self.compress, self.evaluate, lambda _: None)

    def compress(self, plan, folder):
        folder.mkdir(parents=True)
        self.compressed.append(plan)

    def evaluate(self, folders, data):
        self.batches.append((len(folders), data))
        kl = {f: self.kl[name] for name, plan in PLANS.items()
              for f in [self.runner.place(name, plan)]}  # fmt: skip
        return [evaluation(kl[f] if data is CHOICE else 1 - kl[f], str(f)) for f in folders]


def test_the_choice_data_decide_and_the_test_data_are_reported(tmp_path):
    fake = Fake(tmp_path, {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.1, "e": 0.9})
    decision = decide(PLANS, Objective(), CHOICE, TEST, fake.runner)
    assert decision.chosen == "b", "the first of the best"
    assert decision.folder == fake.runner.place("b", PLANS["b"])
    assert {name: score.value for name, score in decision.choice.items()} == fake.kl
    kl = {each.compressed: each.divergence.kl.value for each in decision.finalists}
    assert kl == {name: 1 - value for name, value in fake.kl.items()}
    assert {each.compressed: each.plan for each in decision.finalists} == PLANS
    assert decision.winner.compressed == "b"
    assert fake.compressed == list(PLANS.values())


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_no_more_are_evaluated_together_than_fit(at_once, sizes, tmp_path):
    fake = Fake(tmp_path, dict.fromkeys(PLANS, 0.5), at_once)
    together = Fake(tmp_path / "other", dict.fromkeys(PLANS, 0.5))
    decision = decide(PLANS, Objective(), CHOICE, TEST, fake.runner)
    assert fake.batches == [(n, data) for data in (CHOICE, TEST) for n in sizes]
    expected = decide(PLANS, Objective(), CHOICE, TEST, together.runner)
    assert (decision.choice, decision.finalists) == (expected.choice, expected.finalists)


def test_another_plan_of_the_same_name_lies_elsewhere(tmp_path):
    runner = Fake(tmp_path, {}).runner
    assert runner.place("searched", PLANS["a"]) != runner.place("searched", PLANS["b"])
    assert runner.place("searched", PLANS["a"]) == runner.place("searched", PLANS["a"])


TASK = TaskScore(0.6, 0.5, 0.25, 8, retention=0.7)
SEMANTIC = Semantic(0.97, None, 0.1, 0.96, None, "scorer", 8)


@pytest.mark.parametrize(
    ("measure", "value"),
    [("kl", 0.1), ("top1", 0.9), ("semantic", 0.97), ("sr", 0.8), ("srcr", 0.5), ("x", 0.7)],
)
def test_the_value_of_an_objective(measure, value):
    kept = evaluation(0.1, semantic=SEMANTIC, tasks={"x": TASK}, sr=0.8, srcr=0.5)
    assert objective_value(Objective(measure), kept) == pytest.approx(value)


def test_a_name_that_stands_for_several_tasks_is_their_mean():
    kept = evaluation(0.1, tasks={"x": TASK, "y": TASK}, sr=0.8)
    assert objective_value(Objective("both"), kept) == 0.8


def test_an_objective_may_be_undefined(tmp_path):
    fake = Fake(tmp_path, dict.fromkeys(PLANS, 0.5))
    with pytest.raises(InputError, match="'sr' is undefined here: the base model is at chance"):
        decide(PLANS, Objective("sr"), CHOICE, TEST, fake.runner)


def observations(kl, given_up=()):
    measured = {key: measurement(key, value, key not in given_up) for key, value in kl.items()}
    domain = SearchDomain((A, B, C), ((), ()), 0, 99, ExplorationSpec())
    return Observations(domain, measured)


def test_finalists_are_uniform_allocated_and_searched():
    known = observations({(A, A): 0.3, (B, B): 0.2, (C, C): 0.1, (A, B): 0.05, (B, A): 0.04,
                          (None, B): 0.0})  # fmt: skip
    finalists = searched_finalists(known, [A, B, C], (B, A))
    assert finalists == {
        "uniform 3 bits": (B, B), "uniform 50 % + 6 bits": (C, C), "allocated": (B, A),
        "searched": (A, B),
    }  # fmt: skip


def test_what_was_given_up_is_no_finalist():
    known = observations({(A, B): 0.01, (B, A): 0.04}, given_up=[(A, B)])
    assert known.ranked() == [(B, A)]
    assert "searched" not in searched_finalists(known, [], (B, A))


def test_uniform_finalists_that_were_not_measured_are_the_least_pruned():
    assert list(uniform_finalists(observations({}), [A, C])) == ["uniform 25 % + 4 bits"]
