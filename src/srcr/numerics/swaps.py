r"""Swaps of a mask: in a row, a weight that is kept goes for a pruned one that is worth more.

The sweep prunes a column when it passes, by what it knows then. With all weights in place, and
``R = (target - Q)(H + damp I)``, taking a kept weight q_i away changes the squared output error by
``2 q_i R_i + q_i^2 H_ii``, and putting v in place of a pruned one by ``v^2 H_jj - 2 v (R_j + q_i H_ij)``
(diagonals damped). A swap is made where the sum is negative, so that no swap raises the error; every row
keeps its number of zeros.
"""

import torch

from srcr.numerics.kernels.dispatch import swaps_for
from srcr.numerics.kernels.states import LEAST_GAIN, DescentState


def swap_weights(state: DescentState, damp: float, limit: int) -> None:
    """Make up to ``limit`` swaps a row, the best by what each weight is worth alone, in place: the mask, the
    weights, codes and the pull of all columns; ``damp`` is added to the diagonal of the state's Hessian. With
    a grid, what comes in is rounded to it."""
    kernel = swaps_for(state.weight.device)
    (kernel or swap_rows)(state, damp, limit)


def swap_rows(state: DescentState, damp: float, limit: int) -> None:
    """:func:`swap_weights` of all rows together: the reference of the compiled kernel."""
    weight, pull, mask, grid = state.weight, state.pull, state.mask, state.grid
    assert mask is not None
    diagonal = state.damped.diagonal() + damp
    columns = torch.arange(weight.shape[1], device=weight.device)
    rows = torch.arange(len(weight), device=weight.device)  # in which something may still be gained
    for _ in range(limit):
        kept, w, r = mask[rows], weight[rows], pull[rows]
        loss, removed = (w * (2 * r + w * diagonal)).masked_fill_(~kept, torch.inf).min(dim=1)
        before = w.gather(1, removed[:, None])
        r += before * state.damped[removed]
        r.scatter_add_(1, removed[:, None], before * damp)
        value = r / diagonal
        codes = zeros = None
        if grid is not None:
            qparams = grid.rows(rows).columns(columns)
            codes, zeros = qparams.quantize(value), qparams.zero_codes()
            value = qparams.dequantize(codes)
        worth = (value * (value * diagonal - 2 * r)).masked_fill_(kept, torch.inf)
        gain, inserted = worth.min(dim=1)
        better = (gain + loss < -LEAST_GAIN * loss.abs()).nonzero()[:, 0]
        if not len(better):
            return
        rows, removed, inserted = rows[better], removed[better], inserted[better]
        after = value[better].gather(1, inserted[:, None])
        pull[rows] = r[better] - after * state.damped[inserted]
        pull[rows, inserted] -= after[:, 0] * damp
        weight[rows, removed], weight[rows, inserted] = 0.0, after[:, 0]
        mask[rows, removed], mask[rows, inserted] = False, True
        if state.codes is not None and codes is not None and zeros is not None:
            state.codes[rows, removed] = zeros[better, removed].to(torch.int8)
            state.codes[rows, inserted] = codes[better, inserted].to(torch.int8)
