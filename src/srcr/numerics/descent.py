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
from srcr.numerics.obs import Swept, fix


def descend(
    swept: Swept,
    target: Tensor,
    H: Tensor,
    damp: float,
    order: Tensor,
    grid: Grid | None = None,
    block_size: int = 128,
) -> Swept:
    """One pass over all columns, in ``order`` [cols], towards ``target`` [rows, cols].

    With a grid the start is what ``swept.codes`` stand for on it, and weights stay on it; without one
    the surviving weights move freely. Steps within a block of columns reach the rest in one product.
    """
    rows, cols = target.shape
    damped = H[order][:, order]
    damped.diagonal().add_(damp)
    columns = order.tolist()
    codes = None if swept.codes is None else swept.codes[:, order].to(torch.float32)
    keep = None if swept.keep is None else swept.keep[:, order]
    weight = swept.weight[:, order]
    if grid is not None and codes is not None:
        weight = grid.columns(order).dequantize(codes)
    pull = (target[:, order] - weight) @ damped
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        steps = torch.empty(rows, stop - start, device=target.device)
        for j in range(start, stop):
            value = weight[:, j] + pull[:, j] / damped[j, j]
            column = None if grid is None else grid.column(columns[j])
            value, code = fix(value, column, None if keep is None else keep[:, j])
            if codes is not None and code is not None:
                codes[:, j] = code
            step = value - weight[:, j]
            weight[:, j] = value
            steps[:, j - start] = step
            pull[:, j + 1 : stop].addr_(step, damped[j, j + 1 : stop], alpha=-1)
        pull[:, stop:].addmm_(steps, damped[start:stop, stop:], alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(cols, device=order.device)
    return Swept(
        weight=weight[:, back],
        codes=None if codes is None else codes[:, back].to(torch.int8),
        keep=swept.keep,
        loss=swept.loss,
    )
