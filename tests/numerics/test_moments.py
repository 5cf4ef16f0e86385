"""Compiled sums of products of bfloat16 matrices, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srcr.numerics import moments
from srcr.numerics.kernels import cpu_moments, dispatch
from srcr.numerics.kernels.dispatch import moments_for

pytestmark = pytest.mark.skipif(
    not cpu_moments.available(), reason="this CPU has no AVX-512 BF16: float32 is used instead"
)


def matrix(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).bfloat16()


def exact(left, right):
    return left.double().numpy().T @ right.double().numpy()


def assert_near(result, expected, n):
    """Products are exact, and sums in float32."""
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6 * max(1, n))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    left=st.integers(1, 100),
    right=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(rows, left, right, seed):
    X, Y = matrix(rows, left, seed), matrix(rows, right, seed + 1)
    moment = torch.ones(left, right)
    cpu_moments.accumulate(moment, X, Y)
    assert_near(moment, 1 + exact(X, Y), rows)
    gram = torch.ones(left, left)
    cpu_moments.accumulate_gram(gram, X)
    assert_near(gram.tril(), np.tril(1 + exact(X, X)), rows)


@pytest.mark.parametrize("rows", [511, 512, 513, 2048])
def test_more_rows_than_are_taken_at_a_time(rows):
    X = matrix(rows, 65, rows)
    gram = torch.zeros(65, 65)
    cpu_moments.accumulate_gram(gram, X)
    assert_near(gram.tril(), np.tril(exact(X, X)), rows)


def test_matrices_that_are_parts_of_others():
    X, Y = matrix(40, 96, 0)[::2, 16:80], matrix(64, 20, 1).T[:, :33]
    moment = torch.zeros(64, 33)
    cpu_moments.accumulate(moment, X, Y)
    assert_near(moment, exact(X, Y), 20)


def test_what_is_not_finite_shows():
    X = matrix(9, 5, 0)
    X[4, 2] = torch.inf
    gram = torch.zeros(5, 5)
    cpu_moments.accumulate_gram(gram, X)
    assert not torch.isfinite(gram).all()


def test_they_are_used_for_bfloat16_on_a_cpu_alone(monkeypatch):
    X = matrix(8, 4, 0)
    monkeypatch.setattr(dispatch, "is_intel", lambda: False)
    assert moments_for(X, X) is cpu_moments
    assert moments_for(X.float()) is None
    assert moments_for(X, X.float()) is None
    moment = torch.zeros(4, 4)
    moments.accumulate(moment, X, X.float())
    assert_near(moment, exact(X, X), 8)
