"""Grids: what they can hold, what they hold exactly, and how scales are chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from layers import grid_of
from srcr.numerics.descent import Descent, refine
from srcr.numerics.grid import (
    CACHED_ELEMENTS,
    Grid,
    code_range,
    round_to_storage,
    smallest_scale,
)
from srcr.numerics.hessian import DampedHessian, output_error
from srcr.numerics.obs import SweepResult
from srcr.numerics.scales import ERROR_NORM

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUP = 4

bits = st.integers(2, 8)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 10_000)


@st.composite
def weights(draw, largest=8.0):
    """A matrix of a few rows and one to three groups of 4 columns."""
    shape = draw(st.tuples(st.integers(1, 3), st.sampled_from([4, 8, 12])))
    numbers = st.floats(-largest, largest, width=32, allow_subnormal=False)
    return torch.from_numpy(draw(arrays("float32", shape, elements=numbers)))


@st.composite
def grids(draw, **settings):
    """(weights, mask or None, grid fitted to them)."""
    W = draw(weights(**settings))
    mask = draw(st.none() | arrays("bool", W.shape))
    mask = None if mask is None else torch.from_numpy(mask)
    grid = grid_of(
        W,
        draw(bits),
        draw(st.sampled_from([GROUP, W.shape[1]])),
        draw(st.booleans()),
        draw(dtypes),
        mask=mask,
        search=draw(st.booleans()),
    )
    return W, mask, grid


def rounded(grid, W):
    column = grid.expand()
    return column.dequantize(column.quantize(W))


def loss(grid, W, importance=None):
    """The search's own measure, group by group, in float64."""
    error = (rounded(grid, W).double() - W.double()).abs() ** ERROR_NORM
    if importance is not None:
        error = error * importance.double()
    return error.view(W.shape[0], -1, grid.group_size).sum(-1)


@pytest.mark.parametrize(("num_bits", "expected"), [(2, (-2, 1)), (4, (-8, 7)), (8, (-128, 127))])
def test_code_range(num_bits, expected):
    assert code_range(num_bits) == expected


@given(grids())
def test_codes_are_whole_and_in_range(case):
    W, _, grid = case
    low, high = code_range(grid.num_bits)
    for w in (W, W * 100, -W):
        codes = grid.expand().quantize(w)
        assert bool(((codes >= low) & (codes <= high) & (codes == codes.round())).all())


@given(grids())
def test_zero_is_on_every_grid(case):
    W, _, grid = case
    low, high = code_range(grid.num_bits)
    column = grid.expand()
    zeros = column.zero_codes()
    assert zeros.shape == W.shape
    assert bool(((zeros >= low) & (zeros <= high) & (zeros == zeros.round())).all())
    assert bool((column.dequantize(zeros) == 0).all())
    assert not bool(torch.signbit(column.dequantize(zeros)).any())  # a negative scale gives no -0
    assert torch.equal(column.quantize(torch.zeros_like(W)), zeros)


@given(grids())
def test_scales_are_stored_values_and_usable(case):
    _, _, grid = case
    assert torch.equal(round_to_storage(grid.scale, grid.dtype), grid.scale)
    assert torch.equal(grid.scale.to(grid.dtype).float(), grid.scale)
    assert bool((grid.scale != 0).all())
    assert bool(torch.isfinite(grid.scale).all())


@given(grids())
def test_dequantize_is_the_product_the_engine_computes(case):
    W, _, grid = case
    column = grid.expand()
    codes = column.quantize(W)
    zero = 0 if grid.zero_point is None else grid.zero_point.repeat_interleave(grid.group_size, 1)
    scale = grid.scale.repeat_interleave(grid.group_size, 1).to(grid.dtype)
    expected = (codes - zero).to(torch.int32).to(grid.dtype) * scale
    assert torch.equal(column.dequantize(codes), expected.float())
    assert torch.equal(grid.dequantize(codes.to(torch.int8)), expected.float())
    assert torch.equal(rounded(grid, W).to(grid.dtype).float(), rounded(grid, W))


@given(grids())
def test_a_group_holds_at_most_two_to_the_bits_values(case):
    W, _, grid = case
    for group in rounded(grid, W).reshape(-1, grid.group_size):
        assert len(group.unique()) <= 2**grid.num_bits


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_row_uses_the_whole_range_of_codes(symmetric, dtype):
    W = torch.linspace(-1, 1, 512)[None, :]
    for num_bits in range(2, 9):
        grid = grid_of(W, num_bits, 512, symmetric, dtype, search=False)
        # The outermost code is a tie: the range ends half a step before it.
        assert 2**num_bits - 1 <= len(rounded(grid, W).unique()) <= 2**num_bits


