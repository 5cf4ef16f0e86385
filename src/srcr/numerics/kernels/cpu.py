"""The steps within a block of columns on a CPU, compiled by Numba: rows in parallel, a row's part of the
block in the cache.

Each function does what its namesake in :mod:`srcr.numerics.obs` and :mod:`srcr.numerics.descent` does,
operation by operation in float32; products may be fused with the sums they enter.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from srcr.numerics.grid import Column
from srcr.numerics.kernels import Descent, Sweep

#: How the engine's product is rounded: not at all, or to one of the 16-bit types.
_PRODUCT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "fastmath": {"contract"},
    "error_model": "numpy",
}


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
def _code(w, scale, zero, low, high):  # type: ignore[no-untyped-def]
    return min(max(np.rint(w / scale + zero), low), high)


@njit(parallel=True, **_OPTIONS)
def _sweep(  # type: ignore[no-untyped-def]
    work, upper, fixed, codes, keep, errors, scale, zero,
    start, first, last, stop, low, high, product, pruned, push, gridded,
):  # fmt: skip
    for r in prange(work.shape[0]):
        for j in range(first, last):
            kept = keep[r, j] if pruned else True
            w = work[r, j]
            if not (kept or push):
                w = np.float32(0.0)
            value = w
            if gridded:
                z = zero[r, j - start]
                code = _code(w, scale[r, j - start], z, low, high) if kept else z
                codes[r, j] = np.int8(code)
                value = _rounded((code - z) * scale[r, j - start], product)
            elif not kept:
                value = np.float32(0.0)
            fixed[r, j] = value
            error = (w - value) / upper[j, j]
            errors[r, j - start] = error
            for k in range(j + 1, stop):
                work[r, k] -= error * upper[j, k]


@njit(parallel=True, **_OPTIONS)
def _descend(  # type: ignore[no-untyped-def]
    pull, damped, weight, codes, keep, steps, scale, zero,
    start, stop, low, high, product, pruned, gridded,
):  # fmt: skip
    for r in prange(pull.shape[0]):
        for j in range(start, stop):
            kept = keep[r, j] if pruned else True
            value = weight[r, j] + pull[r, j] / damped[j, j]
            if gridded:
                z = zero[r, j - start]
                code = _code(value, scale[r, j - start], z, low, high) if kept else z
                codes[r, j] = np.int8(code)
                value = _rounded((code - z) * scale[r, j - start], product)
            elif not kept:
                value = np.float32(0.0)
            step = value - weight[r, j]
            weight[r, j] = value
            steps[r, j - start] = step
            for k in range(j + 1, stop):
                pull[r, k] -= step * damped[j, k]


def fix_columns(state: Sweep, column: Column | None, start: int, at: slice, stop: int) -> None:
    """As :func:`srcr.numerics.obs.fix_columns`."""
    _threads()
    _sweep(
        *(_array(t) for t in (state.work, state.upper, state.fixed)), *_optional(state.codes, state.keep),
        _array(state.errors), *_grid(column), start, at.start, at.stop, stop, *_range(column),
        state.keep is not None, state.push, column is not None,
    )  # fmt: skip


def step_columns(state: Descent, column: Column | None, start: int, stop: int) -> None:
    """As :func:`srcr.numerics.descent.step_columns`."""
    _threads()
    _descend(
        *(_array(t) for t in (state.pull, state.damped, state.weight)), *_optional(state.codes, state.keep),
        _array(state.steps), *_grid(column), start, stop, *_range(column),
        state.keep is not None, column is not None,
    )  # fmt: skip


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()


def _optional(codes: Tensor | None, keep: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of the right type, empty ones for what there is none of."""
    return (
        np.empty((0, 0), np.int8) if codes is None else codes.numpy(),
        np.empty((0, 0), np.bool_) if keep is None else keep.numpy(),
    )


def _grid(column: Column | None) -> tuple[np.ndarray, np.ndarray]:
    if column is None:
        return np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    scale = column.scale.contiguous().numpy()
    return scale, column.zero_codes().contiguous().numpy()


def _range(column: Column | None) -> tuple[np.float32, np.float32, int]:
    if column is None:
        return np.float32(0), np.float32(0), 0
    return np.float32(column.low), np.float32(column.high), _PRODUCT[column.dtype]


def _threads() -> None:
    """As many threads as torch uses."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(torch.get_num_threads(), most))
