"""The steps within a block of columns on a CPU, compiled by Numba: four rows at a time, in parallel, a
row's part of the block in the cache.

Each function does what its namesake in :mod:`srcr.numerics.obs` and :mod:`srcr.numerics.descent` does,
operation by operation in float32. Loops run over slices from 0 on: an index that might be negative keeps
Numba from using the vector units.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange
from torch import Tensor

from srcr.numerics.grid import Grid, code_range
from srcr.numerics.kernels import Descent, Sweep

#: How the engine's product is rounded: not at all, or to one of the 16-bit types.
_PRODUCT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}


@njit(inline="always", **_OPTIONS)
def _rounded(x, product):  # type: ignore[no-untyped-def]
    """``x`` as the nearest value of a 16-bit type (ties to even), in float32; -0.0 becomes 0.0."""
    if product == 1:
        bits = np.float32(x).view(np.int32)
        bits = (bits + np.int32(0x7FFF) + ((bits >> 16) & np.int32(1))) & np.int32(-0x10000)
        x = np.int32(bits).view(np.float32)
    elif product == 2:
        if abs(x) < np.float32(2.0**-14):
            x = np.rint(x * np.float32(2.0**24)) * np.float32(2.0**-24)
        else:
            bits = np.float32(x).view(np.int32)
            bits = (bits + np.int32(0xFFF) + ((bits >> 13) & np.int32(1))) & np.int32(-0x2000)
            x = np.int32(bits).view(np.float32)
            if abs(x) > np.float32(65504.0):
                x = np.float32(np.inf) if x > 0 else np.float32(-np.inf)
    return x + np.float32(0.0)


@njit(inline="always", **_OPTIONS)
def _fixed(w, kept, r, c, scale, zero, group_size, low, high, product, codes):  # type: ignore[no-untyped-def]
    """What weight ``w`` of row r, column c becomes; its code is noted. Without a grid (``group_size`` 0)
    it stays, if it is kept."""
    if group_size == 0:
        return w if kept else np.float32(0.0)
    s, z = scale[r, c // group_size], zero[r, c // group_size]
    code = min(max(np.rint(w / s + z), low), high) if kept else z
    codes[r, c] = np.int8(code)
    return _rounded((code - z) * s, product)


@njit(inline="always", **_OPTIONS)
def _sweep_one(  # type: ignore[no-untyped-def]
    w, pivot, r, i, c, fixed, codes, keep, errors, chosen, has_mask, at, push, scale, zero, group_size,
    low, high, product,
):  # fmt: skip
    """Fix one weight, the i-th of its block, column c of the matrix; returns its error."""
    kept = True
    if has_mask:
        kept = chosen[r, at]
        keep[r, c] = kept
        if not (kept or push):
            w = np.float32(0.0)
    value = _fixed(w, kept, r, c, scale, zero, group_size, low, high, product, codes)
    fixed[r, c] = value
    error = (w - value) / pivot
    errors[r, i] = error
    return error


@njit(parallel=True, **_OPTIONS)
def _sweep(  # type: ignore[no-untyped-def]
    work, upper, order, fixed, codes, keep, errors, chosen, has_mask, push,
    scale, zero, group_size, low, high, product, start, first, last, stop,
):  # fmt: skip
    rows, n = work.shape[0], stop - start
    for quad in prange((rows + 3) // 4):
        r0 = 4 * quad
        r1, r2, r3 = min(r0 + 1, rows - 1), min(r0 + 2, rows - 1), min(r0 + 3, rows - 1)
        w0, w1 = work[r0, start:stop].copy(), work[r1, start:stop].copy()
        w2, w3 = work[r2, start:stop].copy(), work[r3, start:stop].copy()
        for i in range(first - start, last - start):
            c, at, pivot = order[start + i], start + i - first, upper[i, i]
            e0 = _sweep_one(w0[i], pivot, r0, i, c, fixed, codes, keep, errors, chosen, has_mask, at,
                            push, scale, zero, group_size, low, high, product)  # fmt: skip
            e1 = _sweep_one(w1[i], pivot, r1, i, c, fixed, codes, keep, errors, chosen, has_mask, at,
                            push, scale, zero, group_size, low, high, product)  # fmt: skip
            e2 = _sweep_one(w2[i], pivot, r2, i, c, fixed, codes, keep, errors, chosen, has_mask, at,
                            push, scale, zero, group_size, low, high, product)  # fmt: skip
            e3 = _sweep_one(w3[i], pivot, r3, i, c, fixed, codes, keep, errors, chosen, has_mask, at,
                            push, scale, zero, group_size, low, high, product)  # fmt: skip
            _push(
                upper[i, i + 1 : n],
                w0[i + 1 :],
                w1[i + 1 :],
                w2[i + 1 :],
                w3[i + 1 :],
                e0,
                e1,
                e2,
                e3,
            )
        work[r0, last:stop] = w0[last - start :]
        work[r1, last:stop] = w1[last - start :]
        work[r2, last:stop] = w2[last - start :]
        work[r3, last:stop] = w3[last - start :]


@njit(inline="always", **_OPTIONS)
def _push(row, w0, w1, w2, w3, e0, e1, e2, e3):  # type: ignore[no-untyped-def]
    """Subtract ``e * row`` from four rows."""
    for k in range(row.size):
        u = row[k]
        w0[k] -= e0 * u
        w1[k] -= e1 * u
        w2[k] -= e2 * u
        w3[k] -= e3 * u


@njit(inline="always", **_OPTIONS)
def _descend_one(  # type: ignore[no-untyped-def]
    pull,
    energy,
    r,
    i,
    c,
    weight,
    codes,
    keep,
    steps,
    has_mask,
    scale,
    zero,
    group_size,
    low,
    high,
    product,
):
    """Move one weight to its best value; returns the step."""
    kept = keep[r, c] if has_mask else True
    before = weight[r, c]
    value = _fixed(
        before + pull / energy, kept, r, c, scale, zero, group_size, low, high, product, codes
    )
    weight[r, c] = value
    steps[r, i] = value - before
    return value - before


@njit(parallel=True, **_OPTIONS)
def _descend(  # type: ignore[no-untyped-def]
    pull, damped, order, weight, codes, keep, steps, has_mask,
    scale, zero, group_size, low, high, product, start, stop,
):  # fmt: skip
    rows, n = pull.shape[0], stop - start
    for quad in prange((rows + 3) // 4):
        r0 = 4 * quad
        count = min(4, rows - r0)
        p = np.zeros((4, n), np.float32)
        p[:count] = pull[r0 : r0 + count, start:stop]
        p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
        step = np.zeros(4, np.float32)
        for i in range(n):
            c, energy = order[start + i], damped[i, i]
            for q in range(count):  # a row is moved once, so none may stand in for another
                step[q] = _descend_one(p[q, i], energy, r0 + q, i, c, weight, codes, keep, steps, has_mask,
                                       scale, zero, group_size, low, high, product)  # fmt: skip
            _push(damped[i, i + 1 : n], p0[i + 1 :], p1[i + 1 :], p2[i + 1 :], p3[i + 1 :],
                  step[0], step[1], step[2], step[3])  # fmt: skip


def fix_columns(state: Sweep, chosen: Tensor | None, start: int, at: slice, stop: int) -> None:
    """As :func:`srcr.numerics.obs.fix_columns`."""
    _threads()
    _sweep(
        state.work.numpy(), state.upper[start:stop, start:stop].contiguous().numpy(),
        state.order.numpy(), state.fixed.numpy(), _codes(state.codes), _mask(state.keep),
        state.errors.numpy(), _mask(chosen), chosen is not None, state.push, *_grid(state.grid),
        start, at.start, at.stop, stop,
    )  # fmt: skip


def step_columns(state: Descent, start: int, stop: int) -> None:
    """As :func:`srcr.numerics.descent.step_columns`."""
    _threads()
    _descend(
        state.pull.numpy(), state.damped[start:stop, start:stop].contiguous().numpy(),
        state.order.numpy(), state.weight.numpy(), _codes(state.codes), _mask(state.keep),
        state.steps.numpy(), state.keep is not None, *_grid(state.grid), start, stop,
    )  # fmt: skip


def _codes(codes: Tensor | None) -> npt.NDArray[np.int8]:
    return np.empty((0, 0), np.int8) if codes is None else codes.numpy()


def _mask(mask: Tensor | None) -> npt.NDArray[np.bool_]:
    return np.empty((0, 0), np.bool_) if mask is None else mask.contiguous().numpy()


def _grid(grid: Grid | None) -> tuple[Any, ...]:
    """Scales and zero-points [rows, groups], the group size, the range of codes, the product's rounding."""
    if grid is None:
        none = np.empty((0, 0), np.float32)
        return none, none, 0, np.float32(0), np.float32(0), 0
    scale = grid.scale.contiguous()
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.contiguous()
    low, high = map(np.float32, code_range(grid.num_bits))
    return scale.numpy(), zero.numpy(), grid.group_size, low, high, _PRODUCT[grid.dtype]


def _threads() -> None:
    """As many threads as torch uses."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(torch.get_num_threads(), most))
