"""After the sweep: scales fitted to the codes, then codes to the scales."""

from dataclasses import replace

import torch
from torch import Tensor

from srcr.numerics.descent import Descent, refine
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.tensors import row_chunks
from srcr.plans.specs import SolverSpec
from srcr.solver.problem import RowStack, Solution


def polish_(
    stack: RowStack, solution: Solution, damped: DampedHessian, spec: SolverSpec
) -> tuple[Solution, Tensor | None]:
    """The solution after ``spec.descent_rounds`` of refitted scales and coordinate descent, in the memory of
    its own weights; and the squared output error [rows] to its refined target, where that was needed on the
    way.

    Rows do not depend on each other: a chunk at a time.
    """
    target = solution.refined_target
    if spec.descent_rounds == 0 or target is None:
        return solution, None
    weights, grid = solution.weights, solution.grid
    # The paper's sequences choose a mask once and for all.
    swaps = stack.swaps if spec.mode == "joint" else 0
    scales = None if grid is None else grid.scale.clone()
    error = torch.empty(len(target), device=target.device)
    for rows in row_chunks(target):
        fitted = None if grid is None else grid.rows(rows)
        refined = refine(
            weights.rows(rows),
            target[rows],
            damped,
            fitted,
            Descent(spec.descent_rounds, stack.block_columns(spec), swaps),
        )
        part = refined.weights
        weights.weight[rows] = part.weight
        if weights.codes is not None and part.codes is not None:
            weights.codes[rows] = part.codes
        if weights.mask is not None and part.mask is not None:
            weights.mask[rows] = part.mask
        if scales is not None and refined.grid is not None:
            scales[rows] = refined.grid.scale
        delta = target[rows] - part.weight
        error[rows] = refined.pull.sub_(delta, alpha=damped.damp).mul_(delta).sum(dim=1)
    if grid is not None and scales is not None:
        solution = replace(solution, grid=replace(grid, scale=scales))
    return solution, error
