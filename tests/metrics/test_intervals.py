"""Bootstrap intervals over documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srcr.metrics.intervals import RESAMPLES, interval, ratio_interval


def test_the_interval_covers_the_truth_95_times_in_100():
    """600 texts of 100 documents of unequal length whose tokens share a document's own mean."""
    rng = np.random.default_rng(1)
    truth, inside, repeats = 2.0, 0, 600
    for _ in range(repeats):
        tokens = rng.integers(20, 60, size=100).astype(float)
        total = tokens * (truth + 0.5 * rng.standard_normal(100))
        estimate = ratio_interval(total, tokens)
        inside += estimate.low <= truth <= estimate.high
    assert 0.93 <= inside / repeats <= 0.97


def test_the_width_is_that_of_the_normal_interval():
    rng = np.random.default_rng(2)
    total = rng.standard_normal(4000)
    estimate = ratio_interval(total, np.ones(4000))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 / np.sqrt(4000), rel=0.06)
    assert estimate.value == pytest.approx(total.mean())
    assert estimate.n == 4000


def test_the_same_data_give_the_same_interval():
    total, weight = np.arange(20.0), np.linspace(1, 2, 20)
    assert ratio_interval(total, weight) == ratio_interval(total.copy(), weight.copy())
    assert ratio_interval(total, weight, seed=1) != ratio_interval(total, weight)


def test_documents_are_drawn_not_tokens():
    """Two documents: the bootstrap can only give one, the other, or their mean."""
    estimate = ratio_interval(np.array([0.0, 100.0]), np.array([100.0, 100.0]))
    assert (estimate.low, estimate.value, estimate.high) == (0.0, 0.5, 1.0)


def test_one_document_has_no_spread():
    estimate = ratio_interval(np.array([3.0]), np.array([4.0]))
    assert (estimate.low, estimate.value, estimate.high, estimate.n) == (0.75, 0.75, 0.75, 1)


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


def test_the_statistic_is_evaluated_on_the_data_and_on_all_draws():
    shapes = []

    def statistic(draw):
        shapes.append(draw.shape)
        return draw.mean(-1)

    interval(statistic, 7)
    assert shapes == [(7,), (RESAMPLES, 7)]
