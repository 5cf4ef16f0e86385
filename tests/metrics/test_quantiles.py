"""Streamed percentiles are numpy's, whatever the values and however they arrive."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from srcr.metrics.quantiles import Quantiles

PERCENTS = (0, 12.5, 50, 95, 99, 99.9, 100)
largest = float(np.float32(1e30))
floats = st.floats(-largest, largest, width=32)


@given(arrays(np.float32, st.integers(1, 60), elements=floats), st.integers(1, 60))
def test_any_values_in_any_pieces(values, size):
    stream = Quantiles()
    for start in range(0, len(values), size):
        stream.add(values[start : start + size])
    expected = np.percentile(values.astype(np.float64), PERCENTS)
    assert stream.percentiles(PERCENTS) == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_more_values_than_are_read_at_a_time():
    values = np.random.default_rng(0).lognormal(-5, 2, size=(37, 511)).astype(np.float32)
    stream = Quantiles(chunk=1000)
    stream.add(values[:20])
    assert stream.percentiles([50]) == pytest.approx([np.median(values[:20])], rel=1e-6)
    stream.add(values[20:])
    expected = np.percentile(values.astype(np.float64), PERCENTS)
    assert stream.percentiles(PERCENTS) == pytest.approx(expected, rel=1e-6)


@given(arrays(np.float32, st.integers(1, 60), elements=floats))
def test_octaves_count_as_numpy_does(values):
    stream = Quantiles()
    stream.add(values)
    edges = [-np.inf, *(2.0**exponent for exponent in range(-3, 5)), np.inf]
    assert stream.octaves(-3, 4) == np.histogram(values, edges)[0].tolist()


def test_no_values():
    with pytest.raises(ValueError, match="no values"):
        Quantiles().percentiles([50])
