"""Products of bfloat16 matrices over their rows, ``X^T Y``, exact products summed in float32, on CPUs that
have AVX-512 BF16: compiled by Numba around the one instruction that libraries give no access to without
rounding the result to bfloat16 (which moments do not survive, docs/decisions/008).

The instruction (VDPBF16PS) adds two products to each of sixteen float32 sums, so both matrices are laid out
by pairs of rows: panels [PANEL columns / pairs / PANEL], each entry the two numbers of one column.
"""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from srcr.numerics.kernels.cpu import _OPTIONS, _threads

#: For the record.
ENGINE = "VDPBF16PS"
#: Numbers in a vector of float32.
LANES = 16
#: Columns of a panel: two vectors.
PANEL = 2 * LANES
#: Columns on the other side that the registers hold the sums of.
TILE = 8
#: Pairs of rows at a time: those of a panel stay in the innermost cache.
PAIRS = 256
#: Rows that are packed at a time: as many numbers as the last cache holds.
ROWS = 2048
#: Panels on either side of a square of the result, which stays in the second cache.
SQUARE = 2

llvm.initialize_native_asmparser()


@cache
def available() -> bool:
    """Whether this CPU has the instruction, and Numba may use it (``NUMBA_CPU_FEATURES``)."""
    allowed: str | None = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    masked = allowed is not None and "+avx512bf16" not in allowed.split(",")
    return bool(llvm.get_host_cpu_features().get("avx512bf16", False)) and not masked


def _emit_tile(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """The LLVM code of :data:`_tile`: a loop over pairs of rows with all its sums in registers."""

    def pointer(index: int) -> Any:
        """To the numbers of an array among the arguments."""
        made = context.make_array(signature.args[index])
        return made(context, builder, value=args[index]).data

    def number(value: int) -> Any:
        return ir.Constant(ir.IntType(32), value)

    words = ir.VectorType(ir.IntType(32), LANES)  # each two bfloat16 numbers
    floats = ir.VectorType(ir.FloatType(), LANES)
    anything, everywhere = ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * LANES)
    multiply_add = ir.FunctionType(floats, [words, words, floats])
    _, at, _, on, pairs, _ = args
    sums = [cgutils.alloca_once(builder, floats) for _ in range(2 * TILE)]  # type: ignore[no-untyped-call]
    for place in sums:
        builder.store(ir.Constant(floats, [0.0] * LANES), place)
    with cgutils.for_range(builder, pairs) as loop:
        offset = builder.mul(loop.index, ir.Constant(ir.IntType(64), PANEL))
        left = builder.gep(pointer(0), [builder.add(at, offset)])
        right = builder.gep(pointer(2), [builder.add(on, offset)])
        right = builder.bitcast(right, words.as_pointer())
        halves = [builder.load(builder.gep(right, [number(half)]), align=4) for half in range(2)]
        for row in range(TILE):
            word = builder.load(builder.gep(left, [number(row)]))
            x = builder.insert_element(anything, word, number(0))
            x = builder.shuffle_vector(x, anything, everywhere)
            for half, y in enumerate(halves):
                place = sums[2 * row + half]
                given = [x, y, builder.load(place)]
                more = builder.asm(multiply_add, "vdpbf16ps $2, $1, $0", "=v,v,v,0", given, False)
                builder.store(more, place)
    result = builder.bitcast(pointer(5), floats.as_pointer())
    for index, place in enumerate(sums):
        builder.store(builder.load(place), builder.gep(result, [number(index)]), align=4)
    return context.get_dummy_value()


def _typed_tile(_: Any, left: Any, at: Any, right: Any, on: Any, pairs: Any, out: Any) -> Any:
    return types.void(left, types.intp, right, types.intp, types.intp, out), _emit_tile


#: ``(left, at, right, on, pairs, out)``: ``out`` [TILE, PANEL] = sums over so many pairs of rows of the TILE
#: columns of ``left`` from ``at`` on, times the PANEL columns of ``right`` from ``on`` on; both packed, flat.
_tile: Any = intrinsic(_typed_tile)


