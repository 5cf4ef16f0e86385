"""Which weights of a stack are pruned, each linear on its own exact count."""

from dataclasses import replace

import torch
from torch import Tensor

from srcr.numerics import masks
from srcr.numerics.cholesky import CholeskyFactor
from srcr.numerics.grid import Grid
from srcr.numerics.obs import MaskSelection
from srcr.numerics.sparsity import count_pruned
from srcr.numerics.tensors import row_chunks
from srcr.plans.specs import SolverSpec
from srcr.solver.problem import RowStack


def sweep_selection(
    stack: RowStack, factor: CholeskyFactor, grid: Grid | None, spec: SolverSpec
) -> MaskSelection | None:
    """How the sweep chooses its mask: block by block, or group by group for N:M. Pruners that do not
    compensate choose once, from the dense weights."""
    if stack.pruner is None:
        return None
    diagonal, pivots = factor.diagonal[factor.order], factor.upper.diagonal()
    block = stack.block_columns(spec)
    if not stack.pruner.compensates:
        chosen = choose_mask(stack, stack.W[:, factor.order], diagonal, pivots)
        return MaskSelection(lambda _, columns: chosen[:, columns], block)

    def select(W: Tensor, columns: slice) -> Tensor:
        W, rounded = W.contiguous(), None
        if grid is not None:
            qparams = grid.columns(factor.order[columns])
            rounded = qparams.dequantize(qparams.quantize(W))
        return choose_mask(stack, W, diagonal[columns], pivots[columns], rounded, columns.start)

    return MaskSelection(select, stack.pattern[1] if stack.pattern else block)


def preview_mask(stack: RowStack, target: Tensor, factor: CholeskyFactor) -> Tensor:
    """The mask [rows, cols] that would be chosen before any weight has moved: what will about survive, to
    fit a grid to."""
    pivots = torch.empty_like(factor.diagonal)
    pivots[factor.order] = factor.upper.diagonal()
    source = target if stack.pruner is not None and stack.pruner.compensates else stack.W
    parts = []
    for rows, size, sparsity in zip(
        torch.split(source, list(stack.sizes)), stack.sizes, stack.sparsities, strict=True
    ):  # a linear at a time: their masks do not depend on each other
        linear = replace(stack, W=rows, sizes=(size,), sparsities=(sparsity,))
        parts.append(choose_mask(linear, rows, factor.diagonal, pivots))
    return torch.cat(parts)


def choose_mask(
    stack: RowStack,
    W: Tensor,
    diagonal: Tensor,
    pivots: Tensor,
    rounded: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """The mask [rows, n] of the columns from ``start`` on with weights ``W`` [rows, n], each linear of the
    stack on its own count.

    The count of a span is what the whole layer owes up to its end, less what it owes up to its start,
    so that spans add up to exactly ``round(sparsity * size)``.
    """
    assert stack.pruner is not None
    scores = torch.empty_like(W)
    for rows in row_chunks(W):
        fixed = None if rounded is None else rounded[rows]
        scores[rows] = stack.pruner.scores(W[rows], diagonal, pivots, fixed)
    if stack.pattern is not None:
        return masks.n_of_m_mask(scores, *stack.pattern)
    stop = start + W.shape[1]
    parts = []
    for part, sparsity in zip(
        torch.split(scores, list(stack.sizes)), stack.sparsities, strict=True
    ):
        height = part.shape[0]
        before, after = (count_pruned(sparsity, height * n) for n in (start, stop))
        prune = masks.prune_rowwise if stack.pruner.scope == "row" else masks.prune_lowest
        parts.append(prune(part, after - before))
    return torch.cat(parts)
