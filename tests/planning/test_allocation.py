import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.errors import InputError
from srcr.planning.allocation import Option, allocate

options = st.builds(Option, st.integers(0, 60), st.floats(-2, 10, allow_nan=False, width=32))
units = st.lists(st.lists(options, min_size=1, max_size=4), min_size=1, max_size=5)


@given(units, st.integers(0, 300))
def test_the_best_of_all_choices(found, budget):
    every = itertools.product(*(range(len(unit)) for unit in found))
    sums = [
        (
            sum(found[u][i].loss for u, i in enumerate(c)),
            sum(found[u][i].cost for u, i in enumerate(c)),
        )
        for c in every
    ]
    affordable = [loss for loss, cost in sums if cost <= budget]
    if not affordable:
        with pytest.raises(InputError, match="smallest choice costs"):
            allocate(found, budget)
        return
    best = allocate(found, budget)
    assert best.cost == sum(found[u][i].cost for u, i in enumerate(best.choice)) <= budget
    assert best.loss == pytest.approx(min(affordable), abs=1e-6)


@given(units, st.integers(0, 300))
def test_a_thinned_front_keeps_to_the_budget(found, budget):
    if sum(min(o.cost for o in unit) for unit in found) > budget:
        return
    best = allocate(found, budget, resolution=3)
    assert best.cost == sum(found[u][i].cost for u, i in enumerate(best.choice)) <= budget


def test_many_units_come_near_the_budget():
    unit = [Option(bits * 1000, 4.0**-bits) for bits in range(2, 9)]
    found = allocate([unit] * 64, 64 * 3500)
    assert 64 * 3500 * 0.995 <= found.cost <= 64 * 3500


def test_nothing_to_choose_from():
    with pytest.raises(InputError, match="at least one option"):
        allocate([[Option(1, 1.0)], []], 10)