@given(W=weights(), num_bits=bits, symmetric=st.booleans(), seed=seeds, weigh=st.booleans())
def test_the_search_is_never_worse_than_the_plain_range(W, num_bits, symmetric, seed, weigh):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(W.shape[1], generator=generator) if weigh else None
    plain, searched = (
        grid_of(W, num_bits, GROUP, symmetric, torch.float32, importance, search=search)
        for search in (False, True)
    )
    worst = loss(plain, W, importance) * (1 + 1e-4) + 1e-30
    assert bool((loss(searched, W, importance) <= worst).all())


def test_the_search_is_not_worse_where_both_ends_are_full():
    """Shrinking alone clips one end: the plain range cuts both half as much."""
    W = torch.tensor([[1.0, -1.0]])
    plain, searched = (grid_of(W, 2, 2, True, torch.float32, search=s) for s in (False, True))
    assert float(loss(searched, W)) <= float(loss(plain, W))


def test_the_search_gains_on_a_row_with_an_outlier():
    W = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    W[0, 3] = 5
    plain, searched = (grid_of(W, 3, 256, True, torch.float32, search=s) for s in (False, True))
    assert float(loss(searched, W)) < 0.9 * float(loss(plain, W))


@pytest.mark.parametrize("side", [1, -1])
def test_a_one_sided_row_uses_the_spare_code_on_its_side(side):
    W = side * torch.tensor([[8.0, 3.0, 5.0, 1.0]])
    grid = grid_of(W, 4, 4, True, torch.float32)
    assert torch.equal(rounded(grid, W), W)


@given(W=weights(), num_bits=bits, symmetric=st.booleans())
def test_the_plain_range_is_off_by_half_a_step_at_most(W, num_bits, symmetric):
    grid = grid_of(W, num_bits, GROUP, symmetric, torch.float32, search=False)
    error = (rounded(grid, W) - W).abs()
    # Moving 0 onto the grid may shift an asymmetric range by another half step.
    steps = 0.5 if symmetric else 1.0
    assert bool((error <= grid.expand().scale * (steps + 1e-3)).all())


def test_many_weights_are_dequantized_in_parts():
    grid = Grid(
        torch.rand(5, 3).add(0.1),
        torch.randint(-8, 8, (5, 3)).float(),
        4,
        CACHED_ELEMENTS // 4,
        torch.float32,
    )
    codes = torch.randint(-8, 8, (5, 3 * grid.group_size), dtype=torch.int8)
    assert torch.equal(grid.dequantize(codes), grid.expand().dequantize(codes.float()))


@given(grids())
def test_all_views_of_a_grid_agree(case):
    W, _, grid = case
    whole = grid.expand()
    picked = torch.arange(W.shape[1]).flip(0)
    flipped = grid.columns(picked)
    for index in range(W.shape[1]):
        single = grid.columns(torch.tensor([index])).column(0)
        for name in ("scale", "zero_point"):
            parts = [getattr(column, name) for column in (whole, flipped, single)]
            if grid.zero_point is None and name == "zero_point":
                assert parts == [None, None, None]
                continue
            assert torch.equal(parts[0][:, index], parts[2])
            assert torch.equal(parts[1][:, W.shape[1] - 1 - index], parts[2])
        assert torch.equal(single.quantize(W[:, index]), whole.quantize(W)[:, index])
    half = slice(0, (W.shape[0] + 1) // 2)
    assert torch.equal(rounded(grid.rows(half), W[half]), rounded(grid, W)[half])


@given(grids())
def test_groups_do_not_touch_each_other(case):
    W, mask, grid = case
    settings = grid.num_bits, GROUP, grid.zero_point is None, grid.dtype
    whole = grid_of(W, *settings, mask=mask)
    assert whole.scale.shape == (len(W), W.shape[1] // GROUP)
    for group in range(W.shape[1] // GROUP):
        part = slice(group * GROUP, (group + 1) * GROUP)
        own = None if mask is None else mask[:, part]
        alone = grid_of(W[:, part], *settings, mask=own)
        assert torch.equal(alone.scale[:, 0], whole.scale[:, group])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nothing", ["zeros", "all pruned"])
def test_a_row_of_nothing_is_zero_and_harms_no_other(symmetric, search, dtype, nothing):
    W = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 8, dtype=torch.bool)
    if nothing == "zeros":
        W[1] = 0
    else:
        mask[1] = False
    grid = grid_of(W, 4, 8, symmetric, dtype, mask=mask, search=search)
    out = rounded(grid, torch.where(mask, W, torch.zeros_like(W)))
    assert bool((out[1] == 0).all())
    others = grid_of(W[[0, 2]], 4, 8, symmetric, dtype, search=search)
    assert torch.equal(grid.scale[[0, 2]], others.scale)
    assert bool(torch.isfinite(grid.expand().quantize(W)).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 3e4),
        (torch.float16, 1e-2),
        (torch.float16, 1e-4),  # scales among the subnormal numbers
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
    ],
)
def test_huge_and_tiny_weights_keep_their_precision(symmetric, search, dtype, size):
    W = torch.randn(2, 16, generator=torch.Generator().manual_seed(2)).clamp(-2, 2) * size / 2
    grid = grid_of(W, 8, 16, symmetric, dtype, search=search)
    relative = (rounded(grid, W).double() - W.double()).norm() / W.double().norm()
    assert float(relative) < 0.02


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_below_the_smallest_scale_become_zero(symmetric):
    W = torch.full((1, 4), 1e-9)
    grid = grid_of(W, 4, 4, symmetric, torch.float16)
    assert float(grid.scale) == 2.0**-24
    assert bool((rounded(grid, W) == 0).all())


