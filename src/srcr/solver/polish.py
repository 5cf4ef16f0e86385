"""After the sweep: scales fitted to the codes, then codes to the scales."""

from dataclasses import replace

import torch
from torch import Tensor

from srcr.numerics.descent import descend
from srcr.numerics.hessian import DampedHessian
from srcr.numerics.products import product
from srcr.numerics.scales import refit_scales
from srcr.numerics.tensors import row_chunks
from srcr.plans.specs import SolverSpec
from srcr.solver.problem import RowStack, Solution


def polish_(
    stack: RowStack, solution: Solution, damped: DampedHessian, spec: SolverSpec
) -> tuple[Solution, Tensor | None]:
    """The solution after ``spec.descent_rounds`` of refitted scales and coordinate descent, in the memory of
    its own weights; and the output energy [rows] of its refined target, ``diag(T H T^T)``, where that was
    needed on the way.

    Rows do not depend on each other: a chunk at a time.
    """
    target = solution.refined_target
    if spec.descent_rounds == 0 or target is None:
        return solution, None
    weights, grid = solution.weights, solution.grid
    scales = None if grid is None else grid.scale.clone()
    energy = torch.empty(len(target), device=target.device)
    for rows in row_chunks(target):
        part, wanted = weights.rows(rows), target[rows]
        reach = product(wanted, damped.matrix)
        energy[rows] = (reach * wanted).sum(dim=1)
        reach.add_(wanted, alpha=damped.damp)
        fitted = None if grid is None else grid.rows(rows)
        for _ in range(spec.descent_rounds):
            if fitted is not None and part.codes is not None:
                fitted = refit_scales(fitted, part.codes, wanted, damped, reach)
            part = descend(part, wanted, damped, fitted, stack.block_columns(spec))
        weights.weight[rows] = part.weight
        if weights.codes is not None and part.codes is not None:
            weights.codes[rows] = part.codes
        if scales is not None and fitted is not None:
            scales[rows] = fitted.scale
    if grid is not None and scales is not None:
        solution = replace(solution, grid=replace(grid, scale=scales))
    return solution, energy
