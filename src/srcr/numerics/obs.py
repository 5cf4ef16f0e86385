r"""One sweep over the columns of a weight: prune, quantize, or both in the same pass.

The column swept at step j is fixed (set to zero, or rounded on the grid); its error is pushed into
the columns still to come, by the row of the factor ``U`` of the inverse Hessian (``H^-1 = U^T U``):

    e_j = (w_j - fixed(w_j)) / U_jj ,     W[:, j:] -= e_j U[j, j:]

which is Optimal Brain Surgeon with a fixed order (SparseGPT, arXiv 2301.00774, algorithm 1; GPTQ,
arXiv 2210.17323, algorithm 1). Since zero is a code of every grid, one pass does both at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.grid import Grid, QParams
from srcr.numerics.kernels.dispatch import FixColumns, kernels_for, permute_columns
from srcr.numerics.kernels.states import SweepState

#: ``(W [rows, n], positions) -> mask [rows, n]``: chooses the mask of the n columns at these positions
#: of the sweep, from their current weights.
SelectMask = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class MaskSelection:
    """How the mask is chosen: by ``select`` for ``span`` columns at a time (M for N:M). What has
    reached a pruned weight is pushed on with the rest, or dropped where ``propagate`` is False."""

    select: SelectMask
    span: int
    propagate: bool = True


@dataclass(frozen=True, eq=False)
class SweepResult:
    """``weight`` [rows, cols] float32 as the engine will see it, ``codes`` int8 [rows, cols] or None,
    ``mask`` bool [rows, cols] (True: kept) or None."""

    weight: Tensor
    codes: Tensor | None
    mask: Tensor | None

    def rows(self, rows: slice) -> "SweepResult":
        """The result of a slice of the rows."""
        codes, mask = (None if t is None else t[rows] for t in (self.codes, self.mask))
        return SweepResult(self.weight[rows], codes, mask)


def fix(
    weight: Tensor, qparams: QParams | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What weights [rows] of a column become, and their codes (None without a grid): rounded on the grid
    if there is one, zero where the mask is False."""
    if qparams is not None:
        codes = qparams.quantize(weight)
        if mask is not None:
            codes = torch.where(mask, codes, qparams.zero_codes())
        return qparams.dequantize(codes), codes
    return (weight if mask is None else torch.where(mask, weight, torch.zeros_like(weight))), None


def fix_columns(state: SweepState, start: int, columns: slice, stop: int) -> None:
    """Fix ``columns`` of the block ``start:stop``, each one's error pushed on to its end: the reference of
    the compiled kernels."""
    qparams = None if state.grid is None else state.grid.columns(state.order[columns])
    for j in range(columns.start, columns.stop):
        mask = None if state.mask is None else state.mask[:, j]
        w = state.weight[:, j]
        if mask is not None and not state.propagate:
            w = torch.where(mask, w, torch.zeros_like(w))
        value, codes = fix(w, None if qparams is None else qparams.column(j - columns.start), mask)
        if state.codes is not None and codes is not None:
            state.codes[:, j] = codes
        error = (w - value) / state.upper[j, j]
        state.weight[:, j] = value
        state.errors[:, j - start] = error
        state.weight[:, j + 1 : stop].addr_(error, state.upper[j, j + 1 : stop], alpha=-1)


def sweep(
    W: Tensor,
    factor: CholeskyFactor,
    selection: MaskSelection | None = None,
    grid: Grid | None = None,
    block_size: int = 128,
    fix_block: FixColumns | None = None,
) -> SweepResult:
    """What ``W`` [rows, cols] becomes when it is swept in the factor's order; the errors of a block of
    ``block_size`` columns reach the columns behind it in one matrix product.

    Pruned weights are exactly 0 and, with a grid, hold the code that dequantizes to 0. The span of
    ``selection`` must divide ``block_size`` (or be at least as large as the block). ``fix_block`` fixes
    the columns within a block; None is the fastest that the device has.
    """
    if fix_block is None:
        kernels = kernels_for(W.device)
        fix_block = kernels.fix_columns if kernels else fix_columns
    upper, order = factor.upper, factor.order
    rows, cols = W.shape
    weight = permute_columns(W.to(torch.float32, copy=True).contiguous(), order)
    state = SweepState(
        weight,
        upper,
        order,
        codes=None if grid is None else torch.empty_like(weight, dtype=torch.int8),
        mask=None if selection is None else torch.empty_like(weight, dtype=torch.bool),
        errors=weight.new_empty(rows, min(block_size, cols)),
        grid=grid,
        propagate=selection is None or selection.propagate,
    )
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        span = stop - start if selection is None else selection.span
        for first in range(start, stop, span):
            columns = slice(first, min(first + span, stop))
            if selection is not None and state.mask is not None:
                state.mask[:, columns] = selection.select(weight[:, columns], columns)
            fix_block(state, start, columns, stop)
        errors = state.errors[:, : stop - start]
        weight[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    back = torch.argsort(order)
    return SweepResult(
        weight=permute_columns(weight, back),
        codes=None if state.codes is None else permute_columns(state.codes, back),
        mask=None if state.mask is None else permute_columns(state.mask, back),
    )