def test_pruned_weights_do_not_widen_the_grid():
    W = torch.tensor([[0.1, -0.2, 0.3, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    for symmetric in (True, False):
        grid = grid_of(W, 4, 4, symmetric, torch.float32, mask=mask)
        assert float((rounded(grid, W) - W)[mask].abs().max()) < 0.03


def test_importance_decides_which_weight_is_served():
    W = torch.tensor([[1.0, 0.3, -0.3, 0.29]])
    first = grid_of(W, 2, 4, True, torch.float32, torch.tensor([100.0, 1, 1, 1]))
    last = grid_of(W, 2, 4, True, torch.float32, torch.tensor([0.0, 1, 1, 1]))
    assert abs(float(rounded(first, W)[0, 0]) - 1) < 0.01
    assert float((rounded(last, W) - W)[0, 1:].abs().max()) < 0.02


def refitted_grid(grid, codes, W, H, damp, block_size=128):
    """The grid with its scales refitted to the codes, none of which moves."""
    start = SweepResult(grid.dequantize(codes), codes, None)
    stay = lambda *_: None  # noqa: E731
    return refine(start, W, DampedHessian(H, damp), grid, Descent(1, block_size), stay).grid


def random_problem(seed, rows=4, cols=8):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * cols, cols, generator=generator) @ torch.randn(
        cols, cols, generator=generator
    )
    return torch.randn(rows, cols, generator=generator), X.T @ X


def damped_errors(W, grid, codes, H, damp):
    delta = (W - grid.expand().dequantize(codes)).double()
    damped = H.double() + damp * torch.eye(len(H))
    return ((delta @ damped) * delta).sum(1)


@given(seed=seeds, num_bits=bits, symmetric=st.booleans(), zeros=st.floats(0, 1))
def test_refitting_never_raises_the_damped_error(seed, num_bits, symmetric, zeros):
    W, H = random_problem(seed)
    damp = 0.01 * float(H.diagonal().mean())
    grid = grid_of(W, num_bits, 8, symmetric, torch.float32)
    column = grid.expand()
    gone = torch.rand(W.shape, generator=torch.Generator().manual_seed(seed + 1)) < zeros
    codes = torch.where(gone, column.zero_codes(), column.quantize(W))
    refitted = refitted_grid(grid, codes, W, H, damp)
    before, after = (damped_errors(W, g, codes, H, damp) for g in (grid, refitted))
    assert bool((after <= before * (1 + 1e-4) + 1e-5).all())
    assert torch.equal(round_to_storage(refitted.scale, torch.float32), refitted.scale)


def test_refitting_a_single_group_finds_the_minimum():
    W, H = random_problem(3)
    damp = 0.5
    grid = grid_of(W, 3, 8, True, torch.float32)
    codes = grid.expand().quantize(W)
    refitted = refitted_grid(grid, codes, W, H, damp)
    damped = H.double() + damp * torch.eye(8)
    c = codes.double()
    best = ((W.double() @ damped) * c).sum(1) / ((c @ damped) * c).sum(1)
    torch.testing.assert_close(refitted.scale[:, 0].double(), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_longer_than_a_block_are_refitted_alike(symmetric):
    W, H = random_problem(4)
    grid = grid_of(W, 3, 8, symmetric, torch.float32)
    codes = grid.expand().quantize(W)
    codes[1] = grid.expand().zero_codes()[1]
    plain = refitted_grid(grid, codes, W, H, 0.5)
    by_rows = refitted_grid(grid, codes, W, H, 0.5, block_size=4)
    torch.testing.assert_close(by_rows.scale, plain.scale, rtol=1e-4, atol=1e-6)
    assert torch.equal(by_rows.scale[1], grid.scale[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitting_groups_one_after_the_other_helps(symmetric):
    W, H = random_problem(4, rows=16)
    grid = grid_of(W, 3, 4, symmetric, torch.float32)
    codes = grid.expand().quantize(W)
    refitted = refitted_grid(grid, codes, W, H, 0.1)
    before, after = (damped_errors(W, g, codes, H, 0.1) for g in (grid, refitted))
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < 0.95 * float(before.sum())


@given(seed=seeds, num_bits=bits, dtype=dtypes, group=st.sampled_from([4, 8]))
def test_refitted_scales_are_stored_values(seed, num_bits, dtype, group):
    W, H = random_problem(seed)
    grid = grid_of(W, num_bits, group, True, dtype)
    refitted = refitted_grid(grid, grid.expand().quantize(W), W, H, 0.1)
    assert torch.equal(round_to_storage(refitted.scale, dtype), refitted.scale)
    assert (refitted.num_bits, refitted.group_size, refitted.dtype) == (num_bits, group, dtype)


def test_refitting_a_row_of_zero_codes_keeps_its_scale():
    W, H = random_problem(5)
    grid = grid_of(W, 4, 8, False, torch.float32)
    codes = grid.expand().zero_codes().clone()
    assert torch.equal(refitted_grid(grid, codes, W, H, 0.1).scale, grid.scale)


def test_refitting_does_not_change_what_it_is_given():
    W, H = random_problem(6)
    grid = grid_of(W, 3, 8, False, torch.float32)
    codes = grid.expand().quantize(W)
    before = [tensor.clone() for tensor in (grid.scale, codes, W, H)]
    refitted_grid(grid, codes, W, H, 0.1)
    after = grid.scale, codes, W, H
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_refitting_with_no_error_changes_nothing():
    _, H = random_problem(7)
    scale = torch.tensor([[0.5], [0.25]])
    codes = torch.tensor([[1.0, -2, 3, 0, 1, 7, -8, 2], [0, 0, 1, -1, 2, 3, 4, 5]])
    grid = Grid(scale, None, 4, 8, torch.float32)
    refitted = refitted_grid(grid, codes, codes * scale, H, 0.1)
    torch.testing.assert_close(refitted.scale, scale)
    assert output_error(refitted.expand().dequantize(codes) - codes * scale, H) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_underflow_become_the_smallest_scale(dtype):
    smallest = smallest_scale(dtype)
    values = torch.tensor([0.0, smallest / 4, smallest, 0.1, -0.1])
    out = round_to_storage(values, dtype)
    assert out[:3].tolist() == [smallest] * 3
    assert out[3] == -out[4] == torch.tensor(0.1).to(dtype).float()


def test_subnormal_scales_are_numbers_like_any_other():
    """All of float16's, and both signs: a compiled search rounds to them as PyTorch does."""
    subnormal = torch.arange(1, 1025) * 2.0**-24
    for scales in (subnormal, -subnormal):
        assert torch.equal(round_to_storage(scales, torch.float16), scales)
    between = torch.linspace(2.0**-24, 2.0**-13, 10_001)
    assert torch.equal(round_to_storage(between, torch.float16), between.half().float())


@given(bits, st.booleans(), seeds, st.integers(-22, -10))
def test_codes_fit_the_rounded_scale_however_coarse_it_is(num_bits, symmetric, seed, exponent):
    """Weights within the grid's reach are never further from it than half a step."""
    W = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    grid = grid_of(W, num_bits, 8, symmetric, torch.float16)
    qparams = grid.expand()
    codes = qparams.quantize(W)
    inside = (codes > qparams.quant_min) & (codes < qparams.quant_max)
    # Half a step, and the rounding of the product to float16.
    allowed = qparams.scale.abs() / 2 + W.abs() * 2.0**-10 + 2.0**-24
    error = (qparams.dequantize(codes) - W).abs()
    assert bool((error <= allowed)[inside].all())
