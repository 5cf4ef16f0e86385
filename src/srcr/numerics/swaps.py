r"""Swaps of a mask: in a row, a weight that is kept goes for a pruned one that is worth more.

The sweep prunes a column when it passes, by what it knows then. With all weights in place, and
``R = (target - Q)(H + damp I)``, taking a kept weight q_i away changes the squared output error by
``2 q_i R_i + q_i^2 H_ii``, and putting v in place of a pruned one by ``v^2 H_jj - 2 v (R_j + q_i H_ij)``
(diagonals damped). A swap is made where the sum is negative, so that no swap raises the error; every row
keeps its number of zeros.
"""

from dataclasses import replace

import torch
from torch import Tensor

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
    qparams = None if grid is None else grid.columns(columns)
    left = torch.arange(
        len(weight), device=weight.device
    )  # rows in which something may still be gained
    for _ in range(limit):
        kept, w, r = mask[left], weight[left], pull[left]
        loss, out = (w * (2 * r + w * diagonal)).masked_fill_(~kept, torch.inf).min(dim=1)
        gone = w.gather(1, out[:, None])
        r += gone * state.damped[out]
        r.scatter_add_(1, out[:, None], gone * damp)
        value = r / diagonal
        codes = None
        if qparams is not None:
            part = replace(
                qparams,
                scale=qparams.scale[left],
                zero_point=None if qparams.zero_point is None else qparams.zero_point[left],
            )
            codes = part.quantize(value)
            value = part.dequantize(codes)
        gain, into = (value * (value * diagonal - 2 * r)).masked_fill_(kept, torch.inf).min(dim=1)
        better = (gain + loss < -LEAST_GAIN * loss.abs()).nonzero()[:, 0]
        if not len(better):
            return
        left, out, into = left[better], out[better], into[better]
        come = value[better].gather(1, into[:, None])
        pull[left] = r[better] - come * state.damped[into]
        pull[left, into] -= come[:, 0] * damp
        weight[left, out], weight[left, into] = 0.0, come[:, 0]
        mask[left, out], mask[left, into] = False, True
        if state.codes is not None and codes is not None and qparams is not None:
            state.codes[left, out] = _zeros(qparams.zero_point, left, out, state.codes)
            state.codes[left, into] = codes[better, into].to(torch.int8)


def _zeros(zero_point: Tensor | None, rows: Tensor, columns: Tensor, codes: Tensor) -> Tensor:
    """The codes of zeros at these places."""
    if zero_point is None:
        return torch.zeros_like(rows, dtype=codes.dtype)
    return zero_point[rows, columns].to(codes.dtype)
