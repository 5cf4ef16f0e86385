"""The scale search on a CPU, compiled by Numba: rows in parallel, the columns of a group in vector units,
nothing written but the result.

It tries what :func:`srcr.numerics.scales.search_scales` tries and takes what that takes: the lowest loss, of
equals the first. A try is given up as soon as a part of its loss is more than the best whole one, so a
good one comes first: what served the group before. Losses agree with PyTorch's to a few parts in a
million, so only tries that close to each other may change places.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from srcr.numerics.grid import COARSE, FINE, Grid, GridSpec, code_range, smallest_scale
from srcr.numerics.kernels.cpu import (
    _INLINED,
    _OPTIONS,
    _PARALLEL,
    _PRODUCT,
    _copy,
    _rounded,
    _threads,
)

#: Columns between two looks at whether a try is still worth it.
CHUNK = 64
#: Rows that one thread takes after each other, what served one being tried first in the next.
BLOCK = 8
#: ``x^-0.4`` is ``MAGIC - 0.4 bits(x)`` read as a float, within 3.6 %.
MAGIC = np.float32(1490927360.0)
#: ``(1 + t)^-0.8`` for t from -0.162 to 0.194, highest power first: within 6e-7 of it.
ROOT = tuple(
    np.float32(c)
    for c in (
        -0.5863889455795288,
        0.6645404696464539,
        -0.6733043193817139,
        0.7197099924087524,
        -0.7999913096427917,
        1.0000004768371582,
    )
)
_MOST = np.float32(3e38)


@njit(fastmath={"contract"}, **_OPTIONS)
def powers(x, bits, n, out):  # type: ignore[no-untyped-def]
    """``x^2.4`` of n floats that are not negative, to a relative error of 1e-6; ``bits`` are the same
    numbers read as int32.

    With z near ``x^-0.4`` and ``r = x^2 z^5``, which is near 1, it is ``(x z)^4 r^-0.8``. Factors are
    taken in an order that neither overflows nor underflows before the result does.
    """
    for k in range(n):
        z = np.int32(np.int32(MAGIC - np.float32(0.4) * np.float32(bits[k]))).view(np.float32)
        u = x[k] * z
        v = u * z
        t = v * v * z - np.float32(1.0)
        q = ROOT[0]
        q = q * t + ROOT[1]
        q = q * t + ROOT[2]
        q = q * t + ROOT[3]
        q = q * t + ROOT[4]
        q = q * t + ROOT[5]
        u = u * u
        out[k] = u * u * q


@njit(fastmath={"reassoc", "nsz", "contract"}, **_OPTIONS)
def _dot(a, b, start, n):  # type: ignore[no-untyped-def]
    """The sum of ``a[k] * b[start + k]``."""
    total = np.float32(0.0)
    for k in range(n):
        total += a[k] * b[start + k]
    return total


@njit(**_INLINED)
def _errors_of(x, start, n, scale, zero, low, high, product, out):  # type: ignore[no-untyped-def]
    inverse = np.float32(1.0) / scale
    for k in range(n):
        w = x[start + k]
        code = min(max(np.rint(w * inverse + zero), low), high)
        out[k] = min(abs(_rounded((code - zero) * scale, product) - w), _MOST)


@njit(**_OPTIONS)
def _errors(x, start, n, scale, zero, low, high, product, out):  # type: ignore[no-untyped-def]
    """``|x - its nearest value on the grid|`` of n weights."""
    if product == 0:  # a loop each, without a branch in it
        _errors_of(x, start, n, scale, zero, low, high, 0, out)
    elif product == 1:
        _errors_of(x, start, n, scale, zero, low, high, 1, out)
    else:
        _errors_of(x, start, n, scale, zero, low, high, 2, out)


@njit(**_OPTIONS)
def _loss(  # type: ignore[no-untyped-def]
    x, weight, first, scale, zero, low, high, product, most, error, bits, power
):
    """``sum weight * error^2.4``, or a part of it that is already above ``most``."""
    total = 0.0
    size, chunk = np.uint64(x.size), np.uint64(CHUNK)
    for start in range(np.uint64(0), size, chunk):
        n = min(chunk, size - start)
        _errors(x, start, n, scale, zero, low, high, product, error)
        powers(error, bits, n, power)
        total += _dot(power, weight, first + start, n)
        if total > most:
            break
    return total


@njit(**_INLINED)
def _zero_others(x, alive):  # type: ignore[no-untyped-def]
    """Make 0 what is not alive, where anything is."""
    count = 0
    for k in range(x.size):
        count += alive[k]
    if count:
        for k in range(x.size):
            x[k] = x[k] if alive[k] else np.float32(0.0)


@njit(**_INLINED)
def _round_to_storage(scale, stored, smallest):  # type: ignore[no-untyped-def]
    """As :func:`srcr.numerics.grid.round_to_storage`."""
    scale = _rounded(scale, stored)
    return smallest if abs(scale) < smallest else scale


@njit(**_OPTIONS)
def _grid(number, lowest, highest, shrinks, low, high, symmetric, stored, smallest):  # type: ignore[no-untyped-def]
    """The scale and zero-point that are tried at this place: the plain range, then each shrunk one, for a
    symmetric grid with the spare code below and above."""
    steps = high - low
    if number > 0:
        shrink = shrinks[(number - 1) // 2 if symmetric else number - 1]
        lowest, highest = lowest * shrink, highest * shrink
    if not symmetric:
        scale = (highest - lowest) / steps
        safe = scale if scale > 0 else np.float32(1.0)
        zero = min(max(np.rint(low - lowest / safe), low), high)
        return _round_to_storage(scale, stored, smallest), zero
    largest = max(highest, -lowest)
    divisor = steps / np.float32(2.0) if number == 0 else (-low if number % 2 else low)
    return _round_to_storage(largest / divisor, stored, smallest), np.float32(0.0)


@njit(**_PARALLEL)
def _search(  # type: ignore[no-untyped-def]
    W,
    mask,
    importance,
    size,
    shrinks,
    coarse,
    low,
    high,
    symmetric,
    stored,
    product,
    smallest,
    scales,
    zeros,
):
    rows, groups = scales.shape
    sides = 2 if symmetric else 1
    for block in prange((rows + BLOCK - 1) // BLOCK):
        x = np.empty(size, np.float32)
        error, power = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        bits = error.view(np.int32)
        served = 0
        for r in range(block * BLOCK, min((block + 1) * BLOCK, rows)):
            for g in range(groups):
                _copy(W[r, g * size : (g + 1) * size], x)
                if mask.size:
                    _zero_others(x, mask[r, g * size : (g + 1) * size])
                lowest = highest = np.float32(0.0)
                for k in range(size):
                    lowest, highest = min(lowest, x[k]), max(highest, x[k])
                best, most = -1, np.inf
                for turn in range(-1, coarse.size):
                    number = served if turn < 0 else coarse[turn]
                    if turn >= 0 and number == served:
                        continue
                    scale, zero = _grid(
                        number, lowest, highest, shrinks, low, high, symmetric, stored, smallest
                    )
                    loss = _loss(
                        x, importance, np.uint64(g * size), scale, zero, low, high, product, most,
                        error, bits, power,
                    )  # fmt: skip
                    if best < 0 or loss < most or (loss == most and number < best):
                        best, most = number, loss
                served, center = best, max(best - 1, 0) // sides
                for offset in FINE:
                    if not 0 <= center + offset < shrinks.size:
                        continue
                    for side in range(sides):
                        number = 1 + (center + offset) * sides + side
                        scale, zero = _grid(
                            number,
                            lowest,
                            highest,
                            shrinks,
                            low,
                            high,
                            symmetric,
                            stored,
                            smallest,
                        )
                        loss = _loss(
                            x, importance, np.uint64(g * size), scale, zero, low, high, product, most,
                            error, bits, power,
                        )  # fmt: skip
                        if loss < most:
                            best, most = number, loss
                scales[r, g], zeros[r, g] = _grid(
                    best, lowest, highest, shrinks, low, high, symmetric, stored, smallest
                )


def search_scales(
    W: Tensor,
    spec: GridSpec,
    importance: Tensor | None,
    mask: Tensor | None,
    shrinks: Sequence[float],
) -> Grid:
    """As :func:`srcr.numerics.scales.search_scales`."""
    _threads()
    rows, cols = W.shape
    scale = torch.empty(rows, cols // spec.group_size)
    zero_point = torch.empty_like(scale)
    weight = torch.ones(cols) if importance is None else importance.to(torch.float32)
    low, high = map(np.float32, code_range(spec.num_bits))
    sides = 2 if spec.symmetric else 1
    tried = [1 + sides * i + side for i in range(0, len(shrinks), COARSE) for side in range(sides)]
    _search(
        W.to(torch.float32).contiguous().numpy(),
        np.empty((0, 0), np.bool_) if mask is None else mask.contiguous().numpy(),
        weight.contiguous().numpy(), spec.group_size, np.array(shrinks, np.float32),
        np.array([0, *tried], np.int64), low, high, spec.symmetric, _PRODUCT[spec.dtype],
        _PRODUCT[spec.product or spec.dtype], np.float32(smallest_scale(spec.dtype)),
        scale.numpy(), zero_point.numpy(),
    )  # fmt: skip
    return spec.grid(scale, None if spec.symmetric else zero_point)
