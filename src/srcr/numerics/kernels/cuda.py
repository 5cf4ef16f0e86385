"""The steps within a block of columns on a GPU, compiled by Triton: a warp takes a few rows and keeps their
part of the block in registers, from the first column to the last, in one launch.

Each function does what its namesake in :mod:`srcr.numerics.obs` and :mod:`srcr.numerics.descent` does. A
tile's column is read by summing the tile with all other columns masked, since registers have no index;
divisions are the correctly rounded ones. What is rounded is rounded by operations that Triton's
interpreter does as a GPU does, so that the kernels can be tested without one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srcr.numerics.grid import Grid, code_range
from srcr.numerics.kernels.states import DescentState, SweepState

#: How the engine's product is rounded.
_PRODUCT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: Numbers of a tile that a warp holds (16 in each of its threads); rows of a tile and warps, at most.
_WARP, _MOST_ROWS, _MOST_WARPS = 512, 32, 16
#: How a GPU's threads are to do it: products are rounded before they are added, as in the reference.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
#: Added and subtracted again, it leaves the nearest integer, ties to even, of what is below 2^22.
_ROUNDER = tl.constexpr(1.5 * 2.0**23)


def permute_columns(matrix: Tensor, order: Tensor) -> None:
    """As :func:`srcr.numerics.kernels.dispatch.permute_columns`."""
    matrix.copy_(matrix.index_select(1, order))


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(x, PRODUCT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x`` as the nearest value of a 16-bit type (ties to even), in float32; -0.0 becomes 0.0."""
    if PRODUCT == tl.bfloat16:  # noqa: SIM300 (by its bits: the interpreter's conversion rounds ties up)
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    elif PRODUCT == tl.float16:  # noqa: SIM300
        x = x.to(tl.float16).to(tl.float32)
    return x + 0.0


