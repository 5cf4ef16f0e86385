import numpy as np
import pytest

from srcr.planning.surrogate import Surrogate

ERRORS = [np.array([8.0, 4.0, 2.0, 1.0])] * 5


def truth(rng):
    """Every group has a rate of its own, and its levels depart from it by up to 40 %."""
    return [e * rng.uniform(0.2, 5) * rng.uniform(0.6, 1.4, 4) * 1e-3 for e in ERRORS]


def singles(losses):
    assignments = [tuple(2 if i == g else None for i in range(5)) for g in range(5)]
    return assignments, [float(losses[g][2]) for g in range(5)]


def test_it_learns_each_groups_rate():
    losses = truth(np.random.default_rng(0))
    rates = [real[2] / errors[2] for real, errors in zip(losses, ERRORS, strict=True)]
    assert max(rates) > 3 * min(rates), "no one rate would do for all"
    mean = Surrogate(ERRORS).draw(*singles(losses), None)
    for learnt, rate, errors in zip(mean, rates, ERRORS, strict=True):
        assert learnt == pytest.approx(rate * errors, rel=1e-6)


def test_a_group_that_was_not_measured_has_the_rate_of_the_others():
    losses = truth(np.random.default_rng(0))
    assignments, kl = singles(losses)
    mean = Surrogate(ERRORS).draw(assignments[:4], kl[:4], None)
    common = np.exp(np.mean([np.log(losses[g][2] / ERRORS[g][2]) for g in range(4)]))
    assert mean[4] == pytest.approx(common * ERRORS[4], rel=1e-6)


def test_more_measurements_bring_it_nearer():
    rng = np.random.default_rng(1)
    losses = truth(rng)
    assignments, kl = singles(losses)
    few = Surrogate(ERRORS).draw(assignments, kl, None)
    for _ in range(60):
        assignment = tuple(rng.integers(0, 4, 5))
        assignments.append(assignment)
        total = sum(float(losses[g][i]) for g, i in enumerate(assignment))
        kl.append(1.3 * total)  # not quite a sum
    many = Surrogate(ERRORS).draw(assignments, kl, None)

    def off(draw):  # a factor common to all changes no choice
        ratio = np.log(np.concatenate(draw) / np.concatenate(losses))
        return np.abs(ratio - ratio.mean()).mean()

    assert off(few) > 0.1
    assert off(many) < 0.5 * off(few)


def test_draws_spread_around_the_mean_and_repeat_with_the_seed():
    losses = truth(np.random.default_rng(2))
    assignments, kl = singles(losses)
    model = Surrogate(ERRORS)
    rng = np.random.default_rng(0)
    draws = np.array([np.concatenate(model.draw(assignments, kl, rng)) for _ in range(200)])
    mean = np.concatenate(model.draw(assignments, kl, None))
    assert draws.mean(0) == pytest.approx(mean, rel=0.1)
    measured = np.tile([False, False, True, False], 5)
    spread = draws.std(0) / mean
    assert (spread[measured] < 0.1).all(), "what was measured is known to its noise"
    assert (spread[~measured] > 0.15).all(), "what was not departs by a level's own deviation"
    again = np.concatenate(model.draw(assignments, kl, np.random.default_rng(0)))
    assert again == pytest.approx(draws[0])


def test_without_measurements_errors_decide():
    assert Surrogate(ERRORS).draw([], [], None)[0] == pytest.approx(ERRORS[0])
