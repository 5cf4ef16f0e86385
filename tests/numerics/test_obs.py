"""The sweep against a reference that inverts the Hessian of the remaining columns at every step."""

import numpy as np
import pytest
import torch

import reference
from layers import grid_of
from srcr.errors import InputError
from srcr.numerics import cholesky, hessian, masks, obs, saliency
from srcr.numerics.grid import Grid

ROWS, COLS = 5, 16
BLOCKS = [1, 5, 16, 64]  # of 16 columns: smaller, not dividing, equal, larger


def layer(seed, rows=ROWS, cols=COLS):
    """A weight and the Hessian of correlated inputs, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator)
    X = torch.randn(3 * cols, cols, generator=generator) @ mix
    X *= torch.logspace(-0.5, 0.5, cols)[torch.randperm(cols, generator=generator)]
    return torch.randn(rows, cols, generator=generator), X.T @ X


def factor_of(H, ordered, multiple=1):
    order = hessian.activation_order(H.diagonal(), multiple) if ordered else None
    return cholesky.factorize(H, order, 0.01)


def doubles(tensor):
    return tensor.double().numpy()


def reference_grid(grid):
    zero = None if grid.zero_point is None else doubles(grid.zero_point)
    product = np.float16 if grid.dtype == torch.float16 else np.float64
    return reference.Grid(doubles(grid.scale), zero, grid.num_bits, grid.group_size, product)


def reference_sweep(W, H, factor, **settings):
    order = factor.order.tolist()
    return reference.sweep(doubles(W), doubles(H), order, factor.damp, **settings)


def assert_same(swept, expected):
    np.testing.assert_allclose(doubles(swept.weight), expected.weight, atol=2e-4, rtol=1e-4)
    if swept.mask is not None:
        np.testing.assert_array_equal(swept.mask.numpy(), expected.keep)
        assert bool((swept.weight[~swept.mask] == 0).all())
    if swept.codes is not None:
        assert expected.margin > 1e-4, "a rounding tie: take another seed"
        np.testing.assert_array_equal(swept.codes.numpy(), expected.codes)


def random_mask(seed, sparsity=0.4):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.rand(ROWS, COLS, generator=generator) >= sparsity


def fixed(mask, factor, block, propagate=True):
    ordered = mask[:, factor.order]
    return obs.MaskSelection(lambda _, at: ordered[:, at], block, propagate)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "dtype"),
    [
        (2, 16, True, torch.float32),
        (3, 4, False, torch.float32),
        (4, 8, True, torch.float16),
        (4, 16, False, torch.float16),
    ],
)
def test_quantize_only(ordered, block, bits, group, symmetric, dtype):
    W, H = layer(seed=bits)
    factor = factor_of(H, ordered)
    grid = grid_of(W, bits, group, symmetric, dtype, H.diagonal())
    swept = obs.sweep(W, factor, None, grid, block)
    assert swept.mask is None
    assert_same(swept, reference_sweep(W, H, factor, grid=reference_grid(grid)))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_prune_only_with_a_given_mask(ordered, block):
    W, H = layer(seed=10)
    mask, factor = random_mask(10), factor_of(H, ordered)
    swept = obs.sweep(W, factor, fixed(mask, factor, block), None, block)
    expected = reference_sweep(
        W, H, factor, choose=lambda _, columns: mask.numpy()[:, columns], span=COLS
    )
    assert swept.codes is None
    assert torch.equal(swept.mask, mask)
    assert_same(swept, expected)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block", [4, 8, 16, 64])
@pytest.mark.parametrize("pattern", [(2, 4), (3, 4), (1, 2)])
def test_prune_only_n_of_m_chosen_on_the_fly(ordered, block, pattern):
    W, H = layer(seed=20)
    factor = factor_of(H, ordered, pattern[1])
    pivots = factor.upper.diagonal()
    selection = obs.MaskSelection(
        lambda w, at: masks.n_of_m_mask(saliency.obs(w, pivots[at]), *pattern), pattern[1]
    )
    costs = reference.removal_costs(doubles(H), factor.order.tolist(), factor.damp)
    expected = reference_sweep(
        W,
        H,
        factor,
        choose=lambda w, at: reference.n_of_m(w[:, at] ** 2 * costs[at], *pattern),
        span=pattern[1],
    )
    swept = obs.sweep(W, factor, selection, None, block)
    assert_same(swept, expected)
    groups = swept.mask.view(ROWS, -1, pattern[1])
    assert bool((groups.sum(-1) == pattern[0]).all())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_prune_only_chosen_block_by_block(ordered, block):
    W, H = layer(seed=25)
    factor = factor_of(H, ordered)
    pivots = factor.upper.diagonal()
    selection = obs.MaskSelection(
        lambda w, at: masks.prune_lowest(saliency.obs(w, pivots[at]), w.numel() // 2), block
    )
    costs = reference.removal_costs(doubles(H), factor.order.tolist(), factor.damp)

    def choose(w, at):
        return reference.all_but_lowest(w[:, at] ** 2 * costs[at], w[:, at].size // 2)

    swept = obs.sweep(W, factor, selection, None, block)
    assert_same(swept, reference_sweep(W, H, factor, choose=choose, span=block))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("propagate", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 16, True), (4, 4, True), (3, 8, False), (4, 16, False)]
)
def test_joint_with_a_given_mask(ordered, block, propagate, bits, group, symmetric):
    W, H = layer(seed=30 + bits)
    mask, factor = random_mask(30), factor_of(H, ordered)
    grid = grid_of(W, bits, group, symmetric, torch.float32, H.diagonal(), mask)
    swept = obs.sweep(W, factor, fixed(mask, factor, block, propagate), grid, block)
    expected = reference_sweep(
        W,
        H,
        factor,
        choose=lambda _, columns: mask.numpy()[:, columns],
        span=COLS,
        grid=reference_grid(grid),
        push=propagate,
    )
    assert_same(swept, expected)
    column = grid.expand()
    assert torch.equal(column.dequantize(swept.codes.float()), swept.weight)
    zeros = column.zero_codes().expand(ROWS, COLS)
    assert torch.equal(swept.codes.float()[~mask], zeros[~mask])


@pytest.mark.parametrize("block", [4, 8, 16, 64])
def test_joint_n_of_m_where_rounding_has_a_cost(block):
    W, H = layer(seed=40)
    factor = factor_of(H, ordered=True, multiple=4)
    pivots = factor.upper.diagonal()
    grid = grid_of(W, 3, 8, True, torch.float32, H.diagonal())

    def select(w, at):
        column = grid.columns(factor.order[at])
        rounded = column.dequantize(column.quantize(w))
        cost = saliency.obs(w, pivots[at]) - saliency.obs(w - rounded, pivots[at])
        return masks.n_of_m_mask(cost, 2, 4)

    theirs = reference_grid(grid)
    costs = reference.removal_costs(doubles(H), factor.order.tolist(), factor.damp)

    def choose(w, at):
        scores = np.zeros((ROWS, len(at)))
        for row in range(ROWS):
            for i, col in enumerate(at):
                code, _ = theirs.round_one(w[row, col], row, col)
                left = w[row, col] - theirs.value(code, row, col)
                scores[row, i] = (w[row, col] ** 2 - left**2) * costs[col]
        return reference.n_of_m(scores, 2, 4)

    swept = obs.sweep(W, factor, obs.MaskSelection(select, 4), grid, block)
    assert_same(swept, reference_sweep(W, H, factor, choose=choose, span=4, grid=theirs))


def test_the_last_column_of_every_row_cannot_be_repaired():
    """With nothing pruned but the last column swept, nothing else may move."""
    W, H = layer(seed=51)
    mask, factor = torch.ones(ROWS, COLS, dtype=torch.bool), factor_of(H, ordered=True)
    last = int(factor.order[-1])
    mask[:, last] = False
    swept = obs.sweep(W, factor, fixed(mask, factor, COLS))
    others = [col for col in range(COLS) if col != last]
    assert torch.equal(swept.weight[:, others], W[:, others])
    assert bool((swept.weight[:, last] == 0).all())


def test_pruning_one_column_gives_the_least_squares_optimum():
    """Removing the column swept first leaves exactly the best refit of all the others."""
    W, H = layer(seed=52)
    factor = factor_of(H, ordered=False)
    mask = torch.ones(ROWS, COLS, dtype=torch.bool)
    mask[:, 0] = False
    swept = obs.sweep(W, factor, fixed(mask, factor, COLS))
    damped = doubles(H) + factor.damp * np.eye(COLS)
    best = doubles(W) @ damped[:, 1:] @ np.linalg.inv(damped[1:, 1:])
    np.testing.assert_allclose(doubles(swept.weight)[:, 1:], best, atol=1e-4)


def test_compensation_beats_plain_rounding():
    W, H = layer(seed=53, rows=32)
    factor = factor_of(H, ordered=True)
    grid = grid_of(W, 3, COLS, True, torch.float32)
    column = grid.expand()
    plain = column.dequantize(column.quantize(W))
    swept = obs.sweep(W, factor, None, grid, 8)
    assert hessian.output_error(swept.weight - W, H) < 0.7 * hessian.output_error(plain - W, H)


def test_a_weight_on_the_grid_is_left_alone():
    _, H = layer(seed=54)
    scale = torch.full((ROWS, 2), 0.25)
    generator = torch.Generator().manual_seed(54)
    codes = torch.randint(-8, 8, (ROWS, COLS), generator=generator)
    swept = obs.sweep(
        codes * 0.25, factor_of(H, True), None, Grid(scale, None, 4, 8, torch.float32)
    )
    assert torch.equal(swept.codes, codes.to(torch.int8))
    assert torch.equal(swept.weight, codes * 0.25)


def test_the_weight_given_is_not_changed():
    W, H = layer(seed=55)
    before = W.clone()
    obs.sweep(W, factor_of(H, True), None, grid_of(W, 2, 4, True, torch.float32), 4)
    assert torch.equal(W, before)


def test_n_of_m_refuses_a_width_that_m_does_not_divide():
    W, H = layer(seed=56, cols=10)
    selection = obs.MaskSelection(lambda w, at: masks.n_of_m_mask(w.abs(), 2, 4), 4)
    with pytest.raises(InputError, match=r"2:4.*divides"):
        obs.sweep(W, factor_of(H, False), selection, None, 8)
