"""The compiled steps against the reference in PyTorch, on layers of realistic size."""

import numpy as np
import pytest
import torch

from srcr.numerics import hessian, masks, obs, saliency
from srcr.numerics.descent import descend, step_columns
from srcr.numerics.grid import fit_grid
from srcr.numerics.kernels import cpu, kernels_for

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
