"""Swaps of a mask on a CPU, compiled by Numba: every row by itself, in the cache.

The function does what its namesake in :mod:`srcr.numerics.swaps` does, in the same precision; a weight that
comes in is rounded only where it could be the best.
"""

import numpy as np
from numba import njit, prange

from srcr.numerics.kernels.cpu import (
    _INLINED,
    _PARALLEL,
    _codes,
    _fixed,
    _grid,
    _group_size,
    _mask,
    _rounded,
    _threads,
)
from srcr.numerics.kernels.states import LEAST_GAIN, DescentState


@njit(**_INLINED)
def _worth(v, r, j, g, energy, pull, scale, zero, low, high, product):  # type: ignore[no-untyped-def]
    """By how much the error changes where weight j becomes the nearest to ``v`` on the grid."""
    if g >= 0:
        s, z = scale[r, g], zero[r, g]
        v = _rounded((min(max(np.rint(v / s + z), low), high) - z) * s, product)
    return v * (v * energy - np.float32(2) * pull)


@njit(**_PARALLEL)
def _swap(  # type: ignore[no-untyped-def]
    pull, matrix, diagonal, damp, group_size, weight, codes, mask, scale, zero, low, high, product,
    limit, least,
):  # fmt: skip
    cols = weight.shape[1]
    for r in prange(weight.shape[0]):
        w, kept = weight[r], mask[r]
        p = pull[r].copy()
        for _ in range(limit):
            loss, removed = np.float32(np.inf), 0
            for c in range(cols):
                if kept[c]:
                    cost = w[c] * (np.float32(2) * p[c] + w[c] * diagonal[c])
                    if cost < loss:
                        loss, removed = cost, c
            if loss == np.float32(np.inf):
                break
            before, row = w[removed], matrix[removed]
            for c in range(cols):
                p[c] += before * row[c]
            p[removed] += before * damp
            gain, inserted = np.float32(np.inf), 0
            for c in range(cols):
                # Without a grid, or where rounding costs nothing, it gains p^2 / d: nothing gains more.
                if not kept[c] and -p[c] * p[c] < gain * diagonal[c]:
                    g = c // group_size if group_size else -1
                    worth = _worth(p[c] / diagonal[c], r, c, g, diagonal[c], p[c],
                                   scale, zero, low, high, product)  # fmt: skip
                    if worth < gain:
                        gain, inserted = worth, c
            if not gain + loss < -least * abs(loss):
                break
            g = inserted // group_size if group_size else -1
            after = _fixed(p[inserted] / diagonal[inserted], True, r, inserted, g, scale, zero, low, high,
                          product, codes)  # fmt: skip
            g = removed // group_size if group_size else -1
            w[removed] = _fixed(
                before, False, r, removed, g, scale, zero, low, high, product, codes
            )
            w[inserted] = after
            kept[removed], kept[inserted] = False, True
            row = matrix[inserted]
            for c in range(cols):
                p[c] -= after * row[c]
            p[inserted] -= after * damp
            for c in range(cols):
                pull[r, c] = p[c]


def swap_rows(state: DescentState, damp: float, limit: int) -> None:
    """As :func:`srcr.numerics.swaps.swap_rows`."""
    _threads()
    diagonal = state.damped.diagonal() + damp
    _swap(
        state.pull.numpy(), state.damped.numpy(), diagonal.numpy(), np.float32(damp),
        _group_size(state.grid), state.weight.numpy(), _codes(state.codes), _mask(state.mask),
        *_grid(state.grid), limit, np.float32(LEAST_GAIN),
    )  # fmt: skip
