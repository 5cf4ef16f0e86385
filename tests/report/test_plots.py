"""The Pareto front, and figures that are plain JSON."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.records.evaluation import Histogram, KlEstimate
from srcr.records.run import LayerRecord
from srcr.report import load_runs, plots
from srcr.report.layers import block_number, by_type, layer_type
from srcr.report.runs import load_searches
from srcr.report.searches import search_history
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
    *points, front, base = figure["data"]
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
    assert base["x"] == [axis.base(run.rates)]
    assert base["y"] == [outcome.base]
    assert base["meta"]["labels"] == ["models/tiny-llama"]


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
    json.dumps(plots.finite(plots.task_figure(tasks)), allow_nan=False)


def test_layers_are_summed_up_by_type() -> None:
    layers = [
        LayerRecord(f"model.layers.{i}.mlp.{name}", (2, size), 0.1 * i, 4 + i, 0.5, 0.1, 3.0, error)
        for i, name, size, error in ((0, "up", 3, 0.1), (0, "down", 1, 0.4), (1, "up", 1, 0.5))
    ]
    up, down = by_type(layers)
    assert (up.name, up.count, up.weights, down.count) == ("up", 2, 8, 1)
    assert up.error == pytest.approx((6 * 0.1 + 2 * 0.5) / 8)
    assert up.bits == pytest.approx((6 * 4 + 2 * 5) / 8)
    assert up.sparsity == pytest.approx(0.1 * 2 / 8)
    assert up.worst is layers[2]


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", 12, "q_proj"),
        ("transformer.h.3.mlp.experts.7.w1", 3, "w1"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_a_layers_place_is_read_from_its_name(name: str, block: int | None, kind: str) -> None:
    assert (block_number(name), layer_type(name)) == (block, kind)


def test_the_histogram_begins_and_ends_where_tokens_are() -> None:
    kl = KlEstimate(0.3, (0.2, 0.4), p50=0.25, p95=0.0)
    assert plots.histogram(kl) is None
    counts = Histogram((0.125, 0.25, 0.5, 1.0), (0, 0, 3, 1, 0))
    assert plots.histogram(replace(kl, histogram=counts)) == {
        "low": -2, "below": False, "shares": [75, 25], "marks": {"mean": 0.3, "median": 0.25},
    }  # fmt: skip
    below = plots.histogram(replace(kl, histogram=replace(counts, counts=(1, 0, 1, 0, 0))))
    assert below
    assert (below["low"], below["below"], below["shares"]) == (-4, True, [50, 0, 50])


def test_a_searchs_candidates_are_read_with_what_was_predicted(searched: Path) -> None:
    ((name, search),) = load_searches([searched])
    history = search_history(name, search)
    assert (history.trials, history.given_up, history.chosen) == (5, 1, "searched")
    assert [each.number for each in history.candidates] == [2, 3, 4, 5]
    sizes = [12.5, 18.75, 100 * (2 + 2 * 4) / (16 * 3), 25]
    assert [each.size for each in history.candidates] == pytest.approx(sizes)
    first, second = history.candidates[:2]
    assert first.predicted == pytest.approx(0.08 / 4 + 0.16 / 4)
    assert second.predicted == pytest.approx(0.08 / 16 + 0.16 / 16)
    figures = history.figures()
    json.dumps(figures, allow_nan=False)
    assert figures["history"]
    assert figures["history"]["data"][-1]["y"] == [0.09, 0.02, 0.015]
    assert figures["front"]
    assert figures["front"]["data"][-1]["y"] == [0.09, 0.02, 0.015]
    older = replace(search, measured=tuple(replace(m, number=None) for m in search.measured))
    assert search_history(name, older).figures()["history"] is None
    assert not search_history(name, replace(search, sensitivity=None)).candidates
