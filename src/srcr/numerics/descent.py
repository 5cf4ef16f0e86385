r"""Cyclic coordinate descent on the codes that a sweep has chosen.

The sweep fixes a column for good when it passes. Afterwards every weight can be looked at again with
all others in place: with ``R = (target - Q)(H + damp I)`` the best value of weight j of a row is
``q_j + R_j / (H_jj + damp)``, and on a grid the code nearest to it (Behdin et al., QuantEase,
arXiv 2309.01885, eq. 6). No step can raise the damped output error (but for the rounding
of the engine's 16-bit product), so no pass can. Pruned weights
stay at zero.
"""

import torch
from torch import Tensor

from srcr.numerics.grid import Grid
from srcr.numerics.kernels import Descent, StepColumns, kernels_for, permute_columns
from srcr.numerics.obs import Swept, fix
from srcr.numerics.products import product


def step_columns(state: Descent, start: int, stop: int) -> None:
    """Move the columns of the block ``start:stop`` to their best values, one after the other: the
    reference of the compiled kernels."""
    grid = None if state.grid is None else state.grid.columns(state.order[start:stop])
    for j in range(start, stop):
        keep = None if state.keep is None else state.keep[:, j]
        value = state.weight[:, j] + state.pull[:, j] / state.damped[j - start, j - start]
        value, code = fix(value, None if grid is None else grid.at(j - start), keep)
        if state.codes is not None and code is not None:
            state.codes[:, j] = code
        step = value - state.weight[:, j]
        state.weight[:, j] = value
        state.steps[:, j - start] = step
        rest = state.damped[j - start, j + 1 - start : stop - start]
        state.pull[:, j + 1 : stop].addr_(step, rest, alpha=-1)


def descend(
    swept: Swept,
    target: Tensor,
    H: Tensor,
    damp: float,
    order: Tensor,
    grid: Grid | None = None,
    block_size: int = 128,
    columns: StepColumns | None = None,
) -> Swept:
    """One pass over all columns, in ``order`` [cols], towards ``target`` [rows, cols].

    With a grid the start is what ``swept.codes`` stand for on it, and weights stay on it; without one
    the surviving weights move freely. Steps within a block of columns reach the rest in one product.
    ``columns`` moves the columns within a block; None is the fastest that the device has.
    """
    if columns is None:
        kernels = kernels_for(target.device)
        columns = kernels.step_columns if kernels else step_columns
    rows, cols = target.shape
    weight = swept.weight.clone()
    if grid is not None and swept.codes is not None:
        weight = grid.dequantize(swept.codes)
    delta = target - weight
    pull = permute_columns(product(delta, H).add_(delta, alpha=damp), order)
    weight = permute_columns(weight, order)
    codes, keep = (
        None if t is None else permute_columns(t.clone(), order) for t in (swept.codes, swept.keep)
    )
    steps = pull.new_empty(rows, min(block_size, cols))
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        damped = H[order[start:stop]].index_select(1, order[start:])  # what this block reaches
        damped.diagonal().add_(damp)
        columns(Descent(pull, damped, order, weight, codes, keep, steps, grid), start, stop)
        moved = steps[:, : stop - start]
        pull[:, stop:].addmm_(moved, damped[:, stop - start :], alpha=-1)
    back = torch.argsort(order)
    return Swept(
        weight=permute_columns(weight, back),
        codes=None if codes is None else permute_columns(codes, back),
        keep=swept.keep,
        loss=swept.loss,
    )
