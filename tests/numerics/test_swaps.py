"""Swaps of a mask: each is the best by what weights are worth alone, and none raises the error."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srcr.numerics.descent import Descent, refine
from srcr.numerics.grid import Grid, GridSpec
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.kernels import cpu_swaps
from srcr.numerics.kernels.states import LEAST_GAIN, DescentState
from srcr.numerics.obs import SweepResult
from srcr.numerics.scales import search_scales
from srcr.numerics.swaps import swap_rows

ROWS, COLS = 7, 24
WAYS = {"reference": swap_rows, "compiled": cpu_swaps.swap_rows}


def problem(seed, bits=None, group=COLS, symmetric=True, sparsity=0.4, dtype=torch.float32):
    """A target, a damped Hessian, and a state whose mask is magnitude's."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(ROWS, COLS, generator=generator)
    X = torch.randn(3 * COLS, COLS, generator=generator) @ torch.randn(
        COLS, COLS, generator=generator
    )
    H = X.T @ X / len(X)
    damped = DampedHessian(H, 0.01 * float(H.diagonal().mean()))
    order = W.abs().argsort(dim=1)
    mask = torch.ones(ROWS, COLS, dtype=torch.bool)
    mask.scatter_(1, order[:, : int(sparsity * COLS)], False)
    grid, codes, weight = None, None, torch.where(mask, W, 0.0)
    if bits is not None:
        grid = search_scales(W, GridSpec(bits, group, symmetric, dtype), None, mask, (1.0,))
        qparams = grid.columns(torch.arange(COLS))
        codes = torch.where(mask, qparams.quantize(W), qparams.zero_codes())
        weight, codes = qparams.dequantize(codes), codes.to(torch.int8)
    delta = W - weight
    pull = delta @ H + damped.damp * delta
    return W, damped, DescentState(pull, H, weight, codes, mask, grid)


def damped_error(W, damped, weight):
    """Squared output error of each row, float64."""
    H = damped.matrix.double() + damped.damp * torch.eye(COLS, dtype=torch.float64)
    delta = (W - weight).double()
    return ((delta @ H) * delta).sum(dim=1).numpy()


def rounded(value, grid: Grid | None, row, column):
    """What a value becomes on the grid."""
    if grid is None:
        return value
    part = grid.columns(torch.tensor([column]))
    one = replace(
        part, scale=part.scale[row],
        zero_point=None if part.zero_point is None else part.zero_point[row],
    )  # fmt: skip
    return float(one.dequantize(one.quantize(torch.tensor([value], dtype=torch.float32)))[0])


def swapped(W, damped, state, limit):
    """Weights and mask after up to ``limit`` swaps a row, one number at a time in float64."""
    H = damped.matrix.double().numpy() + damped.damp * np.eye(COLS)
    weight, mask = state.weight.double().numpy(), state.mask.numpy().copy()
    target = W.double().numpy()
    for r in range(ROWS):
        for _ in range(limit):
            pull = (target[r] - weight[r]) @ H
            kept = [c for c in range(COLS) if mask[r, c]]
            loss, out = min(
                (2 * weight[r, c] * pull[c] + weight[r, c] ** 2 * H[c, c], c) for c in kept
            )
            pull = pull + weight[r, out] * H[out]
            options = []
            for c in range(COLS):
                if not mask[r, c]:
                    value = rounded(pull[c] / H[c, c], state.grid, r, c)
                    options.append((value**2 * H[c, c] - 2 * value * pull[c], c, value))
            gain, into, value = min(options)
            if gain + loss >= -LEAST_GAIN * abs(loss):
                break
            weight[r, out], weight[r, into] = 0.0, value
            mask[r, out], mask[r, into] = False, True
    return weight, mask


CASES = [
    {},
    {"bits": 4},
    {"bits": 3, "group": 8},
    {"bits": 2, "group": 6, "symmetric": False},
    {"bits": 4, "dtype": torch.bfloat16},
    {"bits": 8, "group": 4, "symmetric": False, "dtype": torch.float16},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("limit", [1, 6])
def test_swaps_are_those_of_plain_arithmetic(way, case, limit):
    W, damped, state = problem(3, **case)
    weight, mask = swapped(W, damped, state, limit)
    assert (mask != state.mask.numpy()).any()
    WAYS[way](state, damped.damp, limit)
    np.testing.assert_array_equal(state.mask.numpy(), mask)
    np.testing.assert_allclose(state.weight.numpy(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@given(
    seed=st.integers(0, 50), case=st.sampled_from(CASES), limit=st.integers(1, COLS),
    sparsity=st.sampled_from([0.05, 0.5, 0.9]),
)  # fmt: skip
def test_no_error_rises_and_rows_keep_their_zeros(way, seed, case, limit, sparsity):
    W, damped, state = problem(seed, sparsity=sparsity, **case)
    before, zeros = damped_error(W, damped, state.weight), (~state.mask).sum(dim=1)
    WAYS[way](state, damped.damp, limit)
    after = damped_error(W, damped, state.weight)
    assert (after <= before * (1 + 1e-5)).all()
    assert torch.equal((~state.mask).sum(dim=1), zeros)
    assert bool((state.weight[~state.mask] == 0).all())
    delta = W - state.weight
    torch.testing.assert_close(
        state.pull, delta @ damped.matrix + damped.damp * delta, rtol=1e-3, atol=1e-3
    )
    if state.grid is not None:
        assert torch.equal(state.grid.dequantize(state.codes), state.weight)


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_is_gained_nothing_changes(way):
    _, damped, state = problem(1, 4)
    WAYS[way](state, damped.damp, COLS)
    again = replace(
        state, weight=state.weight.clone(), mask=state.mask.clone(), pull=state.pull.clone()
    )
    WAYS[way](again, damped.damp, COLS)
    assert torch.equal(again.mask, state.mask)
    assert torch.equal(again.weight, state.weight)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kept", [True, False])
def test_rows_that_are_all_kept_or_all_pruned(way, kept):
    _, damped, state = problem(2)
    state.mask.fill_(kept)
    if not kept:
        state.weight.zero_()
    before = state.weight.clone()
    WAYS[way](state, damped.damp, 4)
    assert torch.equal(state.weight, before)
    assert bool((state.mask == kept).all())


def test_descent_with_swaps_loses_less():
    W, damped, state = problem(5, 4, sparsity=0.5)
    start = SweepResult(state.weight, state.codes, state.mask)
    plain, swapping = (
        refine(start, W, damped, state.grid, Descent(3, COLS, swaps)) for swaps in (0, 3)
    )
    errors = [damped_error(W, damped, each.weights.weight).sum() for each in (plain, swapping)]
    assert errors[1] < 0.98 * errors[0]
    assert torch.equal(plain.weights.mask, start.mask)  # which is nobody's to change
    assert torch.equal((~swapping.weights.mask).sum(1), (~start.mask).sum(1))
