"""The compiled steps against the reference in PyTorch, on layers of realistic size."""

import numpy as np
import pytest
import torch

from srcr.numerics import hessian, masks, obs, saliency
from srcr.numerics.descent import descend, step_columns
from srcr.numerics.grid import ERROR_NORM, SHRINKS, fit_grid, fit_rows
from srcr.numerics.kernels import cpu, cpu_scales, fit_rows_for, kernels_for

ROWS, COLS = 96, 320


def layer(seed):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLS, COLS, generator=generator) / COLS**0.5
    X = torch.randn(4 * COLS, COLS, generator=generator) @ (mix + torch.eye(COLS))
    return torch.randn(ROWS, COLS, generator=generator), X.T @ X


def selection(kind, factor):
    pivots = factor.upper.diagonal()
    if kind == "2:4":
        return obs.Selection(lambda w, at: masks.keep_n_of_m(saliency.obs(w, pivots[at]), 2, 4), 4)
    if kind is None:
        return None
    share = ROWS * 128 // 3
    return obs.Selection(
        lambda w, at: masks.keep_all_but_lowest(saliency.obs(w, pivots[at]), min(share, w.numel())),
        128,
        push=kind == "pushed",
    )


def assert_alike(ours, theirs, grid):
    """The same but for what a last bit may tip: a rounding tie, and what follows from it in its row."""
    same = torch.ones(ROWS, dtype=torch.bool)
    if theirs.keep is not None:
        assert (ours.keep == theirs.keep).float().mean() > 0.999
        same &= (ours.keep == theirs.keep).all(1)
    if theirs.codes is not None:
        same &= (ours.codes == theirs.codes).all(1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(ours.weight[same], theirs.weight[same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss[same], theirs.loss[same], rtol=1e-3, atol=1e-4)
    if grid is not None:
        dequantized = grid.expand().dequantize(ours.codes.float())
        assert torch.equal(dequantized, ours.weight), "the product is the engine's, to the bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "kind"),
    [
        (4, COLS, True, None),
        (4, COLS, True, "pushed"),
        (3, 64, False, "pushed"),
        (8, 32, False, "2:4"),
        (2, COLS, True, "dropped"),
        (None, None, None, "pushed"),
        (None, None, None, "2:4"),
    ],
)
def test_cpu_is_the_reference(dtype, bits, group, symmetric, kind):
    W, H = layer(seed=1)
    order = hessian.activation_order(H.diagonal(), 4)
    factor = hessian.factorize(H, order)
    grid = None
    if bits is not None:
        grid = fit_grid(W, bits, group, symmetric, dtype, H.diagonal())
    ours, theirs = (
        obs.sweep(W, factor, selection(kind, factor), grid, columns=columns)
        for columns in (cpu.fix_columns, obs.fix_columns)
    )
    assert_alike(ours, theirs, grid)
    polished, expected = (
        descend(theirs, W, H, factor.damp, order, grid, columns=columns)
        for columns in (cpu.step_columns, step_columns)
    )
    assert_alike(polished, expected, grid)


def test_a_cpu_has_kernels_and_an_unknown_device_has_none():
    assert kernels_for(torch.device("cpu")) is cpu
    assert kernels_for(torch.device("meta")) is None
    assert fit_rows_for(torch.device("cpu")) is cpu_scales.fit_rows
    assert fit_rows_for(torch.device("meta")) is None


@pytest.mark.parametrize(("dtype", "product"), [(torch.bfloat16, 1), (torch.float16, 2)])
def test_products_are_rounded_as_torch_does(dtype, product):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 17, (20_000,), generator=generator)
    values = torch.randn(20_000, generator=generator).ldexp(exponents)
    halfway = torch.arange(-4096, 4096) * 2.0**-4  # many ties
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.0, 65520.0, -7e4, 2.0**-24, 2.0**-25, 3e-8])
    values = torch.cat([values, halfway, halfway * 2.0**-20, special])
    if product == 1:
        values = values[values.abs() < 1e38]
    ours = np.array([cpu._rounded(np.float32(v), product) for v in values.numpy()], np.float32)
    theirs = values.to(dtype).to(torch.float32) + 0.0
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert not np.signbit(ours[ours == 0]).any()


def test_threads_are_those_of_torch():
    import numba

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        W, H = layer(seed=2)
        obs.sweep(W, hessian.factorize(H))
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def search_loss(grid, W, keep, importance):
    """The scale search's own measure of each group, in float64."""
    column = grid.expand()
    if keep is not None:
        alive = keep.view(len(W), -1, grid.group_size)
        alive = (alive | ~alive.any(2, keepdim=True)).view_as(W)
        W = torch.where(alive, W, torch.zeros(()))
    error = (column.dequantize(column.quantize(W)) - W).double().abs() ** ERROR_NORM
    if importance is not None:
        error = error * importance.double()
    return error.view(len(W), -1, grid.group_size).sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "pruned", "weighed"),
    [(2, 5, 0.9, True), (3, 64, 0.3, False), (4, COLS, 0.25, True), (8, 32, None, True)],
)
def test_scales_are_those_of_the_reference(dtype, symmetric, bits, group, pruned, weighed):
    W, H = layer(seed=3)
    W[5] = 0
    W[:, 7] *= 20
    keep = None if pruned is None else torch.rand_like(W) >= pruned
    importance = H.diagonal() if weighed else None
    ours, theirs = (
        rows(W, bits, group, symmetric, dtype, importance, keep, SHRINKS)
        for rows in (cpu_scales.fit_rows, fit_rows)
    )
    same = ours.scale == theirs.scale
    if not symmetric:
        same &= ours.zero_point == theirs.zero_point
    assert same.float().mean() > 0.99, "only tries whose losses tie may change places"
    losses = [search_loss(grid, W, keep, importance) for grid in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-12)
    assert torch.equal(losses[0][same], losses[1][same])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e30)])
def test_losses_that_overflow_are_as_in_the_reference(symmetric, dtype, size):
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).clamp(-1, 1) * size
    ours, theirs = (
        rows(W, 4, 16, symmetric, dtype, None, None, SHRINKS)
        for rows in (cpu_scales.fit_rows, fit_rows)
    )
    assert torch.equal(ours.scale, theirs.scale)


def test_powers_are_within_a_millionth():
    exponents = np.linspace(-52, 52, 200_001)  # beyond, the result is out of float32's range
    x = np.concatenate([np.exp2(exponents), 1 + np.linspace(0, 1, 50_001)]).astype(np.float32)
    out = np.empty_like(x)
    cpu_scales.powers(x, x.view(np.int32), np.uint64(x.size), out)
    np.testing.assert_allclose(out, x.astype(np.float64) ** ERROR_NORM, rtol=1e-6)
    edges = np.array([0, 1e-45, 1e-38, 3e38, np.inf], np.float32)
    cpu_scales.powers(edges, edges.view(np.int32), np.uint64(4), out)
    assert out[:4].tolist() == [0, 0, 0, np.inf]


def test_a_scale_does_not_depend_on_other_rows_or_threads():
    W, H = layer(seed=5)
    settings = 4, 64, True, torch.bfloat16, H.diagonal(), None, SHRINKS
    whole = cpu_scales.fit_rows(W, *settings).scale
    assert torch.equal(cpu_scales.fit_rows(W[11:14].contiguous(), *settings).scale, whole[11:14])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu_scales.fit_rows(W, *settings).scale, whole)
    finally:
        torch.set_num_threads(before)
