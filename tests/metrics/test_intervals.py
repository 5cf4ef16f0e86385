"""Bootstrap intervals over documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.metrics.intervals import JACKKNIFE, RESAMPLES, interval, ratio_interval

pytestmark = pytest.mark.slow


def covers(estimate, truth):
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize("sigma", [0.5, 0.8])
def test_ratios_of_skewed_losses_are_covered_95_times_in_100(sigma):
    """Texts of 64 documents of unequal length, whose mean losses are lognormal (skewness 1.8 and 3.7)."""
    rng = np.random.default_rng(1)
    truth, inside, repeats = np.exp(sigma**2 / 2), 0, 1000
    for _ in range(repeats):
        tokens = rng.integers(50, 500, size=64).astype(float)
        loss = np.exp(sigma * rng.standard_normal(64))
        inside += covers(ratio_interval(tokens * loss, tokens), truth)
    assert 0.93 <= inside / repeats <= 0.97


def test_paired_differences_of_right_and_wrong_are_covered_95_times_in_100():
    """300 items, 70 % right by the base and 65 % by the compressed model, which mostly agree. (More repeats:
    benchmarks/intervals.py.)"""
    rng = np.random.default_rng(2)
    inside, repeats = 0, 300
    for _ in range(repeats):
        luck = rng.random(300)
        base = luck < 0.7
        ours = np.where(rng.random(300) < 0.8, luck, rng.random(300)) < 0.65
        change = ours.astype(float) - base
        inside += covers(interval(lambda draw, change=change: change[draw].mean(-1), 300), -0.05)
    assert 0.93 <= inside / repeats <= 0.97


def test_the_width_is_that_of_the_normal_interval():
    rng = np.random.default_rng(2)
    total = rng.standard_normal(4000)
    estimate = ratio_interval(total, np.ones(4000))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / np.sqrt(4000), rel=0.06)
    assert estimate.value == pytest.approx(total.mean())


def test_the_same_data_give_the_same_interval():
    total, weight = np.arange(20.0), np.linspace(1, 2, 20)
    assert ratio_interval(total, weight) == ratio_interval(total.copy(), weight.copy())
    assert ratio_interval(total, weight, seed=1) != ratio_interval(total, weight)


def test_documents_are_drawn_not_tokens():
    """Two documents: nothing lies outside their own ratios."""
    estimate = ratio_interval(np.array([0.0, 100.0]), np.array([100.0, 100.0]))
    assert (estimate.low, estimate.value, estimate.high) == (0.0, 0.5, 1.0)


def test_a_single_document_has_no_spread():
    estimate = ratio_interval(np.array([3.0]), np.array([4.0]))
    assert (estimate.low, estimate.value, estimate.high) == (0.75, 0.75, 0.75)


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(1, 100)), min_size=1, max_size=20),
    st.floats(0.125, 8),
)
def test_the_interval_lies_within_the_data_and_scales_with_it(documents, factor):
    total, weight = (np.array(column) for column in zip(*documents, strict=True))
    estimate = ratio_interval(total, weight)
    ratios = total / weight
    assert ratios.min() - 1e-9 <= estimate.low <= estimate.high <= ratios.max() + 1e-9
    assert estimate.value == pytest.approx(total.sum() / weight.sum())
    scaled = ratio_interval(total * factor, weight)
    for name in ("value", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(getattr(estimate, name) * factor, abs=1e-9)


def test_a_paired_difference_is_narrower_than_its_parts():
    """One draw serves both models, so that what they share cancels."""
    rng = np.random.default_rng(3)
    shared = rng.standard_normal(300)
    base, ours = shared, shared + 0.1 + 0.01 * rng.standard_normal(300)
    paired = interval(lambda draw: (ours[draw] - base[draw]).mean(-1), 300)
    alone = interval(lambda draw: ours[draw].mean(-1), 300)
    assert paired.low > 0.09
    assert paired.high - paired.low < 0.05 * (alone.high - alone.low)


def test_the_statistic_is_evaluated_on_the_data_on_all_draws_and_without_each_document():
    shapes = []

    def statistic(draw):
        shapes.append(draw.shape)
        return draw.mean(-1)

    interval(statistic, 7)
    assert shapes == [(7,), (RESAMPLES, 7)] + 7 * [(6,)]


def test_many_documents_are_left_out_in_groups():
    shapes = []

    def statistic(draw):
        shapes.append(draw.shape)
        return draw.mean(-1)

    interval(statistic, 10 * JACKKNIFE)
    assert [s for s in shapes if len(s) == 1][1:] == JACKKNIFE * [(10 * JACKKNIFE - 10,)]


def test_an_interval_keeps_its_place_under_a_monotone_transformation():
    """What BCa promises: the interval of exp(mean) is exp of that of the mean, up to the acceleration,
    which a transformation of a few per cent hardly moves."""
    data = 0.1 * np.random.default_rng(4).lognormal(size=60)
    plain = interval(lambda draw: data[draw].mean(-1), 60)
    curved = interval(lambda draw: np.exp(data[draw].mean(-1)), 60)
    assert curved.low == pytest.approx(np.exp(plain.low), rel=2e-3)
    assert curved.high == pytest.approx(np.exp(plain.high), rel=2e-3)


def test_skew_moves_the_interval_towards_the_long_tail():
    data = np.random.default_rng(5).lognormal(size=80)
    draws = data[np.random.default_rng(0).integers(0, 80, size=(RESAMPLES, 80))].mean(-1)
    low, high = np.quantile(draws, [0.025, 0.975])
    for estimate in (
        interval(lambda draw: data[draw].mean(-1), 80),
        ratio_interval(data, np.ones(80)),
    ):
        assert estimate.low > low
        assert estimate.high > high


def test_the_same_value_everywhere_has_no_spread():
    for n in (1, 2, 50):
        value = interval(lambda draw: np.ones(draw.shape[:-1]), n)
        ratio = ratio_interval(np.full(n, 0.3), np.full(n, 0.1))
        assert (value.low, value.value, value.high) == (1, 1, 1)
        assert ratio.low == pytest.approx(3)
        assert ratio.high == pytest.approx(3)


def test_nearly_all_right_is_not_taken_for_certain():
    """3 of 300 wrong: a fifth of the draws hold at most one, yet both ends stay near and inside [0, 1]."""
    right = (np.arange(300) < 297).astype(float)
    ratio = ratio_interval(right, np.ones(300))
    share = interval(lambda draw: right[draw].mean(-1), 300)
    for estimate in (ratio, share):
        assert 0.94 < estimate.low < 0.985
        assert 0.99 < estimate.high < 1


def test_two_documents_give_everything_between_them_and_no_more():
    estimate = ratio_interval(np.array([1.0, 4.0]), np.array([1.0, 2.0]))
    assert (estimate.low, estimate.high) == (1, 2)