@triton.jit  # type: ignore[untyped-decorator]
def _fixed(w, kept, scale, zero, low, high, PRODUCT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What weights ``w`` [rows] become, and their codes. Without a grid (``scale`` None) they stay, if
    they are ``kept``, and there are no codes to speak of."""
    if scale is None:
        value = w if kept is None else tl.where(kept, w, 0.0)
        code = value
    else:
        code = tl.div_rn(w, scale) + zero
        code = tl.minimum(tl.maximum(code, low), high)  # first, so that it is small enough
        code = (code + _ROUNDER) - _ROUNDER
        if kept is not None:
            code = tl.where(kept, code, zero)
        value = _rounded((code - zero) * scale, PRODUCT)
    return value, code


@triton.jit(do_not_specialize=["first", "last"])  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    weight, upper, order, codes, mask_pointer, errors, scale, zero,
    rows, cols, stride, width, first, last, groups, group_size, reach, low, high,
    PUSH: tl.constexpr, PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fix the columns ``first:last`` of a block of ``width``, for a tile of rows: weights w, errors e,
    codes c. The pointers are to the block's first column (``upper``: its diagonal block); rows of the
    weight are ``cols`` apart, those of ``upper`` ``stride``, those of ``errors`` ``reach``."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    inside = r < rows
    here = inside[:, None] & (k < width)[None, :]
    at = (r * cols)[:, None] + k[None, :]
    w = tl.load(weight + at, mask=here, other=0.0)
    e = tl.zeros((ROWS, BLOCK), tl.float32)
    c = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(first, last):
        u = tl.load(upper + i * stride + k, mask=k < width, other=0.0)  # 0 for the columns before
        pivot = tl.load(upper + i * stride + i)
        group = r * groups + tl.load(order + i).to(tl.int32) // group_size
        s = None if scale is None else tl.load(scale + group, mask=inside, other=1.0)
        z = 0.0 if zero is None else tl.load(zero + group, mask=inside, other=0.0)
        kept = (
            None
            if mask_pointer is None
            else tl.load(mask_pointer + r * cols + i, mask=inside, other=0) != 0
        )
        now = (k == i)[None, :]
        x = tl.sum(tl.where(now, w, 0.0), axis=1)
        if mask_pointer is not None and not PUSH:
            x = tl.where(kept, x, 0.0)
        value, code = _fixed(x, kept, s, z, low, high, PRODUCT)
        error = tl.div_rn(x - value, pivot)
        w = tl.where(now, value[:, None], w - error[:, None] * u[None, :])
        e = tl.where(now, error[:, None], e)
        c = tl.where(now, code[:, None], c)
    tl.debug_barrier()  # no store before every thread has read what it needs
    done = here & ((k >= first) & (k < last))[None, :]
    tl.store(weight + at, w, mask=here & (k >= first)[None, :])
    tl.store(errors + (r * reach)[:, None] + k[None, :], e, mask=done)
    if codes is not None:
        tl.store(codes + at, c.to(tl.int8), mask=done)


@triton.jit  # type: ignore[untyped-decorator]
def _descend(  # type: ignore[no-untyped-def]
    pull, damped, weight, codes, mask_pointer, scale, zero,
    rows, cols, stride, start, width, groups, group_size, reach, low, high,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the columns of a block: pull p, weights w, codes c; ``start`` is its first column, ``reach`` the
    distance between rows of the pull; other arguments as :func:`_sweep`'s."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    inside = r < rows
    here = inside[:, None] & (k < width)[None, :]
    at = (r * cols)[:, None] + k[None, :]
    p = tl.load(pull + (r * reach)[:, None] + k[None, :], mask=here, other=0.0)
    w = tl.zeros((ROWS, BLOCK), tl.float32)
    c = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(width):
        u = tl.load(damped + i * stride + k, mask=k < width, other=0.0)
        energy = tl.load(damped + i * stride + i)
        group = r * groups + (start + i) // group_size
        s = None if scale is None else tl.load(scale + group, mask=inside, other=1.0)
        z = 0.0 if zero is None else tl.load(zero + group, mask=inside, other=0.0)
        kept = (
            None
            if mask_pointer is None
            else tl.load(mask_pointer + r * cols + i, mask=inside, other=0) != 0
        )
        before = tl.load(weight + r * cols + i, mask=inside, other=0.0)
        now = (k == i)[None, :]
        best = before + tl.div_rn(tl.sum(tl.where(now, p, 0.0), axis=1), energy)
        value, code = _fixed(best, kept, s, z, low, high, PRODUCT)
        step = value - before
        p -= step[:, None] * u[None, :]  # of the columns before, nothing is read any more
        w = tl.where(now, value[:, None], w)
        c = tl.where(now, code[:, None], c)
    tl.debug_barrier()
    tl.store(weight + at, w, mask=here)
    if codes is not None:
        tl.store(codes + at, c.to(tl.int8), mask=here)


def fix_columns(state: SweepState, start: int, columns: slice, stop: int) -> None:
    """As :func:`srcr.numerics.obs.fix_columns`."""
    rows, cols = state.weight.shape
    block = slice(start, stop)
    upper = state.upper[block, block]
    scale, zero, groups, group_size, low, high, product = _grid(state.grid)
    height, width, warps = _tile(stop - start)
    with torch.cuda.device(state.weight.get_device()):
        _sweep[(triton.cdiv(rows, height),)](
            state.weight[:, block], upper, state.order[block], _part(state.codes, block),
            _part(state.mask, block), state.errors, scale, zero,
            rows, cols, upper.stride(0), stop - start, columns.start - start, columns.stop - start,
            groups, group_size, state.errors.stride(0), low, high,
            PUSH=state.propagate, PRODUCT=product, ROWS=height, BLOCK=width, num_warps=warps, **_OPTIONS,
        )  # fmt: skip


def step_columns(state: DescentState, start: int, stop: int) -> None:
    """As :func:`srcr.numerics.descent.step_columns`."""
    rows, cols = state.weight.shape
    block = slice(start, stop)
    scale, zero, groups, group_size, low, high, product = _grid(state.grid)
    height, width, warps = _tile(stop - start)
    with torch.cuda.device(state.weight.get_device()):
        _descend[(triton.cdiv(rows, height),)](
            state.pull, state.damped, state.weight[:, block],
            _part(state.codes, block), _part(state.mask, block), scale, zero,
            rows, cols, state.damped.stride(0), start, stop - start,
            groups, group_size, state.pull.stride(0), low, high,
            PRODUCT=product, ROWS=height, BLOCK=width, num_warps=warps, **_OPTIONS,
        )  # fmt: skip


def _tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a tile (powers of two) for a block of so many columns, and the warps for it."""
    width: int = triton.next_power_of_2(columns)
    rows, warps = max(1, _WARP // width), max(1, width // _WARP)
    return min(rows, _MOST_ROWS), width, min(warps, _MOST_WARPS)


def _part(matrix: Tensor | None, block: slice) -> Tensor | None:
    return None if matrix is None else matrix[:, block]


def _grid(grid: Grid | None) -> tuple[Any, ...]:
    """Scales and zero-points [rows, groups], how many groups, columns in one, the range of codes, and the
    product's rounding."""
    if grid is None:
        return None, None, 1, 1, 0.0, 0.0, tl.float32
    low, high = map(float, code_range(grid.num_bits))
    zero = None if grid.zero_point is None else grid.zero_point.contiguous()
    groups = grid.scale.shape[1]
    product = _PRODUCT[grid.product_dtype]
    return grid.scale.contiguous(), zero, groups, grid.group_size, low, high, product
