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
from srcr.numerics.kernels.states import DescentState, SweepState

#: How the engine's product is rounded: not at all, or to one of the 16-bit types.
_PRODUCT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
#: A step within a loop: inlined by LLVM, for Numba's own inlining takes several times as long to compile.
_INLINED: dict[str, Any] = {"forceinline": True, **_OPTIONS}
#: Loops marked `prange` run in parallel, and nothing else: to look for more takes long to compile.
_PARALLEL: dict[str, Any] = {
    "parallel": {
        "prange": True,
        "comprehension": False,
        "reduction": False,
        "inplace_binop": False,
        "setitem": False,
        "numpy": False,
        "stencil": False,
        "fusion": False,
    },
    **_OPTIONS,
}


@njit(**_INLINED)
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


@njit(**_INLINED)
def _fixed(w, kept, r, j, g, scale, zero, low, high, product, codes):  # type: ignore[no-untyped-def]
    """What weight ``w`` of row r, column j becomes; its code is noted. Without a grid (g < 0, else the
    column's group) it stays, if it is kept."""
    if g < 0:
        return w if kept else np.float32(0.0)
    s, z = scale[r, g], zero[r, g]
    code = min(max(np.rint(w / s + z), low), high)
    code = code if kept else z  # apart, so that no branch has to be guessed
    codes[r, j] = np.int8(code)
    return _rounded((code - z) * s, product)


@njit(**_INLINED)
def _fix_weight(  # type: ignore[no-untyped-def]
    w, pivot, r, j, i, g, work, codes, mask, errors, push, scale, zero, low, high, product
):
    """Fix one weight in column j, the i-th of the block; returns its error."""
    kept = mask[r, j] if mask.size else True
    if not (kept or push):
        w = np.float32(0.0)
    value = _fixed(w, kept, r, j, g, scale, zero, low, high, product, codes)
    work[r, j] = value
    errors[r, i] = (w - value) / pivot
    return errors[r, i]


@njit(**_INLINED)
def _step_weight(  # type: ignore[no-untyped-def]
    pull, energy, r, j, g, weight, codes, mask, scale, zero, low, high, product
):
    """Move one weight to its best value; returns the step."""
    kept = mask[r, j] if mask.size else True
    before = weight[r, j]
    weight[r, j] = _fixed(
        before + pull / energy, kept, r, j, g, scale, zero, low, high, product, codes
    )
    return weight[r, j] - before


@njit(**_INLINED)
def _copy(source, target):  # type: ignore[no-untyped-def]
    """``target[:] = source``, without the check of shapes, which takes seconds to compile."""
    for k in range(source.size):
        target[k] = source[k]


@njit(**_INLINED)
def _push(row, w0, w1, w2, w3, e0, e1, e2, e3):  # type: ignore[no-untyped-def]
    """Subtract ``e * row`` from four rows."""
    for k in range(row.size):
        u = row[k]
        w0[k] -= e0 * u
        w1[k] -= e1 * u
        w2[k] -= e2 * u
        w3[k] -= e3 * u


