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

from srcr.numerics.grid import Column, Grid
from srcr.numerics.hessian import Factor
from srcr.numerics.kernels import FixColumns, Sweep, kernels_for, permute_columns

#: ``(W [rows, n], positions) -> keep [rows, n]``: chooses the mask of the n columns at these positions
#: of the sweep, from their current weights.
SelectMask = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Selection:
    """How the mask is chosen: by ``select`` for ``span`` columns at a time (M for N:M). What has
    reached a pruned weight is pushed on with the rest, or dropped where ``push`` is False."""

    select: SelectMask
    span: int
    push: bool = True


@dataclass(frozen=True, eq=False)
class Swept:
    """``weight`` [rows, cols] float32 as the engine will see it, ``codes`` int8 or None, ``keep``
    the mask or None, ``loss`` the sweep's own estimate of the squared output error a row [rows]."""

    weight: Tensor
    codes: Tensor | None
    keep: Tensor | None
    loss: Tensor

    def rows(self, part: slice) -> "Swept":
        """Some rows of all."""
        codes, keep = (None if t is None else t[part] for t in (self.codes, self.keep))
        return Swept(self.weight[part], codes, keep, self.loss[part])


def fix(w: Tensor, column: Column | None, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a column of weights [rows] becomes: rounded on the grid if there is one, zero where not
    kept. Returns the weights and their codes (None without a grid)."""
    if column is not None:
        code = column.quantize(w)
        if keep is not None:
            code = torch.where(keep, code, column.zero_codes())
        return column.dequantize(code), code
    return (w if keep is None else torch.where(keep, w, torch.zeros_like(w))), None


def fix_columns(state: Sweep, start: int, at: slice, stop: int) -> None:
    """Fix the columns ``at`` of the block ``start:stop``, each one's error pushed on to its end: the
    reference of the compiled kernels."""
    grid = None if state.grid is None else state.grid.columns(state.order[at])
    for j in range(at.start, at.stop):
        keep = None if state.keep is None else state.keep[:, j]
        w = state.work[:, j]
        if keep is not None and not state.push:
            w = torch.where(keep, w, torch.zeros_like(w))
        value, code = fix(w, None if grid is None else grid.at(j - at.start), keep)
        if state.codes is not None and code is not None:
            state.codes[:, j] = code
        error = (w - value) / state.upper[j, j]
        state.work[:, j] = value
        state.errors[:, j - start] = error
        state.work[:, j + 1 : stop].addr_(error, state.upper[j, j + 1 : stop], alpha=-1)


def sweep(
    W: Tensor,
    factor: Factor,
    selection: Selection | None = None,
    grid: Grid | None = None,
    block_size: int = 128,
    columns: FixColumns | None = None,
) -> Swept:
    """Sweep ``W`` [rows, cols] in the factor's order; the errors of a block of ``block_size`` columns
    reach the columns behind it in one matrix product.

    Pruned weights are exactly 0 and, with a grid, hold the code that dequantizes to 0. The span of
    ``selection`` must divide ``block_size`` (or be at least as large as the block). ``columns`` fixes
    the columns within a block; None is the fastest that the device has.
    """
    if columns is None:
        kernels = kernels_for(W.device)
        columns = kernels.fix_columns if kernels else fix_columns
    upper, order = factor.upper, factor.order
    rows, cols = W.shape
    work = permute_columns(W.to(torch.float32, copy=True).contiguous(), order)
    state = Sweep(
        work,
        upper,
        order,
        codes=None if grid is None else torch.empty_like(work, dtype=torch.int8),
        keep=None if selection is None else torch.empty_like(work, dtype=torch.bool),
        errors=work.new_empty(rows, min(block_size, cols)),
        grid=grid,
        push=selection is None or selection.push,
    )
    loss = torch.zeros(rows, device=W.device)
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        span = stop - start if selection is None else selection.span
        for first in range(start, stop, span):
            at = slice(first, min(first + span, stop))
            if selection is not None and state.keep is not None:
                state.keep[:, at] = selection.select(work[:, at], at)
            columns(state, start, at, stop)
        errors = state.errors[:, : stop - start]
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
        loss += errors.square().sum(dim=1)
    back = torch.argsort(order)
    return Swept(
        weight=permute_columns(work, back),
        codes=None if state.codes is None else permute_columns(state.codes, back),
        keep=None if state.keep is None else permute_columns(state.keep, back),
        loss=loss,
    )
