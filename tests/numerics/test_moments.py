"""Compiled sums of products of bfloat16 matrices, against float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srcr.numerics import moments
from srcr.numerics.kernels import cpu_moments, dispatch, mkl_moments
from srcr.numerics.kernels.dispatch import moments_for

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(params=[cpu_moments, mkl_moments], ids=lambda module: module.ENGINE)
def compiled(request):
    """The ways that this CPU has."""
    if not request.param.available():
        pytest.skip("this CPU has no AVX-512 BF16 or AMX: float32 is used instead")
    return request.param


def matrix(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator).bfloat16()


def exact(left, right):
    return left.double().numpy().T @ right.double().numpy()


def assert_near(result, expected, n):
    """Products are exact, and sums in float32."""
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-6 * max(1, n))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 70),
    left=st.integers(1, 100),
    right=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape(compiled, rows, left, right, seed):
    X, Y = matrix(rows, left, seed), matrix(rows, right, seed + 1)
    moment = torch.ones(left, right)
    compiled.accumulate(moment, X, Y)
    assert_near(moment, 1 + exact(X, Y), rows)
    gram = torch.ones(left, left)
    compiled.accumulate_gram(gram, X)
    assert_near(gram.tril(), np.tril(1 + exact(X, X)), rows)


@pytest.mark.parametrize("rows", [511, 512, 513, 2048])
def test_more_rows_than_are_taken_at_a_time(compiled, rows):
    X = matrix(rows, 65, rows)
    gram = torch.zeros(65, 65)
    compiled.accumulate_gram(gram, X)
    assert_near(gram.tril(), np.tril(exact(X, X)), rows)


def test_matrices_that_are_parts_of_others(compiled):
    X, Y = matrix(40, 96, 0)[::2, 16:80], matrix(64, 20, 1).T[:, :33]
    moment = torch.zeros(64, 33)
    compiled.accumulate(moment, X, Y)
    assert_near(moment, exact(X, Y), 20)


def test_what_is_not_finite_shows(compiled):
    X = matrix(9, 5, 0)
    X[4, 2] = torch.inf
    gram = torch.zeros(5, 5)
    compiled.accumulate_gram(gram, X)
    assert not torch.isfinite(gram).all()


def test_a_single_row_and_parts_of_moments(compiled):
    """Whose strides say nothing, or more than their width."""
    X = matrix(7, 40, 0)
    moment = torch.zeros(40, 90)[:, 50:]
    compiled.accumulate(moment, X[3:4], X[3:4])
    assert_near(moment, exact(X[3:4], X[3:4]), 1)


@pytest.mark.parametrize(("intel", "module"), [(False, cpu_moments), (True, mkl_moments)])
def test_they_are_used_for_bfloat16_on_a_cpu_alone(monkeypatch, intel, module):
    if not module.available():
        pytest.skip("this CPU has no AVX-512 BF16 or AMX")
    X = matrix(8, 4, 0)
    monkeypatch.setattr(dispatch, "is_intel", lambda: intel)
    assert moments_for(X, X) is module
    assert moments_for(X.float()) is None
    assert moments_for(X, X.float()) is None
    moment = torch.zeros(4, 4)
    moments.accumulate(moment, X, X.float())
    assert_near(moment, exact(X, X), 8)


def test_no_token_outweighs_the_rest():
    """Nothing changes without extremes; with one, its energy comes to about the most, by a power of two."""
    X = matrix(64, 32, 0)
    assert moments.token_scales(X) is None
    X[5] *= 1024.0
    scales = moments.token_scales(X)
    assert scales.dtype == X.dtype
    assert torch.equal(scales[:, 0] != 1, torch.arange(64) == 5)
    energy = (X.float() * scales.float()).square().sum(1)
    assert 0.45 < energy[5] / (moments.MOST_ENERGY * energy.median()) < 2.1
    assert math.frexp(float(scales[5]))[0] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_of_nothing_are_left_alone(dtype):
    X = torch.zeros(9, 4, dtype=dtype)
    assert moments.token_scales(X) is None
    X[0] = 3.0  # most tokens are zero, so that there is no usual energy
    assert moments.token_scales(X) is None
    X[1:] = 0.01
    X[2] = 0.0
    scales = moments.token_scales(X)
    assert torch.isfinite(scales).all()
    assert scales[2] == 1
