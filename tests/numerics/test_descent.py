"""Refitted scales and coordinate descent against a reference that tries every code for every weight."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from layers import grid_of
from srcr.numerics.descent import Descent, refine
from srcr.numerics.hessian import DampedHessian, output_error
from srcr.numerics.obs import SweepResult

ROWS, COLS = 4, 12


def problem(seed, sparsity=None):
    """(target, Hessian, mask or None)."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * COLS, COLS, generator=generator) @ torch.randn(
        COLS, COLS, generator=generator
    )
    H = X.T @ X
    W = torch.randn(ROWS, COLS, generator=generator)
    mask = None
    if sparsity is not None:
        mask = torch.rand(ROWS, COLS, generator=generator) >= sparsity
    return W, H, mask


def rounded(W, grid, mask):
    """Where a descent starts: every weight at its nearest code, pruned ones at zero."""
    column = grid.expand()
    codes = column.quantize(W)
    if mask is not None:
        codes = torch.where(mask, codes, column.zero_codes())
    return SweepResult(column.dequantize(codes), codes.to(torch.int8), mask)


def damped_error(delta, H, damp):
    return output_error(delta.double(), H.double() + damp * torch.eye(COLS))


def in_reference(swept, mask):
    codes = np.zeros((ROWS, COLS)) if swept.codes is None else swept.codes.numpy()
    mask = np.ones((ROWS, COLS), bool) if mask is None else mask.numpy()
    weight = swept.weight.double().numpy()
    return reference.Swept(weight, codes.astype(int), mask, np.zeros(ROWS), 0.5)


def reference_grid(grid):
    zero = None if grid.zero_point is None else grid.zero_point.double().numpy()
    return reference.Grid(grid.scale.double().numpy(), zero, grid.num_bits, grid.group_size)


def refined_by_reference(start, W, H, mask, damp, grid):
    """A round over all groups, or all columns without a grid; and the grid."""
    swept, W, H = in_reference(start, mask), W.double().numpy(), H.double().numpy()
    if grid is None:
        return reference.descend(swept, W, H, list(range(COLS)), damp, None), None
    grid = reference_grid(grid)
    margin = 0.5
    for group in range(COLS // grid.group_size):
        columns = list(range(group * grid.group_size, (group + 1) * grid.group_size))
        swept = reference.refit(swept, W, H, damp, grid, group)
        swept = reference.descend(swept, W, H, columns, damp, grid)
        margin = min(margin, swept.margin)
    return replace(swept, margin=margin), grid


@pytest.mark.parametrize("block", [1, 5, 12, 64])
@pytest.mark.parametrize("sparsity", [None, 0.4])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 12, True), (3, 4, False), (4, 6, True)]
)
def test_scales_and_codes_are_the_best_ones_with_all_others_in_place(
    block, sparsity, bits, group, symmetric
):
    W, H, mask = problem(bits, sparsity)
    damp = 0.01 * float(H.diagonal().mean())
    grid = grid_of(W, bits, group, symmetric, torch.float32, H.diagonal(), mask)
    start = rounded(W, grid, mask)
    result = refine(start, W, DampedHessian(H, damp), grid, Descent(1, block))
    expected, refitted = refined_by_reference(start, W, H, mask, damp, grid)
    assert expected.margin > 1e-4, "a tie: take another seed"
    np.testing.assert_array_equal(result.weights.codes.numpy(), expected.codes)
    np.testing.assert_allclose(result.grid.scale.numpy(), refitted.scale, rtol=1e-4)
    np.testing.assert_allclose(result.weights.weight.numpy(), expected.weight, atol=1e-4)
    assert result.grid.zero_point is grid.zero_point


@pytest.mark.parametrize("block", [1, 5, 12, 64])
@pytest.mark.parametrize("group", [None, 4, 12])
def test_the_pull_is_that_of_the_result(block, group):
    W, H, mask = problem(9, 0.3)
    grid = None if group is None else grid_of(W, 3, group, True, torch.bfloat16, mask=mask)
    start = SweepResult(torch.where(mask, W, torch.zeros(())), None, mask)
    if grid is not None:
        start = rounded(W, grid, mask)
    result = refine(start, W, DampedHessian(H, 0.7), grid, Descent(3, block))
    delta = W - result.weights.weight
    expected = delta @ H + 0.7 * delta
    torch.testing.assert_close(result.pull, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block", [1, 5, 12, 64])
def test_survivors_that_are_not_rounded_move_to_the_best_value(block):
    W, H, mask = problem(5, 0.5)
    start = SweepResult(torch.where(mask, W, torch.zeros(())), None, mask)
    result = refine(start, W, DampedHessian(H, 0.1), None, Descent(1, block)).weights
    expected, _ = refined_by_reference(start, W, H, mask, 0.1, None)
    assert result.codes is None
    np.testing.assert_allclose(result.weight.numpy(), expected.weight, atol=1e-3)
    assert bool((result.weight[~mask] == 0).all())


def test_many_rounds_reach_the_least_squares_optimum():
    W, H, mask = problem(6, 0.3)
    start = SweepResult(torch.where(mask, W, torch.zeros(())), None, mask)
    damp = 0.1 * float(H.diagonal().mean())
    swept = refine(start, W, DampedHessian(H, damp), descent=Descent(200)).weights
    damped = H.double().numpy() + damp * np.eye(COLS)
    for row in range(ROWS):
        kept = mask[row].numpy()
        best = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ W[row].double().numpy())
        np.testing.assert_allclose(swept.weight[row].numpy()[kept], best, atol=1e-3)


@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    group=st.sampled_from([4, 12]),
    symmetric=st.booleans(),
    sparsity=st.none() | st.floats(0, 1),
    block=st.integers(1, 16),
)
def test_no_round_raises_the_damped_error(seed, bits, group, symmetric, sparsity, block):
    W, H, mask = problem(seed, sparsity)
    damp = 0.01 * float(H.diagonal().mean())
    grid = grid_of(W, bits, group, symmetric, torch.float32, mask=mask)
    start = rounded(W, grid, mask)
    refined = refine(start, W, DampedHessian(H, damp), grid, Descent(1, block))
    result = refined.weights
    before, after = (damped_error(s.weight - W, H, damp) for s in (start, result))
    assert after <= before * (1 + 1e-4) + 1e-4
    column = refined.grid.expand()
    assert torch.equal(column.dequantize(result.codes.float()), result.weight)
    assert -(2 ** (bits - 1)) <= int(result.codes.min())
    assert int(result.codes.max()) < 2 ** (bits - 1)
    if mask is not None:
        assert bool((result.weight[~mask] == 0).all())
        assert torch.equal(result.mask, mask)


def test_what_is_given_is_not_changed():
    W, H, mask = problem(7, 0.4)
    for group, block in ((12, 5), (12, 64), (4, 64)):
        grid = grid_of(W, 3, group, False, torch.float32)
        start = rounded(W, grid, mask)
        given = start.weight, start.codes, mask, W, H, grid.scale, grid.zero_point
        before = [tensor.clone() for tensor in given]
        refine(start, W, DampedHessian(H, 1.0), grid, Descent(2, block))
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
