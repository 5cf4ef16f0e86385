"""The k-th smallest of many numbers on a CPU, compiled by Numba: counted by their leading bits in parallel,
then candidates among the few that share those of the one looked for."""

import numpy as np
from numba import get_num_threads, njit, prange
from torch import Tensor

from srcr.numerics.kernels.cpu import _OPTIONS, _threads

#: Bits of a float32 that are counted by, from the highest.
LEADING = 12


@njit(inline="always", **_OPTIONS)
def _rank(x):  # type: ignore[no-untyped-def]
    """The leading bits of a number, in an order that is that of the numbers."""
    bits = np.float32(x + np.float32(0.0)).view(np.int32)
    bits = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return (bits >> np.int32(32 - LEADING)) + np.int32(1 << (LEADING - 1))


@njit(parallel=True, **_OPTIONS)
def _kth(flat, k, parts):  # type: ignore[no-untyped-def]
    size = (flat.size + parts - 1) // parts
    counts = np.zeros((parts, 1 << LEADING), np.int64)
    for part in prange(parts):
        for i in range(part * size, min((part + 1) * size, flat.size)):
            counts[part, _rank(flat[i])] += 1
    total = counts.sum(axis=0)
    rank, before = 0, 0
    while before + total[rank] <= k:
        before += total[rank]
        rank += 1
    candidates = np.empty(total[rank], np.float32)
    for part in prange(parts):
        place = counts[:part, rank].sum()
        for i in range(part * size, min((part + 1) * size, flat.size)):
            if _rank(flat[i]) == rank:
                candidates[place] = flat[i]
                place += 1
    return np.partition(candidates, k - before)[k - before]


def kth_smallest(flat: Tensor, k: int) -> float:
    """The number at place ``k`` (from 0) of ``flat`` [n] float32 in rising order; none may be NaN."""
    _threads()
    return float(_kth(flat.contiguous().numpy(), k, get_num_threads()))
