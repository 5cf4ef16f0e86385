"""Prune, then quantize: the paper's sequences (Laborde et al., arXiv 2505.07289, section III).

- ``sequential-a``: quantize *all* weights of the pruned matrix: the grid is fitted to zeros and survivors
  alike, and what the second sweep pushes onto a pruned weight is pushed on.
- ``sequential-b``: quantize the *survivors* only: the grid is fitted to them, and what reaches a pruned
  weight is dropped.

In both, pruned weights end as exactly 0.
"""

from torch import Tensor

from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.obs import MaskSelection, sweep
from srcr.plans.specs import SolverSpec
from srcr.solver.one_pass import round_to_nearest
from srcr.solver.problem import RowStack, Solution
from srcr.solver.selection import sweep_selection


def solve_in_sequence(
    stack: RowStack, target: Tensor, factor: CholeskyFactor, diagonal: Tensor, spec: SolverSpec
) -> Solution:
    """The stack, pruned in a sweep of its own and then quantized. A quantizer that compensates can be
    polished afterwards, towards the pruned weights."""
    block = stack.block_columns(spec)
    pruned = sweep(target, factor, sweep_selection(stack, factor, None, spec), None, block)
    mask = pruned.mask
    assert mask is not None
    assert stack.quantizer is not None
    if not stack.quantizer.compensates:
        weights, grid = round_to_nearest(stack, pruned.weight, diagonal, mask)
        return Solution(weights, grid, target)
    survivors = spec.mode == "sequential-b"
    grid = stack.fit_grid(pruned.weight, diagonal, mask if survivors else None)
    assert grid is not None
    ordered = mask[:, factor.order]
    frozen = MaskSelection(lambda _, columns: ordered[:, columns], block, propagate=not survivors)
    weights = sweep(pruned.weight, factor, frozen, grid, block)
    return Solution(weights, grid, target, pruned.weight)
