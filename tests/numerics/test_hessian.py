"""Factorisation, damping, ordering, dense targets and output error, against explicit algebra."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from srcr.errors import NumericalError
from srcr.numerics import cholesky, hessian, moments
from srcr.numerics.tensors import is_finite


def inputs(seed, tokens=60, cols=12):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator)
    return torch.randn(tokens, cols, generator=generator) @ mix


def explicit_inverse(H, factor):
    damped = H.double().numpy() + factor.damp * np.eye(len(H))
    order = factor.order.numpy()
    return np.linalg.inv(damped[np.ix_(order, order)])


def assert_factors(H, factor, rtol=2e-4):
    upper = factor.upper.double().numpy()
    expected = explicit_inverse(H, factor)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper, expected, atol=rtol * np.abs(expected).max())


def test_accumulate_adds_batches():
    X, Y = inputs(0), inputs(1)
    moment = torch.zeros(12, 12)
    for part in (slice(0, 7), slice(7, 60)):
        moments.accumulate(moment, X[part], Y[part])
    expected = X.double().numpy().T @ Y.double().numpy()
    np.testing.assert_allclose(moment.numpy(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cols", [1, 12, 256, 257, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_matrix_is_computed_by_half_and_mirrored(cols, dtype):
    X = torch.randn(60, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
    moment = torch.zeros(cols, cols)
    for part in (slice(0, 7), slice(7, 60)):
        moments.accumulate_gram(moment, X[part])
    moments.mirror_(moment)
    expected = X.double().numpy().T @ X.double().numpy()
    np.testing.assert_allclose(moment.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_a_token_far_above_all_others_does_not_bury_them():
    """As in the first token of a sequence: products in bfloat16 would lose all the others."""
    X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    rest = X[1:].double().numpy()
    X[0] = 300.0
    moment = torch.zeros(12, 12)
    moments.accumulate_gram(moment, X)
    moments.mirror_(moment)
    np.testing.assert_allclose(moment.numpy() - 90000.0, rest.T @ rest, atol=0.1)


@pytest.mark.parametrize("frac", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("ordered", [True, False])
def test_factor_of_a_regular_hessian(frac, ordered):
    X = inputs(2)
    H = X.T @ X
    order = hessian.activation_order(H.diagonal()) if ordered else None
    factor = cholesky.factorize(H, order, frac)
    assert factor.dampening_frac == frac
    assert factor.damp == pytest.approx(frac * float(H.diagonal().mean()))
    assert torch.equal(factor.diagonal, H.diagonal())
    assert_factors(H, factor)


def test_pivots_are_the_inverse_of_the_remaining_columns():
    X = inputs(3)
    H = X.T @ X
    order = hessian.activation_order(H.diagonal())
    factor = cholesky.factorize(H, order)
    costs = reference.removal_costs(H.double().numpy(), order.tolist(), factor.damp)
    np.testing.assert_allclose(
        1 / factor.upper.diagonal().double().numpy() ** 2, costs[order.numpy()], rtol=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize(("frac", "rtol"), [(0.01, 1e-3), (1e-4, 1e-2)])
def test_factor_of_a_rank_deficient_hessian(tokens, frac, rtol):
    X = inputs(4, tokens)
    H = X.T @ X
    factor = cholesky.factorize(H, None, frac)
    assert factor.dampening_frac == frac
    assert_factors(H, factor, rtol)


def test_damping_too_small_for_float32_is_honoured_in_float64():
    H = torch.full((12, 12), 100.0)
    factor = cholesky.factorize(H, None, 1e-9)
    assert factor.dampening_frac == 1e-9
    assert_factors(H, factor, rtol=1e-3)


def test_damping_starts_to_grow_where_there_was_none():
    factor = cholesky.factorize(torch.full((12, 12), 100.0), None, 0.0)
    assert factor.dampening_frac == 1e-6
    assert factor.damp == pytest.approx(1e-4)
    assert bool(torch.isfinite(factor.upper).all())
    assert bool((factor.upper.diagonal() > 0).all())


def test_the_damping_reported_is_the_damping_used():
    """Eigenvalues 2 and -0.05 of the mean: the first damping fails in both precisions."""
    H = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    factor = cholesky.factorize(H, None, 0.01)
    assert factor.dampening_frac == pytest.approx(0.1)
    assert factor.damp == pytest.approx(0.1)
    assert_factors(H, factor)


def test_damping_is_tried_up_to_the_mean_diagonal():
    H = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # needs more than half of the mean
    factor = cholesky.factorize(H, None, 0.03)
    assert factor.dampening_frac == 1.0
    assert_factors(H, factor)


def test_too_indefinite_a_hessian_is_refused():
    with pytest.raises(NumericalError, match="dampening_frac 1"):
        cholesky.factorize(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


def test_dead_columns_do_not_stop_the_factorisation():
    X = inputs(5)
    X[:, [2, 7]] = 0
    H = X.T @ X
    assert_factors(H, cholesky.factorize(H))


@pytest.mark.parametrize("frac", [0.0, 0.01])
def test_a_zero_hessian_costs_the_same_in_every_direction(frac):
    factor = cholesky.factorize(torch.zeros(6, 6), None, frac)
    upper = factor.upper
    assert factor.damp > 0
    torch.testing.assert_close(upper, torch.eye(6) * upper[0, 0])
    torch.testing.assert_close(upper[0, 0] ** 2, torch.tensor(1 / factor.damp))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad):
    H = torch.eye(4)
    H[1, 2] = bad
    with pytest.raises(NumericalError, match="not finite"):
        cholesky.factorize(H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(bad, dtype):
    tensor = torch.randn(37, 41).to(dtype)
    assert is_finite(tensor)
    for at in (0, 1, 700, tensor.numel() - 1):
        spoilt = tensor.clone()
        spoilt.view(-1)[at] = bad
        assert not is_finite(spoilt)
    assert is_finite(tensor[:0])


def test_factorize_does_not_change_the_hessian():
    X = inputs(6, tokens=2)
    H = X.T @ X
    before = H.clone()
    cholesky.factorize(H, None, 0.0)
    assert torch.equal(H, before)


def test_activation_order_is_by_falling_diagonal_first_of_equals_first():
    order = hessian.activation_order(torch.tensor([1.0, 5.0, 3.0, 5.0, 0.0]))
    assert order.tolist() == [1, 3, 2, 0, 4]


@given(
    multiple=st.sampled_from([1, 2, 4, 8]),
    groups=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_activation_order_moves_whole_groups(multiple, groups, seed):
    diagonal = torch.rand(groups * multiple, generator=torch.Generator().manual_seed(seed))
    order = hessian.activation_order(diagonal, multiple)
    assert sorted(order.tolist()) == list(range(groups * multiple))
    moved = order.view(groups, multiple)
    assert torch.equal(moved, moved[:, :1] + torch.arange(multiple))
    assert bool((moved[:, 0] % multiple == 0).all())
    sums = diagonal.view(groups, multiple).sum(1)[moved[:, 0] // multiple]
    assert sums.tolist() == sorted(sums.tolist(), reverse=True)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("frac", [0.01, 0.5])
def test_dense_target_solves_the_stacked_least_squares(ordered, frac):
    X = inputs(7)
    X_dense = X + 0.3 * inputs(8)
    W = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    H = X.T @ X
    order = hessian.activation_order(H.diagonal()) if ordered else None
    factor = cholesky.factorize(H, order, frac)
    target = hessian.dense_target_(W @ X_dense.T @ X, W, factor)
    expected = reference.dense_target(
        W.double().numpy(), X.double().numpy(), X_dense.double().numpy(), factor.damp
    )
    np.testing.assert_allclose(target.numpy(), expected, atol=2e-4, rtol=1e-3)
    by_map = W @ hessian.dense_map_(X_dense.T @ X, factor)
    np.testing.assert_allclose(by_map.numpy(), expected, atol=2e-4, rtol=1e-3)


def test_dense_target_by_panels(monkeypatch):
    generator = torch.Generator().manual_seed(12)
    X = torch.randn(300, 100, generator=generator)
    H, W = X.T @ X, torch.randn(7, 100, generator=generator)
    cross = W @ torch.randn(100, 100, generator=generator)
    factor = cholesky.factorize(H, hessian.activation_order(H.diagonal()))
    whole = hessian.dense_target_(cross.clone(), W, factor)
    monkeypatch.setattr(hessian, "PANEL", 24)
    torch.testing.assert_close(hessian.dense_target_(cross, W, factor), whole, rtol=1e-4, atol=1e-5)


def test_output_energy_of_many_rows_is_estimated_on_some():
    generator = torch.Generator().manual_seed(13)
    H, W = torch.eye(4), torch.randn(2000, 4, generator=generator)
    exact = float((W.double() ** 2).sum())
    assert hessian.output_energy(W[:600], H) == pytest.approx(float((W[:600] ** 2).sum()), rel=1e-5)
    assert hessian.output_energy(W, H) == pytest.approx(exact, rel=0.1)


def test_dense_target_is_the_weight_itself_where_inputs_agree():
    X = inputs(10)
    W = torch.randn(5, 12, generator=torch.Generator().manual_seed(11))
    H = X.T @ X
    torch.testing.assert_close(
        hessian.dense_target_(W @ H, W, cholesky.factorize(H)), W, atol=1e-4, rtol=1e-4
    )


def test_output_error_is_the_squared_change_of_the_outputs():
    X = inputs(12)
    delta = torch.randn(5, 12, generator=torch.Generator().manual_seed(13))
    expected = ((X.double() @ delta.double().T) ** 2).sum().item()
    assert hessian.output_error(delta, X.T @ X) == pytest.approx(expected, rel=1e-5)
    assert hessian.output_error(torch.zeros(5, 12), X.T @ X) == 0


@pytest.mark.parametrize("block", [3, 8, 64])
@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_factorising_in_place(monkeypatch, block, size):
    monkeypatch.setattr(cholesky, "BLOCK", block)
    X = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = X.T @ X
    lower = A.clone()
    assert cholesky.cholesky_(lower)
    torch.testing.assert_close(lower, torch.linalg.cholesky(A))
    inverse = lower.clone()
    cholesky.invert_lower_(inverse)
    torch.testing.assert_close(inverse, torch.linalg.inv(lower))
    assert torch.equal(inverse, inverse.tril())
    H, order = A.float(), torch.randperm(size)
    before = H.clone()
    factor = cholesky.factorize(H, order)
    assert torch.equal(H, before)
    damped = (H + factor.damp * torch.eye(size))[order][:, order]
    product = factor.upper.T @ factor.upper @ damped
    torch.testing.assert_close(product, torch.eye(size), atol=2e-3, rtol=0)


def test_what_is_not_positive_definite_is_not_factorised():
    assert not cholesky.cholesky_(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
