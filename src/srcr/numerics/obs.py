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


def fix(w: Tensor, column: Column | None, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a column of weights [rows] becomes: rounded on the grid if there is one, zero where not
    kept. Returns the weights and their codes (None without a grid)."""
    if column is not None:
        code = column.quantize(w)
        if keep is not None:
            code = torch.where(keep, code, column.zero_codes())
        return column.dequantize(code), code
    return (w if keep is None else torch.where(keep, w, torch.zeros_like(w))), None


def sweep(
    W: Tensor,
    factor: Factor,
    selection: Selection | None = None,
    grid: Grid | None = None,
    block_size: int = 128,
) -> Swept:
    """Sweep ``W`` [rows, cols] in the factor's order; the errors of a block of ``block_size`` columns
    reach the columns behind it in one matrix product.

    Pruned weights are exactly 0 and, with a grid, hold the code that dequantizes to 0. The span of
    ``selection`` must divide ``block_size`` (or be at least as large as the block).
    """
    upper, order = factor.upper, factor.order
    columns = order.tolist()
    rows, cols = W.shape
    work = W[:, order].to(torch.float32)
    fixed = torch.empty_like(work)
    codes = torch.empty(rows, cols, device=W.device) if grid is not None else None
    keep = torch.ones(rows, cols, dtype=torch.bool, device=W.device) if selection else None
    loss = torch.zeros(rows, device=W.device)
    pivots = upper.diagonal()
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        errors = torch.empty(rows, stop - start, device=W.device)
        for j in range(start, stop):
            if selection is not None and keep is not None and (j - start) % selection.span == 0:
                end = min(j + selection.span, stop)
                keep[:, j:end] = selection.select(work[:, j:end], slice(j, end))
            w = work[:, j]
            if selection is not None and keep is not None and not selection.push:
                w = torch.where(keep[:, j], w, torch.zeros_like(w))
            column = None if grid is None else grid.column(columns[j])
            value, code = fix(w, column, None if keep is None else keep[:, j])
            if codes is not None and code is not None:
                codes[:, j] = code
            fixed[:, j] = value
            error = (w - value) / pivots[j]
            errors[:, j - start] = error
            work[:, j + 1 : stop].addr_(error, upper[j, j + 1 : stop], alpha=-1)
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
        loss += errors.square().sum(dim=1)
    back = torch.empty_like(order)
    back[order] = torch.arange(cols, device=W.device)
    return Swept(
        weight=fixed[:, back],
        codes=None if codes is None else codes[:, back].to(torch.int8),
        keep=None if keep is None else keep[:, back],
        loss=loss,
    )
