r"""Cyclic coordinate descent on the codes that a sweep has chosen.

The sweep fixes a column for good when it passes. Afterwards every weight can be looked at again with
all others in place: with ``R = (target - Q)(H + damp I)`` the best value of weight j of a row is
``q_j + R_j / (H_jj + damp)``, and on a grid the code nearest to it (Behdin et al., QuantEase,
arXiv 2309.01885, eq. 6). No step can raise the damped output error (but for the rounding of the engine's
16-bit product), so no pass can. Pruned weights stay at zero.
"""

import torch
from torch import Tensor

from srcr.numerics.grid import Grid
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.kernels.dispatch import StepColumns, kernels_for, permute_columns
from srcr.numerics.kernels.states import DescentState
from srcr.numerics.obs import SweepResult, fix
from srcr.numerics.products import product


def step_columns(state: DescentState, start: int, stop: int) -> None:
    """Move the columns of the block ``start:stop`` to their best values, in their order: the reference of
    the compiled kernels."""
    qparams = None if state.grid is None else state.grid.columns(state.order[start:stop])
    for j in range(start, stop):
        mask = None if state.mask is None else state.mask[:, j]
        value = state.weight[:, j] + state.pull[:, j] / state.damped[j - start, j - start]
        value, codes = fix(value, None if qparams is None else qparams.column(j - start), mask)
        if state.codes is not None and codes is not None:
            state.codes[:, j] = codes
        step = value - state.weight[:, j]
        state.weight[:, j] = value
        state.steps[:, j - start] = step
        rest = state.damped[j - start, j + 1 - start : stop - start]
        state.pull[:, j + 1 : stop].addr_(step, rest, alpha=-1)


def descend(
    start_from: SweepResult,
    target: Tensor,
    damped: DampedHessian,
    grid: Grid | None = None,
    block_size: int = 128,
    step_block: StepColumns | None = None,
) -> SweepResult:
    """The result of one pass over all columns, in the order of ``damped``, towards ``target`` [rows, cols].

    With a grid the pass starts from what the codes of ``start_from`` stand for on it, and weights stay on
    it; without one the surviving weights move freely. Steps within a block of columns reach the rest in one
    product. ``step_block`` moves the columns within a block; None is the fastest that the device has.
    """
    if step_block is None:
        kernels = kernels_for(target.device)
        step_block = kernels.step_columns if kernels else step_columns
    H, damp, order = damped.matrix, damped.damp, damped.order
    rows, cols = target.shape
    weight = start_from.weight.clone()
    if grid is not None and start_from.codes is not None:
        weight = grid.dequantize(start_from.codes)
    delta = target - weight
    pull = permute_columns(product(delta, H).add_(delta, alpha=damp), order)
    weight = permute_columns(weight, order)
    codes, mask = (
        None if t is None else permute_columns(t.clone(), order)
        for t in (start_from.codes, start_from.mask)
    )
    steps = pull.new_empty(rows, min(block_size, cols))
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        reached = H[order[start:stop]].index_select(1, order[start:])
        reached.diagonal().add_(damp)
        step_block(
            DescentState(pull, reached, order, weight, codes, mask, steps, grid), start, stop
        )
        moved = steps[:, : stop - start]
        pull[:, stop:].addmm_(moved, reached[:, stop - start :], alpha=-1)
    back = torch.argsort(order)
    return SweepResult(
        weight=permute_columns(weight, back),
        codes=None if codes is None else permute_columns(codes, back),
        mask=start_from.mask,
    )
