import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.planning.allocate import Option, allocate

options = st.builds(Option, st.integers(0, 60), st.floats(-2, 10, allow_nan=False, width=32))
groups = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


def least(options):
    """What the cheapest choice costs."""
    return sum(min(option.cost for option in group) for group in options)


def cost(options, numbers):
    return sum(group[i].cost for group, i in zip(options, numbers, strict=True))


@given(groups, st.integers(0, 200))
def test_the_best_of_all_choices(options, spare):
    budget = least(options) + spare
    sums = [
        (cost(options, numbers), sum(g[i].loss for g, i in zip(options, numbers, strict=True)))
        for numbers in itertools.product(*(range(len(group)) for group in options))
    ]
    best = allocate(options, budget)
    assert best.cost == cost(options, best.numbers) <= budget
    expected = min(loss for total, loss in sums if total <= budget)
    assert best.loss == pytest.approx(expected, abs=1e-6)
    chosen = sum(g[i].loss for g, i in zip(options, best.numbers, strict=True))
    assert chosen == pytest.approx(expected, abs=1e-6)


@given(groups, st.integers(1, 200))
def test_a_budget_below_the_cheapest_choice_is_refused(options, missing):
    with pytest.raises(InputError, match=f"smallest choice costs {least(options)}"):
        allocate(options, least(options) - missing)


@given(groups, st.integers(0, 200))
def test_a_thinned_front_keeps_to_the_budget(options, spare):
    best = allocate(options, least(options) + spare, resolution=3)
    assert best.cost == cost(options, best.numbers) <= least(options) + spare


def test_many_groups_come_near_the_budget():
    group = [Option(bits * 1000, 4.0**-bits) for bits in range(2, 9)]
    best = allocate([group] * 64, 64 * 3500)
    assert 64 * 3500 * 0.995 <= best.cost <= 64 * 3500
    # Between 3 and 4 bits: half the groups each, which no other choice beats.
    assert best.loss == pytest.approx(32 * (4.0**-3 + 4.0**-4), rel=1e-6)


def test_nothing_to_choose_from():
    with pytest.raises(InputError, match="at least one option"):
        allocate([[Option(1, 1.0)], []], 10)