@njit(**_PARALLEL)
def _sweep(  # type: ignore[no-untyped-def]
    work, upper, groups, codes, mask, errors, push, scale, zero, low, high, product,
    start, first, last, stop,
):  # fmt: skip
    rows = work.shape[0]
    for quad in prange((rows + 3) // 4):
        r0 = 4 * quad  # the last row may come twice: from the same start, to the same end
        r1, r2, r3 = min(r0 + 1, rows - 1), min(r0 + 2, rows - 1), min(r0 + 3, rows - 1)
        w0, w1 = work[r0, start:stop].copy(), work[r1, start:stop].copy()
        w2, w3 = work[r2, start:stop].copy(), work[r3, start:stop].copy()
        for j in range(first, last):
            i, g = j - start, groups[j]
            k, p = i + 1, upper[i, i]
            e0 = _fix_weight(w0[i], p, r0, j, i, g, work, codes, mask, errors, push,
                            scale, zero, low, high, product)  # fmt: skip
            e1 = _fix_weight(w1[i], p, r1, j, i, g, work, codes, mask, errors, push,
                            scale, zero, low, high, product)  # fmt: skip
            e2 = _fix_weight(w2[i], p, r2, j, i, g, work, codes, mask, errors, push,
                            scale, zero, low, high, product)  # fmt: skip
            e3 = _fix_weight(w3[i], p, r3, j, i, g, work, codes, mask, errors, push,
                            scale, zero, low, high, product)  # fmt: skip
            _push(upper[i, k:], w0[k:], w1[k:], w2[k:], w3[k:], e0, e1, e2, e3)
        _copy(w0[last - start :], work[r0, last:stop])
        _copy(w1[last - start :], work[r1, last:stop])
        _copy(w2[last - start :], work[r2, last:stop])
        _copy(w3[last - start :], work[r3, last:stop])


@njit(**_PARALLEL)
def _descend(  # type: ignore[no-untyped-def]
    pull, damped, group_size, weight, codes, mask, scale, zero, low, high, product, start, stop
):
    rows = pull.shape[0]
    for quad in prange((rows + 3) // 4):
        r0 = 4 * quad
        count = min(4, rows - r0)
        p = np.zeros((4, stop - start), np.float32)
        for q in range(count):
            _copy(pull[r0 + q], p[q])
        p0, p1, p2, p3 = p[0], p[1], p[2], p[3]
        e = np.zeros(4, np.float32)
        for j in range(start, stop):
            i, g = j - start, j // group_size if group_size else -1
            for q in range(count):
                e[q] = _step_weight(p[q, i], damped[i, i], r0 + q, j, g, weight, codes, mask, scale,
                                    zero, low, high, product)  # fmt: skip
            k = i + 1
            _push(damped[i, k:], p0[k:], p1[k:], p2[k:], p3[k:], e[0], e[1], e[2], e[3])


@njit(**_PARALLEL)
def _permute(matrix, order):  # type: ignore[no-untyped-def]
    for r in prange(matrix.shape[0]):
        row = matrix[r].copy()
        for i in range(order.size):
            matrix[r, i] = row[order[i]]


def permute_columns(matrix: Tensor, order: Tensor) -> None:
    """As :func:`srcr.numerics.kernels.dispatch.permute_columns`."""
    _threads()
    _permute(matrix.numpy(), order.numpy())


def fix_columns(state: SweepState, start: int, columns: slice, stop: int) -> None:
    """As :func:`srcr.numerics.obs.fix_columns`."""
    _threads()
    _sweep(
        state.weight.numpy(), _block(state.upper, start, stop), _groups(state.order, state.grid),
        _codes(state.codes), _mask(state.mask), state.errors.numpy(), state.propagate,
        *_grid(state.grid), start, columns.start, columns.stop, stop,
    )  # fmt: skip


def step_columns(state: DescentState, start: int, stop: int) -> None:
    """As :func:`srcr.numerics.descent.step_columns`."""
    _threads()
    _descend(
        state.pull.numpy(), state.damped.numpy(), _group_size(state.grid),
        state.weight.numpy(), _codes(state.codes), _mask(state.mask),
        *_grid(state.grid), start, stop,
    )  # fmt: skip


def _block(matrix: Tensor, start: int, stop: int) -> npt.NDArray[np.float32]:
    """The diagonal block, contiguous: rows a power of two apart would share the cache's sets."""
    return matrix[start:stop, start:stop].contiguous().numpy()


def _groups(order: Tensor, grid: Grid | None) -> npt.NDArray[np.int64]:
    """The group of each column; -1 without a grid."""
    return (torch.full_like(order, -1) if grid is None else order // grid.group_size).numpy()


def _group_size(grid: Grid | None) -> int:
    """Columns of a group; 0 without a grid."""
    return 0 if grid is None else grid.group_size


def _codes(codes: Tensor | None) -> npt.NDArray[np.int8]:
    return np.empty((0, 0), np.int8) if codes is None else codes.numpy()


def _mask(mask: Tensor | None) -> npt.NDArray[np.bool_]:
    return np.empty((0, 0), np.bool_) if mask is None else mask.numpy()


def _grid(grid: Grid | None) -> tuple[Any, ...]:
    """Scales and zero-points [rows, groups], the range of codes, and the product's rounding."""
    if grid is None:
        none = np.empty((0, 0), np.float32)
        return none, none, np.float32(0), np.float32(0), 0
    scale = grid.scale.contiguous()
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.contiguous()
    low, high = map(np.float32, code_range(grid.num_bits))
    return scale.numpy(), zero.numpy(), low, high, _PRODUCT[grid.product_dtype]


def _threads() -> None:
    """As many threads as torch uses, which stay as many: Numba starts its own with the OpenMP of both."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, most))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
