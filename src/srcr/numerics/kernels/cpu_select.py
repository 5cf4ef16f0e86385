"""The k-th smallest of many numbers on a CPU, compiled by Numba: counted by their leading bits in parallel,
then candidates among the few that share those of the one looked for."""

import numpy as np
from numba import get_num_threads, njit, prange
from torch import Tensor

from srcr.numerics.kernels.cpu import _INLINED, _PARALLEL, _threads

#: Bits of a float32 that are counted by, from the highest.
LEADING = 12


@njit(**_INLINED)
def _rank(x):  # type: ignore[no-untyped-def]
    """The leading bits of a number, in an order that is that of the numbers."""
    bits = np.float32(x + np.float32(0.0)).view(np.int32)
    bits = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return (bits >> np.int32(32 - LEADING)) + np.int32(1 << (LEADING - 1))


@njit(**_PARALLEL)
def _count(flat, size, counts):  # type: ignore[no-untyped-def]
    """Count the ranks of each part, ``size`` numbers, into ``counts`` [parts, ranks]."""
    for part in prange(counts.shape[0]):
        for i in range(part * size, min((part + 1) * size, flat.size)):
            counts[part, _rank(flat[i])] += 1


@njit(**_PARALLEL)
def _gather(flat, size, rank, places, candidates):  # type: ignore[no-untyped-def]
    """Write the numbers of a rank to ``candidates``, those of each part from its place on."""
    for part in prange(places.size):
        place = places[part]
        for i in range(part * size, min((part + 1) * size, flat.size)):
            if _rank(flat[i]) == rank:
                candidates[place] = flat[i]
                place += 1


def kth_smallest(flat: Tensor, k: int) -> float:
    """The number at place ``k`` (from 0) of ``flat`` [n] float32 in rising order; none may be NaN."""
    _threads()
    numbers, parts = flat.contiguous().numpy(), get_num_threads()
    size = -(-numbers.size // parts)
    counts = np.zeros((parts, 1 << LEADING), np.int64)
    _count(numbers, size, counts)
    below = counts.sum(axis=0).cumsum()
    rank = int(np.searchsorted(below, k, side="right"))
    of_rank = counts[:, rank]
    candidates = np.empty(of_rank.sum(), np.float32)
    _gather(numbers, size, rank, of_rank.cumsum() - of_rank, candidates)
    place = k - (int(below[rank]) - candidates.size)
    return float(np.partition(candidates, place)[place])
