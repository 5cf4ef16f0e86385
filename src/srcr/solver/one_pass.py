"""Prune and quantize at once: in the same sweep, or by methods that do not compensate."""

import torch
from torch import Tensor

from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.grid import Grid
from srcr.numerics.obs import SweepResult, sweep
from srcr.plans.specs import SolverSpec
from srcr.solver.problem import RowStack, Solution
from srcr.solver.selection import choose_mask, preview_mask, sweep_selection


def solve_directly(stack: RowStack, diagonal: Tensor) -> Solution:
    """The stack by methods that do not compensate: choose, round, done."""
    mask = None
    if stack.pruner is not None:
        mask = choose_mask(stack, stack.W, diagonal, torch.ones_like(diagonal))
    weights, grid = round_to_nearest(stack, stack.W, diagonal, mask)
    return Solution(weights, grid, stack.W)


def solve_in_one_pass(
    stack: RowStack, target: Tensor, factor: CholeskyFactor, diagonal: Tensor, spec: SolverSpec
) -> Solution:
    """The stack, pruned and quantized in the same sweep."""
    mask = None
    if stack.pruner is not None:
        mask = preview_mask(stack, target, factor)
        stack.release()
    grid = stack.fit_grid(target, diagonal, mask)
    del mask
    stack.release()
    selection = sweep_selection(stack, factor, grid, spec)
    weights = sweep(target, factor, selection, grid, stack.block_columns(spec))
    return Solution(weights, grid, target, target)


def round_to_nearest(
    stack: RowStack, W: Tensor, diagonal: Tensor, mask: Tensor | None
) -> tuple[SweepResult, Grid | None]:
    """Every surviving weight of ``W`` [rows, cols] at its nearest code, and the quantizer's grid."""
    grid = stack.fit_grid(W, diagonal, mask)
    codes = None
    if grid is not None:
        qparams = grid.expand()
        codes = qparams.quantize(W)
        if mask is not None:
            codes = torch.where(mask, codes, qparams.zero_codes())
        W = qparams.dequantize(codes)
        codes = codes.to(torch.int8)
    elif mask is not None:
        W = torch.where(mask, W, torch.zeros_like(W))
    return SweepResult(W, codes, mask), grid
