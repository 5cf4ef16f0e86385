"""Products, whichever library gives them, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr.numerics import products
from srcr.numerics.products import product

SIDES = st.sampled_from([1, 31, 64, 65, 200])


def laid_out(rows, cols, how):
    """A random matrix, with its numbers in this order in memory."""
    if how == "transposed":
        return torch.randn(cols, rows).T
    if how == "part":
        return torch.randn(rows + 3, cols + 5)[2 : rows + 2, 1 : cols + 1]
    return torch.randn(rows, cols)


LAYOUTS = st.sampled_from(["plain", "transposed", "part"])


@pytest.mark.parametrize(
    "onednn", [False, True] if torch.backends.mkldnn.is_available() else [False]
)
@given(m=SIDES, k=SIDES, n=SIDES, left=LAYOUTS, right=LAYOUTS, seed=st.integers(0, 99))
def test_a_product_is_that_of_float64_rounded(onednn, m, k, n, left, right, seed):
    torch.manual_seed(seed)
    A, B = laid_out(m, k, left), laid_out(k, n, right)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "uses_onednn", lambda: onednn)
        result = product(A, B)
    exact = A.double() @ B.double()
    bound = A.double().abs() @ B.double().abs() * (k * torch.finfo(torch.float32).eps)
    assert result.shape == (m, n)
    assert result.dtype == torch.float32
    assert bool(((result - exact).abs() <= bound).all())


def test_a_product_keeps_the_type_it_is_given():
    A = torch.randn(70, 80, dtype=torch.float64)
    assert torch.equal(product(A, A.T), A @ A.T)


def test_what_is_not_finite_stays_so():
    A = torch.randn(64, 64)
    A[3, 5] = float("nan")
    assert bool(product(A, torch.randn(64, 64))[3].isnan().all())