@njit(parallel=True, **_OPTIONS)
def _pack(x):  # type: ignore[no-untyped-def]
    """``x`` [n, cols] uint16 as panels [panels, pairs of rows, PANEL] uint32, zeros where it ends."""
    n, cols = x.shape
    panels, pairs = (cols + PANEL - 1) // PANEL, (n + 1) // 2
    out = np.empty((panels, pairs, PANEL), np.uint32)
    for pair in prange(pairs):
        upper, lower = x[2 * pair], x[min(2 * pair + 1, n - 1)]
        alone = np.uint32(0 if 2 * pair + 1 == n else 0xFFFF)
        for panel in range(panels):
            part = out[panel, pair]
            wide = min(PANEL, cols - panel * PANEL)
            first, second = upper[panel * PANEL :], lower[panel * PANEL :]
            for k in range(wide):
                part[k] = np.uint32(first[k]) | ((np.uint32(second[k]) & alone) << np.uint32(16))
            for k in range(wide, PANEL):
                part[k] = 0
    return out


@njit(inline="always", **_OPTIONS)
def _add(sums, out, row, col):  # type: ignore[no-untyped-def]
    """Add a tile's sums to ``out`` from ``row`` and ``col`` on, as far as that reaches."""
    wide = min(PANEL, out.shape[1] - col)
    for r in range(min(TILE, out.shape[0] - row)):
        part = out[row + r, col : col + wide]
        for k in range(wide):
            part[k] += sums[r * PANEL + k]


@njit(parallel=True, **_OPTIONS)
def _add_products(left, right, out, symmetric):  # type: ignore[no-untyped-def]
    """Add the products of packed matrices to ``out``, square by square; where ``symmetric``, of the panels
    on and below the diagonal."""
    rows = out.shape[0]
    panels, pairs, _ = left.shape
    flat, other = left.reshape(-1), right.reshape(-1)
    across = (right.shape[0] + SQUARE - 1) // SQUARE
    down = (panels + SQUARE - 1) // SQUARE
    squares = down * (down + 1) // 2 if symmetric else down * across
    for turn in prange(squares):
        if symmetric:  # squares row by row of the lower triangle
            below = int((np.sqrt(8.0 * turn + 1) - 1) / 2)
            beside = turn - below * (below + 1) // 2
        else:
            below, beside = turn // across, turn % across
        below, beside = below * SQUARE, beside * SQUARE
        sums = np.empty(TILE * PANEL, np.float32)
        for start in range(0, pairs, PAIRS):
            steps = min(PAIRS, pairs - start)
            for j in range(beside, min(beside + SQUARE, right.shape[0])):
                on = (j * pairs + start) * PANEL
                for i in range(max(below, j) if symmetric else below, min(below + SQUARE, panels)):
                    at = (i * pairs + start) * PANEL
                    for first in range(0, min(PANEL, rows - i * PANEL), TILE):
                        _tile(flat, at + first, other, on, steps, sums)
                        _add(sums, out, i * PANEL + first, j * PANEL)


def _packed(x: Tensor) -> Any:
    return _pack(x.contiguous().view(torch.int16).numpy().view(np.uint16))


def accumulate(moment: Tensor, left: Tensor, right: Tensor) -> None:
    """As :func:`srcr.numerics.moments.accumulate`, of bfloat16 matrices."""
    _threads()
    for x, y in zip(torch.split(left, ROWS), torch.split(right, ROWS), strict=True):
        _add_products(_packed(x), _packed(y), moment.numpy(), False)


def accumulate_gram(moment: Tensor, x: Tensor) -> None:
    """As :func:`srcr.numerics.moments.accumulate_gram`, of a bfloat16 matrix."""
    _threads()
    for rows in torch.split(x, ROWS):
        panels = _packed(rows)
        _add_products(panels, panels, moment.numpy(), True)
