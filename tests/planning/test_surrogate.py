import numpy as np
import pytest

from srcr.planning.surrogate import Surrogate

ERRORS = [np.array([8.0, 4.0, 2.0, 1.0])] * 5


def truth(rng):
    """Every unit has a rate of its own, and its levels depart from it by up to 40 %."""
    return [e * rng.uniform(0.2, 5) * rng.uniform(0.6, 1.4, 4) * 1e-3 for e in ERRORS]


def singles(losses):
    choices = [tuple(2 if i == u else None for i in range(5)) for u in range(5)]
    return choices, [float(losses[u][2]) for u in range(5)]


def test_it_learns_each_units_rate():
    losses = truth(np.random.default_rng(0))
    mean = Surrogate(ERRORS).draw(*singles(losses), None)
    for found, real in zip(mean, losses, strict=True):
        assert found == pytest.approx(real, rel=1.5)
        assert found[2] == pytest.approx(real[2], rel=0.1)


def test_more_measurements_bring_it_nearer():
    rng = np.random.default_rng(1)
    losses = truth(rng)
    choices, kl = singles(losses)
    few = Surrogate(ERRORS).draw(choices, kl, None)
    for _ in range(60):
        choice = tuple(rng.integers(0, 4, 5))
        choices.append(choice)
        kl.append(1.3 * sum(float(losses[u][i]) for u, i in enumerate(choice)))  # not quite a sum
    many = Surrogate(ERRORS).draw(choices, kl, None)

    def off(found):  # a factor common to all changes no choice
        ratio = np.log(np.concatenate(found) / np.concatenate(losses))
        return np.abs(ratio - ratio.mean()).mean()

    assert off(many) < 0.8 * off(few)


def test_draws_spread_around_the_mean_and_repeat_with_the_seed():
    losses = truth(np.random.default_rng(2))
    choices, kl = singles(losses)
    model = Surrogate(ERRORS)
    rng = np.random.default_rng(0)
    draws = np.array([np.concatenate(model.draw(choices, kl, rng)) for _ in range(200)])
    mean = np.concatenate(model.draw(choices, kl, None))
    assert draws.mean(0) == pytest.approx(mean, rel=0.1)
    assert (draws.std(0) > 0.02 * mean).all()
    again = np.concatenate(model.draw(choices, kl, np.random.default_rng(0)))
    assert again == pytest.approx(draws[0])


def test_without_measurements_errors_decide():
    assert Surrogate(ERRORS).draw([], [], None)[0] == pytest.approx(ERRORS[0])
