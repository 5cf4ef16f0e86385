"""The Pareto front, and figures that are plain JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.report import load_runs, plots
from srcr.report.table import rate_map

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that none dominates, by rising cost."""
    alone = [i for i, above in enumerate(plots.dominators(points)) if not above]
    return sorted(alone, key=lambda i: points[i])


def test_the_front_by_hand() -> None:
    points = [(1.0, 0.2), (2.0, 0.1), (2.0, 0.5), (3.0, 0.5), (4.0, 0.9)]
    assert front_of(points) == [0, 2, 4]


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = front_of(points)
    values = [points[i] for i in front]
    assert front
    assert values == sorted(values)
    assert all(b[1] > a[1] or b == a for a, b in pairwise(values))
    for cost, value in points:  # every point is matched or beaten by one of the front
        assert any(c <= cost and v >= value for c, v in values)


@given(POINTS, st.data())
def test_dominators_give_the_front_of_any_subset(
    points: list[tuple[float, float]], data: st.DataObject
) -> None:
    subset = data.draw(st.sets(st.sampled_from(range(len(points))), min_size=1))
    above = plots.dominators(points)
    kept = sorted(subset)
    expected = {kept[i] for i in front_of([points[i] for i in kept])}
    assert {i for i in subset if not subset.intersection(above[i])} == expected


@pytest.mark.slow
@pytest.mark.parametrize("outcome", plots.OUTCOMES, ids=lambda outcome: outcome.key)
@pytest.mark.parametrize("axis", plots.AXES, ids=lambda axis: axis.key)
def test_every_run_is_a_point_with_its_interval(
    dozen: list[Path], outcome: plots.Outcome, axis: plots.Axis
) -> None:
    runs = load_runs(dozen)
    figure = plots.tradeoff(runs, outcome, axis)
    assert figure
    json.dumps(figure, allow_nan=False)
    *points, front = figure["data"]
    assert sorted(i for trace in points for i in trace["meta"]["runs"]) == list(range(len(runs)))
    trace = points[0]
    run = runs[trace["meta"]["runs"][0]]
    measure = outcome.of(run)
    assert run.rates
    assert measure
    assert measure[1]
    assert trace["x"][0] == axis.of(run.rates)
    assert trace["error_y"]["array"][0] == pytest.approx(measure[1][1] - measure[0])
    assert len(front["meta"]["front"]) == len(runs)


def test_a_cell_of_the_map_puts_its_best_run_first(dozen: list[Path]) -> None:
    runs = load_runs(dozen)
    map_of_srcr = rate_map(runs)
    assert map_of_srcr
    (cells,) = [cells for bits, cells in map_of_srcr.rows if bits == 4]
    cell = cells[map_of_srcr.sparsities.index(25)]
    names = {runs[index].name for _, index in cell}
    assert names == {"s25-w4", "s25-w4-case-a", "s25-w4-case-b", "6of8-w4"}
    assert cell[0] == max(cell)
    assert (map_of_srcr.heat(map_of_srcr.lowest), map_of_srcr.heat(map_of_srcr.highest)) == (0, 1)
    assert rate_map(runs[:1]) is None


def test_not_a_number_becomes_null(dozen: list[Path]) -> None:
    (run,) = load_runs(dozen[:1])
    assert run.evaluation
    tasks = {
        name: replace(task, retention=float("nan")) for name, task in run.evaluation.tasks.items()
    }
    json.dumps(plots.task_figure(tasks), allow_nan=False)
